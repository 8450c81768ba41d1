// The kernels for one instruction set. A file kernels_<isa>.cpp opens a target region and an
// anonymous namespace, includes the header with `struct Isa`, then this one.
#pragma once

using Vec = Isa::Vec;
constexpr int kLanes = Isa::kLanes;
constexpr int kPanel = 2 * kLanes;      // columns that a tile computes at once
constexpr int kVecBytes = 4 * kLanes;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

#include "adapter_impl.h"
#include "prepare_impl.h"
#include "fields_impl.h"
#include "row_parts_impl.h"
#include "few_rows_impl.h"
#include "tile_impl.h"
#include "table_impl.h"
#include "math_impl.h"
#include "norm_impl.h"
#include "attention_impl.h"
#include "cached_attention_impl.h"
#include "peaks_impl.h"

constexpr Kernels MakeTable(const char* name) {
  return {name,     Isa::kTileRows, kLanes,      &Steps,      &OperandBytes, &Prepare,
          &Units,   &RunUnit,       &RunFewRows, &RangeOf,    &OuterUnits,   &OuterUnit,
          kOuterColumns,
          &kTableKernels, &kNormKernels, &attention::kTable,
          &cached_attention::kTable, &kPeakKernels};
}
