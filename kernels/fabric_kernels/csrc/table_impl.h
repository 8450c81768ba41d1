// Products with a table: as for packed weights, panels of the table are widened to float32 once and
// tiles of rows run over them.
// Included once for each instruction set, after its Isa.
#pragma once

using Floats = Isa::Floats;
constexpr int kFloatRows = Isa::kFloatTileRows;

// c[r][lane] += sum over steps of a[s][r] * w[s][lane]; R rows, two vectors of columns. Each block of
// steps is summed on its own first: the gradient by a hidden state is a sum over the vocabulary.
template <int R>
void FloatTile(int64_t steps, const float* w, const float* a, float* c) {
  Floats acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    acc[r][0] = acc[r][1] = Isa::SplatFloat(0);
  }
  for (int64_t s = 0; s < steps; ++s) {
    const Floats w0 = Isa::LoadFloats(w), w1 = Isa::LoadFloats(w + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Floats v = Isa::SplatFloat(a[r]);
      acc[r][0] = Isa::MultiplyAdd(v, w0, acc[r][0]);
      acc[r][1] = Isa::MultiplyAdd(v, w1, acc[r][1]);
    }
    w += kPanel;
    a += kFloatRows;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 2; ++v) {
      float* to = c + r * kPanel + v * kLanes;
      Isa::StoreFloats(to, Isa::AddFloats(Isa::LoadFloats(to), acc[r][v]));
    }
  }
}

using FloatTileFunction = void (*)(int64_t, const float*, const float*, float*);

template <int... R>
constexpr std::array<FloatTileFunction, sizeof...(R)> FloatTileTable(
    std::integer_sequence<int, R...>) {
  return {&FloatTile<R + 1>...};
}

// Rows of c [m][kPanel] += packed rows (`depth` steps deep, from `first_step`) . panel w.
void FloatTiles(const float* packed, int64_t m, int64_t depth, int64_t first_step, int64_t steps,
                const float* w, float* c) {
  static constexpr auto kTable = FloatTileTable(std::make_integer_sequence<int, kFloatRows>());
  const float* a = packed + first_step * kFloatRows;
  for (int64_t r = 0; r < m; r += kFloatRows) {
    kTable[size_t(std::min<int64_t>(m - r, kFloatRows) - 1)](steps, w, a, c + r * kPanel);
    a += depth * kFloatRows;
  }
}

int64_t RowBlocks(int64_t m) { return CeilDiv(m, kFloatRows); }
int64_t PackedFloats(int64_t m, int64_t steps) { return RowBlocks(m) * steps * kFloatRows; }

void PackRows(const float* x, int64_t m, int64_t stride, int64_t first, int64_t steps, int64_t i,
              float* packed) {
  float* to = packed + i * steps * kFloatRows;
  for (int r = 0; r < kFloatRows; ++r) {
    // Rows after the last repeat it: their results are not computed.
    const float* from = x + std::min<int64_t>(i * kFloatRows + r, m - 1) * stride + first;
    for (int64_t s = 0; s < steps; ++s) to[s * kFloatRows + r] = from[s];
  }
}

// kLanes elements of the table from element `at`, widened.
template <TableType kType>
inline Floats LoadTable(const void* table, int64_t at) {
  if constexpr (kType == TableType::kFloat32) {
    return Isa::LoadFloats(static_cast<const float*>(table) + at);
  } else if constexpr (kType == TableType::kBFloat16) {
    return Isa::LoadBFloat16(static_cast<const uint16_t*>(table) + at);
  } else {
    return Isa::LoadFloat16(static_cast<const uint16_t*>(table) + at);
  }
}

// The same for the first `count` of them; the others are zero.
template <TableType kType>
inline Floats LoadTablePart(const void* table, int64_t at, int64_t count) {
  constexpr int kBytes = kType == TableType::kFloat32 ? 4 : 2;
  if (count >= kLanes) return LoadTable<kType>(table, at);
  alignas(64) uint8_t part[kLanes * kBytes] = {};
  if (count > 0) {
    std::memcpy(part, static_cast<const uint8_t*>(table) + at * kBytes, size_t(count * kBytes));
  }
  return LoadTable<kType>(part, 0);
}

