// The product of one to four rows of digits (decoding): packed bytes go from memory through
// registers once, and nothing is unpacked to memory.
// Included once for each instruction set, after prepare_impl.h and fields_impl.h.
#pragma once

constexpr int kWeightRows = 4;  // rows of weights in flight

// Rows of weights in one piece of work: about 64 KB of them.
inline int64_t FewRowsUnit(const Matrix& matrix) {
  return RoundUp(65536 / std::clamp<int64_t>(matrix.row_bytes, 1, 65536), kWeightRows);
}

// Codes in a row whose products with one row of digits, 256 times as large, fit a lane of int32.
constexpr int64_t kOneRowCodes = int64_t{kLanes} << 15;

// sums[r][i] = digits of row r . fields of weight row i (codes + 1).
using FewRowsSums = int32_t[kFewRows][kWeightRows];
using WeightRows = const uint8_t* [kWeightRows];

// The whole vectors of packed bytes of the rows, then once more the incomplete last one, copied and
// followed by zeros: two passes of the same loop, which so has no case to tell apart. (A loop body
// in a lambda would keep its accumulators in memory.)
struct Passes {
  WeightRows at;
  int64_t count;
  int64_t rest;
  alignas(64) uint8_t tail[kWeightRows][kVecBytes];

  Passes(const WeightRows& rows, int64_t begin, int64_t end) {
    for (int i = 0; i < kWeightRows; ++i) at[i] = rows[i] + begin;
    count = (end - begin) / kVecBytes;
    rest = (end - begin) % kVecBytes;
  }
  // The second pass; false if there is none.
  bool Next() {
    if (rest == 0) return false;
    std::memset(tail, 0, sizeof(tail));
    for (int i = 0; i < kWeightRows; ++i) {
      std::memcpy(tail[i], at[i] + count * kVecBytes, size_t(rest));
      at[i] = tail[i];
    }
    count = 1;
    rest = 0;
    return true;
  }
};

// ternary2, one row of digits. Fields are not shifted down: each plane has its own accumulator,
// which is shifted once at the end (exact, since every product in it is a multiple of 4^j).
void OneRowTernary2(const int32_t* digits, const WeightRows& rows, int64_t row_bytes,
                    int64_t ahead, FewRowsSums& sums) {
  Vec acc[kWeightRows][4];
#pragma GCC unroll 4
  for (auto& row : acc) row[0] = row[1] = row[2] = row[3] = Isa::Zero();
  const Vec mask[4] = {Isa::Splat8(0x03), Isa::Splat8(0x0c), Isa::Splat8(0x30),
                       Isa::Splat8(0xc0)};
  Passes passes(rows, 0, row_bytes);
  do {
    for (int64_t v = 0; v < passes.count; ++v, digits += 4 * kLanes) {
      Vec part[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) part[j] = Isa::Load(digits + j * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kWeightRows; ++i) {
        const uint8_t* at = passes.at[i] + v * kVecBytes;
        __builtin_prefetch(at + ahead, 0, 2);  // into the second level
        const Vec bytes = Isa::Load(at);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) Isa::Dot(acc[i][j], Isa::And(bytes, mask[j]), part[j]);
      }
    }
  } while (passes.Next());
#pragma GCC unroll 4
  for (int i = 0; i < kWeightRows; ++i) {
    Vec total = Isa::Add32(acc[i][0], Isa::template ShiftRightArithmetic32<2>(acc[i][1]));
    total = Isa::Add32(total, Isa::template ShiftRightArithmetic32<4>(acc[i][2]));
    total = Isa::Add32(total, Isa::template ShiftRightArithmetic32<6>(acc[i][3]));
    sums[0][i] = Isa::Sum(total);
  }
}

// ternary1.6, one row of digits. With r_0 the byte and r_{j+1} = 3 r_j mod 256, digit j of the byte
// is (3 r_j - r_{j+1}) / 256, so the dot product needs no digit on its own:
//   256 * sum_j t_j a_j = 3 * sum_j r_j a_j - sum_j r_{j+1} a_j,
// lane by lane, which divides by 256 without a remainder.
void OneRowTernary1_6(const int32_t* digits, const WeightRows& rows, int64_t row_bytes,
                      int64_t ahead, FewRowsSums& sums) {
  Vec current[kWeightRows], next[kWeightRows];
#pragma GCC unroll 4
  for (int i = 0; i < kWeightRows; ++i) current[i] = next[i] = Isa::Zero();
  Passes passes(rows, 0, row_bytes);
  do {
    for (int64_t v = 0; v < passes.count; ++v, digits += 5 * kLanes) {
      Vec part[5];
#pragma GCC unroll 5
      for (int j = 0; j < 5; ++j) part[j] = Isa::Load(digits + j * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kWeightRows; ++i) {
        const uint8_t* at = passes.at[i] + v * kVecBytes;
        __builtin_prefetch(at + ahead, 0, 2);  // into the second level
        Vec r = Isa::Load(at);
#pragma GCC unroll 5
        for (int j = 0; j < 5; ++j) {
          Isa::Dot(current[i], r, part[j]);
          r = Triple(r);
          Isa::Dot(next[i], r, part[j]);
        }
      }
    }
  } while (passes.Next());
#pragma GCC unroll 4
  for (int i = 0; i < kWeightRows; ++i) {
    const Vec three = Isa::Add32(current[i], Isa::Add32(current[i], current[i]));
    sums[0][i] = Isa::Sum(Isa::template ShiftRightArithmetic32<8>(Isa::Sub32(three, next[i])));
  }
}

