// Products of float rows with a table [N, K] of floats or int8 codes (an embedding or head).
#pragma once

#include <cstddef>
#include <cstdint>

namespace fabric {

// kInt8 are codes with a float16 scale for each 32 of a row; only the product of few rows has them.
enum class TableType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };
constexpr int64_t kTableGroup = 32;

// Forward y [M, N] = x [M, K] . table^T; transposed y [M, K] = x [M, N] . table.
struct TableJob {
  TableType type;
  const void* table;
  const uint16_t* scales;  // [N, ceil(K / 32)] of kInt8, else null
  int64_t rows;   // N
  int64_t width;  // K
  int64_t m;
  const float* x;
  float* y;
};

constexpr int64_t kTableFewRows = 16;  // up to this many rows of x, the table is read row by row
constexpr int64_t kTableBlock = 1024;  // table rows that a pass of the transposed product takes

struct TableKernels {
  // Floats of `blocks` packed blocks of rows, `steps` deep.
  int64_t (*packed_floats)(int64_t m, int64_t steps);
  int64_t (*row_blocks)(int64_t m);
  // Packs block `i` of the rows of x [m, stride], columns [first, first + steps).
  void (*pack)(const float* x, int64_t m, int64_t stride, int64_t first, int64_t steps, int64_t i,
               float* packed);
  int64_t (*forward_units)(const TableJob&);
  void (*forward)(const TableJob&, const float* packed, int64_t unit);
  int64_t (*few_rows_units)(const TableJob&);
  void (*few_rows)(const TableJob&, int64_t unit);
  // Adds the share of table rows [first, first + steps).
  int64_t (*transposed_units)(const TableJob&);
  void (*transposed)(const TableJob&, const float* packed, int64_t first, int64_t steps,
                     int64_t unit);
};

}  // namespace fabric
