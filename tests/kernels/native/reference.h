// What the kernels must compute, in scalar arithmetic.
#pragma once

#include <algorithm>
#include <cmath>

#include "problem.h"

// One row of inputs as the integers that stand for it.
struct Row {
  std::vector<int64_t> values;  // of all groups one after another
  float factor;                 // of the results; NaN if the inputs are not finite
};

inline float AbsMax(const float* x, int64_t n) {
  float top = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return std::numeric_limits<float>::infinity();
    top = std::max(top, std::fabs(x[i]));
  }
  return top;
}

inline void Append(const float* x, int64_t n, float scale, std::vector<int64_t>& values) {
  for (int64_t i = 0; i < n; ++i) {
    const float product = x[i] * scale;
    values.push_back(int64_t(std::nearbyint(product)));
  }
}

inline Row QuantizeRow(const fabric::Job& job, int64_t m) {
  Row row{{}, 1.0f};
  if (job.codes != nullptr) {
    row.values.assign(job.codes + m * job.k, job.codes + (m + 1) * job.k);
    return row;
  }
  // What is contracted: the inputs once, or each group's gradient.
  struct Part {
    const float* x;
    int64_t n;
    float scale;
  };
  std::vector<Part> parts;
  if (!job.transposed) parts.push_back({job.floats[0] + m * job.k, job.k, 1.0f});
  for (int g = 0; job.transposed && g < job.groups; ++g) {
    const int64_t n = job.matrix[g].rows;
    parts.push_back({job.floats[g] + m * n, n, job.matrix[g].scale});
  }
  float absmax = 0;
  int64_t width = 0;
  for (const Part& part : parts) {
    absmax = std::max(absmax, AbsMax(part.x, part.n) * std::fabs(part.scale));
    width += part.n;
  }
  if (!std::isfinite(absmax)) {
    row.values.assign(size_t(width), 0);
    row.factor = std::numeric_limits<float>::quiet_NaN();
  } else if (job.digits == 1) {
    const float scale = (1.0f / std::max(absmax, 1e-5f)) * 127.0f;
    Append(parts[0].x, parts[0].n, scale, row.values);
    row.factor = 1.0f / scale;
  } else if (absmax < 1e-30f) {
    row.values.assign(size_t(width), 0);
    row.factor = 0;
  } else {
    const float largest = job.digits == 2 ? 127.0f * 256 : 127.0f * 65536;
    for (const Part& part : parts) {
      Append(part.x, part.n, part.scale * (largest / absmax), row.values);
    }
    row.factor = absmax / largest;
  }
  return row;
}

struct Product {
  int64_t sum;       // of value times code
  double magnitude;  // of |code|
};

// Element (row of `values`, column) of the output of `group`.
inline Product Multiply(const Problem& problem, const Row& row, int group, int64_t column) {
  const fabric::Job& job = problem.job;
  Product product{0, 0};
  const auto add = [&](int64_t value, int64_t code) {
    product.sum += value * code;
    product.magnitude += std::fabs(double(code));
  };
  if (!job.transposed) {
    const int32_t* codes = problem.groups[size_t(group)].codes.data() + column * job.k;
    for (int64_t k = 0; k < job.k; ++k) add(row.values[size_t(k)], codes[k]);
    return product;
  }
  size_t i = 0;
  for (int g = 0; g < job.groups; ++g) {
    const std::vector<int32_t>& codes = problem.groups[size_t(g)].codes;
    for (int64_t n = 0; n < job.matrix[g].rows; ++n) {
      add(row.values[i++], codes[size_t(n * job.k + column)]);
    }
  }
  return product;
}

// The same element in double from the inputs as they are.
inline double Exact(const Problem& problem, int64_t m, int group, int64_t column) {
  const fabric::Job& job = problem.job;
  double sum = 0;
  for (int g = 0; g < job.groups; ++g) {
    const std::vector<int32_t>& codes = problem.groups[size_t(g)].codes;
    if (!job.transposed && g != group) continue;
    const int64_t n = job.transposed ? job.matrix[g].rows : job.k;
    const float* x = job.floats[job.transposed ? g : 0] + m * n;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = job.transposed ? i * job.k + column : column * job.k + i;
      sum += double(x[i]) * codes[size_t(at)] * double(job.matrix[g].scale);
    }
  }
  return sum;
}
