// Products with packed weights and their adapters.
#include <algorithm>

#include "reference.h"
#include "report.h"

namespace {

using fabric::Job;
using fabric::Kernels;

// As the handlers of XLA's calls do, in one thread.
void Run(const Kernels& kernels, const Job& job) {
  constexpr int64_t kMaxRows = 512;
  const int64_t most = kMaxRows / job.digits;
  const int64_t pieces = (job.rows + most - 1) / most;
  const int64_t piece = (job.rows + pieces - 1) / pieces;
  for (int64_t first = 0; first < job.rows; first += piece) {
    const int64_t tokens = std::min(piece, job.rows - first), rows = tokens * job.digits;
    const bool few = !job.transposed && rows <= fabric::kFewRows;
    const size_t bytes = kernels.operand_bytes(job, rows, few);
    std::vector<int32_t> dwords((bytes + 3) / 4, 0x5a5a5a5a), sums(static_cast<size_t>(rows));
    std::vector<float> factors(static_cast<size_t>(tokens));
    const fabric::Operand operand{rows, kernels.steps(job), dwords.data(), sums.data(),
                                  factors.data()};
    for (int64_t t = 0; t < tokens; ++t) kernels.prepare(job, operand, first + t, t, few);
    const auto unit = few ? kernels.run_few_rows : kernels.run_unit;
    const int64_t units = kernels.units(job, few);
    for (int64_t i = 0; i < units; ++i) unit(job, operand, i, first, tokens);
  }
}

// narrow = scale * x A^T; transposed: scale * g B^T.
void CheckNarrow(const Shape& shape, const Problem& problem, int group, Report& report) {
  const Job& job = problem.job;
  const fabric::Adapter& adapter = job.adapter[group];
  const int64_t n = job.transposed ? job.matrix[group].rows : job.k;
  const float* rows = job.transposed ? adapter.b : adapter.a;
  for (int64_t m = 0; m < shape.m; ++m) {
    const float* x = job.floats[job.transposed ? group : 0] + m * n;
    for (int64_t r = 0; r < adapter.rank; ++r) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double term = double(x[i]) * rows[r * n + i] * adapter.scale;
        sum += term;
        magnitude += std::fabs(term);
      }
      const double found = adapter.narrow[m * adapter.rank + r];
      report.Expect(std::fabs(found - sum) <= SumError(n, magnitude), "narrow", m, r,
                    found, sum);
    }
  }
}

struct Wide {
  double sum, magnitude;
};

// What the adapters add to an element, from the narrow products that the kernels stored.
Wide AdapterPart(const Job& job, int64_t m, int group, int64_t column) {
  Wide wide{0, 0};
  for (int g = 0; g < job.groups; ++g) {
    const fabric::Adapter& adapter = job.adapter[g];
    if (!job.transposed && g != group) continue;
    const int64_t width = job.transposed ? job.k : job.matrix[g].rows;
    const float* rows = job.transposed ? adapter.a : adapter.b;
    for (int64_t r = 0; r < adapter.rank; ++r) {
      const double term = double(adapter.narrow[m * adapter.rank + r]) * rows[r * width + column];
      wide.sum += term;
      wide.magnitude += std::fabs(term);
    }
  }
  return wide;
}

void CheckFloat(const Shape& shape, const Problem& problem, const Row& row, int64_t m, int group,
                int64_t column, Report& report) {
  const Job& job = problem.job;
  const int64_t width = shape.transposed ? shape.k : shape.n[size_t(group)];
  const float found = job.out[group][m * width + column];
  if (shape.rank == 0) report.Digest(found);
  if (std::isnan(row.factor)) {
    return report.Expect(std::isnan(found), "not finite", m, column, found, row.factor);
  }
  const Product product = Multiply(problem, row, group, column);
  const float scale = job.transposed ? 1.0f : job.matrix[group].scale;
  if (shape.rank == 0 && job.digits < 3) {
    const float expected = float(product.sum) * (row.factor * scale);
    return report.Expect(found == expected, "product", m, column, found, expected);
  }
  const Wide wide = AdapterPart(job, m, group, column);
  const double step = std::fabs(double(row.factor) * scale);
  const double expected = double(product.sum) * row.factor * scale;
  // The two parts of a sum of three digits are rounded, their sum, and the products with factors;
  // then the sum with each row of the adapter.
  const double parts = std::fabs(double(product.sum)) + 128 * product.magnitude;
  const double rounding = 5 * kHalfUlp * step * parts +
                          SumError(shape.rank * job.groups, std::fabs(expected) + wide.magnitude);
  report.Expect(std::fabs(found - expected - wide.sum) <= rounding, "product", m,
                column, found, expected + wide.sum);
  // The fixed point itself: half a step for each input, and the rounding of the float products.
  if (job.digits == 1 || row.factor == 0) return;
  const double exact = Exact(problem, m, group, column);
  report.Expect(std::fabs(expected - exact) <= 2.5 * product.magnitude * step,
                "fixed point", m, column, expected, exact);
}