// Panel of table rows n0 .. as columns, steps are their elements [begin, end).
template <TableType kType>
void WidenRows(const TableJob& job, int64_t n0, int64_t begin, int64_t end, float* w) {
  for (int v = 0; v < 2; ++v) {
    for (int64_t k = begin; k < end; k += kLanes) {
      Vec lanes[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t n = std::min<int64_t>(n0 + v * kLanes + lane, job.rows - 1);
        alignas(64) float row[kLanes];
        Isa::StoreFloats(row, LoadTablePart<kType>(job.table, n * job.width + k, end - k));
        lanes[lane] = Isa::Load(row);
      }
      Isa::Transpose(lanes);
      const int64_t count = std::min<int64_t>(kLanes, end - k);
      for (int64_t s = 0; s < count; ++s) {
        Isa::Store(w + (k - begin + s) * kPanel + v * kLanes, lanes[s]);
      }
    }
  }
}

template <TableType kType>
void TableForward(const TableJob& job, const float* packed, int64_t unit) {
  constexpr int64_t kSteps = 512;
  const int64_t n0 = unit * kPanel;
  float* w = reinterpret_cast<float*>(ThreadScratch(Slot::kPanel, size_t(kSteps * kPanel * 4)));
  float* c = reinterpret_cast<float*>(ThreadScratch(Slot::kTile, size_t(job.m * kPanel * 4)));
  std::memset(c, 0, size_t(job.m * kPanel * 4));
  for (int64_t k = 0; k < job.width; k += kSteps) {
    const int64_t end = std::min(job.width, k + kSteps);
    WidenRows<kType>(job, n0, k, end, w);
    FloatTiles(packed, job.m, job.width, k, end - k, w, c);
  }
  const int64_t columns = std::min<int64_t>(kPanel, job.rows - n0);
  for (int64_t m = 0; m < job.m; ++m) {
    std::memcpy(job.y + m * job.rows + n0, c + m * kPanel, size_t(columns * 4));
  }
}

template <TableType kType>
void TableTransposed(const TableJob& job, const float* packed, int64_t first, int64_t steps,
                     int64_t unit) {
  constexpr int64_t kSteps = 512;
  const int64_t k0 = unit * kPanel, columns = std::min<int64_t>(kPanel, job.width - k0);
  float* w = reinterpret_cast<float*>(ThreadScratch(Slot::kPanel, size_t(kSteps * kPanel * 4)));
  float* c = reinterpret_cast<float*>(ThreadScratch(Slot::kTile, size_t(job.m * kPanel * 4)));
  std::memset(c, 0, size_t(job.m * kPanel * 4));
  if (first > 0) {
    for (int64_t m = 0; m < job.m; ++m) {
      std::memcpy(c + m * kPanel, job.y + m * job.width + k0, size_t(columns * 4));
    }
  }
  for (int64_t s = 0; s < steps; s += kSteps) {
    const int64_t count = std::min(kSteps, steps - s);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (first + s + i) * job.width + k0;
      for (int v = 0; v < 2; ++v) {
        Isa::StoreFloats(w + i * kPanel + v * kLanes,
                         LoadTablePart<kType>(job.table, at + v * kLanes, columns - v * kLanes));
      }
    }
    FloatTiles(packed, job.m, steps, s, count, w, c);
  }
  for (int64_t m = 0; m < job.m; ++m) {
    std::memcpy(job.y + m * job.width + k0, c + m * kPanel, size_t(columns * 4));
  }
}

constexpr int kTableRows = kRowParts;   // table rows in flight, one of each quarter
constexpr int64_t kFewRowsTable = 16;   // rows of each quarter in one piece of work
constexpr int kTableTokens = 4;         // rows of x that share what was widened

int64_t TablePartRows(const TableJob& job) { return CeilDiv(job.rows, kTableRows); }

// kLanes elements of x from `at`, zeros behind the last.
inline Floats LoadX(const float* x, int64_t at, int64_t width) {
  if (at + kLanes <= width) return Isa::LoadFloats(x + at);
  alignas(64) float part[kLanes] = {};
  std::memcpy(part, x + at, size_t(width - at) * 4);
  return Isa::LoadFloats(part);
}

