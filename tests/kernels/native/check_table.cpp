// Products with a table of float32, bfloat16 or float16.
#include <algorithm>

#include "report.h"

namespace {

using fabric::Kernels;
using fabric::TableJob;
using fabric::TableKernels;
using fabric::TableType;

struct Table {
  TableType type;
  std::vector<uint8_t> bytes;
  std::vector<double> values;
};

uint32_t Bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The number that sign, exponent and fraction of an IEEE half stand for.
double Half(uint32_t bits) {
  const int exponent = int(bits >> 10) & 31;
  const double fraction = (bits & 1023) / 1024.0;
  const double x = exponent == 0 ? std::ldexp(fraction, -14)
                                 : std::ldexp(1 + fraction, exponent - 15);
  return bits & 0x8000 ? -x : x;
}

Table MakeTable(Random& random, TableType type, int64_t size) {
  Table table{type, {}, {}};
  const size_t width = type == TableType::kFloat32 ? 4 : 2;
  table.bytes = std::vector<uint8_t>(size_t(size) * width);
  for (int64_t i = 0; i < size; ++i) {
    const float x = random.Float();
    uint32_t bits = Bits(x);
    double value = x;
    if (type == TableType::kBFloat16) {
      bits >>= 16;
      const uint32_t cut = bits << 16;
      float rounded;
      std::memcpy(&rounded, &cut, 4);
      value = rounded;
    } else if (type == TableType::kFloat16) {
      bits = uint32_t(random.Below(65536)) & 0xbbff;  // subnormal ones too; all below two
      value = Half(bits);
    }
    std::memcpy(table.bytes.data() + size_t(i) * width, &bits, width);
    table.values.push_back(value);
  }
  return table;
}

// As the handlers of XLA's calls do, in one thread.
void Forward(const TableKernels& kernels, const TableJob& job) {
  if (job.m <= fabric::kTableFewRows) {
    const int64_t units = kernels.few_rows_units(job);
    for (int64_t i = 0; i < units; ++i) kernels.few_rows(job, i);
    return;
  }
  std::vector<float> packed(size_t(kernels.packed_floats(job.m, job.width)), kUnwritten);
  for (int64_t i = 0; i < kernels.row_blocks(job.m); ++i) {
    kernels.pack(job.x, job.m, job.width, 0, job.width, i, packed.data());
  }
  const int64_t units = kernels.forward_units(job);
  for (int64_t i = 0; i < units; ++i) kernels.forward(job, packed.data(), i);
}

void Transposed(const TableKernels& kernels, const TableJob& job) {
  for (int64_t n = 0; n < job.rows; n += fabric::kTableBlock) {
    const int64_t steps = std::min(fabric::kTableBlock, job.rows - n);
    std::vector<float> packed(size_t(kernels.packed_floats(job.m, steps)), kUnwritten);
    for (int64_t i = 0; i < kernels.row_blocks(job.m); ++i) {
      kernels.pack(job.x, job.m, job.rows, n, steps, i, packed.data());
    }
    const int64_t units = kernels.transposed_units(job);
    for (int64_t i = 0; i < units; ++i) kernels.transposed(job, packed.data(), n, steps, i);
  }
}

void CheckShape(const TableKernels& kernels, Random& random, TableType type, bool transposed,
                int64_t m, int64_t n, int64_t k, Report& report) {
  report.Begin(std::string(transposed ? "table transposed" : "table") + " type " +
               std::to_string(int(type)) + " m " + std::to_string(m) + " n " + std::to_string(n) +
               " k " + std::to_string(k));
  const Table table = MakeTable(random, type, n * k);
  const int64_t in = transposed ? n : k, out = transposed ? k : n;
  const std::vector<float> x = random.Floats(m * in);
  std::vector<float> y(size_t(m * out), kUnwritten);
  const TableJob job{type, table.bytes.data(), nullptr, n, k, m, x.data(), y.data()};
  transposed ? Transposed(kernels, job) : Forward(kernels, job);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < out; ++column) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < in; ++i) {
        const int64_t at = transposed ? i * k + column : column * k + i;
        const double term = x[size_t(row * in + i)] * table.values[size_t(at)];
        sum += term;
        magnitude += std::fabs(term);
      }
      const double found = y[size_t(row * out + column)];
      report.Expect(std::fabs(found - sum) <= SumError(in, magnitude), "sum", row, column, found,
                    sum);
    }
  }
}

}  // namespace

void CheckTable(const Kernels& kernels, Random& random, Report& report) {
  struct Sizes {
    int64_t n, k;
    std::vector<int64_t> m;
  };
  const std::vector<Sizes> all = {{1, 1, {1, 4}},
                                  {67, 131, {1, 2, 3, 4, 7, 12, 25}},
                                  {64, 128, {3, 24}},
                                  {9, 1099, {1, 5}},
                                  {2085, 19, {1, 5}}};
  for (const Sizes& sizes : all) {
    for (int64_t m : sizes.m) {
      for (TableType type : {TableType::kFloat32, TableType::kBFloat16, TableType::kFloat16}) {
        for (bool transposed : {false, true}) {
          CheckShape(*kernels.table, random, type, transposed, m, sizes.n, sizes.k, report);
        }
      }
    }
  }
}
