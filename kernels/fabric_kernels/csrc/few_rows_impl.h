// The product of one to four rows of digits (decoding): packed bytes go from memory through
// registers once, and nothing is unpacked to memory.
// Included once for each instruction set, after prepare_impl.h, fields_impl.h and row_parts_impl.h.
#pragma once

constexpr int kWeightRows = kRowParts;  // rows of weights in flight
// With one row of digits. ternary2 has four accumulators a row, which is too many for four rows
// where registers are few.
template <Format kFormat>
constexpr int kOneRowWeights =
    kFormat == Format::kTernary2 && Isa::kRegisters < 32 ? 2 : kWeightRows;

// Codes in a row whose products with one row of digits, 256 times as large, fit a lane of int32.
constexpr int64_t kOneRowCodes = int64_t{kLanes} << 15;

// sums[r][i] = digits of row r . fields of weight row i (codes + 1).
using FewRowsSums = int32_t[kFewRows][kWeightRows];

// sums[i] = digits of one row . fields of rows[i], still spread over the lanes of a vector.
//
// ternary2: fields are not shifted down; each plane has its own accumulator, which is shifted once
// at the end (exact, since every product in it is a multiple of 4^j).
inline void OneRowTernary2(const int32_t* digits, const uint8_t* const* rows, int64_t vectors,
                           int64_t ahead, Vec* sums) {
  constexpr int kCount = kOneRowWeights<Format::kTernary2>;
  Vec acc[kCount][4];
#pragma GCC unroll 4
  for (auto& row : acc) row[0] = row[1] = row[2] = row[3] = Isa::Zero();
  const Vec mask[4] = {Isa::Splat8(0x03), Isa::Splat8(0x0c), Isa::Splat8(0x30),
                       Isa::Splat8(0xc0)};
  for (int64_t v = 0; v < vectors; ++v, digits += 4 * kLanes) {
    Vec part[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) part[j] = Isa::Load(digits + j * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      __builtin_prefetch(rows[i] + v * kVecBytes + ahead);
      const Vec bytes = Isa::Load(rows[i] + v * kVecBytes);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) Isa::Dot(acc[i][j], Isa::And(bytes, mask[j]), part[j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    Vec total = Isa::Add32(acc[i][0], Isa::template ShiftRightArithmetic32<2>(acc[i][1]));
    total = Isa::Add32(total, Isa::template ShiftRightArithmetic32<4>(acc[i][2]));
    sums[i] = Isa::Add32(total, Isa::template ShiftRightArithmetic32<6>(acc[i][3]));
  }
}

// ternary1.6: with r_0 the byte and r_{j+1} = 3 r_j mod 256, digit j of the byte
// is (3 r_j - r_{j+1}) / 256, so the dot product needs no digit on its own:
//   256 * sum_j t_j a_j = 3 * sum_j r_j a_j - sum_j r_{j+1} a_j,
// lane by lane, which divides by 256 without a remainder.
inline void OneRowTernary1_6(const int32_t* digits, const uint8_t* const* rows, int64_t vectors,
                             int64_t ahead, Vec* sums) {
  constexpr int kCount = kOneRowWeights<Format::kTernary1_6>;
  Vec current[kCount], next[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) current[i] = next[i] = Isa::Zero();
  for (int64_t v = 0; v < vectors; ++v, digits += 5 * kLanes) {
    Vec part[5];
#pragma GCC unroll 5
    for (int j = 0; j < 5; ++j) part[j] = Isa::Load(digits + j * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      __builtin_prefetch(rows[i] + v * kVecBytes + ahead);
      Vec r = Isa::Load(rows[i] + v * kVecBytes);
#pragma GCC unroll 5
      for (int j = 0; j < 5; ++j) {
        Isa::Dot(current[i], r, part[j]);
        r = Triple(r);
        Isa::Dot(next[i], r, part[j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const Vec three = Isa::Add32(current[i], Isa::Add32(current[i], current[i]));
    sums[i] = Isa::template ShiftRightArithmetic32<8>(Isa::Sub32(three, next[i]));
  }
}

// One to four rows of digits; what every instruction set and format can do.
template <Format kFormat, int R>
void FewRows(const int32_t* digits, int64_t row_stride, const RowsInFlight& rows, int64_t vectors,
             FewRowsSums& sums) {
  constexpr int kPlanes = Planes(kFormat);
  for (auto& row : sums) std::fill(std::begin(row), std::end(row), 0);
  // Vectors after which an accumulator must be widened.
  const int64_t flush = std::min<int64_t>(Isa::kFlushSteps / kPlanes, vectors);
  for (int64_t begin = 0; begin < vectors; begin += flush) {
    Vec acc[kWeightRows][R];
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[i][r] = Isa::Zero();
    }
    const int64_t end = std::min(begin + flush, vectors);
    for (int64_t v = begin; v < end; ++v, digits += kPlanes * kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kWeightRows; ++i) {
        __builtin_prefetch(rows.at[i] + v * kVecBytes + rows.ahead);
        Vec bytes = Isa::Load(rows.at[i] + v * kVecBytes);
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
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][i] += Isa::Sum(Isa::Widen(acc[i][r]));
    }
  }
}

template <Format kFormat>
void FewRows(int64_t count, const int32_t* digits, int64_t row_stride,
             const RowsInFlight& rows, int64_t vectors, FewRowsSums& sums) {
  switch (count) {
    case 1:
      return FewRows<kFormat, 1>(digits, row_stride, rows, vectors, sums);
    case 2:
      return FewRows<kFormat, 2>(digits, row_stride, rows, vectors, sums);
    case 3:
      return FewRows<kFormat, 3>(digits, row_stride, rows, vectors, sums);
    default:
      return FewRows<kFormat, 4>(digits, row_stride, rows, vectors, sums);
  }
}

// sums[i] = digits of the row . fields of a row of part i.
template <Format kFormat>
inline void OneRowOfParts(const int32_t* digits, const RowsInFlight& rows, int64_t vectors,
                          int32_t* sums) {
  constexpr int kCount = kOneRowWeights<kFormat>;
  static_assert(kRowParts % kCount == 0);
  Vec lanes[kRowParts];
#pragma GCC unroll 4
  for (int part = 0; part < kRowParts; part += kCount) {
    if constexpr (kFormat == Format::kTernary2) {
      OneRowTernary2(digits, rows.at + part, vectors, rows.ahead, lanes + part);
    } else {
      OneRowTernary1_6(digits, rows.at + part, vectors, rows.ahead, lanes + part);
    }
  }
  Isa::SumFour(lanes, sums);
}

// Stores kLanes rows of a matrix from n on, or those that there are.
void StoreOneRow(const Job& job, const Operand& operand, int group, int64_t n, int64_t first,
                 const int32_t* found) {
  const Matrix& matrix = job.matrix[group];
  const Vec sums = Isa::Sub32(Isa::Load(found), Isa::Splat32(operand.sums[0]));
  alignas(64) int32_t part[kLanes];
  const int64_t count = std::min<int64_t>(kLanes, matrix.rows - n);
  const int64_t at = first * matrix.rows + n;
  int32_t* to =
      job.sums != nullptr ? job.sums + at : reinterpret_cast<int32_t*>(job.out[group] + at);
  int32_t* own = count == kLanes ? to : part;
  if (job.sums != nullptr) {
    Isa::Store(own, sums);
  } else {
    Isa::StoreScaled(reinterpret_cast<float*>(own), sums, operand.factors[0] * matrix.scale);
  }
  if (own == part) std::memcpy(to, part, size_t(count) * 4);
  const Adapter& adapter = job.adapter[group];
  if (adapter.rank > 0) {
    AddWide(job.out[group] + at, count, adapter.narrow + first * adapter.rank, adapter.rank,
            adapter.b, matrix.rows, n);
  }
}

// Rows [begin, end) of each part of a matrix by one row of digits.
template <Format kFormat>
void RunOneRow(const Job& job, const Operand& operand, const FewRowsRange& range, int64_t first) {
  const int64_t vectors = RowChunks(job);
  RowsInFlight rows(job, range);
  for (int64_t n = range.begin; n < range.end; n += kLanes) {
    alignas(64) int32_t sums[kRowParts][kLanes];
    for (int i = 0; i < kLanes; ++i, rows.Advance()) {
      int32_t across[kRowParts];
      OneRowOfParts<kFormat>(operand.dwords, rows, vectors, across);
      for (int part = 0; part < kRowParts; ++part) sums[part][i] = across[part];
    }
    for (int part = 0; part < kRowParts; ++part) {
      const int64_t row = part * range.part + n;
      if (row < range.rows) StoreOneRow(job, operand, range.group, row, first, sums[part]);
    }
  }
}

void FewRowsDispatch(const Job& job, const Operand& operand, const RowsInFlight& rows,
                     FewRowsSums& sums) {
  const int64_t vectors = RowChunks(job), stride = vectors * Planes(job.format) * kLanes;
  const int32_t* digits = operand.dwords;
  if (job.format == Format::kTernary2) {
    FewRows<Format::kTernary2>(operand.rows, digits, stride, rows, vectors, sums);
  } else {
    FewRows<Format::kTernary1_6>(operand.rows, digits, stride, rows, vectors, sums);
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

// Rows [begin, end) of each part of a matrix by up to four rows of digits.
void RunSomeRows(const Job& job, const Operand& operand, const FewRowsRange& range, int64_t first,
                 int64_t tokens) {
  static_assert(kLanes % kWeightRows == 0);
  const Matrix& matrix = job.matrix[range.group];
  RowsInFlight rows(job, range);
  for (int64_t n = range.begin; n < range.end; n += kWeightRows) {
    FewRowsSums sums[kRowParts];  // of rows n .. of each part
    for (int i = 0; i < kWeightRows; ++i, rows.Advance()) {
      FewRowsSums across;
      FewRowsDispatch(job, operand, rows, across);
      for (int p = 0; p < kRowParts; ++p) {
        for (int r = 0; r < kFewRows; ++r) sums[p][r][i] = across[r][p];
      }
    }
    for (int p = 0; p < kRowParts; ++p) {
      const int64_t row = p * range.part + n;
      const int64_t count = std::min<int64_t>(kWeightRows, matrix.rows - row);
      if (count > 0) StoreFewRows(job, operand, sums[p], range.group, row, count, first, tokens);
    }
  }
}

void RunFewRows(const Job& job, const Operand& operand, int64_t unit, int64_t first,
                int64_t tokens) {
  const FewRowsRange range = RangeOf(job, unit);
  if (operand.rows > 1 || !Isa::kWideDot || job.k >= kOneRowCodes) {
    RunSomeRows(job, operand, range, first, tokens);
  } else if (job.format == Format::kTernary2) {
    RunOneRow<Format::kTernary2>(job, operand, range, first);
  } else {
    RunOneRow<Format::kTernary1_6>(job, operand, range, first);
  }
}
