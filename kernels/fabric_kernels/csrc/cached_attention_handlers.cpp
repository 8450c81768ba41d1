// The call that XLA makes for attention in a step of decoding.
#include <algorithm>
#include <cstdint>

#include "cached_attention.h"
#include "job.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace fabric {
namespace {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

// Elements of keys below which a call is not worth waking a thread for.
constexpr int64_t kAlone = 16384;

bool Is(const ffi::Span<const int64_t> dims, std::initializer_list<int64_t> expected) {
  return std::equal(dims.begin(), dims.end(), expected.begin(), expected.end());
}

int64_t ElementBytes(CacheType type) {
  return type == CacheType::kFloat32 ? 4 : type == CacheType::kBFloat16 ? 2 : 1;
}

// q [B, 1, H, hd], k and v [B, 1, K, hd], cos and sin [B, 1, hd / 2], layer [], positions and first
// [B, 1], keys and values [L, B, K, S, hd] and for int8 their scales [L, B, K, S], else empty
// -> [B, 1, H, hd] and the cache, in place
ffi::Error CachedAttentionHandler(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats cos,
                                  Floats sin, ffi::BufferR0<ffi::S32> layer, Integers positions,
                                  Integers first, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                                  Floats key_scales, Floats value_scales, ffi::Result<Floats> out,
                                  ffi::Result<ffi::AnyBuffer> new_keys,
                                  ffi::Result<ffi::AnyBuffer> new_values,
                                  ffi::Result<Floats> new_key_scales,
                                  ffi::Result<Floats> new_value_scales, float scale) {
  CachedAttentionJob job{};
  switch (keys.element_type()) {
    case ffi::F32:
      job.type = CacheType::kFloat32;
      break;
    case ffi::BF16:
      job.type = CacheType::kBFloat16;
      break;
    case ffi::S8:
      job.type = CacheType::kInt8;
      break;
    default:
      return ffi::Error::InvalidArgument("a cache is float32, bfloat16 or int8");
  }
  const auto dims = keys.dimensions(), heads = q.dimensions();
  const auto wrong = [] {
    return ffi::Error::InvalidArgument("cached attention: the shapes do not fit");
  };
  if (dims.size() != 5 || heads.size() != 4) return wrong();
  const int64_t layers = dims[0];
  job.batch = dims[1];
  job.kv_heads = dims[2];
  job.slots = dims[3];
  job.width = dims[4];
  if (job.kv_heads < 1 || job.slots < 1 || job.width % 2 != 0 || heads[2] % job.kv_heads != 0) {
    return wrong();
  }
  job.group = heads[2] / job.kv_heads;
  const int64_t half = job.width / 2;
  if (!Is(heads, {job.batch, 1, heads[2], job.width}) ||
      !Is(k.dimensions(), {job.batch, 1, job.kv_heads, job.width}) ||
      !Is(v.dimensions(), {job.batch, 1, job.kv_heads, job.width}) ||
      !Is(cos.dimensions(), {job.batch, 1, half}) || !Is(sin.dimensions(), {job.batch, 1, half}) ||
      !Is(positions.dimensions(), {job.batch, 1}) || !Is(first.dimensions(), {job.batch, 1}) ||
      !Is(values.dimensions(), {layers, job.batch, job.kv_heads, job.slots, job.width}) ||
      values.element_type() != keys.element_type()) {
    return wrong();
  }
  const int64_t index = *layer.typed_data(), vectors = job.batch * job.kv_heads * job.slots;
  if (index < 0 || index >= layers) return ffi::Error::InvalidArgument("no such layer");
  if (keys.untyped_data() != (*new_keys).untyped_data() ||
      values.untyped_data() != (*new_values).untyped_data()) {
    return ffi::Error::InvalidArgument("the cache is not written in place");
  }
  const int64_t bytes = index * vectors * job.width * ElementBytes(job.type);
  job.keys = static_cast<uint8_t*>((*new_keys).untyped_data()) + bytes;
  job.values = static_cast<uint8_t*>((*new_values).untyped_data()) + bytes;
  if (job.type == CacheType::kInt8) {
    if (int64_t(key_scales.element_count()) != layers * vectors ||
        int64_t(value_scales.element_count()) != layers * vectors) {
      return wrong();
    }
    job.key_scales = new_key_scales->typed_data() + index * vectors;
    job.value_scales = new_value_scales->typed_data() + index * vectors;
  }
  job.scale = scale;
  job.q = q.typed_data();
  job.k = k.typed_data();
  job.v = v.typed_data();
  job.cos = cos.typed_data();
  job.sin = sin.typed_data();
  job.positions = positions.typed_data();
  job.first = first.typed_data();
  job.out = out->typed_data();
  const char* message = nullptr;
  const Kernels* kernels = SelectKernels(&message);
  if (kernels == nullptr) return ffi::Error::InvalidArgument(message);
  const auto run = kernels->cached_attention->run;
  const int64_t items = job.batch * job.kv_heads;
  int64_t elements = 0;
  for (int64_t b = 0; b < job.batch; ++b) {
    elements += job.kv_heads * job.width * (job.positions[b] - job.first[b] + 1);
  }
  if (elements < kAlone) {
    for (int64_t item = 0; item < items; ++item) run(job, item);
  } else {
    ParallelFor(pool, items, [&](int64_t item) { run(job, item); });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fabric

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(FabricCachedAttention, fabric::CachedAttentionHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()
                                  .Arg<fabric::Integers>()
                                  .Arg<fabric::Integers>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Ret<fabric::Floats>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<fabric::Floats>()
                                  .Ret<fabric::Floats>()
                                  .Attr<float>("scale"));

#pragma GCC visibility pop