// One to four rows of digits; what every instruction set and format can do.
template <Format kFormat, int R>
void FewRows(const int32_t* digits, int64_t row_stride, const WeightRows& rows, int64_t row_bytes,
             int64_t ahead, FewRowsSums& sums) {
  constexpr int kPlanes = Planes(kFormat);
  for (auto& row : sums) std::fill(std::begin(row), std::end(row), 0);
  // Bytes after which an accumulator must be widened.
  const int64_t flush =
      std::min<int64_t>(Isa::kFlushSteps / kPlanes, row_bytes) * int64_t{kVecBytes};
  for (int64_t begin = 0; begin < row_bytes; begin += flush) {
    Vec acc[kWeightRows][R];
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[i][r] = Isa::Zero();
    }
    Passes passes(rows, begin, std::min(begin + flush, row_bytes));
    do {
      for (int64_t v = 0; v < passes.count; ++v, digits += kPlanes * kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < kWeightRows; ++i) {
          const uint8_t* at = passes.at[i] + v * kVecBytes;
          __builtin_prefetch(at + ahead, 0, 2);  // into the second level
          Vec bytes = Isa::Load(at);
#pragma GCC unroll 5
          for (int j = 0; j < kPlanes; ++j) {
            const Vec codes = NextField<kFormat>(bytes);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              Isa::Dot(acc[i][r], codes, Isa::Load(digits + r * row_stride + j * kLanes));
            }
          }
        }
      }
    } while (passes.Next());
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][i] += Isa::Sum(Isa::Widen(acc[i][r]));
    }
  }
}

template <Format kFormat>
void FewRows(int64_t count, const int32_t* digits, int64_t row_stride, const WeightRows& rows,
             int64_t row_bytes, int64_t ahead, FewRowsSums& sums) {
  switch (count) {
    case 1:
      return FewRows<kFormat, 1>(digits, row_stride, rows, row_bytes, ahead, sums);
    case 2:
      return FewRows<kFormat, 2>(digits, row_stride, rows, row_bytes, ahead, sums);
    case 3:
      return FewRows<kFormat, 3>(digits, row_stride, rows, row_bytes, ahead, sums);
    default:
      return FewRows<kFormat, 4>(digits, row_stride, rows, row_bytes, ahead, sums);
  }
}

void FewRowsDispatch(const Job& job, const Operand& operand, const WeightRows& rows,
                     int64_t row_bytes, FewRowsSums& sums) {
  // Sixteen rows ahead, into the second-level cache: three times the speed of eight into the first.
  const int64_t ahead = 4 * kWeightRows * row_bytes;
  const int64_t stride = RowChunks(job) * Planes(job.format) * kLanes;
  const int32_t* digits = operand.dwords;
  const bool two_bits = job.format == Format::kTernary2;
  if (operand.rows == 1 && Isa::kWideDot && job.k < kOneRowCodes) {
    return two_bits ? OneRowTernary2(digits, rows, row_bytes, ahead, sums)
                    : OneRowTernary1_6(digits, rows, row_bytes, ahead, sums);
  }
  return two_bits ? FewRows<Format::kTernary2>(operand.rows, digits, stride, rows, row_bytes,
                                               ahead, sums)
                  : FewRows<Format::kTernary1_6>(operand.rows, digits, stride, rows, row_bytes,
                                                 ahead, sums);
}

void StoreFewRows(const Job& job, const Operand& operand, const FewRowsSums& sums, int group,
                  int64_t n, int64_t count, int64_t first, int64_t tokens) {
  const Matrix& matrix = job.matrix[group];
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < count; ++i) {
      int64_t value = 0;
      for (int d = 0; d < job.digits; ++d) {
        const int64_t r = t * job.digits + d;
        value = 256 * value + (sums[r][i] - operand.sums[r]);
      }
      const int64_t at = (first + t) * matrix.rows + n + i;
      if (job.sums != nullptr) {
        job.sums[at] = int32_t(value);
      } else {
        job.out[group][at] = float(value) * (operand.factors[t] * matrix.scale);
      }
    }
    const Adapter& adapter = job.adapter[group];
    if (adapter.rank > 0) {
      AddWide(job.out[group] + (first + t) * matrix.rows + n, count,
              adapter.narrow + (first + t) * adapter.rank, adapter.rank, adapter.b, matrix.rows, n);
    }
  }
}

void RunFewRows(const Job& job, const Operand& operand, int64_t unit, int64_t first,
                int64_t tokens) {
  for (int g = 0; g < job.groups; ++g) {
    const Matrix& matrix = job.matrix[g];
    const int64_t size = FewRowsUnit(matrix), units = CeilDiv(matrix.rows, size);
    if (unit >= units) {
      unit -= units;
      continue;
    }
    const int64_t end = std::min(matrix.rows, (unit + 1) * size);
    for (int64_t n = unit * size; n < end; n += kWeightRows) {
      WeightRows rows;
      for (int i = 0; i < kWeightRows; ++i) {
        rows[i] = matrix.bytes + std::min<int64_t>(n + i, matrix.rows - 1) * matrix.row_bytes;
      }
      FewRowsSums sums;
      FewRowsDispatch(job, operand, rows, matrix.row_bytes, sums);
      StoreFewRows(job, operand, sums, g, n, std::min<int64_t>(kWeightRows, end - n), first,
                   tokens);
    }
    return;
  }
}
