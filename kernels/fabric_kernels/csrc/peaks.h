// What an instruction set can do at most, for comparison.
#pragma once

#include <cstdint>

namespace fabric {

struct PeakKernels {
  // `steps` times one dot product on each of the accumulators that registers hold, on operands of
  // two vectors; the sum of all, so that none can be left out.
  int32_t (*dot)(int64_t steps, const int8_t* operands);
  // 8-bit multiplications and additions in a step.
  int64_t dot_operations;
  // The sum of the dwords of `bytes` bytes, read as four streams side by side (as the kernel for
  // few rows does) or as one; prefetched `ahead` bytes. A multiple of 1 KB.
  int32_t (*read)(const uint8_t* from, int64_t bytes, bool four, int64_t ahead);
};

}  // namespace fabric
