// The calls that XLA makes for attention.
#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "job.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace fabric {
namespace {

namespace ffi = xla::ffi;

// Items that a call is cut into, if it has so many rows: enough for many cores, whose number must
// not influence results. Backward each holds sums of its own for the keys.
constexpr int64_t kForwardItems = 16, kBackwardItems = 8;
constexpr int64_t kChunkRows = 64;  // at least this many query rows in an item

using Floats = ffi::Buffer<ffi::F32>;
using Mask = ffi::Buffer<ffi::PRED>;

struct Inputs {
  Floats q, k, v;
  Mask mask;
  Floats cos, sin;
};

bool Is(const ffi::Span<const int64_t> dims, std::initializer_list<int64_t> expected) {
  return std::equal(dims.begin(), dims.end(), expected.begin(), expected.end());
}

ffi::ErrorOr<AttentionJob> MakeJob(const Inputs& in, float scale, int64_t items) {
  const auto q = in.q.dimensions(), k = in.k.dimensions();
  const auto wrong = [] {
    return ffi::Unexpected(ffi::Error::InvalidArgument("attention: the shapes do not fit"));
  };
  if (q.size() != 4 || k.size() != 4) return wrong();
  AttentionJob job{};
  job.batch = q[0];
  job.queries = q[1];
  job.keys = k[1];
  job.kv_heads = k[2];
  job.width = q[3];
  if (job.keys < 1 || job.kv_heads < 1 || q[2] % job.kv_heads != 0) return wrong();
  job.group = q[2] / job.kv_heads;
  if (!Is(k, {job.batch, job.keys, job.kv_heads, job.width}) ||
      !Is(in.v.dimensions(), {k[0], k[1], k[2], k[3]}) ||
      !Is(in.mask.dimensions(), {job.batch, job.queries, job.keys})) {
    return wrong();
  }
  job.scale = scale;
  job.q = in.q.typed_data();
  job.k = in.k.typed_data();
  job.v = in.v.typed_data();
  job.mask = reinterpret_cast<const uint8_t*>(in.mask.typed_data());
  if (in.cos.element_count() > 0) {
    if (job.queries != job.keys || job.width % 2 != 0 ||
        !Is(in.cos.dimensions(), {job.batch, job.queries, job.width / 2}) ||
        !Is(in.sin.dimensions(), {job.batch, job.queries, job.width / 2})) {
      return wrong();
    }
    job.cos = in.cos.typed_data();
    job.sin = in.sin.typed_data();
  }
  const int64_t heads = std::max<int64_t>(1, job.batch * job.kv_heads);
  const int64_t most = job.queries * job.group / kChunkRows;
  job.chunks = std::max<int64_t>(1, std::min((items + heads - 1) / heads, most));
  return job;
}

ffi::ErrorOr<const AttentionKernels*> Select() {
  const char* message = nullptr;
  const Kernels* kernels = SelectKernels(&message);
  if (kernels == nullptr) return ffi::Unexpected(ffi::Error::InvalidArgument(message));
  return kernels->attention;
}

// q [B, T, H, hd], k and v [B, S, K, hd], mask [B, T, S], cos and sin [B, T, hd / 2] or empty
// -> [B, T, H, hd]
ffi::Error AttentionHandler(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Mask mask,
                            Floats cos, Floats sin, ffi::Result<Floats> out, float scale) {
  auto made = MakeJob({q, k, v, mask, cos, sin}, scale, kForwardItems);
  if (made.has_error()) return made.error();
  auto kernels = Select();
  if (kernels.has_error()) return kernels.error();
  AttentionJob& job = *made;
  job.out = out->typed_data();
  ParallelFor(pool, job.batch * job.kv_heads * job.chunks,
              [&](int64_t item) { (*kernels)->forward(job, item); });
  return ffi::Error::Success();
}

// The same inputs and the gradient by the output -> those by q, k and v
ffi::Error AttentionTransposedHandler(ffi::ThreadPool pool, Floats q, Floats k, Floats v,
                                      Mask mask, Floats cos, Floats sin, Floats g,
                                      ffi::Result<Floats> dq, ffi::Result<Floats> dk,
                                      ffi::Result<Floats> dv, float scale) {
  auto made = MakeJob({q, k, v, mask, cos, sin}, scale, kBackwardItems);
  if (made.has_error()) return made.error();
  auto selected = Select();
  if (selected.has_error()) return selected.error();
  const AttentionKernels& kernels = **selected;
  AttentionJob& job = *made;
  job.g = g.typed_data();
  job.dq = dq->typed_data();
  job.dk = dk->typed_data();
  job.dv = dv->typed_data();
  const int64_t heads = job.batch * job.kv_heads;
  if (job.chunks == 1) {
    ParallelFor(pool, heads, [&](int64_t head) { kernels.backward(job, head, nullptr); });
    return ffi::Error::Success();
  }
  const int64_t floats = kernels.sums_floats(job);
  float* sums = reinterpret_cast<float*>(
      ThreadScratch(Slot::kOperand, size_t(heads * job.chunks * floats) * sizeof(float)));
  ParallelFor(pool, heads * job.chunks,
              [&](int64_t item) { kernels.backward(job, item, sums + item * floats); });
  ParallelFor(pool, heads, [&](int64_t head) {
    kernels.finish(job, head, sums + head * job.chunks * floats);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fabric

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(FabricAttention, fabric::AttentionHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Mask>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Ret<fabric::Floats>()
                                  .Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FabricAttentionTransposed, fabric::AttentionTransposedHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Mask>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Ret<fabric::Floats>()
                                  .Ret<fabric::Floats>()
                                  .Ret<fabric::Floats>()
                                  .Attr<float>("scale"));

#pragma GCC visibility pop
