// AVX2 without VNNI: four products a lane go through int16 pairs.
// Included inside a target("avx2,fma,f16c") region.
#pragma once

#include "isa_ymm.h"

struct Isa : Ymm {
  static constexpr int kTileRows = 5;  // 10 accumulators, 2 weights, activation, pairs: 14 of 16
  // An int16 grows by at most 2 * 3 * 128 a step (3: the most that two bits hold).
  static constexpr int kFlushSteps = 42;
  static constexpr bool kWideDot = false;  // pairs of products of larger u8 operands saturate

  // acc[pair] += sum over 2 bytes of w (u8) times a (s8), in int16. Assembly, because GCC 12 moves
  // the products of the intrinsics ahead of the sums until no register is left for accumulators.
  static void Dot(Vec& acc, Vec w, Vec a) {
    Vec pairs;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(pairs) : "x"(w), "x"(a));
  }
  // The same with one dword of `a` for all lanes.
  static void DotSplat(Vec& acc, Vec w, const int32_t* a) { Dot(acc, w, Splat32(*a)); }
  // Sums of pairs of int16, as int32.
  static Vec Widen(Vec acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
};
