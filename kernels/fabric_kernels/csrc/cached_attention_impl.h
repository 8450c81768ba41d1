// A step of decoding, a key/value head at a time: see cached_attention.h. Vectors of the cache are
// widened in registers; scores of kLanes slots are summed side by side and turned once.
// Included once for each instruction set, after its Isa and the arithmetic of attention.
#pragma once

namespace cached_attention {

using Floats = Isa::Floats;

template <CacheType kType>
struct Element {
  using Stored = float;
  static Floats Load(const float* p) { return Isa::LoadFloats(p); }
};
template <>
struct Element<CacheType::kBFloat16> {
  using Stored = uint16_t;
  static Floats Load(const uint16_t* p) { return Isa::LoadBFloat16(p); }
};
template <>
struct Element<CacheType::kInt8> {
  using Stored = int8_t;
  static Floats Load(const int8_t* p) { return Isa::LoadInt8(p); }
};

// The elements from `at` of a vector of `width`, zeros behind its end.
template <CacheType kType>
inline Floats LoadPart(const typename Element<kType>::Stored* vector, int64_t at, int64_t width) {
  if (at + kLanes <= width) return Element<kType>::Load(vector + at);
  alignas(64) typename Element<kType>::Stored part[kLanes] = {};
  std::memcpy(part, vector + at, size_t(width - at) * sizeof(part[0]));
  return Element<kType>::Load(part);
}

inline uint16_t RoundToBFloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // stays a NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);                 // half to even
}

// to = x in the cache's type; `scale` is written for int8.
template <CacheType kType>
void Store(const float* x, int64_t width, typename Element<kType>::Stored* to, float* scale) {
  if constexpr (kType == CacheType::kFloat32) {
    std::memcpy(to, x, size_t(width) * sizeof(float));
  } else if constexpr (kType == CacheType::kBFloat16) {
    for (int64_t i = 0; i < width; ++i) to[i] = RoundToBFloat16(x[i]);
  } else {
    float top = 0;
    for (int64_t i = 0; i < width; ++i) top = std::max(top, std::fabs(x[i]));
    *scale = top * (1.0f / 127.0f);
    const float inverse = *scale > 0 ? 1.0f / *scale : 0.0f;
    for (int64_t i = 0; i < width; ++i) {
      to[i] = int8_t(std::clamp(std::nearbyint(x[i] * inverse), -127.0f, 127.0f));
    }
  }
}

void Rotate(const float* x, int64_t width, const float* cos, const float* sin, float* to) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    to[i] = x[i] * cos[i] - x[half + i] * sin[i];
    to[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
  }
}

// scores[s] = q . keys[s] for `count` slots; q has zeros behind its end.
template <CacheType kType>
void Scores(const float* q, const typename Element<kType>::Stored* keys, int64_t width,
            int64_t count, float* scores) {
  const int64_t whole = width - width % kLanes;
  for (int64_t s = 0; s < count; s += kLanes) {
    Floats acc[kLanes];
    // Slots after the last repeat it: their results are not used.
    const int64_t last = std::min<int64_t>(kLanes, count - s) - 1;
    // Slot by slot, so that memory is read in order.
    for (int64_t i = 0; i < kLanes; ++i) {
      const auto* key = keys + (s + std::min(i, last)) * width;
      Floats sum = Isa::SplatFloat(0);
      for (int64_t d = 0; d < whole; d += kLanes) {
        sum = Isa::MultiplyAdd(Element<kType>::Load(key + d), Isa::LoadFloats(q + d), sum);
      }
      if (whole < width) {
        sum = Isa::MultiplyAdd(LoadPart<kType>(key, whole, width), Isa::LoadFloats(q + whole), sum);
      }
      acc[i] = sum;
    }
    Vec turned[kLanes];
    std::memcpy(turned, acc, sizeof acc);
    Isa::Transpose(turned);
    std::memcpy(acc, turned, sizeof acc);
    for (int i = kLanes / 2; i > 0; i /= 2) {
      for (int j = 0; j < i; ++j) acc[j] = Isa::AddFloats(acc[j], acc[j + i]);
    }
    Isa::StoreFloats(scores + s, acc[0]);
  }
}

// Weights in place, not divided by their sum, which is returned. Lanes after `count` become zeros.
float Weigh(float* scores, int64_t count, float scale, const float* slot_scales) {
  using attention::Lanes;
  if (slot_scales != nullptr) {
    for (int64_t s = 0; s < count; ++s) scores[s] *= slot_scales[s];
  }
  const int64_t padded = RoundUp(count, kLanes);
  for (int64_t s = count; s < padded; ++s) scores[s] = -std::numeric_limits<float>::infinity();
  Floats top = Isa::LoadFloats(scores);
  for (int64_t s = kLanes; s < padded; s += kLanes) {
    top = Isa::MaxFloats(top, Isa::LoadFloats(scores + s));
  }
  const Lanes factor = attention::Splat(scale);
  const Lanes shift = attention::Splat(-scale * Isa::MaxLaneFloat(top));
  Floats sum = Isa::SplatFloat(0);
  for (int64_t s = 0; s < padded; s += kLanes) {
    const Lanes e =
        attention::Exp(attention::MultiplyAdd(attention::Load(scores + s), factor, shift));
    attention::Store(scores + s, e);
    sum = Isa::AddFloats(sum, Isa::LoadFloats(scores + s));
  }
  return Isa::SumFloats(sum);
}