void CheckShape(const Kernels& kernels, Random& random, const Shape& shape, Report& report) {
  report.Begin(shape.Name());
  const Problem problem = MakeProblem(random, shape);
  Run(kernels, problem.job);
  const int groups = shape.transposed ? 1 : problem.job.groups;
  for (int g = 0; shape.rank > 0 && g < problem.job.groups; ++g) {
    CheckNarrow(shape, problem, g, report);
  }
  for (int64_t m = 0; m < shape.m; ++m) {
    const Row row = QuantizeRow(problem.job, m);
    for (int g = 0; g < groups; ++g) {
      const int64_t width = shape.transposed ? shape.k : shape.n[size_t(g)];
      for (int64_t i = 0; i < width; ++i) {
        if (!shape.codes) {
          CheckFloat(shape, problem, row, m, g, i, report);
          continue;
        }
        const int64_t expected = Multiply(problem, row, g, i).sum;
        const int32_t found = problem.sums[size_t(m * width + i)];
        report.Expect(found == expected, "sum", m, i, found, double(expected));
        report.Digest(uint32_t(found));
      }
    }
  }
}

// All products of one size.
void CheckSizes(const Kernels& kernels, Random& random, const std::vector<int64_t>& n, int64_t k,
                int64_t m, Report& report) {
  for (Format format : {Format::kTernary2, Format::kTernary1_6}) {
    CheckShape(kernels, random, {format, false, true, 1, 0, m, k, {n[0]}}, report);
    for (int digits = 1; digits <= fabric::kMaxDigits; ++digits) {
      for (int64_t rank : {int64_t{0}, 1 + (m + digits) % 9}) {
        CheckShape(kernels, random, {format, false, false, digits, rank, m, k, n}, report);
        if (digits == 1) continue;
        CheckShape(kernels, random, {format, true, false, digits, rank, m, k, n}, report);
      }
    }
  }
}

}  // namespace

void CheckTernary(const Kernels& kernels, Random& random, Report& report) {
  struct Sizes {
    std::vector<int64_t> n;
    int64_t k;
    std::vector<int64_t> m;
  };
  // Rows longer than a block of each loop, more rows than a block, and whole vectors throughout.
  std::vector<Sizes> all = {
      {{1}, 1, {1, 2, 4, 5, 13, 1000}},
      {{3}, 5, {1, 3, 7, 600}},
      {{17}, 33, {1000}},
      {{33}, 257, {1, 2, 3, 4, 5, 6, 11, 12, 25, 63}},
      {{7, 40, 65}, 333, {1, 2, 3, 9, 37}},
      {{64}, 320, {1, 4, 8, 24}},
      {{5, 66}, 2701, {1, 2, 5}},
      {{37}, 8003, {1, 2}},
      {{1029}, 37, {1, 5, 8}},
      // Sums of two digits longer than 32 bits.
      {{2}, 70001, {1, 3}},
      {{70001}, 3, {2}},
  };
  // Rows of every length modulo the vectors'.
  for (int64_t k = 1; k <= 330; ++k) all.push_back({{3}, k, {1 + 4 * (k % 2)}});
  for (const Sizes& sizes : all) {
    for (int64_t m : sizes.m) CheckSizes(kernels, random, sizes.n, sizes.k, m, report);
  }
}

// out [rank, width] = narrow [rows, rank]^T x [rows, width]
void CheckOuter(const Kernels& kernels, Random& random, Report& report) {
  struct Sizes {
    int64_t rows, rank, width;
  };
  for (const Sizes& s : {Sizes{1, 1, 1}, {5, 3, 63}, {37, 8, 64}, {129, 9, 257}, {1000, 4, 131}}) {
    report.Begin("outer rows " + std::to_string(s.rows) + " rank " + std::to_string(s.rank) +
                 " width " + std::to_string(s.width));
    const std::vector<float> narrow = random.Floats(s.rows * s.rank);
    const std::vector<float> x = random.Floats(s.rows * s.width);
    std::vector<float> out(size_t(s.rank * s.width), kUnwritten);
    for (int64_t unit = 0; unit < kernels.outer_units(s.width); ++unit) {
      kernels.outer(narrow.data(), x.data(), s.rows, s.rank, s.width,
                    unit * kernels.outer_columns, out.data());
    }
    for (int64_t r = 0; r < s.rank; ++r) {
      for (int64_t c = 0; c < s.width; ++c) {
        double sum = 0, magnitude = 0;
        for (int64_t m = 0; m < s.rows; ++m) {
          const double term = double(narrow[size_t(m * s.rank + r)]) * x[size_t(m * s.width + c)];
          sum += term;
          magnitude += std::fabs(term);
        }
        const double found = out[size_t(r * s.width + c)];
        report.Expect(std::fabs(found - sum) <= SumError(s.rows, magnitude), "sum", r, c, found,
                      sum);
      }
    }
  }
}
