// The arithmetic of attention: tiles of float products, and the exponential.
// Included once for each instruction set, after its Isa, inside namespace attention.
#pragma once

// Query rows of a block. Blocks of scores are transposed, [keys, kQueries]: a vector holds one key
// and many queries, so that no sum or maximum of a softmax crosses lanes.
constexpr int kQueries = 32;
constexpr int kRows = Isa::kTileRows >= 8 ? 8 : 4;  // by 2 vectors: what the registers hold
constexpr int kGranule = 8;                         // keys that are masked or skipped together
static_assert(kQueries % kPanel == 0 && kQueries % kRows == 0 && kGranule % kRows == 0);

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
// Unsigned: sums of bits wrap in lanes whose result is not used.
typedef uint32_t BitLanes __attribute__((vector_size(4 * kLanes)));
constexpr int kVectors = kQueries / kLanes;

inline Lanes Load(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void Store(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }
inline Lanes Splat(float x) { return x - Lanes{}; }
inline Lanes MultiplyAdd(Lanes a, Lanes b, Lanes c) {
  Isa::Floats x, y, z;
  std::memcpy(&x, &a, sizeof a);
  std::memcpy(&y, &b, sizeof b);
  std::memcpy(&z, &c, sizeof c);
  z = Isa::MultiplyAdd(x, y, z);
  std::memcpy(&c, &z, sizeof c);
  return c;
}

// e^x for x <= 0, to about an ulp; 0 below -87, where results would be subnormal.
inline Lanes Exp(Lanes x) {
  // Added to a float of magnitude below 2^22 it leaves the nearest integer in the lowest bits.
  const Lanes magic = Splat(12582912.0f);
  const Lanes shifted = MultiplyAdd(x, Splat(1.44269504f), magic);
  const Lanes n = shifted - magic;
  // ln 2 in two parts: the products of n with the first are exact.
  const Lanes r = MultiplyAdd(n, Splat(2.12194440e-4f), MultiplyAdd(n, Splat(-0.693359375f), x));
  // Cephes' expf.
  Lanes p = MultiplyAdd(r, Splat(1.9875691500e-4f), Splat(1.3981999507e-3f));
  p = MultiplyAdd(p, r, Splat(8.3334519073e-3f));
  p = MultiplyAdd(p, r, Splat(4.1665795894e-2f));
  p = MultiplyAdd(p, r, Splat(1.6666665459e-1f));
  p = MultiplyAdd(p, r, Splat(5.0000001201e-1f));
  p = MultiplyAdd(p * r, r, r) + Splat(1.0f);
  const BitLanes scaled = (BitLanes)p + ((BitLanes)shifted << 23);
  return (Lanes)(scaled & ~(BitLanes)(x < Splat(-87.0f)));
}

// A tile of kRows rows and kPanel columns: c[r][j] = sum over steps of a[r][step] b[step][j], added
// to what is there if `add`. a[r][step] lies at r * a_row + step * a_step. Forced inline, so that
// strides which a caller knows are constants here.
__attribute__((always_inline)) inline void Tile(int64_t steps, const float* a, int64_t a_row,
                                                int64_t a_step, const float* b, int64_t b_step,
                                                float* c, int64_t c_row, bool add) {
  Isa::Floats acc[kRows][2];
  const float* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    row[r] = a + r * a_row;
    acc[r][0] = add ? Isa::LoadFloats(c + r * c_row) : Isa::SplatFloat(0);
    acc[r][1] = add ? Isa::LoadFloats(c + r * c_row + kLanes) : Isa::SplatFloat(0);
  }
  for (int64_t s = 0; s < steps; ++s) {
    const Isa::Floats b0 = Isa::LoadFloats(b), b1 = Isa::LoadFloats(b + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Isa::Floats v = Isa::SplatFloat(row[r][s * a_step]);
      acc[r][0] = Isa::MultiplyAdd(v, b0, acc[r][0]);
      acc[r][1] = Isa::MultiplyAdd(v, b1, acc[r][1]);
    }
    b += b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    Isa::StoreFloats(c + r * c_row, acc[r][0]);
    Isa::StoreFloats(c + r * c_row + kLanes, acc[r][1]);
  }
}

// scores[keys][kQueries] = rows[keys][stride] . turned[width][kQueries]
void KeysByQueries(int64_t keys, int64_t width, const float* rows, int64_t stride,
                   const float* turned, float* scores) {
  for (int64_t s = 0; s < keys; s += kRows) {
    for (int j = 0; j < kQueries; j += kPanel) {
      Tile(width, rows + s * stride, stride, 1, turned + j, kQueries, scores + s * kQueries + j,
           kQueries, false);
    }
  }
}

// out[kQueries][stride] = weights[keys][kQueries]^T . rows[keys][stride]
void QueriesByWidth(int64_t keys, const float* weights, const float* rows, int64_t stride,
                    float* out) {
  for (int64_t j = 0; j < stride; j += kPanel) {
    for (int r = 0; r < kQueries; r += kRows) {
      Tile(keys, weights + r, 1, kQueries, rows + j, stride, out + r * stride + j, stride, false);
    }
  }
}

// sums[keys][stride] += weights[keys][kQueries] . rows[kQueries][stride]
void AddKeysByWidth(int64_t keys, const float* weights, const float* rows, int64_t stride,
                    float* sums) {
  for (int64_t s = 0; s < keys; s += kRows) {
    for (int64_t j = 0; j < stride; j += kPanel) {
      Tile(kQueries, weights + s * kQueries, kQueries, 1, rows + j, stride, sums + s * stride + j,
           stride, true);
    }
  }
}

// turned[stride][kQueries] = rows[kQueries][stride]^T
void Turn(const float* rows, int64_t stride, float* turned) {
  for (int64_t d = 0; d < stride; d += kLanes) {
    for (int r = 0; r < kQueries; r += kLanes) {
      Vec v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = Isa::Load(rows + (r + i) * stride + d);
      Isa::Transpose(v);
      for (int i = 0; i < kLanes; ++i) Isa::Store(turned + (d + i) * kQueries + r, v[i]);
    }
  }
}
