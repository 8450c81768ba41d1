// Compares the kernels of one instruction set with scalar arithmetic and prints a digest of all
// results that are equal on every machine. No argument: the set that SelectKernels chooses.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "reference.h"

namespace fabric {
const Kernels* AvxVnniEvexKernels();

// Scratch that is never longer than asked for and never holds what it held before.
uint8_t* ThreadScratch(Slot slot, size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static std::unique_ptr<uint8_t, Free> buffers[static_cast<int>(Slot::kCount)];
  void* fresh = nullptr;
  if (posix_memalign(&fresh, 64, bytes) != 0) std::abort();
  std::memset(fresh, 0xa5, bytes);
  buffers[static_cast<int>(slot)].reset(static_cast<uint8_t*>(fresh));
  return static_cast<uint8_t*>(fresh);
}
}  // namespace fabric

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

// FNV-1a; every NaN counts as the same.
struct Digest {
  uint64_t value = 14695981039346656037u;
  void Add(uint32_t word) { value = (value ^ word) * 1099511628211u; }
  void Add(float number) {
    uint32_t bits = 0x7fc00000;
    if (!std::isnan(number)) std::memcpy(&bits, &number, 4);
    Add(bits);
  }
};

int failures = 0;

void Expect(bool good, const Shape& shape, const char* what, int64_t m, int64_t column,
            double found, double expected) {
  if (good || ++failures > 20) return;
  std::printf("%s: format %d transposed %d digits %d rank %d m %d k %d n %d groups %d: "
              "[%d, %d] is %.9g, expected %.9g\n",
              what, int(shape.format), shape.transposed, shape.digits, int(shape.rank),
              int(shape.m), int(shape.k), int(shape.n[0]), int(shape.n.size()), int(m),
              int(column), found, expected);
}

// narrow = scale * x A^T; transposed: scale * g B^T.
void CheckNarrow(const Shape& shape, const Problem& problem, int group) {
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
      Expect(std::fabs(found - sum) <= 2e-6 * magnitude, shape, "narrow", m, r, found, sum);
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
      const double term =
          double(adapter.narrow[m * adapter.rank + r]) * rows[r * width + column];
      wide.sum += term;
      wide.magnitude += std::fabs(term);
    }
  }
  return wide;
}

void CheckFloat(const Shape& shape, const Problem& problem, const Row& row, int64_t m, int group,
                int64_t column, float found) {
  const Job& job = problem.job;
  if (std::isnan(row.factor)) {
    return Expect(std::isnan(found), shape, "not finite", m, column, found, row.factor);
  }
  const Product product = Multiply(problem, row, group, column);
  const float scale = job.transposed ? 1.0f : job.matrix[group].scale;
  const float once = float(product.sum) * row.factor * scale;
  if (shape.rank == 0 && job.digits < 3) {
    return Expect(found == once, shape, "product", m, column, found, once);
  }
  const Wide wide = AdapterPart(job, m, group, column);
  const double step = std::fabs(double(row.factor) * scale), ulp = std::ldexp(1.0, -24);
  const double expected = double(product.sum) * row.factor * scale;
  // Two parts of a sum of three digits are rounded, and the products with two factors.
  const double rounding =
      5 * ulp * step * (std::fabs(double(product.sum)) + 128 * product.magnitude) +
      1e-6 * wide.magnitude + (shape.rank > 0 ? 1e-6 * std::fabs(expected) : 0);
  Expect(std::fabs(found - expected - wide.sum) <= rounding, shape, "product", m, column, found,
         expected + wide.sum);
  // The fixed point itself: half a step for each input, and the rounding of the float products.
  const double exact = Exact(problem, m, group, column);
  if (row.factor != 0) {
    Expect(std::fabs(expected - exact) <= 2.5 * product.magnitude * step, shape, "fixed point", m,
           column, expected, exact);
  }
}

void Check(const Kernels& kernels, Random& random, const Shape& shape, Digest& digest) {
  const Problem problem = MakeProblem(random, shape);
  const Job& job = problem.job;
  Run(kernels, job);
  for (int g = 0; shape.rank > 0 && g < job.groups; ++g) CheckNarrow(shape, problem, g);
  for (int64_t m = 0; m < shape.m; ++m) {
    const Row row = QuantizeRow(job, m);
    for (int g = 0; g < (shape.transposed ? 1 : job.groups); ++g) {
      const int64_t width = shape.transposed ? shape.k : shape.n[size_t(g)];
      for (int64_t i = 0; i < width; ++i) {
        if (shape.codes) {
          const int64_t expected = Multiply(problem, row, g, i).sum;
          const int32_t found = problem.sums[size_t(m * width + i)];
          Expect(found == expected, shape, "sum", m, i, found, double(expected));
          digest.Add(uint32_t(found));
        } else {
          const float found = problem.groups[size_t(g)].out[size_t(m * width + i)];
          CheckFloat(shape, problem, row, m, g, i, found);
          if (shape.rank == 0) digest.Add(found);
        }
      }
    }
  }
}

