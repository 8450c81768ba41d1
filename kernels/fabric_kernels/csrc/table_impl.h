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

constexpr int64_t kFewRowsTable = 64;  // table rows in one piece of work

template <TableType kType>
void TableFewRows(const TableJob& job, int64_t unit) {
  const int64_t end = std::min(job.rows, (unit + 1) * kFewRowsTable);
  for (int64_t n = unit * kFewRowsTable; n < end; ++n) {
    for (int64_t m = 0; m < job.m; ++m) {
      const float* x = job.x + m * job.width;
      Floats acc[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[i] = Isa::SplatFloat(0);
      int64_t k = 0;
      for (; k + 4 * kLanes <= job.width; k += 4 * kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          acc[i] = Isa::MultiplyAdd(Isa::LoadFloats(x + k + i * kLanes),
                                    LoadTable<kType>(job.table, n * job.width + k + i * kLanes),
                                    acc[i]);
        }
      }
      for (; k < job.width; k += kLanes) {
        alignas(64) float part[kLanes] = {};
        const int64_t count = std::min<int64_t>(kLanes, job.width - k);
        std::memcpy(part, x + k, size_t(count * 4));
        acc[0] = Isa::MultiplyAdd(Isa::LoadFloats(part),
                                  LoadTablePart<kType>(job.table, n * job.width + k, count),
                                  acc[0]);
      }
      job.y[m * job.rows + n] = (Isa::SumFloats(acc[0]) + Isa::SumFloats(acc[1])) +
                                (Isa::SumFloats(acc[2]) + Isa::SumFloats(acc[3]));
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
  }

void RunTableForward(const TableJob& job, const float* packed, int64_t unit) {
  FABRIC_BY_TYPE(TableForward, packed, unit)
}
void RunTableFewRows(const TableJob& job, int64_t unit) { FABRIC_BY_TYPE(TableFewRows, unit) }
void RunTableTransposed(const TableJob& job, const float* packed, int64_t first, int64_t steps,
                        int64_t unit) {
  FABRIC_BY_TYPE(TableTransposed, packed, first, steps, unit)
}
#undef FABRIC_BY_TYPE

int64_t TableForwardUnits(const TableJob& job) { return CeilDiv(job.rows, kPanel); }
int64_t TableFewRowsUnits(const TableJob& job) { return CeilDiv(job.rows, kFewRowsTable); }
int64_t TableTransposedUnits(const TableJob& job) { return CeilDiv(job.width, kPanel); }

constexpr TableKernels kTableKernels = {
    &PackedFloats,      &RowBlocks,       &PackRows,
    &TableForwardUnits, &RunTableForward, &TableFewRowsUnits,
    &RunTableFewRows,   &TableTransposedUnits, &RunTableTransposed};
