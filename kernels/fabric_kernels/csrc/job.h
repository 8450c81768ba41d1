// What one call computes, and the functions that an instruction set provides for it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "cached_attention.h"
#include "norm.h"
#include "peaks.h"
#include "table.h"

namespace fabric {

// Byte layouts of fabric_kernels/packing.py.
enum class Format : int32_t {
  kTernary2 = 0,    // byte i of a row: codes 4i .. 4i+3, two bits each, lowest first
  kTernary1_6 = 1,  // digit j of byte i, base 3, most significant first: code j * row_bytes + i
};

constexpr int kMaxGroups = 4;   // matrices in one call: q, k and v; gate and up
constexpr int kMaxDigits = 3;   // int8 digits of one activation
constexpr int kFewRows = 4;     // up to this many rows of digits take the kernel for few rows

struct Matrix {
  const uint8_t* bytes;  // [rows, row_bytes]
  int64_t rows;          // N
  int64_t row_bytes;
  float scale;
};

// A low-rank adapter beside a matrix; rank 0 for none.
struct Adapter {
  int64_t rank;
  const float* a;   // [R, K]
  const float* b;   // [R, N]
  float scale;
  float* narrow;    // [M, R]: scale * x A^T; transposed: scale * g B^T
};

// y_g = x . codes_g^T for each matrix (forward), or dx = sum_g g_g . codes_g (transposed).
//
// Activations enter the integer products as rows of int8 digits: one digit for codes (given, or
// quantised here by absmax), two or three for fixed-point numbers of 16 or 24 bits a row.
struct Job {
  Format format;
  bool transposed;
  int digits;
  int groups;
  int64_t k;              // codes in a row of the matrices
  int64_t rows;           // M
  Matrix matrix[kMaxGroups];
  Adapter adapter[kMaxGroups];        // only with float inputs and outputs
  const int8_t* codes;                // [M, K] or null
  const float* floats[kMaxGroups];    // [M, K]; transposed: [M, N_g] for each matrix
  int32_t* sums;                      // integer output [M, N], or null
  float* out[kMaxGroups];             // float outputs [M, N_g]; transposed: out[0] is [M, K]
};

// Activations as the kernels read them. `rows` counts rows of digits: M times digits.
struct Operand {
  int64_t rows;
  int64_t steps;      // groups of four digits along the contracted axis
  int32_t* dwords;    // [ceil(rows / tile_rows), steps, tile_rows], or planes for few rows
  int32_t* sums;      // [rows]: sum of the digits of a row
  float* factors;     // [M]: the float that a row's integer result is multiplied by
};

constexpr int kRowParts = 4;  // parts of a matrix that a product of few rows reads side by side

// The rows that a piece of a product of few rows computes: [begin, end) of every part.
struct FewRowsRange {
  int group;
  int64_t begin;
  int64_t end;
  int64_t part;  // rows of a part
  int64_t rows;  // of the matrix

  // Those of one part as rows of the matrix.
  int64_t Begin(int i) const { return std::min(rows, i * part + begin); }
  int64_t End(int i) const { return std::min(rows, i * part + end); }
};

struct Kernels {
  const char* name;
  int tile_rows;
  int lanes;
  // Steps of the contracted axis, rounded up to what the layout needs.
  int64_t (*steps)(const Job&);
  // Bytes of Operand::dwords.
  size_t (*operand_bytes)(const Job&, int64_t rows, bool few_rows);
  // Quantises, splits into digits and arranges token `m` of `job` as token `slot` of `operand`.
  void (*prepare)(const Job&, const Operand&, int64_t m, int64_t slot, bool few_rows);
  // Independent pieces of the output, and one of them for `tokens` tokens starting at `first`.
  int64_t (*units)(const Job&, bool few_rows);
  void (*run_unit)(const Job&, const Operand&, int64_t unit, int64_t first, int64_t tokens);
  void (*run_few_rows)(const Job&, const Operand&, int64_t unit, int64_t first, int64_t tokens);
  FewRowsRange (*few_rows_range)(const Job&, int64_t unit);
  // out [rank, width] = narrow[rows, rank]^T x[rows, width], in pieces of columns.
  int64_t (*outer_units)(int64_t width);
  void (*outer)(const float* narrow, const float* x, int64_t rows, int64_t rank, int64_t width,
                int64_t at, float* out);
  int outer_columns;
  const TableKernels* table;
  const NormKernels* norm;
  const AttentionKernels* attention;
  const CachedAttentionKernels* cached_attention;
  const PeakKernels* peaks;
};

// The table of an instruction set, or null where the compiler could not target it.
const Kernels* Avx512VnniKernels();
const Kernels* AvxVnniKernels();
const Kernels* Avx2Kernels();
const Kernels* NeonDotKernels();
const Kernels* PortableKernels();

// The best table that this processor runs. FABRIC_KERNELS_ISA names one instead; a name that is
// unknown or can't run here gives null and a message.
const Kernels* SelectKernels(const char** error);

// Scratch of the calling thread, 64-byte aligned, kept for its next call.
enum class Slot { kOperand, kPanel, kTile, kRow, kNarrow, kTail, kCount };
uint8_t* ThreadScratch(Slot slot, size_t bytes);

}  // namespace fabric
