// The product of many rows: weights are unpacked once into panels that stay in the second-level
// cache, and tiles of rows x panel columns run over them.
// Included once for each instruction set, after few_rows_impl.h.
#pragma once

// c[r][lane] += sum over steps of four products; R rows, two vectors of columns.
//   w [steps][2][kVecBytes] u8 codes, a [steps][kTileRows] dwords of int8 digits, c [R][kPanel].
template <int R>
void Tile(int64_t steps, const uint8_t* w, const int32_t* a, int32_t* c) {
  for (int64_t begin = 0; begin < steps; begin += Isa::kFlushSteps) {
    const int64_t count = std::min<int64_t>(steps - begin, Isa::kFlushSteps);
    Vec acc[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Isa::Zero();
    for (int64_t s = 0; s < count; ++s) {
      const Vec w0 = Isa::Load(w), w1 = Isa::Load(w + kVecBytes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        Isa::DotSplat(acc[r][0], w0, a + r);
        Isa::DotSplat(acc[r][1], w1, a + r);
      }
      w += 2 * kVecBytes;
      a += Isa::kTileRows;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) {
        int32_t* to = c + r * kPanel + v * kLanes;
        Isa::Store(to, Isa::Add32(Isa::Load(to), Isa::Widen(acc[r][v])));
      }
    }
  }
}

using TileFunction = void (*)(int64_t, const uint8_t*, const int32_t*, int32_t*);

template <int... R>
constexpr std::array<TileFunction, sizeof...(R)> TileTable(std::integer_sequence<int, R...>) {
  return {&Tile<R + 1>...};
}

// A block of steps of all rows against one panel.
void Tiles(const Operand& operand, int64_t first_step, int64_t steps, const uint8_t* w,
           int32_t* c) {
  static constexpr auto kTable = TileTable(std::make_integer_sequence<int, Isa::kTileRows>());
  const int32_t* a = operand.dwords + first_step * Isa::kTileRows;
  for (int64_t r = 0; r < operand.rows; r += Isa::kTileRows) {
    const int64_t rows = std::min<int64_t>(operand.rows - r, Isa::kTileRows);
    kTable[size_t(rows - 1)](steps, w, a, c + r * kPanel);
    a += operand.steps * Isa::kTileRows;
  }
}

// Forward panel: columns are kPanel outputs n0.., steps are dwords [begin, end) of their rows.
void UnpackRows(const Job& job, const Matrix& matrix, int64_t n0, int64_t begin, int64_t end,
                uint8_t* w) {
  const int planes = Planes(job.format);
  for (int v = 0; v < 2; ++v) {
    for (int64_t i = begin; i < end; i += kLanes) {
      Vec rows[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        // Rows after the last repeat it: their results are not stored.
        const int64_t n = std::min<int64_t>(n0 + v * kLanes + lane, matrix.rows - 1);
        rows[lane] = LoadRow(matrix.bytes + n * matrix.row_bytes, 4 * i, matrix.row_bytes);
      }
      Isa::Transpose(rows);
      const int64_t count = std::min<int64_t>(kLanes, end - i);
      uint8_t* to = w + (i - begin) * planes * 2 * kVecBytes + v * kVecBytes;
      for (int64_t t = 0; t < count; ++t) {
        Fields(job.format, rows[t], [&](int j, Vec codes) {
          Isa::Store(to + (t * planes + j) * 2 * kVecBytes, codes);
        });
      }
    }
  }
}

// Bytes of packed columns in a unit of the transposed product, and the panels that they give.
constexpr int UnitBytes(Format format) { return format == Format::kTernary2 ? 16 : kPanel; }
constexpr int UnitPanels(Format format) {
  return format == Format::kTernary2 ? 64 / kPanel : 5;
}

// Dword b of `out` = bytes b of the four rows, for 16 columns.
inline void TransposeBytes(const uint8_t* const (&rows)[4], int64_t column, int64_t available,
                           uint32_t* out) {
  if (available >= 16) {
    return Isa::TransposeBytes(rows[0] + column, rows[1] + column, rows[2] + column,
                               rows[3] + column, out);
  }
  uint8_t part[4][16] = {};
  if (available > 0) {
    for (int r = 0; r < 4; ++r) std::memcpy(part[r], rows[r] + column, size_t(available));
  }
  Isa::TransposeBytes(part[0], part[1], part[2], part[3], out);
}

