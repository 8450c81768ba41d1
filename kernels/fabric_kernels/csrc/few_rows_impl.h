// The product of one to four rows of digits (decoding): packed bytes go from memory through
// registers once, and nothing is unpacked to memory.
// Included once for each instruction set, after prepare_impl.h and fields_impl.h.
#pragma once

constexpr int kWeightRows = 4;  // rows of weights in flight
// With one row of digits. Two rows of ternary2 are read so nearly in order that the prefetchers of
// memory follow, a sixth faster than four where pages are large; of one, the digits would be loaded
// too often. ternary1.6 has fewer accumulators a row, and needs four for enough of them.
template <Format kFormat>
constexpr int kOneRowWeights = kFormat == Format::kTernary2 ? 2 : kWeightRows;
// Asked for ahead of its use, into the second-level cache: with 4 KiB the answer comes late, 8 and
// more are slower again.
constexpr int64_t kAhead = 6144;

// Rows of weights in one piece of work: about 64 KB of them.
inline int64_t FewRowsUnit(const Matrix& matrix) {
  const int64_t rows = 65536 / std::clamp<int64_t>(matrix.row_bytes, 1, 65536);
  return RoundUp(rows, std::max(kWeightRows, kLanes));
}

// Codes in a row whose products with one row of digits, 256 times as large, fit a lane of int32.
constexpr int64_t kOneRowCodes = int64_t{kLanes} << 15;

// sums[r][i] = digits of row r . fields of weight row i (codes + 1).
using FewRowsSums = int32_t[kFewRows][kWeightRows];
// The same of one row of digits, each sum still spread over the lanes of a vector.
template <Format kFormat>
using OneRowSums = Vec[kOneRowWeights<kFormat>];
template <int kCount>
using WeightRows = const uint8_t* [kCount];
template <Format kFormat>
using OneRowWeights = WeightRows<kOneRowWeights<kFormat>>;

// The whole vectors of packed bytes of the rows, then once more the incomplete last one, copied and
// followed by zeros: two passes of the same loop, which so has no case to tell apart. (A loop body
// in a lambda would keep its accumulators in memory.)
template <int kCount>
struct Passes {
  WeightRows<kCount> at;
  int64_t count;
  int64_t rest;
  alignas(64) uint8_t tail[kCount][kVecBytes];

