// AVX-VNNI: 8 lanes of int32, one instruction for four u8 x s8 products a lane.
// Included inside a target("avx2,fma,avxvnni") region.
#pragma once

#include "isa_ymm.h"

// The instruction, which AVX512VL encodes differently.
#ifndef FABRIC_VPDPBUSD
#define FABRIC_VPDPBUSD "%{vex%} vpdpbusd"
#endif

struct Isa : Ymm {
  static constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 weights, 1 activation: 15 of 16
  static constexpr int kFlushSteps = 1 << 30;  // dots accumulate in int32: never widened
  static constexpr bool kWideDot = true;       // u8 operands up to 255 don't saturate

  // acc[lane] += sum over 4 bytes of w (u8) times a (s8). Assembly, as for AVX-512.
  static void Dot(Vec& acc, Vec w, Vec a) {
    asm(FABRIC_VPDPBUSD " %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
  }
  // The same with one dword of `a` for all lanes.
  static void DotSplat(Vec& acc, Vec w, const int32_t* a) { Dot(acc, w, Splat32(*a)); }
  static Vec Widen(Vec acc) { return acc; }
};