// Where row n of each quarter of a table lies; the last row of all where there is none.
template <class Element>
struct TableRows {
  static constexpr int64_t kSoon = kAhead / int64_t(sizeof(Element));
  const Element* at[kTableRows];
  TableRows(const TableJob& job, const Element* table, int64_t stride, int64_t n) {
    for (int r = 0; r < kTableRows; ++r) {
      at[r] = table + std::min(r * TablePartRows(job) + n, job.rows - 1) * stride;
    }
  }
};

// y of row n of each quarter of the table.
inline void StoreTableRows(const TableJob& job, int64_t n, int64_t m, const float* sums) {
  for (int r = 0; r < kTableRows; ++r) {
    const int64_t row = r * TablePartRows(job) + n;
    if (row < job.rows) job.y[m * job.rows + row] = sums[r];
  }
}

// y[m][n ..] = x[m] . row n of each quarter of the table, for M rows of x from `m` on.
template <TableType kType, int M>
void TableTile(const TableJob& job, int64_t n, int64_t m) {
  using Element = std::conditional_t<kType == TableType::kFloat32, float, uint16_t>;
  constexpr int kParts = M == 1 ? 2 : 1;  // enough sums to hide the latency of one
  const TableRows<Element> rows(job, static_cast<const Element*>(job.table), job.width, n);
  const float* x = job.x + m * job.width;
  Floats acc[kTableRows][M][kParts];
#pragma GCC unroll 16
  for (auto& row : acc) {
#pragma GCC unroll 16
    for (auto& one : row) {
#pragma GCC unroll 2
      for (auto& part : one) part = Isa::SplatFloat(0);
    }
  }
  int64_t k = 0;
  for (; k + kParts * kLanes <= job.width; k += kParts * kLanes) {
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) {
      const int64_t at = k + p * kLanes;
      Floats own[M];
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) own[i] = Isa::LoadFloats(x + i * job.width + at);
#pragma GCC unroll 4
      for (int r = 0; r < kTableRows; ++r) {
        __builtin_prefetch(rows.at[r] + at + rows.kSoon);
        const Floats w = LoadTable<kType>(rows.at[r], at);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) acc[r][i][p] = Isa::MultiplyAdd(own[i], w, acc[r][i][p]);
      }
    }
  }
  for (; k < job.width; k += kLanes) {
    for (int r = 0; r < kTableRows; ++r) {
      const Floats w = LoadTablePart<kType>(rows.at[r], k, job.width - k);
      for (int i = 0; i < M; ++i) {
        acc[r][i][0] = Isa::MultiplyAdd(LoadX(x + i * job.width, k, job.width), w, acc[r][i][0]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    float sums[kTableRows];
    for (int r = 0; r < kTableRows; ++r) {
      const Floats sum =
          kParts == 1 ? acc[r][i][0] : Isa::AddFloats(acc[r][i][0], acc[r][i][kParts - 1]);
      sums[r] = Isa::SumFloats(sum);
    }
    StoreTableRows(job, n, m + i, sums);
  }
}

// The same with int8 codes: each group of 32 is summed, then multiplied by its scale.
template <int M>
void BlockTile(const TableJob& job, int64_t n, int64_t m) {
  static_assert(kTableGroup % kLanes == 0);
  const int64_t groups = CeilDiv(job.width, kTableGroup), padded = RoundUp(groups, kLanes);
  const TableRows<int8_t> rows(job, static_cast<const int8_t*>(job.table), job.width, n);
  const TableRows<uint16_t> halves(job, job.scales, groups, n);
  float* scales = reinterpret_cast<float*>(
      ThreadScratch(Slot::kRow, size_t(kTableRows * padded) * sizeof(float)));
  for (int r = 0; r < kTableRows; ++r) {
    for (int64_t g = 0; g < groups; g += kLanes) {
      Isa::StoreFloats(scales + r * padded + g,
                       LoadTablePart<TableType::kFloat16>(halves.at[r], g, groups - g));
    }
  }
  const float* x = job.x + m * job.width;
  Floats acc[kTableRows][M];
#pragma GCC unroll 4
  for (auto& row : acc) {
#pragma GCC unroll 4
    for (auto& one : row) one = Isa::SplatFloat(0);
  }
  const int64_t whole = job.width / kTableGroup;
  for (int64_t g = 0; g < whole; ++g) {
    const int64_t k = g * kTableGroup;
#pragma GCC unroll 4
    for (int r = 0; r < kTableRows; ++r) {
      __builtin_prefetch(rows.at[r] + k + rows.kSoon);
      Floats part[M];
#pragma GCC unroll 8
      for (int v = 0; v < kTableGroup; v += kLanes) {
        const Floats w = Isa::LoadInt8(rows.at[r] + k + v);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
          const Floats own = Isa::LoadFloats(x + i * job.width + k + v);
          part[i] = v == 0 ? Isa::MulFloats(own, w) : Isa::MultiplyAdd(own, w, part[i]);
        }
      }
      const Floats scale = Isa::SplatFloat(scales[r * padded + g]);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) acc[r][i] = Isa::MultiplyAdd(part[i], scale, acc[r][i]);
    }
  }
  for (int64_t k = whole * kTableGroup; k < job.width; k += kLanes) {
    for (int r = 0; r < kTableRows; ++r) {
      alignas(64) int8_t part[kLanes] = {};
      std::memcpy(part, rows.at[r] + k, size_t(std::min<int64_t>(kLanes, job.width - k)));
      const Floats w =
          Isa::MulFloats(Isa::LoadInt8(part), Isa::SplatFloat(scales[r * padded + whole]));
      for (int i = 0; i < M; ++i) {
        acc[r][i] = Isa::MultiplyAdd(LoadX(x + i * job.width, k, job.width), w, acc[r][i]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    float sums[kTableRows];
    for (int r = 0; r < kTableRows; ++r) sums[r] = Isa::SumFloats(acc[r][i]);
    StoreTableRows(job, n, m + i, sums);
  }
}

template <TableType kType, int M>
inline void FewRowsTile(const TableJob& job, int64_t n, int64_t m) {
  if constexpr (kType == TableType::kInt8) {
    BlockTile<M>(job, n, m);
  } else {
    TableTile<kType, M>(job, n, m);
  }
}

template <TableType kType>
void TableFewRows(const TableJob& job, int64_t unit) {
  const int64_t end = std::min(TablePartRows(job), (unit + 1) * kFewRowsTable);
  for (int64_t n = unit * kFewRowsTable; n < end; ++n) {
    for (int64_t m = 0; m < job.m; m += kTableTokens) {
      switch (std::min<int64_t>(kTableTokens, job.m - m)) {
        case 1:
          FewRowsTile<kType, 1>(job, n, m);
          break;
        case 2:
          FewRowsTile<kType, 2>(job, n, m);
          break;
        case 3:
          FewRowsTile<kType, 3>(job, n, m);
          break;
        default:
          FewRowsTile<kType, 4>(job, n, m);
      }
    }
  }
}

#define FABRIC_BY_TYPE(function, ...)                          \
  switch (job.type) {                                          \
    case TableType::kFloat32:                                  \
      return function<TableType::kFloat32>(job, __VA_ARGS__);  \
    case TableType::kBFloat16:                                 \
      return function<TableType::kBFloat16>(job, __VA_ARGS__); \
    case TableType::kFloat16:                                  \
      return function<TableType::kFloat16>(job, __VA_ARGS__);  \
    case TableType::kInt8:                                     \
      break;                                                   \
  }

void RunTableForward(const TableJob& job, const float* packed, int64_t unit) {
  FABRIC_BY_TYPE(TableForward, packed, unit)
}
void RunTableFewRows(const TableJob& job, int64_t unit) {
  if (job.type == TableType::kInt8) return TableFewRows<TableType::kInt8>(job, unit);
  FABRIC_BY_TYPE(TableFewRows, unit)
}
void RunTableTransposed(const TableJob& job, const float* packed, int64_t first, int64_t steps,
                        int64_t unit) {
  FABRIC_BY_TYPE(TableTransposed, packed, first, steps, unit)
}
#undef FABRIC_BY_TYPE

int64_t TableForwardUnits(const TableJob& job) { return CeilDiv(job.rows, kPanel); }
int64_t TableFewRowsUnits(const TableJob& job) {
  return CeilDiv(TablePartRows(job), kFewRowsTable);
}
int64_t TableTransposedUnits(const TableJob& job) { return CeilDiv(job.width, kPanel); }

constexpr TableKernels kTableKernels = {
    &PackedFloats,      &RowBlocks,       &PackRows,
    &TableForwardUnits, &RunTableForward, &TableFewRowsUnits,
    &RunTableFewRows,   &TableTransposedUnits, &RunTableTransposed};
