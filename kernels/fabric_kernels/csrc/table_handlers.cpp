// The calls that XLA makes for products with a table.
#include <algorithm>
#include <cstdint>

#include "job.h"
#include "parallel.h"
#include "table.h"
#include "xla/ffi/api/ffi.h"

namespace fabric {
namespace {

namespace ffi = xla::ffi;

// Rows of x taken at once: bounds the packed copy of them.
constexpr int64_t kMaxTokens = 256;

ffi::ErrorOr<TableJob> MakeJob(ffi::AnyBuffer table) {
  TableJob job{};
  switch (table.element_type()) {
    case ffi::F32:
      job.type = TableType::kFloat32;
      break;
    case ffi::BF16:
      job.type = TableType::kBFloat16;
      break;
    case ffi::F16:
      job.type = TableType::kFloat16;
      break;
    default:
      return ffi::Unexpected(
          ffi::Error::InvalidArgument("a table is float32, bfloat16 or float16"));
  }
  if (table.dimensions().size() != 2) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("a table has the shape [N, K]"));
  }
  job.table = table.untyped_data();
  job.rows = table.dimensions()[0];
  job.width = table.dimensions()[1];
  return job;
}

ffi::ErrorOr<const TableKernels*> Select() {
  const char* message = nullptr;
  const Kernels* kernels = SelectKernels(&message);
  if (kernels == nullptr) return ffi::Unexpected(ffi::Error::InvalidArgument(message));
  return kernels->table;
}

template <class Rows>
int64_t CountRows(const Rows& x) {
  int64_t rows = 1;
  const auto dims = x.dimensions();
  for (size_t i = 0; i + 1 < dims.size(); ++i) rows *= dims[i];
  return rows;
}

void Pack(ffi::ThreadPool& pool, const TableKernels& kernels, const float* x, int64_t m,
          int64_t stride, int64_t first, int64_t steps, float* packed) {
  ParallelFor(pool, kernels.row_blocks(m), [&](int64_t i) {
    kernels.pack(x, m, stride, first, steps, i, packed);
  });
}

// x float32 [..., K], table [N, K] -> float32 [..., N]
ffi::Error TableHandler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer table,
                        ffi::Result<ffi::Buffer<ffi::F32>> y) {
  auto made = MakeJob(table);
  if (made.has_error()) return made.error();
  auto selected = Select();
  if (selected.has_error()) return selected.error();
  const TableKernels& kernels = **selected;
  const int64_t rows = CountRows(x);
  for (int64_t first = 0; first < rows; first += kMaxTokens) {
    TableJob job = *made;
    job.m = std::min(kMaxTokens, rows - first);
    job.x = x.typed_data() + first * job.width;
    job.y = y->typed_data() + first * job.rows;
    if (job.m <= kTableFewRows) {
      ParallelFor(pool, kernels.few_rows_units(job),
                  [&](int64_t unit) { kernels.few_rows(job, unit); });
      continue;
    }
    float* packed = reinterpret_cast<float*>(ThreadScratch(
        Slot::kOperand, size_t(kernels.packed_floats(job.m, job.width)) * sizeof(float)));
    Pack(pool, kernels, job.x, job.m, job.width, 0, job.width, packed);
    ParallelFor(pool, kernels.forward_units(job),
                [&](int64_t unit) { kernels.forward(job, packed, unit); });
  }
  return ffi::Error::Success();
}

// x float32 [..., K], codes int8 [N, K], scales float16 [N, ceil(K / 32)] -> float32 [..., N]
ffi::Error BlockTableHandler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                             ffi::BufferR2<ffi::S8> codes, ffi::BufferR2<ffi::F16> scales,
                             ffi::Result<ffi::Buffer<ffi::F32>> y) {
  auto selected = Select();
  if (selected.has_error()) return selected.error();
  const TableKernels& kernels = **selected;
  TableJob job{};
  job.type = TableType::kInt8;
  job.table = codes.untyped_data();
  job.scales = static_cast<const uint16_t*>(scales.untyped_data());
  job.rows = codes.dimensions()[0];
  job.width = codes.dimensions()[1];
  const int64_t groups = (job.width + kTableGroup - 1) / kTableGroup;
  if (scales.dimensions()[0] != job.rows || scales.dimensions()[1] != groups ||
      x.dimensions().back() != job.width) {
    return ffi::Error::InvalidArgument("a table of codes: the shapes do not fit");
  }
  job.m = CountRows(x);
  job.x = x.typed_data();
  job.y = y->typed_data();
  ParallelFor(pool, kernels.few_rows_units(job),
              [&](int64_t unit) { kernels.few_rows(job, unit); });
  return ffi::Error::Success();
}

// g float32 [..., N], table [N, K] -> float32 [..., K]
ffi::Error TableTransposedHandler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> g,
                                  ffi::AnyBuffer table, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  auto made = MakeJob(table);
  if (made.has_error()) return made.error();
  auto selected = Select();
  if (selected.has_error()) return selected.error();
  const TableKernels& kernels = **selected;
  const int64_t rows = CountRows(g);
  for (int64_t first = 0; first < rows; first += kMaxTokens) {
    TableJob job = *made;
    job.m = std::min(kMaxTokens, rows - first);
    job.x = g.typed_data() + first * job.rows;
    job.y = y->typed_data() + first * job.width;
    float* packed = reinterpret_cast<float*>(ThreadScratch(
        Slot::kOperand, size_t(kernels.packed_floats(job.m, kTableBlock)) * sizeof(float)));
    for (int64_t n = 0; n < job.rows; n += kTableBlock) {
      const int64_t steps = std::min(kTableBlock, job.rows - n);
      Pack(pool, kernels, job.x, job.m, job.rows, n, steps, packed);
      ParallelFor(pool, kernels.transposed_units(job),
                  [&](int64_t unit) { kernels.transposed(job, packed, n, steps, unit); });
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fabric

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(FabricTable, fabric::TableHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FabricBlockTable, fabric::BlockTableHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::S8>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F16>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FabricTableTransposed, fabric::TableTransposedHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

#pragma GCC visibility pop
