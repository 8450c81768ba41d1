// Plain C++ on four lanes: the reference for the others, and what runs where none of them does.
#pragma once

struct Isa {
  struct Vec {
    uint8_t b[16];
  };
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;
  static constexpr int kTileRows = 4;
  static constexpr int kFlushSteps = 1 << 30;
  static constexpr bool kWideDot = true;

  template <class T, class F>
  static Vec Map(Vec a, Vec b, const F& f) {
    constexpr int n = 16 / sizeof(T);
    T x[n], y[n];
    std::memcpy(x, a.b, 16);
    std::memcpy(y, b.b, 16);
    for (int i = 0; i < n; ++i) x[i] = static_cast<T>(f(x[i], y[i]));
    std::memcpy(a.b, x, 16);
    return a;
  }

  static Vec Zero() { return Vec{}; }
  static Vec Load(const void* p) {
    Vec v;
    std::memcpy(v.b, p, 16);
    return v;
  }
  static void Store(void* p, Vec v) { std::memcpy(p, v.b, 16); }
  static Vec Splat8(int v) {
    Vec r;
    std::memset(r.b, v, 16);
    return r;
  }
  static Vec Splat32(int v) {
    const int32_t four[4] = {v, v, v, v};
    return Load(four);
  }
  static Vec And(Vec a, Vec b) {
    return Map<uint8_t>(a, b, [](unsigned x, unsigned y) { return x & y; });
  }
  static Vec Add8(Vec a, Vec b) {
    return Map<uint8_t>(a, b, [](unsigned x, unsigned y) { return x + y; });
  }
  static Vec Average8(Vec a, Vec b) {
    return Map<uint8_t>(a, b, [](unsigned x, unsigned y) { return (x + y + 1) >> 1; });
  }
  static Vec SubtractSaturated8(Vec a, Vec b) {
    return Map<uint8_t>(a, b, [](unsigned x, unsigned y) { return x > y ? x - y : 0; });
  }
  static Vec Add32(Vec a, Vec b) {
    return Map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
  }
  static Vec Sub32(Vec a, Vec b) {
    return Map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
  }
  template <int kBits>
  static Vec ShiftRight16(Vec a) {
    return Map<uint16_t>(a, a, [](unsigned x, unsigned) { return x >> kBits; });
  }
  template <int kBits>
  static Vec ShiftLeft32(Vec a) {
    return Map<uint32_t>(a, a, [](uint32_t x, uint32_t) { return x << kBits; });
  }
  template <int kBits>
  static Vec ShiftRightArithmetic32(Vec a) {
    return Map<int32_t>(a, a, [](int32_t x, int32_t) { return x >> kBits; });
  }

  // Not inlined: hundreds of copies of this loop would take most of the library's compilation.
  __attribute__((noinline)) static void Dot(Vec& acc, Vec w, Vec a) {
    int8_t digits[16];
    uint32_t lanes[4];
    std::memcpy(digits, a.b, 16);
    std::memcpy(lanes, acc.b, 16);
    for (int i = 0; i < 16; ++i) lanes[i / 4] += uint32_t(int32_t(w.b[i]) * digits[i]);
    std::memcpy(acc.b, lanes, 16);
  }
  static void DotSplat(Vec& acc, Vec w, const int32_t* a) { Dot(acc, w, Splat32(*a)); }
  static Vec Widen(Vec acc) { return acc; }

