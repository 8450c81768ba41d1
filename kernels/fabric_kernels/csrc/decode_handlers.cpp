// The call that XLA makes for a step of decoding through all layers.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>

#include "decode_step.h"
#include "phases.h"
#include "xla/ffi/api/ffi.h"

namespace fabric {
namespace {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
using Shape = std::initializer_list<int64_t>;

bool Is(const ffi::Span<const int64_t> dims, Shape expected) {
  return std::equal(dims.begin(), dims.end(), expected.begin(), expected.end());
}

ffi::Error Wrong(const char* what) {
  return ffi::Error::InvalidArgument(std::string("a step of decoding: ") + what);
}

// keys and values [L, B, K, S, hd], and for int8 their scales [L, B, K, S], else empty
ffi::Error FillCache(DecodeJob& job, const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values,
                     const Floats& key_scales, const Floats& value_scales) {
  CachedAttentionJob& cache = job.cache;
  const auto dims = keys.dimensions();
  if (dims.size() != 5) return Wrong("a cache has five axes");
  int64_t element = 1;
  switch (keys.element_type()) {
    case ffi::F32:
      cache.type = CacheType::kFloat32;
      element = 4;
      break;
    case ffi::BF16:
      cache.type = CacheType::kBFloat16;
      element = 2;
      break;
    case ffi::S8:
      cache.type = CacheType::kInt8;
      break;
    default:
      return Wrong("a cache is float32, bfloat16 or int8");
  }
  job.layers = dims[0];
  cache.batch = dims[1];
  cache.kv_heads = dims[2];
  cache.slots = dims[3];
  cache.width = dims[4];
  if (cache.kv_heads < 1 || cache.slots < 1 || cache.width < 1 || cache.width % 2 != 0 ||
      values.element_type() != keys.element_type() ||
      !Is(values.dimensions(), {dims[0], dims[1], dims[2], dims[3], dims[4]})) {
    return Wrong("the cache does not fit");
  }
  const int64_t vectors = job.layers * cache.batch * cache.kv_heads * cache.slots;
  if (cache.type == CacheType::kInt8) {
    if (int64_t(key_scales.element_count()) != vectors ||
        int64_t(value_scales.element_count()) != vectors) {
      return Wrong("the scales do not fit");
    }
    cache.key_scales = key_scales.typed_data();
    cache.value_scales = value_scales.typed_data();
  }
  cache.keys = keys.untyped_data();
  cache.values = values.untyped_data();
  job.cache_bytes = cache.batch * cache.kv_heads * cache.slots * cache.width * element;
  return ffi::Error::Success();
}

// For each of q, k, v, o, gate, up and down: packed [L, N, W] and scale [L] or [].
ffi::Error FillMatrices(DecodeJob& job, const ffi::RemainingArgs& matrices) {
  if (matrices.size() != 2 * kLinears) return Wrong("there are seven matrices with their scales");
  for (int i = 0; i < kLinears; ++i) {
    auto packed = matrices.get<ffi::BufferR3<ffi::U8>>(size_t(2 * i));
    auto scale = matrices.get<Floats>(size_t(2 * i + 1));
    if (packed.has_error()) return packed.error();
    if (scale.has_error()) return scale.error();
    const auto dims = packed->dimensions();
    job.matrix[i] = Matrix{packed->typed_data(), dims[1], dims[2], 1.0f};
    job.scales[i] = scale->typed_data();
    job.scale_stride[i] = scale->element_count() == 1 ? 0 : 1;
    if (dims[0] != job.layers ||
        (job.scale_stride[i] && int64_t(scale->element_count()) != job.layers)) {
      return Wrong("stacks have different layers");
    }
  }
  return ffi::Error::Success();
}

bool MatricesFit(DecodeJob& job) {
  const int64_t keys = job.cache.kv_heads * job.cache.width;
  const int64_t own = job.matrix[kQuery].rows, codes = job.format == Format::kTernary2 ? 4 : 5;
  if (own % job.cache.width != 0 || own / job.cache.width % job.cache.kv_heads != 0) return false;
  job.heads = own / job.cache.width;
  job.cache.group = job.heads / job.cache.kv_heads;
  job.ffn = job.matrix[kGateLinear].rows;
  const int64_t n[kLinears] = {own, keys, keys, job.hidden, job.ffn, job.ffn, job.hidden};
  const int64_t k[kLinears] = {job.hidden, job.hidden, job.hidden, own,
                               job.hidden, job.hidden, job.ffn};
  for (int i = 0; i < kLinears; ++i) {
    if (job.matrix[i].rows != n[i] || job.matrix[i].row_bytes != (k[i] + codes - 1) / codes) {
      return false;
    }
  }
  return true;
}

// The gain [L, width]; null where there is none.
bool Gain(const Floats& gain, int64_t layers, int64_t width, bool needed, const float** to) {
  *to = gain.element_count() == 0 ? nullptr : gain.typed_data();
  return *to == nullptr ? !needed : Is(gain.dimensions(), {layers, width});
}

// h [B, 1, D], cos and sin [B, 1, hd / 2], positions and first [B, 1], the cache, the gains and the
// matrices -> [B, 1, D] and the cache, in place
ffi::Error DecodeHandler(ffi::ThreadPool pool, Floats h, Floats cos, Floats sin,
                         Integers positions, Integers first, ffi::AnyBuffer keys,
                         ffi::AnyBuffer values, Floats key_scales, Floats value_scales,
                         Floats attention_gain, Floats sub_gain, Floats mlp_gain,
                         Floats mlp_sub_gain, ffi::RemainingArgs matrices, ffi::Result<Floats> out,
                         ffi::Result<ffi::AnyBuffer> new_keys,
                         ffi::Result<ffi::AnyBuffer> new_values,
                         ffi::Result<Floats> new_key_scales, ffi::Result<Floats> new_value_scales,
                         int32_t format, int32_t gate, float eps, float scale) {
  if (keys.untyped_data() != new_keys->untyped_data() ||
      values.untyped_data() != new_values->untyped_data() ||
      (key_scales.element_count() > 0 && key_scales.typed_data() != new_key_scales->typed_data()) ||
      (value_scales.element_count() > 0 &&
       value_scales.typed_data() != new_value_scales->typed_data())) {
    return Wrong("the cache is not written in place");
  }
  DecodeJob job{};
  job.format = Format(format);
  job.gate = Gate(gate);
  job.eps = eps;
  job.hidden = h.dimensions().back();
  if (ffi::Error e = FillCache(job, keys, values, key_scales, value_scales); e.failure()) return e;
  job.rows = job.cache.batch;
  if (job.rows == 0 || job.rows > kFewRows) return Wrong("it is for one to four rows");
  if (ffi::Error e = FillMatrices(job, matrices); e.failure()) return e;
  const int64_t half = job.cache.width / 2, b = job.rows;
  if (!MatricesFit(job) || !Is(h.dimensions(), {b, 1, job.hidden}) ||
      !Is(cos.dimensions(), {b, 1, half}) || !Is(sin.dimensions(), {b, 1, half}) ||
      !Is(positions.dimensions(), {b, 1}) || !Is(first.dimensions(), {b, 1}) ||
      !Gain(attention_gain, job.layers, job.hidden, true, &job.attention_gain) ||
      !Gain(sub_gain, job.layers, job.heads * job.cache.width, false, &job.sub_gain) ||
      !Gain(mlp_gain, job.layers, job.hidden, true, &job.mlp_gain) ||
      !Gain(mlp_sub_gain, job.layers, job.ffn, false, &job.mlp_sub_gain) || gate < 1 || gate > 2) {
    return Wrong("the shapes do not fit");
  }
  job.cache.scale = scale;
  job.cache.cos = cos.typed_data();
  job.cache.sin = sin.typed_data();
  job.cache.positions = positions.typed_data();
  job.cache.first = first.typed_data();
  job.h = out->typed_data();
  if (job.h != h.typed_data()) std::memcpy(job.h, h.typed_data(), h.size_bytes());
  const char* message = nullptr;
  const Kernels* kernels = SelectKernels(&message);
  if (kernels == nullptr) return ffi::Error::InvalidArgument(message);
  // A slot that nothing within the phases uses.
  float* shared = reinterpret_cast<float*>(ThreadScratch(
      Slot::kNarrow, size_t(DecodeStep::SharedFloats(job)) * sizeof(float)));
  const DecodeStep step(*kernels, job, shared);
  Phases<DecodeStep>::Run(pool, step.Counts(), step);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fabric

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(FabricDecodeLayers, fabric::DecodeHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Integers>()
                                  .Arg<fabric::Integers>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .Arg<fabric::Floats>()
                                  .RemainingArgs()
                                  .Ret<fabric::Floats>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<fabric::Floats>()
                                  .Ret<fabric::Floats>()
                                  .Attr<int32_t>("format")
                                  .Attr<int32_t>("gate")
                                  .Attr<float>("eps")
                                  .Attr<float>("scale"));

#pragma GCC visibility pop
