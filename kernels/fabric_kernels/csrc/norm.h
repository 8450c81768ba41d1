// RMS normalisation of rows, alone or of a gated product: y = p / sqrt(mean(p^2) + eps) * gain with
// p = x, or p = act(gate) * up.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fabric {

enum class Gate : int32_t { kNone = 0, kSilu = 1, kSquaredRelu = 2 };

struct NormJob {
  Gate gate;
  bool normalise;     // false: y = p
  int64_t width;
  float eps;
  const float* x;     // [M, width]: x or the gate
  const float* up;    // [M, width], with a gate
  const float* gain;  // [width], where normalised
  const float* dy;    // [M, width], backward
  float* y;           // [M, width]; backward: gradient by x or the gate
  float* d_up;        // [M, width], backward with a gate
};

struct NormKernels {
  void (*forward)(const NormJob&, int64_t row);
  void (*backward)(const NormJob&, int64_t row);
};

}  // namespace fabric