  static void Transpose(Vec (&v)[4]) {
    Vec t[4];
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) std::memcpy(t[j].b + 4 * i, v[i].b + 4 * j, 4);
    }
    for (int i = 0; i < 4; ++i) v[i] = t[i];
  }
  static void Deinterleave4(const int8_t* row, int32_t* four) {
    int8_t out[16];
    for (int i = 0; i < 16; ++i) out[4 * (i % 4) + i / 4] = row[i];
    std::memcpy(four, out, 16);
  }
  static void TransposeBytes(const uint8_t* row0, const uint8_t* row1, const uint8_t* row2,
                             const uint8_t* row3, uint32_t* out) {
    for (int b = 0; b < 16; ++b) {
      const uint8_t four[4] = {row0[b], row1[b], row2[b], row3[b]};
      std::memcpy(out + b, four, 4);
    }
  }
  static void SpreadFields(const uint32_t* dwords, uint32_t* fields) {
    for (int i = 0; i < 64; ++i) fields[i] = (dwords[i / 4] >> (2 * (i % 4))) & 0x03030303u;
  }

  // to[i] = the sum of v[i].
  static void SumFour(const Vec (&v)[4], int32_t* to) {
    for (int i = 0; i < 4; ++i) to[i] = Sum(v[i]);
  }
  static int32_t Sum(Vec v) {
    uint32_t lanes[4];
    std::memcpy(lanes, v.b, 16);
    return int32_t(lanes[0] + lanes[1] + lanes[2] + lanes[3]);
  }
  static Vec RoundScaled(const float* x, float scale) {
    int32_t q[4];
    for (int i = 0; i < 4; ++i) q[i] = int32_t(std::nearbyint(x[i] * scale));
    return Load(q);
  }
  static void StoreBytes(int8_t* p, Vec v) {
    int32_t q[4];
    std::memcpy(q, v.b, 16);
    for (int i = 0; i < 4; ++i) p[i] = int8_t(q[i]);
  }
  static Vec MaxAbsBits(Vec top, const float* x) {
    return Map<int32_t>(top, And(Load(x), Splat32(0x7fffffff)),
                        [](int32_t a, int32_t b) { return a > b ? a : b; });
  }
  static int32_t MaxLane(Vec v) {
    int32_t q[4];
    std::memcpy(q, v.b, 16);
    return std::max(std::max(q[0], q[1]), std::max(q[2], q[3]));
  }
  static void StoreScaled(float* out, Vec v, float factor) {
    int32_t q[4];
    std::memcpy(q, v.b, 16);
    for (int i = 0; i < 4; ++i) out[i] = float(q[i]) * factor;
  }
  static void StoreScaledPair(float* out, Vec high, Vec low, float factor) {
    int32_t q[4], r[4];
    std::memcpy(q, high.b, 16);
    std::memcpy(r, low.b, 16);
    for (int i = 0; i < 4; ++i) out[i] = (float(q[i]) * 256.0f + float(r[i])) * factor;
  }

  struct Floats {
    float f[4];
  };
  static Floats LoadFloats(const float* p) { return Floats{{p[0], p[1], p[2], p[3]}}; }
  // The first `count` of them, then zeros.
  static Floats LoadFirstFloats(const float* p, int64_t count) {
    Floats v = {};
    std::memcpy(v.f, p, size_t(count) * sizeof(float));
    return v;
  }
  static void StoreFloats(float* p, Floats v) { std::memcpy(p, v.f, 16); }
  static Floats SplatFloat(float v) { return Floats{{v, v, v, v}}; }
  static Floats MultiplyAdd(Floats a, Floats b, Floats c) {
    for (int i = 0; i < 4; ++i) c.f[i] += a.f[i] * b.f[i];
    return c;
  }
  static Floats AddFloats(Floats a, Floats b) { return MultiplyAdd(a, SplatFloat(1), b); }
  template <class F>
  static Floats MapFloats(Floats a, Floats b, const F& f) {
    for (int i = 0; i < 4; ++i) a.f[i] = f(a.f[i], b.f[i]);
    return a;
  }
  static Floats SubFloats(Floats a, Floats b) {
    return MapFloats(a, b, [](float x, float y) { return x - y; });
  }
  static Floats MulFloats(Floats a, Floats b) {
    return MapFloats(a, b, [](float x, float y) { return x * y; });
  }
  static Floats DivFloats(Floats a, Floats b) {
    return MapFloats(a, b, [](float x, float y) { return x / y; });
  }
  static Floats MaxFloats(Floats a, Floats b) {
    return MapFloats(a, b, [](float x, float y) { return x > y ? x : y; });
  }
  static Floats MinFloats(Floats a, Floats b) {
    return MapFloats(a, b, [](float x, float y) { return x < y ? x : y; });
  }
  static float MaxLaneFloat(Floats v) {
    return std::max(std::max(v.f[0], v.f[1]), std::max(v.f[2], v.f[3]));
  }
  // Round to the nearest whole number, and back.
  static Vec RoundToInt(Floats v) {
    int32_t q[4];
    for (int i = 0; i < 4; ++i) q[i] = int32_t(std::nearbyint(v.f[i]));
    return Load(q);
  }
  static Floats IntToFloats(Vec v) {
    int32_t q[4];
    std::memcpy(q, v.b, 16);
    return Floats{{float(q[0]), float(q[1]), float(q[2]), float(q[3])}};
  }
  static Floats FromBits(Vec v) {
    Floats f;
    std::memcpy(f.f, v.b, 16);
    return f;
  }
  static float SumFloats(Floats v) { return (v.f[0] + v.f[1]) + (v.f[2] + v.f[3]); }
  // Lane i = the sum of v[i]: of lanes j and j + 2, then of both sums.
  static Floats SumEach(const Floats (&v)[4]) {
    Floats sums;
    for (int i = 0; i < 4; ++i) sums.f[i] = (v[i].f[0] + v[i].f[2]) + (v[i].f[1] + v[i].f[3]);
    return sums;
  }
  static constexpr int kFloatTileRows = 4;
  static Floats LoadBFloat16(const uint16_t* p) {
    uint32_t bits[4];
    for (int i = 0; i < 4; ++i) bits[i] = uint32_t(p[i]) << 16;
    Floats v;
    std::memcpy(v.f, bits, 16);
    return v;
  }
  static Floats LoadInt8(const int8_t* p) {
    return Floats{{float(p[0]), float(p[1]), float(p[2]), float(p[3])}};
  }
  static Floats LoadFloat16(const uint16_t* p) {
    Floats v;
    for (int i = 0; i < 4; ++i) {
      const int exponent = (p[i] >> 10) & 31, fraction = p[i] & 1023;
      float x = exponent == 31  ? (fraction ? std::nanf("") : std::numeric_limits<float>::infinity())
                : exponent == 0 ? std::ldexp(float(fraction), -24)
                                : std::ldexp(float(1024 + fraction), exponent - 25);
      v.f[i] = p[i] & 0x8000 ? -x : x;
    }
    return v;
  }
};
