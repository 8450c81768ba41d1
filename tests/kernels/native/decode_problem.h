// A random decoder's layers for a step of decoding, and that step taken piece by piece.
// Buffers are exactly as long as their contents, so that AddressSanitizer sees every access beyond.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "decode_step.h"
#include "random.h"

struct DecodeShape {
  fabric::Format format;
  fabric::Gate gate;
  fabric::CacheType stored;
  bool sub_norms;
  int64_t rows, layers, hidden, kv_heads, group, width, ffn, slots;

  std::string Name() const {
    return "decode format " + std::to_string(int(format)) + " cache " +
           std::to_string(int(stored)) + " rows " + std::to_string(rows) + " D " +
           std::to_string(hidden) + " K " + std::to_string(kv_heads) + " group " +
           std::to_string(group) + " hd " + std::to_string(width) + " F " + std::to_string(ffn);
  }
};

// A job and all that it points to.
struct DecodeProblem {
  using Floats = std::vector<float>;
  fabric::DecodeJob job{};
  std::vector<uint8_t> packed[fabric::kLinears];
  Floats scales[fabric::kLinears];
  Floats attention_gain, sub_gain, mlp_gain, mlp_sub_gain, cos, sin, key_scales, value_scales, h;
  std::vector<int32_t> positions, first;
  std::vector<uint8_t> keys, values;

  DecodeProblem(Random& random, const DecodeShape& s);
  DecodeProblem(const DecodeProblem&) = delete;

 private:
  void FillLinears(Random& random, const DecodeShape& s);
  void FillCache(Random& random, const DecodeShape& s);
};

inline std::vector<float> Positive(Random& random, int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = 0.5f + std::fabs(random.Float());
  return x;
}

inline void DecodeProblem::FillLinears(Random& random, const DecodeShape& s) {
  const int64_t own = s.kv_heads * s.group * s.width, keys = s.kv_heads * s.width;
  const int64_t n[] = {own, keys, keys, s.hidden, s.ffn, s.ffn, s.hidden};
  const int64_t k[] = {s.hidden, s.hidden, s.hidden, own, s.hidden, s.hidden, s.ffn};
  for (int i = 0; i < fabric::kLinears; ++i) {
    const int64_t codes = s.format == fabric::Format::kTernary2 ? 4 : 5;
    const int64_t row_bytes = (k[i] + codes - 1) / codes;
    packed[i].resize(size_t(s.layers * n[i] * row_bytes));
    for (uint8_t& byte : packed[i]) byte = uint8_t(random.Below(256));
    // One scale for all layers, or one each.
    scales[i] = Positive(random, i % 2 ? 1 : s.layers);
    job.matrix[i] = {packed[i].data(), n[i], row_bytes, 1.0f};
    job.scales[i] = scales[i].data();
    job.scale_stride[i] = i % 2 ? 0 : 1;
  }
}

inline void DecodeProblem::FillCache(Random& random, const DecodeShape& s) {
  fabric::CachedAttentionJob& cache = job.cache;
  const bool codes = s.stored == fabric::CacheType::kInt8;
  const int64_t bytes = codes ? 1 : s.stored == fabric::CacheType::kBFloat16 ? 2 : 4;
  const int64_t vectors = s.layers * s.rows * s.kv_heads * s.slots;
  keys.assign(size_t(vectors * s.width * bytes), 0);
  values = keys;
  // Any code and, little-endian, any float of a moderate size.
  for (auto* all : {&keys, &values}) {
    for (size_t i = 0; i < all->size(); ++i) {
      const bool top = int64_t(i) % bytes == bytes - 1;
      (*all)[i] = uint8_t(codes ? random.Below(256) : top ? 0x3e | random.Below(2) << 7 : 0);
    }
  }
  if (codes) {
    key_scales = Positive(random, vectors);
    value_scales = Positive(random, vectors);
    cache.key_scales = key_scales.data();
    cache.value_scales = value_scales.data();
  }
  for (int64_t row = 0; row < s.rows; ++row) {
    positions.push_back(int32_t(random.Below(s.slots)));
    first.push_back(int32_t(random.Below(positions.back() + 1)));
  }
  for (const float angle : random.Floats(s.rows * s.width / 2)) {
    cos.push_back(std::cos(3 * angle));
    sin.push_back(std::sin(3 * angle));
  }
  cache.type = s.stored;
  cache.batch = s.rows;
  cache.slots = s.slots;
  cache.kv_heads = s.kv_heads;
  cache.group = s.group;
  cache.width = s.width;
  cache.scale = 0.25f;
  cache.cos = cos.data();
  cache.sin = sin.data();
  cache.positions = positions.data();
  cache.first = first.data();
  cache.keys = keys.data();
  cache.values = values.data();
  job.cache_bytes = int64_t(keys.size()) / s.layers;
}

inline DecodeProblem::DecodeProblem(Random& random, const DecodeShape& s) {
  job.format = s.format;
  job.gate = s.gate;
  job.eps = 1e-5f;
  job.rows = s.rows;
  job.layers = s.layers;
  job.hidden = s.hidden;
  job.ffn = s.ffn;
  job.heads = s.kv_heads * s.group;
  FillLinears(random, s);
  FillCache(random, s);
  attention_gain = Positive(random, s.layers * s.hidden);
  mlp_gain = Positive(random, s.layers * s.hidden);
  job.attention_gain = attention_gain.data();
  job.mlp_gain = mlp_gain.data();
  if (s.sub_norms) {
    sub_gain = Positive(random, s.layers * job.heads * s.width);
    mlp_sub_gain = Positive(random, s.layers * s.ffn);
    job.sub_gain = sub_gain.data();
    job.mlp_sub_gain = mlp_sub_gain.data();
  }
  h = random.Floats(s.rows * s.hidden);
  job.h = h.data();
}
