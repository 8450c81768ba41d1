// Low-rank adapters beside the ternary product: y += (s x A^T) B. Both products ride along with the
// base's: the narrow one while a row of x is in the cache to be quantised, the wide one while a row
// of y is in registers to be stored. A is [R, K], B is [R, N], both by rows.
// Included once for each instruction set, after its Isa.
#pragma once

// out[r] = scale * x . rows[r]
void Narrow(const float* x, int64_t n, const float* rows, int64_t rank, float scale, float* out) {
  constexpr int kRows = 4;
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t r0 = 0; r0 < rank; r0 += kRows) {
    // The last rows are repeated where the rank is no multiple; what is stored twice is equal.
    const float* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = rows + std::min<int64_t>(r0 + i, rank - 1) * n;
    Isa::Floats acc[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) acc[i] = Isa::SplatFloat(0);
    for (int64_t k = 0; k < whole; k += kLanes) {
      const Isa::Floats v = Isa::LoadFloats(x + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        acc[i] = Isa::MultiplyAdd(v, Isa::LoadFloats(row[i] + k), acc[i]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      float sum = Isa::SumFloats(acc[i]);
      for (int64_t k = whole; k < n; ++k) sum += x[k] * row[i][k];
      out[std::min<int64_t>(r0 + i, rank - 1)] = scale * sum;
    }
  }
}

// y[0 .. columns) += narrow[r] * rows[r][at + i], for y of at most kPanel columns.
void AddWide(float* y, int64_t columns, const float* narrow, int64_t rank, const float* rows,
             int64_t width, int64_t at) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    Isa::Floats acc = Isa::LoadFloats(y + i);
    for (int64_t r = 0; r < rank; ++r) {
      acc = Isa::MultiplyAdd(Isa::SplatFloat(narrow[r]), Isa::LoadFloats(rows + r * width + at + i),
                             acc);
    }
    Isa::StoreFloats(y + i, acc);
  }
  for (; i < columns; ++i) {
    for (int64_t r = 0; r < rank; ++r) y[i] += narrow[r] * rows[r * width + at + i];
  }
}

constexpr int kOuterColumns = 4 * kLanes;

// out[r][c] = sum over m of narrow[m][r] * x[m][c], for kOuterColumns columns from `at`.
void OuterUnit(const float* narrow, const float* x, int64_t rows, int64_t rank, int64_t width,
               int64_t at, float* out) {
  if (at + kOuterColumns > width) {
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t c = at; c < width; ++c) {
        float sum = 0;
        for (int64_t m = 0; m < rows; ++m) sum += narrow[m * rank + r] * x[m * width + c];
        out[r * width + c] = sum;
      }
    }
    return;
  }
  constexpr int kRows = 4;
  for (int64_t r0 = 0; r0 < rank; r0 += kRows) {
    int64_t r[kRows];
    for (int i = 0; i < kRows; ++i) r[i] = std::min<int64_t>(r0 + i, rank - 1);
    Isa::Floats acc[kRows][4];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = Isa::SplatFloat(0);
    }
    for (int64_t m = 0; m < rows; ++m) {
      const float* from = x + m * width + at;
      Isa::Floats v[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) v[j] = Isa::LoadFloats(from + j * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Isa::Floats s = Isa::SplatFloat(narrow[m * rank + r[i]]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[i][j] = Isa::MultiplyAdd(s, v[j], acc[i][j]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Isa::StoreFloats(out + r[i] * width + at + j * kLanes, acc[i][j]);
      }
    }
  }
}

int64_t OuterUnits(int64_t width) { return CeilDiv(width, kOuterColumns); }