// Transposed panels: columns are codes of the unit's bytes, steps are groups of four rows.
void UnpackColumns(const Job& job, const Matrix& matrix, int64_t column, int64_t first_row,
                   int64_t steps, int64_t panel_stride, uint8_t* w) {
  constexpr int kGroups = kPanel / 16 > 0 ? kPanel / 16 : 1;
  for (int64_t s = 0; s < steps; ++s) {
    const uint8_t* rows[4];
    for (int r = 0; r < 4; ++r) {
      // Rows after the last repeat it: their activations are zero.
      rows[r] = matrix.bytes +
                std::min<int64_t>(first_row + 4 * s + r, matrix.rows - 1) * matrix.row_bytes;
    }
    uint8_t* to = w + s * 2 * kVecBytes;
    if (job.format == Format::kTernary2) {
      alignas(64) uint32_t dwords[16], fields[64];
      TransposeBytes(rows, column, matrix.row_bytes - column, dwords);
      Isa::SpreadFields(dwords, fields);
      for (int p = 0; p < 64 / kPanel; ++p) {
        std::memcpy(to + p * panel_stride, fields + p * kPanel, 2 * kVecBytes);
      }
      continue;
    }
    alignas(64) uint32_t dwords[16 * kGroups];
    for (int g = 0; g < kGroups; ++g) {
      const int64_t at = column + 16 * g;
      TransposeBytes(rows, at, matrix.row_bytes - at, dwords + 16 * g);
    }
    for (int v = 0; v < 2; ++v) {
      Fields(job.format, Isa::Load(dwords + v * kLanes), [&](int j, Vec codes) {
        Isa::Store(to + j * panel_stride + v * kVecBytes, codes);
      });
    }
  }
}

// Terms of a sum of fixed-point numbers that fits an int32 in front of the last of three digits.
constexpr int64_t kPairTerms = INT32_MAX / (127 * 256 + 1);

inline int64_t Terms(const Job& job) {
  if (!job.transposed) return job.k;
  int64_t terms = 0;
  for (int g = 0; g < job.groups; ++g) terms += job.matrix[g].rows;
  return terms;
}

// A row of a panel whose sums are longer than 32 bits.
inline void StoreLongRow(const int32_t* row, const int32_t* sums, int digits, float factor,
                         float* to) {
  for (int i = 0; i < kPanel; ++i) {
    int64_t value = 0;
    for (int d = 0; d < digits; ++d) value = 256 * value + (row[d * kPanel + i] - sums[d]);
    to[i] = float(value) * factor;
  }
}

// Writes `columns` columns of a finished panel, from column `at` of the output of width `ld`.
void StorePanel(const Job& job, const Operand& operand, const int32_t* c, int group, int64_t at,
                int64_t columns, int64_t ld, int64_t first, int64_t tokens) {
  columns = std::min<int64_t>(columns, kPanel);
  const bool is_long = job.digits >= 2 && Terms(job) > kPairTerms;
  for (int64_t t = 0; t < tokens; ++t) {
    alignas(64) int32_t part[kPanel];
    const int32_t* row = c + t * job.digits * kPanel;
    const int32_t* sums = operand.sums + t * job.digits;
    int32_t* ints = job.sums == nullptr ? nullptr : job.sums + (first + t) * ld + at;
    float* floats = ints != nullptr ? nullptr : job.out[group] + (first + t) * ld + at;
    const bool whole = columns >= kPanel;
    void* to = whole ? (ints != nullptr ? static_cast<void*>(ints) : floats) : part;
    // One multiplication by both scales, as absmax.py says.
    const float factor = operand.factors[t] * (job.transposed ? 1.0f : job.matrix[group].scale);
    if (is_long) StoreLongRow(row, sums, job.digits, factor, static_cast<float*>(to));
    for (int v = 0; v < 2 && !is_long; ++v) {
      const int32_t* from = row + v * kLanes;
      // Fields are codes + 1: the sum of the digits comes off again.
      Vec top = Isa::Sub32(Isa::Load(from), Isa::Splat32(sums[0]));
      if (job.digits >= 2) {
        const Vec next = Isa::Sub32(Isa::Load(from + kPanel), Isa::Splat32(sums[1]));
        top = Isa::Add32(Isa::template ShiftLeft32<8>(top), next);
      }
      if (ints != nullptr) {
        Isa::Store(static_cast<int32_t*>(to) + v * kLanes, top);
      } else if (job.digits == 3) {
        const Vec low = Isa::Sub32(Isa::Load(from + 2 * kPanel), Isa::Splat32(sums[2]));
        Isa::StoreScaledPair(static_cast<float*>(to) + v * kLanes, top, low, factor);
      } else {
        Isa::StoreScaled(static_cast<float*>(to) + v * kLanes, top, factor);
      }
    }
    if (!whole) {
      void* row_end = ints != nullptr ? static_cast<void*>(ints) : floats;
      std::memcpy(row_end, part, size_t(columns) * 4);
    }
    if (floats == nullptr) continue;
    for (int g = job.transposed ? 0 : group; g < (job.transposed ? job.groups : group + 1); ++g) {
      const Adapter& adapter = job.adapter[g];
      if (adapter.rank == 0) continue;
      AddWide(floats, columns, adapter.narrow + (first + t) * adapter.rank, adapter.rank,
              job.transposed ? adapter.a : adapter.b, ld, at);
    }
  }
}

