// ARM's dot-product extension: 4 lanes of int32, one instruction for four s8 x s8 products a lane.
// Included inside a region for armv8.2-a+dotprod.
#pragma once

struct Isa {
  using Vec = int32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 32;
  static constexpr int kTileRows = 12;    // 12 x 2 accumulators, 2 weights, 1 activation: 27 of 32
  static constexpr int kFlushSteps = 1 << 30;  // dots accumulate in int32: never widened
  static constexpr bool kWideDot = false;      // weights are s8 operands too: 127 at most

  static uint8x16_t U8(Vec v) { return vreinterpretq_u8_s32(v); }
  static int8x16_t S8(Vec v) { return vreinterpretq_s8_s32(v); }
  static Vec From(uint8x16_t v) { return vreinterpretq_s32_u8(v); }

  static Vec Zero() { return vdupq_n_s32(0); }
  static Vec Load(const void* p) { return From(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static void Store(void* p, Vec v) { vst1q_u8(static_cast<uint8_t*>(p), U8(v)); }
  static Vec Splat8(int v) { return From(vdupq_n_u8(static_cast<uint8_t>(v))); }
  static Vec Splat32(int v) { return vdupq_n_s32(v); }
  static Vec And(Vec a, Vec b) { return vandq_s32(a, b); }
  static Vec Add8(Vec a, Vec b) { return From(vaddq_u8(U8(a), U8(b))); }
  static Vec SubtractSaturated8(Vec a, Vec b) { return From(vqsubq_u8(U8(a), U8(b))); }
  static Vec Add32(Vec a, Vec b) { return vaddq_s32(a, b); }
  static Vec Sub32(Vec a, Vec b) { return vsubq_s32(a, b); }
  static Vec Average8(Vec a, Vec b) { return From(vrhaddq_u8(U8(a), U8(b))); }
  template <int kBits>
  static Vec ShiftRight16(Vec a) {
    return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(a), kBits));
  }
  template <int kBits>
  static Vec ShiftLeft32(Vec a) { return vshlq_n_s32(a, kBits); }
  template <int kBits>
  static Vec ShiftRightArithmetic32(Vec a) { return vshrq_n_s32(a, kBits); }

