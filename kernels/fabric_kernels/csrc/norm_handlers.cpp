// The calls that XLA makes for norms and gated products.
#include <algorithm>
#include <cstdint>

#include "job.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace fabric {

namespace ffi = xla::ffi;
using FloatBuffer = ffi::Buffer<ffi::F32>;

namespace {


constexpr int64_t kPiece = 16384;  // elements in one piece of work

ffi::Error Run(ffi::ThreadPool& pool, const NormJob& job, int64_t elements, bool backward) {
  const char* message = nullptr;
  const Kernels* kernels = SelectKernels(&message);
  if (kernels == nullptr) return ffi::Error::InvalidArgument(message);
  if (job.width == 0) return ffi::Error::Success();
  const auto row = backward ? kernels->norm->backward : kernels->norm->forward;
  const int64_t rows = elements / job.width, step = std::max<int64_t>(1, kPiece / job.width);
  ParallelFor(pool, (rows + step - 1) / step, [&](int64_t piece) {
    const int64_t end = std::min(rows, (piece + 1) * step);
    for (int64_t m = piece * step; m < end; ++m) row(job, m);
  });
  return ffi::Error::Success();
}

NormJob MakeJob(const FloatBuffer& x, const FloatBuffer& up, const FloatBuffer& gain, int32_t gate, float eps) {
  NormJob job{};
  job.gate = Gate(gate);
  job.normalise = gain.element_count() > 0;
  job.width = x.dimensions().back();
  job.eps = eps;
  job.x = x.typed_data();
  job.up = up.typed_data();
  job.gain = gain.typed_data();
  return job;
}

bool Fits(const FloatBuffer& x, const FloatBuffer& up, const FloatBuffer& gain, int32_t gate) {
  return gate >= 0 && gate <= 2 && (gate == 0 || up.element_count() == x.element_count()) &&
         (gain.element_count() == 0 ? gate != 0
                                    : int64_t(gain.element_count()) == x.dimensions().back());
}

// x [..., n], up [..., n] or empty, gain [n] or empty -> y [..., n]
ffi::Error NormHandler(ffi::ThreadPool pool, FloatBuffer x, FloatBuffer up, FloatBuffer gain,
                       ffi::Result<FloatBuffer> y, int32_t gate, float eps) {
  if (!Fits(x, up, gain, gate)) return ffi::Error::InvalidArgument("shapes of a norm do not fit");
  NormJob job = MakeJob(x, up, gain, gate, eps);
  job.y = y->typed_data();
  return Run(pool, job, int64_t(x.element_count()), false);
}

// the same and dy [..., n] -> dx [..., n], d_up [..., n] or empty
ffi::Error NormGradientHandler(ffi::ThreadPool pool, FloatBuffer x, FloatBuffer up, FloatBuffer gain, FloatBuffer dy,
                               ffi::Result<FloatBuffer> dx, ffi::Result<FloatBuffer> d_up, int32_t gate,
                               float eps) {
  if (!Fits(x, up, gain, gate)) return ffi::Error::InvalidArgument("shapes of a norm do not fit");
  NormJob job = MakeJob(x, up, gain, gate, eps);
  job.dy = dy.typed_data();
  job.y = dx->typed_data();
  job.d_up = d_up->typed_data();
  return Run(pool, job, int64_t(x.element_count()), true);
}

}  // namespace
}  // namespace fabric

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(FabricNorm, fabric::NormHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fabric::FloatBuffer>()
                                  .Arg<fabric::FloatBuffer>()
                                  .Arg<fabric::FloatBuffer>()
                                  .Ret<fabric::FloatBuffer>()
                                  .Attr<int32_t>("gate")
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FabricNormGradient, fabric::NormGradientHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fabric::FloatBuffer>()
                                  .Arg<fabric::FloatBuffer>()
                                  .Arg<fabric::FloatBuffer>()
                                  .Arg<fabric::FloatBuffer>()
                                  .Ret<fabric::FloatBuffer>()
                                  .Ret<fabric::FloatBuffer>()
                                  .Attr<int32_t>("gate")
                                  .Attr<float>("eps"));

#pragma GCC visibility pop
