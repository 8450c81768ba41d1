// The calls that XLA makes.
#include <cstdint>
#include <string>

#include "job.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace fabric {
namespace {

namespace ffi = xla::ffi;

// Rows of digits taken at once: bounds the scratch, and keeps a panel's tiles in the cache.
constexpr int64_t kMaxRows = 512;

ffi::Error Run(ffi::ThreadPool& pool, const Job& job) {
  const char* message = nullptr;
  const Kernels* kernels = SelectKernels(&message);
  if (kernels == nullptr) return ffi::Error::InvalidArgument(message);
  if (job.rows == 0) return ffi::Error::Success();
  const int64_t most = kMaxRows / job.digits;
  const int64_t pieces = (job.rows + most - 1) / most;
  const int64_t piece = (job.rows + pieces - 1) / pieces;
  for (int64_t first = 0; first < job.rows; first += piece) {
    const int64_t tokens = std::min(piece, job.rows - first);
    const int64_t rows = tokens * job.digits;
    const bool few = !job.transposed && rows <= kFewRows;
    const size_t dwords = (kernels->operand_bytes(job, rows, few) + 63) / 64 * 64;
    const size_t sums = (size_t(rows) * 4 + 63) / 64 * 64;
    uint8_t* scratch = ThreadScratch(Slot::kOperand, dwords + sums + size_t(tokens) * 4);
    const Operand operand{rows, kernels->steps(job), reinterpret_cast<int32_t*>(scratch),
                          reinterpret_cast<int32_t*>(scratch + dwords),
                          reinterpret_cast<float*>(scratch + dwords + sums)};
    const auto prepare = [&](int64_t slot) {
      kernels->prepare(job, operand, first + slot, slot, few);
    };
    // A few short rows are not worth waking a thread for.
    if (tokens * job.k < 65536) {
      for (int64_t slot = 0; slot < tokens; ++slot) prepare(slot);
    } else {
      ParallelFor(pool, tokens, prepare);
    }
    const auto unit = few ? kernels->run_few_rows : kernels->run_unit;
    ParallelFor(pool, kernels->units(job, few),
                [&](int64_t i) { unit(job, operand, i, first, tokens); });
  }
  return ffi::Error::Success();
}

// The matrix [N, W] of a layer in a stack [L, N, W], or a plain [N, W].
ffi::ErrorOr<Matrix> Layer(const ffi::Buffer<ffi::U8>& packed, int64_t layer, Format format,
                           int64_t k) {
  const auto dims = packed.dimensions();
  const int64_t codes = format == Format::kTernary2 ? 4 : 5;
  if (dims.size() < 2 || dims.size() > 3 || dims[dims.size() - 1] != (k + codes - 1) / codes) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("packed weights have the wrong shape"));
  }
  const int64_t n = dims[dims.size() - 2], width = dims[dims.size() - 1];
  if (dims.size() == 2) layer = 0;
  if (layer < 0 || (dims.size() == 3 && layer >= dims[0])) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "layer " + std::to_string(layer) + " is not in the stack"));
  }
  return Matrix{packed.typed_data() + layer * n * width, n, width, 1.0f};
}

float Scale(const ffi::Buffer<ffi::F32>& scale, int64_t layer) {
  return scale.typed_data()[scale.element_count() == 1 ? 0 : layer];
}

template <class Buffer>
int64_t Rows(const Buffer& x) {
  int64_t rows = 1;
  const auto dims = x.dimensions();
  for (size_t i = 0; i + 1 < dims.size(); ++i) rows *= dims[i];
  return rows;
}

// codes int8 [..., K], layer int32 [], packed -> int32 [..., N]
ffi::Error CodesHandler(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x,
                        ffi::BufferR0<ffi::S32> layer, ffi::Buffer<ffi::U8> packed,
                        ffi::Result<ffi::Buffer<ffi::S32>> y, int32_t format) {
  Job job{};
  job.format = Format(format);
  job.digits = 1;
  job.groups = 1;
  job.k = x.dimensions().back();
  job.rows = Rows(x);
  auto matrix = Layer(packed, *layer.typed_data(), job.format, job.k);
  if (matrix.has_error()) return matrix.error();
  job.matrix[0] = *matrix;
  job.codes = x.typed_data();
  job.sums = y->typed_data();
  return Run(pool, job);
}

