// Random problems for the kernels. Buffers are exactly as long as their contents, so that
// AddressSanitizer sees every access beyond them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "job.h"
#include "random.h"

using fabric::Format;

struct Shape {
  Format format;
  bool transposed;
  bool codes;      // int8 inputs, int32 outputs
  int digits;
  int64_t rank;    // of the adapters; 0 for none
  int64_t m, k;
  std::vector<int64_t> n;

  std::string Name() const {
    return std::string(codes ? "codes" : transposed ? "transposed" : "linear") + " format " +
           std::to_string(int(format)) + " digits " + std::to_string(digits) + " rank " +
           std::to_string(rank) + " m " + std::to_string(m) + " n " + std::to_string(n[0]) +
           " groups " + std::to_string(n.size()) + " k " + std::to_string(k);
  }
};

inline int64_t RowBytes(Format format, int64_t k) {
  return format == Format::kTernary2 ? (k + 3) / 4 : (k + 4) / 5;
}

struct Group {
  std::vector<uint8_t> bytes;  // one byte, then the rows: they are aligned to nothing
  std::vector<int32_t> codes;  // [N, K], as the bytes say
  std::vector<float> x;        // transposed: the gradient, [M, N]
  std::vector<float> a, b;     // adapter: [R, K], [R, N]
  std::vector<float> narrow;   // adapter: [M, R], written by the kernels
  std::vector<float> out;      // [M, N]; transposed: the first group's is [M, K]
};

// A job and all that it points to.
struct Problem {
  fabric::Job job{};
  std::vector<int8_t> codes;   // [M, K]
  std::vector<float> x;        // [M, K]
  std::vector<int32_t> sums;   // [M, N]
  std::vector<Group> groups;
};

// Any byte is decoded: fields of 3 and bytes that no packer writes count too.
inline int32_t Decode(Format format, const uint8_t* row, int64_t row_bytes, int64_t k) {
  if (format == Format::kTernary2) return ((row[k / 4] >> (2 * (k % 4))) & 3) - 1;
  int digit = 0;
  int rest = row[k % row_bytes];
  for (int64_t j = 0; j <= k / row_bytes; ++j) {
    digit = 3 * rest / 256;
    rest = 3 * rest % 256;
  }
  return digit - 1;
}

inline void FillMatrix(Random& random, const Shape& shape, int64_t n, Group& group) {
  const int64_t row_bytes = RowBytes(shape.format, shape.k);
  group.bytes = std::vector<uint8_t>(size_t(1 + n * row_bytes));
  for (uint8_t& byte : group.bytes) byte = uint8_t(random.Below(256));
  // The extremes, whose sums are the largest.
  for (int64_t i = 0; i < row_bytes; ++i) {
    group.bytes[size_t(1 + i)] = 255;
    if (n > 1) group.bytes[size_t(1 + row_bytes + i)] = 0;
  }
  group.codes.resize(size_t(n * shape.k));
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t k = 0; k < shape.k; ++k) {
      group.codes[size_t(r * shape.k + k)] =
          Decode(shape.format, group.bytes.data() + 1 + r * row_bytes, row_bytes, k);
    }
  }
}

// First a row whose sums are the longest; rows of zeros, of an infinity, of a NaN and of tiny
// numbers among the others.
inline void AddOddRows(std::vector<float>& x, int64_t rows, int64_t width) {
  std::fill(x.begin(), x.begin() + width, 0.75f);
  if (rows < 7) return;
  for (int64_t i = 0; i < width; ++i) {
    x[size_t(1 * width + i)] = 0;
    x[size_t(4 * width + i)] *= 1e-37f;
    x[size_t(5 * width + i)] *= 1e-20f;
  }
  x[size_t(2 * width + width / 2)] = -std::numeric_limits<float>::infinity();
  x[size_t(3 * width)] = std::numeric_limits<float>::quiet_NaN();
}

inline void FillInputs(Random& random, const Shape& shape, Problem& problem) {
  if (shape.codes) {
    problem.codes.resize(size_t(shape.m * shape.k));
    for (int8_t& code : problem.codes) code = int8_t(random.Below(256) - 128);
    for (int64_t i = 0; i < shape.k; ++i) {
      problem.codes[size_t(i)] = -128;
      if (shape.m > 1) problem.codes[size_t(shape.k + i)] = 127;
    }
    problem.job.codes = problem.codes.data();
    problem.sums.assign(size_t(shape.m * shape.n[0]), 0x5a5a5a5a);
    problem.job.sums = problem.sums.data();
  } else if (!shape.transposed) {
    problem.x = random.Floats(shape.m * shape.k);
    if (shape.rank == 0) AddOddRows(problem.x, shape.m, shape.k);
    problem.job.floats[0] = problem.x.data();
  }
}

inline Problem MakeProblem(Random& random, const Shape& shape) {
  Problem problem;
  fabric::Job& job = problem.job;
  job.format = shape.format;
  job.transposed = shape.transposed;
  job.digits = shape.digits;
  job.groups = int(shape.n.size());
  job.k = shape.k;
  job.rows = shape.m;
  FillInputs(random, shape, problem);
  problem.groups.resize(shape.n.size());
  for (size_t g = 0; g < shape.n.size(); ++g) {
    Group& group = problem.groups[g];
    const int64_t n = shape.n[g];
    FillMatrix(random, shape, n, group);
    job.matrix[g] = {group.bytes.data() + 1, n, RowBytes(shape.format, shape.k),
                     (g % 2 ? -1.0f : 1.0f) * (0.5f + std::fabs(random.Float()))};
    if (shape.transposed) {
      group.x = random.Floats(shape.m * n);
      if (shape.rank == 0) AddOddRows(group.x, shape.m, n);
      job.floats[g] = group.x.data();
    }
    if (shape.rank > 0) {
      group.a = random.Floats(shape.rank * shape.k);
      group.b = random.Floats(shape.rank * n);
      group.narrow.assign(size_t(shape.m * shape.rank), kUnwritten);
      job.adapter[g] = {shape.rank, group.a.data(), group.b.data(), 2.0f, group.narrow.data()};
    }
    if (!shape.codes && (g == 0 || !shape.transposed)) {
      group.out.assign(size_t(shape.m * (shape.transposed ? shape.k : n)), kUnwritten);
      job.out[g] = group.out.data();
    }
  }
  return problem;
}
