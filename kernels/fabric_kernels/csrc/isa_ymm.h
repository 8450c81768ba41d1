// What AVX2 does for 8 lanes of int32, with or without VNNI: all but the dot products.
// Included inside a target("avx2,fma,f16c") region.
#pragma once

#include "isa_x86.h"

struct Ymm : X86 {
  using Vec = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;

  static Vec Zero() { return _mm256_setzero_si256(); }
  static Vec Load(const void* p) { return _mm256_loadu_si256(static_cast<const Vec*>(p)); }
  static void Store(void* p, Vec v) { _mm256_storeu_si256(static_cast<Vec*>(p), v); }
  static Vec Splat8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static Vec Splat32(int v) { return _mm256_set1_epi32(v); }
  static Vec And(Vec a, Vec b) { return _mm256_and_si256(a, b); }
  static Vec Add8(Vec a, Vec b) { return _mm256_add_epi8(a, b); }
  static Vec SubtractSaturated8(Vec a, Vec b) { return _mm256_subs_epu8(a, b); }
  static Vec Add32(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static Vec Sub32(Vec a, Vec b) { return _mm256_sub_epi32(a, b); }
  static Vec Average8(Vec a, Vec b) { return _mm256_avg_epu8(a, b); }
  template <int kBits>
  static Vec ShiftRight16(Vec a) { return _mm256_srli_epi16(a, kBits); }
  template <int kBits>
  static Vec ShiftLeft32(Vec a) { return _mm256_slli_epi32(a, kBits); }
  template <int kBits>
  static Vec ShiftRightArithmetic32(Vec a) { return _mm256_srai_epi32(a, kBits); }

  // Dword i of the result's vector j = dword j of the argument's vector i.
  static void Transpose(Vec (&v)[8]) {
    Vec t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec low = v[i], high = v[i + 4];
      v[i] = _mm256_permute2x128_si256(low, high, 0x20);
      v[i + 4] = _mm256_permute2x128_si256(low, high, 0x31);
    }
  }

  // fields[4b+j] = (dwords[b] >> 2j) & 0x03030303, for 16 dwords.
  static void SpreadFields(const uint32_t* dwords, uint32_t* fields) {
    const Vec index = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const Vec shifts = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    for (int pair = 0; pair < 8; ++pair) {
      const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(dwords + 2 * pair));
      const Vec v = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(two), index);
      Store(fields + 8 * pair, And(_mm256_srlv_epi32(v, shifts), Splat32(0x03030303)));
    }
  }

  // to[i] = the sum of v[i].
  static void SumFour(const Vec (&v)[4], int32_t* to) {
    const Vec ab = _mm256_hadd_epi32(v[0], v[1]), cd = _mm256_hadd_epi32(v[2], v[3]);
    const Vec sums = _mm256_hadd_epi32(ab, cd);
    const __m128i low = _mm256_castsi256_si128(sums), high = _mm256_extracti128_si256(sums, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(low, high));
  }

  static int32_t Sum(Vec v) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    four = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 1)));
  }

  // round-half-even(x * scale) of kLanes floats.
  static Vec RoundScaled(const float* x, float scale) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale)));
  }
  static void StoreBytes(int8_t* p, Vec v) {
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  // Largest of the absolute values as bits, so that infinities and NaN come out on top.
  static Vec MaxAbsBits(Vec top, const float* x) {
    return _mm256_max_epi32(top, And(Load(x), Splat32(0x7fffffff)));
  }
  static int32_t MaxLane(Vec v) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    four = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 1)));
  }
  // out = float(v) * factor
  static void StoreScaled(float* out, Vec v, float factor) {
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(v), _mm256_set1_ps(factor)));
  }
  // out = (float(high) * 256 + float(low)) * factor
  static void StoreScaledPair(float* out, Vec high, Vec low, float factor) {
    const __m256 f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(256.0f),
                                     _mm256_cvtepi32_ps(low));
    _mm256_storeu_ps(out, _mm256_mul_ps(f, _mm256_set1_ps(factor)));
  }

  using Floats = __m256;
  static Floats LoadFloats(const float* p) { return _mm256_loadu_ps(p); }
  // The first `count` of them, then zeros.
  static Floats LoadFirstFloats(const float* p, int64_t count) {
    alignas(32) float part[kLanes] = {};
    std::memcpy(part, p, size_t(count) * sizeof(float));
    return LoadFloats(part);
  }
  static void StoreFloats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Floats SplatFloat(float v) { return _mm256_set1_ps(v); }
  static Floats MultiplyAdd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats AddFloats(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats SubFloats(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats MulFloats(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats DivFloats(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats MaxFloats(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Floats MinFloats(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static float MaxLaneFloat(Floats v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }
  // Round to the nearest whole number, and back.
  static Vec RoundToInt(Floats v) { return _mm256_cvtps_epi32(v); }
  static Floats IntToFloats(Vec v) { return _mm256_cvtepi32_ps(v); }
  static Floats FromBits(Vec v) { return _mm256_castsi256_ps(v); }
  static float SumFloats(Floats v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  // Lane i = the sum of v[i]: of lanes j and j + 4, of these sums j and j + 2, of those all.
  static Floats SumEach(const Floats (&v)[8]) {
    Floats half[4];
    for (int i = 0; i < 4; ++i) {
      half[i] = _mm256_add_ps(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20),
                              _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
    }
    const Floats a = AddPairs(half[0], half[1]), b = AddPairs(half[2], half[3]);
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
  }
  // In each 128 bits: both halves of a added up, beside those of b.
  static Floats AddPairs(Floats a, Floats b) {
    const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  static constexpr int kFloatTileRows = 6;
  static Floats LoadBFloat16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Floats LoadFloat16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Floats LoadInt8(const int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
};