// Reads the next buffer of a call; the first failure is kept.
class Reader {
 public:
  explicit Reader(ffi::RemainingArgs args) : args_(args) {}
  template <ffi::DataType kType>
  ffi::Buffer<kType> Next() {
    auto buffer = args_.get<ffi::Buffer<kType>>(next_++);
    if (buffer.has_error()) {
      if (error_.success()) error_ = buffer.error();
      return ffi::Buffer<kType>(nullptr);
    }
    return *buffer;
  }
  bool failed() const { return error_.failure(); }
  const ffi::Error& error() const { return error_; }

 private:
  ffi::RemainingArgs args_;
  size_t next_ = 0;
  ffi::Error error_ = ffi::Error::Success();
};

Adapter MakeAdapter(const ffi::Buffer<ffi::F32>& a, const ffi::Buffer<ffi::F32>& b, float scale) {
  return Adapter{a.dimensions()[0], a.typed_data(), b.typed_data(), scale, nullptr};
}

bool Fits(const Adapter& adapter, const ffi::Buffer<ffi::F32>& a, const ffi::Buffer<ffi::F32>& b,
          int64_t n, int64_t k) {
  return a.dimensions().size() == 2 && b.dimensions().size() == 2 && a.dimensions()[1] == k &&
         b.dimensions()[0] == adapter.rank && b.dimensions()[1] == n;
}

// x float32 [..., K], layer, then (packed, scale, A [R, K], B [R, N]) for each matrix
// -> for each matrix float32 [..., N_g], then for each (scale x A^T) [..., R]
ffi::Error LinearHandler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                         ffi::BufferR0<ffi::S32> layer, ffi::RemainingArgs matrices,
                         ffi::RemainingRets outputs, int32_t format, int32_t digits,
                         ffi::Span<const float> scales) {
  Job job{};
  job.format = Format(format);
  job.digits = digits;
  job.groups = int(outputs.size() / 2);
  job.k = x.dimensions().back();
  job.rows = Rows(x);
  if (job.groups < 1 || job.groups > kMaxGroups || digits < 1 || digits > kMaxDigits ||
      scales.size() != size_t(job.groups)) {
    return ffi::Error::InvalidArgument("too many matrices or digits");
  }
  const int64_t index = *layer.typed_data();
  job.floats[0] = x.typed_data();
  Reader reader(matrices);
  for (int g = 0; g < job.groups; ++g) {
    auto packed = reader.Next<ffi::U8>();
    auto scale = reader.Next<ffi::F32>(), a = reader.Next<ffi::F32>(), b = reader.Next<ffi::F32>();
    auto y = outputs.get<ffi::Buffer<ffi::F32>>(size_t(g));
    auto narrow = outputs.get<ffi::Buffer<ffi::F32>>(size_t(job.groups + g));
    if (reader.failed()) return reader.error();
    if (y.has_error()) return y.error();
    if (narrow.has_error()) return narrow.error();
    auto matrix = Layer(packed, index, job.format, job.k);
    if (matrix.has_error()) return matrix.error();
    job.matrix[g] = *matrix;
    job.matrix[g].scale = Scale(scale, index);
    job.adapter[g] = MakeAdapter(a, b, scales[size_t(g)]);
    if (!Fits(job.adapter[g], a, b, matrix->rows, job.k)) {
      return ffi::Error::InvalidArgument("an adapter does not fit its matrix");
    }
    job.adapter[g].narrow = (*narrow)->typed_data();
    job.out[g] = (*y)->typed_data();
  }
  return Run(pool, job);
}