  Passes(const WeightRows<kCount>& rows, int64_t begin, int64_t end) {
    for (int i = 0; i < kCount; ++i) at[i] = rows[i] + begin;
    count = (end - begin) / kVecBytes;
    rest = (end - begin) % kVecBytes;
  }
  // The second pass; false if there is none.
  bool Next() {
    if (rest == 0) return false;
    std::memset(tail, 0, sizeof(tail));
    for (int i = 0; i < kCount; ++i) {
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
void OneRowTernary2(const int32_t* digits, const OneRowWeights<Format::kTernary2>& rows,
                    int64_t row_bytes, int64_t ahead, OneRowSums<Format::kTernary2>& sums) {
  constexpr int kCount = kOneRowWeights<Format::kTernary2>;
  Vec acc[kCount][4];
#pragma GCC unroll 4
  for (auto& row : acc) row[0] = row[1] = row[2] = row[3] = Isa::Zero();
  const Vec mask[4] = {Isa::Splat8(0x03), Isa::Splat8(0x0c), Isa::Splat8(0x30),
                       Isa::Splat8(0xc0)};
  Passes<kCount> passes(rows, 0, row_bytes);
  do {
    for (int64_t v = 0; v < passes.count; ++v, digits += 4 * kLanes) {
      Vec part[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) part[j] = Isa::Load(digits + j * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        const uint8_t* at = passes.at[i] + v * kVecBytes;
        __builtin_prefetch(at + ahead, 0, 2);  // into the second level
        const Vec bytes = Isa::Load(at);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) Isa::Dot(acc[i][j], Isa::And(bytes, mask[j]), part[j]);
      }
    }
  } while (passes.Next());
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    Vec total = Isa::Add32(acc[i][0], Isa::template ShiftRightArithmetic32<2>(acc[i][1]));
    total = Isa::Add32(total, Isa::template ShiftRightArithmetic32<4>(acc[i][2]));
    sums[i] = Isa::Add32(total, Isa::template ShiftRightArithmetic32<6>(acc[i][3]));
  }
}

// ternary1.6, one row of digits. With r_0 the byte and r_{j+1} = 3 r_j mod 256, digit j of the byte
// is (3 r_j - r_{j+1}) / 256, so the dot product needs no digit on its own:
//   256 * sum_j t_j a_j = 3 * sum_j r_j a_j - sum_j r_{j+1} a_j,
// lane by lane, which divides by 256 without a remainder.
void OneRowTernary1_6(const int32_t* digits, const OneRowWeights<Format::kTernary1_6>& rows,
                      int64_t row_bytes, int64_t ahead, OneRowSums<Format::kTernary1_6>& sums) {
  constexpr int kCount = kOneRowWeights<Format::kTernary1_6>;
  Vec current[kCount], next[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) current[i] = next[i] = Isa::Zero();
  Passes<kCount> passes(rows, 0, row_bytes);
  do {
    for (int64_t v = 0; v < passes.count; ++v, digits += 5 * kLanes) {
      Vec part[5];
#pragma GCC unroll 5
      for (int j = 0; j < 5; ++j) part[j] = Isa::Load(digits + j * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
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
  for (int i = 0; i < kCount; ++i) {
    const Vec three = Isa::Add32(current[i], Isa::Add32(current[i], current[i]));
    sums[i] = Isa::template ShiftRightArithmetic32<8>(Isa::Sub32(three, next[i]));
  }
}

// One to four rows of digits; what every instruction set and format can do.
template <Format kFormat, int R>
void FewRows(const int32_t* digits, int64_t row_stride, const WeightRows<kWeightRows>& rows,
             int64_t row_bytes, FewRowsSums& sums) {
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
    Passes<kWeightRows> passes(rows, begin, std::min(begin + flush, row_bytes));
    do {
      for (int64_t v = 0; v < passes.count; ++v, digits += kPlanes * kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < kWeightRows; ++i) {
          const uint8_t* at = passes.at[i] + v * kVecBytes;
          __builtin_prefetch(at + kAhead, 0, 2);  // into the second level
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
void FewRows(int64_t count, const int32_t* digits, int64_t row_stride,
             const WeightRows<kWeightRows>& rows, int64_t row_bytes, FewRowsSums& sums) {
  switch (count) {
    case 1:
      return FewRows<kFormat, 1>(digits, row_stride, rows, row_bytes, sums);
    case 2:
      return FewRows<kFormat, 2>(digits, row_stride, rows, row_bytes, sums);
    case 3:
      return FewRows<kFormat, 3>(digits, row_stride, rows, row_bytes, sums);
    default:
      return FewRows<kFormat, 4>(digits, row_stride, rows, row_bytes, sums);
  }
}

// Rows of the matrix from n on; its last where there are no more.
template <int kCount>
inline void PointAt(const Matrix& matrix, int64_t n, WeightRows<kCount>& rows) {
  for (int i = 0; i < kCount; ++i) {
    rows[i] = matrix.bytes + std::min<int64_t>(n + i, matrix.rows - 1) * matrix.row_bytes;
  }
}

// What is prefetched with rows n.. of a matrix, in bytes from them: at its end the next one's rows.
inline int64_t AheadOf(const Job& job, int group, int64_t n) {
  const Matrix& matrix = job.matrix[group];
  const int64_t left = (matrix.rows - n) * matrix.row_bytes;
  if (kAhead < left || group + 1 >= job.groups) return kAhead;
  const auto next = reinterpret_cast<intptr_t>(job.matrix[group + 1].bytes);
  return next + (kAhead - left) - (reinterpret_cast<intptr_t>(matrix.bytes) + n * matrix.row_bytes);
}

// The sums of kLanes rows of a matrix from n on, each still spread over lanes.
template <Format kFormat>
void OneRowLanes(const Job& job, const Operand& operand, int group, int64_t n,
                 Vec (&lanes)[kLanes]) {
  constexpr int kCount = kOneRowWeights<kFormat>;
  static_assert(kLanes % kCount == 0);
  const Matrix& matrix = job.matrix[group];
  for (int i = 0; i < kLanes; i += kCount) {
    WeightRows<kCount> rows;
    PointAt<kCount>(matrix, n + i, rows);
    const int64_t ahead = AheadOf(job, group, n + i);
    OneRowSums<kFormat> sums;
    if constexpr (kFormat == Format::kTernary2) {
      OneRowTernary2(operand.dwords, rows, matrix.row_bytes, ahead, sums);
    } else {
      OneRowTernary1_6(operand.dwords, rows, matrix.row_bytes, ahead, sums);
    }
    for (int r = 0; r < kCount; ++r) lanes[i + r] = sums[r];
  }
}

// Rows [n, end) of a matrix by one row of digits. As many sums as a vector has lanes are turned and
// added up together: one by one that takes as long as the products of a short row.
void RunOneRow(const Job& job, const Operand& operand, int group, int64_t n, int64_t end,
               int64_t first) {
  const Matrix& matrix = job.matrix[group];
  const Vec offset = Isa::Splat32(operand.sums[0]);
  const float factor = operand.factors[0] * matrix.scale;
  for (; n < end; n += kLanes) {
    Vec lanes[kLanes];
    if (job.format == Format::kTernary2) {
      OneRowLanes<Format::kTernary2>(job, operand, group, n, lanes);
    } else {
      OneRowLanes<Format::kTernary1_6>(job, operand, group, n, lanes);
    }
    Isa::Transpose(lanes);
#pragma GCC unroll 4
    for (int i = kLanes / 2; i > 0; i /= 2) {
#pragma GCC unroll 8
      for (int j = 0; j < i; ++j) lanes[j] = Isa::Add32(lanes[j], lanes[j + i]);
    }
    const Vec sums = Isa::Sub32(lanes[0], offset);
    alignas(64) int32_t part[kLanes];
    const bool whole = n + kLanes <= end;
    const int64_t at = first * matrix.rows + n;
    int32_t* to = job.sums != nullptr ? job.sums + at
                                      : reinterpret_cast<int32_t*>(job.out[group] + at);
    int32_t* own = whole ? to : part;
    if (job.sums != nullptr) {
      Isa::Store(own, sums);
    } else {
      Isa::StoreScaled(reinterpret_cast<float*>(own), sums, factor);
    }
    const int64_t count = std::min<int64_t>(kLanes, end - n);
    if (!whole) std::memcpy(to, part, size_t(count) * 4);
    const Adapter& adapter = job.adapter[group];
    if (adapter.rank > 0) {
      AddWide(job.out[group] + at, count, adapter.narrow + first * adapter.rank, adapter.rank,
              adapter.b, matrix.rows, n);
    }
  }
}

void FewRowsDispatch(const Job& job, const Operand& operand,
                     const WeightRows<kWeightRows>& rows, int64_t row_bytes, FewRowsSums& sums) {
  const int64_t stride = RowChunks(job) * Planes(job.format) * kLanes;
  const int32_t* digits = operand.dwords;
  if (job.format == Format::kTernary2) {
    FewRows<Format::kTernary2>(operand.rows, digits, stride, rows, row_bytes, sums);
  } else {
    FewRows<Format::kTernary1_6>(operand.rows, digits, stride, rows, row_bytes, sums);
  }
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

FewRowsRange RangeOf(const Job& job, int64_t unit) {
  for (int g = 0;; ++g) {
    const Matrix& matrix = job.matrix[g];
    const int64_t size = FewRowsUnit(matrix), units = CeilDiv(matrix.rows, size);
    if (unit < units) return {g, unit * size, std::min(matrix.rows, (unit + 1) * size)};
    unit -= units;
  }
}

void RunFewRows(const Job& job, const Operand& operand, int64_t unit, int64_t first,
                int64_t tokens) {
  const FewRowsRange range = RangeOf(job, unit);
  const Matrix& matrix = job.matrix[range.group];
  if (operand.rows == 1 && Isa::kWideDot && job.k < kOneRowCodes) {
    return RunOneRow(job, operand, range.group, range.begin, range.end, first);
  }
  for (int64_t n = range.begin; n < range.end; n += kWeightRows) {
    WeightRows<kWeightRows> rows;
    PointAt<kWeightRows>(matrix, n, rows);
    FewRowsSums sums;
    FewRowsDispatch(job, operand, rows, matrix.row_bytes, sums);
    const int64_t count = std::min<int64_t>(kWeightRows, range.end - n);
    StoreFewRows(job, operand, sums, range.group, n, count, first, tokens);
  }
}