// out = narrow^T x
void CheckOuter(const Kernels& kernels, Random& random, int64_t rows, int64_t rank,
                int64_t width) {
  const std::vector<float> narrow = random.Floats(rows * rank), x = random.Floats(rows * width);
  std::vector<float> out(size_t(rank * width), 1.5e38f);
  for (int64_t unit = 0; unit < kernels.outer_units(width); ++unit) {
    kernels.outer(narrow.data(), x.data(), rows, rank, width, unit * kernels.outer_columns,
                  out.data());
  }
  const Shape shape{Format::kTernary2, false, false, 0, rank, rows, width, {0}};
  for (int64_t r = 0; r < rank; ++r) {
    for (int64_t c = 0; c < width; ++c) {
      double sum = 0, magnitude = 0;
      for (int64_t m = 0; m < rows; ++m) {
        const double term = double(narrow[size_t(m * rank + r)]) * x[size_t(m * width + c)];
        sum += term;
        magnitude += std::fabs(term);
      }
      const double found = out[size_t(r * width + c)];
      Expect(std::fabs(found - sum) <= 5e-6 * magnitude, shape, "outer", r, c, found, sum);
    }
  }
}

void CheckAll(const Kernels& kernels, Digest& digest) {
  struct Sizes {
    std::vector<int64_t> n;
    int64_t k;
    std::vector<int64_t> m;
  };
  // Rows longer than one block of each loop, matrices of more rows than one, one and no remainder.
  const std::vector<Sizes> all = {
      {{1}, 1, {1, 2, 4, 5, 13, 1000}},
      {{3}, 5, {1, 3, 7, 600}},
      {{33}, 257, {1, 2, 3, 4, 5, 6, 11, 12, 25, 129}},
      {{7, 40, 65}, 333, {1, 2, 3, 9, 37}},
      {{64}, 320, {1, 4, 8, 24}},
      {{5, 66}, 2701, {1, 2, 7}},
      {{67}, 8003, {1, 4}},
      {{1029}, 37, {1, 5, 8}},
  };
  Random random;
  for (const Sizes& sizes : all) {
    for (int64_t m : sizes.m) {
      for (Format format : {Format::kTernary2, Format::kTernary1_6}) {
        Check(kernels, random, {format, false, true, 1, 0, m, sizes.k, {sizes.n[0]}}, digest);
        for (int digits = 1; digits <= 3; ++digits) {
          const int64_t rank = 1 + (m + digits) % 9;
          for (int64_t r : {int64_t{0}, rank}) {
            Check(kernels, random, {format, false, false, digits, r, m, sizes.k, sizes.n}, digest);
            if (digits == 1) continue;
            Check(kernels, random, {format, true, false, digits, r, m, sizes.k, sizes.n}, digest);
          }
        }
      }
      for (int64_t n : sizes.n) CheckOuter(kernels, random, m, 1 + m % 9, n);
      CheckOuter(kernels, random, m, 8, sizes.k);
    }
  }
}

const Kernels* Find(const char* wanted, const char** error) {
  if (wanted == nullptr) return fabric::SelectKernels(error);
  *error = "avxvnni-evex is the only name that may be given";
  if (std::strcmp(wanted, "avxvnni-evex")) return nullptr;
  *error = "avxvnni-evex is not available here";
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni")) return nullptr;
#endif
  return fabric::AvxVnniEvexKernels();
}

}  // namespace

int main(int argc, char** argv) {
  const char* error = nullptr;
  const Kernels* kernels = Find(argc > 1 ? argv[1] : nullptr, &error);
  if (kernels == nullptr) {
    std::printf("unavailable: %s\n", error);
    return 2;
  }
  Digest digest;
  CheckAll(*kernels, digest);
  if (failures > 0) {
    std::printf("%s: %d results are wrong\n", kernels->name, failures);
    return 1;
  }
  std::printf("%s %016llx\n", kernels->name, static_cast<unsigned long long>(digest.value));
  return 0;
}