int64_t Units(const Job& job, bool few_rows) {
  int64_t units = 0;
  if (job.transposed) return CeilDiv(job.matrix[0].row_bytes, UnitBytes(job.format));
  for (int g = 0; g < job.groups; ++g) {
    const Matrix& matrix = job.matrix[g];
    units += few_rows ? FewRowsUnits(matrix) : CeilDiv(matrix.rows, kPanel);
  }
  return units;
}

void RunForwardUnit(const Job& job, const Operand& operand, int group, int64_t n0, int64_t first,
                    int64_t tokens) {
  constexpr int64_t kBlock = 128;  // dwords of a row unpacked at once: 2,048 or 2,560 codes
  const Matrix& matrix = job.matrix[group];
  const int64_t dwords = RowDwords(job), planes = Planes(job.format);
  uint8_t* w = ThreadScratch(Slot::kPanel, size_t(kBlock * planes * 2 * kVecBytes));
  int32_t* c = reinterpret_cast<int32_t*>(
      ThreadScratch(Slot::kTile, size_t(operand.rows * kPanel * 4)));
  std::memset(c, 0, size_t(operand.rows * kPanel * 4));
  for (int64_t i = 0; i < dwords; i += kBlock) {
    const int64_t end = std::min(dwords, i + kBlock);
    UnpackRows(job, matrix, n0, i, end, w);
    Tiles(operand, i * planes, (end - i) * planes, w, c);
  }
  StorePanel(job, operand, c, group, n0, std::min<int64_t>(kPanel, matrix.rows - n0), matrix.rows,
             first, tokens);
}

void RunTransposedUnit(const Job& job, const Operand& operand, int64_t unit, int64_t first,
                       int64_t tokens) {
  constexpr int64_t kBlock = 256;  // steps unpacked at once: 1,024 rows
  const int panels = UnitPanels(job.format);
  const int64_t panel_stride = kBlock * 2 * kVecBytes, tile_stride = operand.rows * kPanel;
  const int64_t column = unit * UnitBytes(job.format);
  uint8_t* w = ThreadScratch(Slot::kPanel, size_t(panels * panel_stride));
  int32_t* c =
      reinterpret_cast<int32_t*>(ThreadScratch(Slot::kTile, size_t(panels * tile_stride * 4)));
  std::memset(c, 0, size_t(panels * tile_stride * 4));
  int64_t done = 0;
  for (int g = 0; g < job.groups; ++g) {
    const int64_t steps = CeilDiv(job.matrix[g].rows, 4);
    for (int64_t s = 0; s < steps; s += kBlock) {
      const int64_t count = std::min(kBlock, steps - s);
      UnpackColumns(job, job.matrix[g], column, 4 * s, count, panel_stride, w);
      for (int p = 0; p < panels; ++p) {
        Tiles(operand, done + s, count, w + p * panel_stride, c + p * tile_stride);
      }
    }
    done += steps;
  }
  const int64_t row_bytes = job.matrix[0].row_bytes;
  for (int p = 0; p < panels; ++p) {
    const bool two = job.format == Format::kTernary2;
    const int64_t at = two ? 4 * column + p * kPanel : p * row_bytes + column;
    const int64_t plane_end = two ? job.k : std::min(job.k, (p + 1) * row_bytes);
    const int64_t columns = std::min<int64_t>(kPanel, plane_end - at);
    if (columns <= 0) break;
    StorePanel(job, operand, c + p * tile_stride, 0, at, columns, job.k, first, tokens);
  }
}

void RunUnit(const Job& job, const Operand& operand, int64_t unit, int64_t first,
             int64_t tokens) {
  if (job.transposed) return RunTransposedUnit(job, operand, unit, first, tokens);
  for (int g = 0; g < job.groups; ++g) {
    const int64_t units = CeilDiv(job.matrix[g].rows, kPanel);
    if (unit < units) return RunForwardUnit(job, operand, g, unit * kPanel, first, tokens);
    unit -= units;
  }
}