// layer, x float32 [..., K] (read only where there are adapters), then for each matrix
// (g [..., N_g], packed, scale, A, B, narrow [..., R] as the forward call returned it)
// -> dx float32 [..., K], then (dA [R, K], dB [R, N]) for each matrix
ffi::Error TransposedHandler(ffi::ThreadPool pool, ffi::BufferR0<ffi::S32> layer,
                             ffi::Buffer<ffi::F32> x, ffi::RemainingArgs matrices,
                             ffi::Result<ffi::Buffer<ffi::F32>> dx, ffi::RemainingRets outputs,
                             int32_t format, int32_t digits, ffi::Span<const float> scales) {
  Job job{};
  job.format = Format(format);
  job.transposed = true;
  job.digits = digits;
  job.groups = int(matrices.size() / 6);
  job.k = dx->dimensions().back();
  if (job.groups < 1 || job.groups > kMaxGroups || digits < 2 || digits > kMaxDigits ||
      outputs.size() != size_t(2 * job.groups) || scales.size() != size_t(job.groups)) {
    return ffi::Error::InvalidArgument("too many matrices or digits");
  }
  const int64_t index = *layer.typed_data();
  const float* forward[kMaxGroups];
  float* da[kMaxGroups];
  float* db[kMaxGroups];
  int64_t ranks = 0;
  Reader reader(matrices);
  for (int i = 0; i < job.groups; ++i) {
    auto g = reader.Next<ffi::F32>();
    auto packed = reader.Next<ffi::U8>();
    auto scale = reader.Next<ffi::F32>(), a = reader.Next<ffi::F32>(), b = reader.Next<ffi::F32>(),
         narrow = reader.Next<ffi::F32>();
    auto out_a = outputs.get<ffi::Buffer<ffi::F32>>(size_t(2 * i));
    auto out_b = outputs.get<ffi::Buffer<ffi::F32>>(size_t(2 * i + 1));
    if (reader.failed()) return reader.error();
    if (out_a.has_error()) return out_a.error();
    if (out_b.has_error()) return out_b.error();
    auto matrix = Layer(packed, index, job.format, job.k);
    if (matrix.has_error()) return matrix.error();
    job.matrix[i] = *matrix;
    job.matrix[i].scale = Scale(scale, index);
    job.adapter[i] = MakeAdapter(a, b, scales[size_t(i)]);
    if (!Fits(job.adapter[i], a, b, matrix->rows, job.k)) {
      return ffi::Error::InvalidArgument("an adapter does not fit its matrix");
    }
    job.floats[i] = g.typed_data();
    job.rows = Rows(g);
    forward[i] = narrow.typed_data();
    da[i] = (*out_a)->typed_data();
    db[i] = (*out_b)->typed_data();
    ranks += job.adapter[i].rank;
  }
  float* narrow = reinterpret_cast<float*>(
      ThreadScratch(Slot::kNarrow, size_t(ranks * job.rows) * 4 + 64));
  for (int i = 0; i < job.groups; ++i) {
    job.adapter[i].narrow = narrow;
    narrow += job.adapter[i].rank * job.rows;
  }
  job.out[0] = dx->typed_data();
  if (ffi::Error error = Run(pool, job); error.failure()) return error;
  const char* message = nullptr;
  const Kernels* kernels = SelectKernels(&message);
  for (int i = 0; i < job.groups; ++i) {
    const Adapter& adapter = job.adapter[i];
    if (adapter.rank == 0) continue;
    const int64_t n = job.matrix[i].rows, a_units = kernels->outer_units(job.k);
    const int64_t columns = kernels->outer_columns;
    ParallelFor(pool, a_units + kernels->outer_units(n), [&](int64_t unit) {
      if (unit < a_units) {
        kernels->outer(adapter.narrow, x.typed_data(), job.rows, adapter.rank, job.k,
                       unit * columns, da[i]);
      } else {
        kernels->outer(forward[i], job.floats[i], job.rows, adapter.rank, n,
                       (unit - a_units) * columns, db[i]);
      }
    });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fabric

// The library is compiled with hidden visibility; these are what is looked up in it.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FabricTernaryCodes, fabric::CodesHandler,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
        .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
        .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
        .Attr<int32_t>("format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FabricTernaryLinear, fabric::LinearHandler,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()
        .RemainingArgs()
        .RemainingRets()
        .Attr<int32_t>("format")
        .Attr<int32_t>("digits")
        .Attr<xla::ffi::Span<const float>>("scales"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FabricTernaryTransposed, fabric::TransposedHandler,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .RemainingArgs()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
        .RemainingRets()
        .Attr<int32_t>("format")
        .Attr<int32_t>("digits")
        .Attr<xla::ffi::Span<const float>>("scales"));

// The instruction set that the kernels use here; null with a reason in `error` if none.
extern "C" const char* FabricKernelsIsa(const char** error) {
  const fabric::Kernels* kernels = fabric::SelectKernels(error);
  return kernels == nullptr ? nullptr : kernels->name;
}

#pragma GCC visibility pop