  // acc[lane] += sum over 4 bytes of w times a. Assembly, because not every compiler's arm_neon.h
  // has the intrinsic inside a region.
  static void Dot(Vec& acc, Vec w, Vec a) {
    asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(a));
  }
  // The same with one dword of `a` for all lanes.
  static void DotSplat(Vec& acc, Vec w, const int32_t* a) {
    float dword;  // in a vector register, which a plain load fills
    std::memcpy(&dword, a, 4);
    asm("sdot %0.4s, %1.16b, %2.4b[0]" : "+w"(acc) : "w"(w), "w"(dword));
  }
  static Vec Widen(Vec acc) { return acc; }

  // Dword i of the result's vector j = dword j of the argument's vector i.
  static void Transpose(Vec (&v)[4]) {
    const int64x2_t low01 = vreinterpretq_s64_s32(vtrn1q_s32(v[0], v[1]));
    const int64x2_t high01 = vreinterpretq_s64_s32(vtrn2q_s32(v[0], v[1]));
    const int64x2_t low23 = vreinterpretq_s64_s32(vtrn1q_s32(v[2], v[3]));
    const int64x2_t high23 = vreinterpretq_s64_s32(vtrn2q_s32(v[2], v[3]));
    v[0] = vreinterpretq_s32_s64(vtrn1q_s64(low01, low23));
    v[1] = vreinterpretq_s32_s64(vtrn1q_s64(high01, high23));
    v[2] = vreinterpretq_s32_s64(vtrn2q_s64(low01, low23));
    v[3] = vreinterpretq_s32_s64(vtrn2q_s64(high01, high23));
  }

  // four[j] = bytes j, j+4, j+8, j+12 of `row`.
  static void Deinterleave4(const int8_t* row, int32_t* four) {
    static constexpr uint8_t kOrder[16] = {0, 4, 8,  12, 1, 5, 9,  13,
                                           2, 6, 10, 14, 3, 7, 11, 15};
    Store(four, From(vqtbl1q_u8(U8(Load(row)), vld1q_u8(kOrder))));
  }
  // out[b] = byte b of rows 0, 1, 2, 3, for 16 bytes.
  static void TransposeBytes(const uint8_t* row0, const uint8_t* row1, const uint8_t* row2,
                             const uint8_t* row3, uint32_t* out) {
    const uint8x16x4_t rows = {{vld1q_u8(row0), vld1q_u8(row1), vld1q_u8(row2), vld1q_u8(row3)}};
    vst4q_u8(reinterpret_cast<uint8_t*>(out), rows);
  }
  // fields[4b+j] = (dwords[b] >> 2j) & 0x03030303, for 16 dwords.
  static void SpreadFields(const uint32_t* dwords, uint32_t* fields) {
    static constexpr int32_t kShifts[4] = {0, -2, -4, -6};
    const int32x4_t shifts = vld1q_s32(kShifts);
    const uint32x4_t mask = vdupq_n_u32(0x03030303);
    for (int b = 0; b < 16; ++b) {
      vst1q_u32(fields + 4 * b, vandq_u32(vshlq_u32(vld1q_dup_u32(dwords + b), shifts), mask));
    }
  }

  // to[i] = the sum of v[i].
  static void SumFour(const Vec (&v)[4], int32_t* to) {
    vst1q_s32(to, vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])));
  }
  static int32_t Sum(Vec v) { return vaddvq_s32(v); }

  // round-half-even(x * scale) of kLanes floats.
  static Vec RoundScaled(const float* x, float scale) {
    return vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x), scale));
  }
  static void StoreBytes(int8_t* p, Vec v) {
    const int16x4_t words = vmovn_s32(v);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    std::memcpy(p, &four, 4);
  }
  // Largest of the absolute values as bits, so that infinities and NaN come out on top.
  static Vec MaxAbsBits(Vec top, const float* x) {
    return vmaxq_s32(top, And(Load(x), Splat32(0x7fffffff)));
  }
  static int32_t MaxLane(Vec v) { return vmaxvq_s32(v); }
  // out = float(v) * factor
  static void StoreScaled(float* out, Vec v, float factor) {
    vst1q_f32(out, vmulq_n_f32(vcvtq_f32_s32(v), factor));
  }
  // out = (float(high) * 256 + float(low)) * factor
  static void StoreScaledPair(float* out, Vec high, Vec low, float factor) {
    const float32x4_t f = vfmaq_n_f32(vcvtq_f32_s32(low), vcvtq_f32_s32(high), 256.0f);
    vst1q_f32(out, vmulq_n_f32(f, factor));
  }

  using Floats = float32x4_t;
  static Floats LoadFloats(const float* p) { return vld1q_f32(p); }
  // The first `count` of them, then zeros.
  static Floats LoadFirstFloats(const float* p, int64_t count) {
    float part[kLanes] = {};
    std::memcpy(part, p, size_t(count) * sizeof(float));
    return LoadFloats(part);
  }
  static void StoreFloats(float* p, Floats v) { vst1q_f32(p, v); }
  static Floats SplatFloat(float v) { return vdupq_n_f32(v); }
  static Floats MultiplyAdd(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats AddFloats(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats SubFloats(Floats a, Floats b) { return vsubq_f32(a, b); }
  static Floats MulFloats(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats DivFloats(Floats a, Floats b) { return vdivq_f32(a, b); }
  static Floats MaxFloats(Floats a, Floats b) { return vmaxq_f32(a, b); }
  static Floats MinFloats(Floats a, Floats b) { return vminq_f32(a, b); }
  static float MaxLaneFloat(Floats v) { return vmaxvq_f32(v); }
  // Round to the nearest whole number, and back.
  static Vec RoundToInt(Floats v) { return vcvtnq_s32_f32(v); }
  static Floats IntToFloats(Vec v) { return vcvtq_f32_s32(v); }
  static Floats FromBits(Vec v) { return vreinterpretq_f32_s32(v); }
  static float SumFloats(Floats v) { return vaddvq_f32(v); }
  // Lane i = the sum of v[i]: of lanes j and j + 2, then of both sums.
  static Floats SumEach(const Floats (&v)[4]) {
    return vpaddq_f32(AddHalves(v[0], v[1]), AddHalves(v[2], v[3]));
  }
  // Both halves of a added up, beside those of b.
  static Floats AddHalves(Floats a, Floats b) {
    return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)),
                     vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
  }
  static constexpr int kFloatTileRows = 10;
  static Floats LoadBFloat16(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
  }
  static Floats LoadFloat16(const uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
  }
  static Floats LoadInt8(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
  }
};
