// AVX-512 with VNNI: 16 lanes of int32, one instruction for four u8 x s8 products a lane.
// Included inside a target("avx512...") region.
#pragma once

#include "isa_x86.h"

struct Isa : X86 {
  using Vec = __m512i;
  static constexpr int kLanes = 16;       // int32 a vector
  static constexpr int kRegisters = 32;
  static constexpr int kTileRows = 12;    // 12 x 2 accumulators, 2 weights: 26 of 32 registers
  static constexpr int kFlushSteps = 1 << 30;  // dots accumulate in int32: never widened
  static constexpr bool kWideDot = true;  // u8 operands up to 255 don't saturate

  static Vec Zero() { return _mm512_setzero_si512(); }
  static Vec Load(const void* p) { return _mm512_loadu_si512(p); }
  static void Store(void* p, Vec v) { _mm512_storeu_si512(p, v); }
  static Vec Splat8(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static Vec And(Vec a, Vec b) { return _mm512_and_si512(a, b); }
  static Vec Add8(Vec a, Vec b) { return _mm512_add_epi8(a, b); }
  static Vec SubtractSaturated8(Vec a, Vec b) { return _mm512_subs_epu8(a, b); }
  static Vec Add32(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static Vec Sub32(Vec a, Vec b) { return _mm512_sub_epi32(a, b); }
  static Vec Average8(Vec a, Vec b) { return _mm512_avg_epu8(a, b); }
  template <int kBits>
  static Vec ShiftRight16(Vec a) { return _mm512_srli_epi16(a, kBits); }
  template <int kBits>
  static Vec ShiftLeft32(Vec a) { return _mm512_slli_epi32(a, kBits); }
  template <int kBits>
  static Vec ShiftRightArithmetic32(Vec a) { return _mm512_srai_epi32(a, kBits); }

  // acc[lane] += sum over 4 bytes of w (u8) times a (s8). Assembly, because GCC 12 moves the
  // accumulators of the intrinsic through copies.
  static void Dot(Vec& acc, Vec w, Vec a) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a)); }
  // The same with one dword of `a` for all lanes.
  static void DotSplat(Vec& acc, Vec w, const int32_t* a) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*a));
  }
  static Vec Widen(Vec acc) { return acc; }

  // Dword i of the result's vector j = dword j of the argument's vector i.
  static void Transpose(Vec (&v)[16]) {
    Vec t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
      v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

  // fields[4b+j] = (dwords[b] >> 2j) & 0x03030303, for 16 dwords.
  static void SpreadFields(const uint32_t* dwords, uint32_t* fields) {
    const Vec index = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const Vec shifts = _mm512_set_epi32(6, 4, 2, 0, 6, 4, 2, 0, 6, 4, 2, 0, 6, 4, 2, 0);
    for (int quarter = 0; quarter < 4; ++quarter) {
      const __m128i four = _mm_load_si128(reinterpret_cast<const __m128i*>(dwords) + quarter);
      const Vec v = _mm512_permutexvar_epi32(index, _mm512_castsi128_si512(four));
      Store(fields + 16 * quarter, And(_mm512_srlv_epi32(v, shifts), Splat32(0x03030303)));
    }
  }

  // to[i] = the sum of v[i].
  static void SumFour(const Vec (&v)[4], int32_t* to) {
    const auto add = [](Vec a, Vec b) {  // of two: pairs of lanes, side by side
      return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const Vec ab = add(v[0], v[1]), cd = add(v[2], v[3]);
    const Vec sums =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    const __m128i low = _mm256_castsi256_si128(half), high = _mm256_extracti128_si256(half, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(low, high));
  }

  static int32_t Sum(Vec v) { return _mm512_reduce_add_epi32(v); }

  // round-half-even(x * scale) of kLanes floats.
  static Vec RoundScaled(const float* x, float scale) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(scale)));
  }
  static void StoreBytes(int8_t* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  // Largest of the absolute values as bits, so that infinities and NaN come out on top.
  static Vec MaxAbsBits(Vec top, const float* x) {
    return _mm512_max_epi32(top, _mm512_and_si512(Load(x), _mm512_set1_epi32(0x7fffffff)));
  }
  static int32_t MaxLane(Vec v) { return _mm512_reduce_max_epi32(v); }
  static Vec Splat32(int v) { return _mm512_set1_epi32(v); }
  // out = float(v) * factor
  static void StoreScaled(float* out, Vec v, float factor) {
    _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(factor)));
  }
  // out = (float(high) * 256 + float(low)) * factor
  static void StoreScaledPair(float* out, Vec high, Vec low, float factor) {
    const __m512 f = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f),
                                     _mm512_cvtepi32_ps(low));
    _mm512_storeu_ps(out, _mm512_mul_ps(f, _mm512_set1_ps(factor)));
  }

  using Floats = __m512;
  static Floats LoadFloats(const float* p) { return _mm512_loadu_ps(p); }
  // The first `count` of them, then zeros.
  static Floats LoadFirstFloats(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  }
  static void StoreFloats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats SplatFloat(float v) { return _mm512_set1_ps(v); }
  static Floats MultiplyAdd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats AddFloats(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats SubFloats(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats MulFloats(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats DivFloats(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats MaxFloats(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats MinFloats(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static float MaxLaneFloat(Floats v) { return _mm512_reduce_max_ps(v); }
  // Round to the nearest whole number, and back.
  static Vec RoundToInt(Floats v) { return _mm512_cvtps_epi32(v); }
  static Floats IntToFloats(Vec v) { return _mm512_cvtepi32_ps(v); }
  static Floats FromBits(Vec v) { return _mm512_castsi512_ps(v); }
  static float SumFloats(Floats v) { return _mm512_reduce_add_ps(v); }
  // Lane i = the sum of v[i]: of lanes j and j + 8, of these sums j and j + 4, and so on.
  static Floats SumEach(const Floats (&v)[16]) {
    Floats quarter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Floats a = AddHalves(v[i], v[i + 4]), b = AddHalves(v[i + 8], v[i + 12]);
      quarter[i] =
          _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    const Floats a = AddPairs(quarter[0], quarter[1]), b = AddPairs(quarter[2], quarter[3]);
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  }
  // Both halves of a added up, beside those of b.
  static Floats AddHalves(Floats a, Floats b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  // In each 128 bits: both halves of a added up, beside those of b.
  static Floats AddPairs(Floats a, Floats b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  static constexpr int kFloatTileRows = 12;
  static Floats LoadBFloat16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Floats LoadFloat16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Floats LoadInt8(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
};