// out[d] = sum of weights[s] * values[s][d] for kBlock vectors of elements from `at`.
template <CacheType kType, int kBlock>
void Mix(const float* weights, const typename Element<kType>::Stored* values, int64_t width,
         int64_t count, int64_t at, float factor, float* out) {
  Floats acc[2][kBlock];
  for (auto& half : acc) {
    for (auto& one : half) one = Isa::SplatFloat(0);
  }
  int64_t s = 0;
  for (; s + 1 < count; s += 2) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const Floats w = Isa::SplatFloat(weights[s + h]);
      const auto* value = values + (s + h) * width;
#pragma GCC unroll 4
      for (int b = 0; b < kBlock; ++b) {
        acc[h][b] =
            Isa::MultiplyAdd(LoadPart<kType>(value, at + b * kLanes, width), w, acc[h][b]);
      }
    }
  }
  if (s < count) {
    const Floats w = Isa::SplatFloat(weights[s]);
    for (int b = 0; b < kBlock; ++b) {
      acc[0][b] = Isa::MultiplyAdd(LoadPart<kType>(values + s * width, at + b * kLanes, width), w,
                                   acc[0][b]);
    }
  }
  for (int b = 0; b < kBlock; ++b) {
    alignas(64) float part[kLanes];
    Isa::StoreFloats(part, Isa::MulFloats(Isa::AddFloats(acc[0][b], acc[1][b]),
                                          Isa::SplatFloat(factor)));
    const int64_t from = at + b * kLanes;
    std::memcpy(out + from, part, size_t(std::min<int64_t>(kLanes, width - from)) * 4);
  }
}

template <CacheType kType>
void Run(const CachedAttentionJob& job, int64_t item) {
  using Stored = typename Element<kType>::Stored;
  const int64_t b = item / job.kv_heads, width = job.width, padded = RoundUp(width, kLanes);
  Stored* keys = static_cast<Stored*>(job.keys) + item * job.slots * width;
  Stored* values = static_cast<Stored*>(job.values) + item * job.slots * width;
  float* key_scales = job.key_scales == nullptr ? nullptr : job.key_scales + item * job.slots;
  float* value_scales = job.value_scales == nullptr ? nullptr : job.value_scales + item * job.slots;
  const float *cos = job.cos + b * (width / 2), *sin = job.sin + b * (width / 2);
  float* q = reinterpret_cast<float*>(ThreadScratch(
      Slot::kPanel, size_t(padded + RoundUp(job.slots, kLanes)) * sizeof(float)));
  float* scores = q + padded;
  const int64_t position = job.positions[b];
  if (0 <= position && position < job.slots) {
    Rotate(job.k + item * width, width, cos, sin, q);
    Store<kType>(q, width, keys + position * width, key_scales + position);
    Store<kType>(job.v + item * width, width, values + position * width, value_scales + position);
  }
  const int64_t end = std::clamp<int64_t>(position + 1, 1, job.slots);
  const int64_t begin = std::clamp<int64_t>(job.first[b], 0, end - 1), count = end - begin;
  for (int64_t i = width; i < padded; ++i) q[i] = 0;
  for (int64_t g = 0; g < job.group; ++g) {
    const int64_t head = item * job.group + g;
    Rotate(job.q + head * width, width, cos, sin, q);
    Scores<kType>(q, keys + begin * width, width, count, scores);
    const float sum =
        Weigh(scores, count, job.scale, key_scales == nullptr ? nullptr : key_scales + begin);
    if (value_scales != nullptr) {
      for (int64_t s = 0; s < count; ++s) scores[s] *= value_scales[begin + s];
    }
    const Stored* seen = values + begin * width;
    float* out = job.out + head * width;
    int64_t at = 0;
    for (; at + 3 * kLanes < width; at += 4 * kLanes) {
      Mix<kType, 4>(scores, seen, width, count, at, 1.0f / sum, out);
    }
    for (; at < width; at += kLanes) {
      Mix<kType, 1>(scores, seen, width, count, at, 1.0f / sum, out);
    }
  }
}

void RunItem(const CachedAttentionJob& job, int64_t item) {
  switch (job.type) {
    case CacheType::kFloat32:
      return Run<CacheType::kFloat32>(job, item);
    case CacheType::kBFloat16:
      return Run<CacheType::kBFloat16>(job, item);
    case CacheType::kInt8:
      return Run<CacheType::kInt8>(job, item);
  }
}

constexpr CachedAttentionKernels kTable = {&RunItem};

}  // namespace cached_attention
