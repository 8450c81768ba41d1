// A step of decoding, a key/value head at a time: see cached_attention.h. Vectors of the cache are
// widened in registers; scores of kLanes slots are summed side by side and turned once.
// Included once for each instruction set, after its Isa and the arithmetic of attention.
#pragma once

namespace cached_attention {

using Floats = Isa::Floats;

// Vectors of a key or value that are read together; as many sums twice fit the registers.
constexpr int kMostVectors = Isa::kRegisters / 4;

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

template <CacheType kType>
using Stored = typename Element<kType>::Stored;

// The elements from `at` of a vector of `width`, zeros behind its end.
template <CacheType kType>
inline Floats LoadPart(const Stored<kType>* vector, int64_t at, int64_t width) {
  if (at + kLanes <= width) return Element<kType>::Load(vector + at);
  if constexpr (kType == CacheType::kFloat32) {
    return Isa::LoadFirstFloats(vector + at, width - at);
  }
  alignas(64) Stored<kType> part[kLanes] = {};
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
void Store(const float* x, int64_t width, Stored<kType>* to, float* scale) {
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

// q . key, which are kVectors whole vectors long and, if kRest, longer; q has zeros behind its end.
template <CacheType kType, int kVectors, bool kRest>
inline Floats Product(const float* q, const Stored<kType>* key, int64_t width) {
  Floats sum = Isa::SplatFloat(0);
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    sum = Isa::MultiplyAdd(Element<kType>::Load(key + i * kLanes), Isa::LoadFloats(q + i * kLanes),
                           sum);
  }
  for (int64_t d = kVectors * kLanes; kRest && d < width; d += kLanes) {
    sum = Isa::MultiplyAdd(LoadPart<kType>(key, d, width), Isa::LoadFloats(q + d), sum);
  }
  return sum;
}

// scores[s] = q . keys[s] for `count` slots. So few instructions are between the loads of two slots
// that those of many slots are under way at once.
template <CacheType kType, int kVectors, bool kRest>
void ScoreSlots(const float* q, const Stored<kType>* keys, int64_t width, int64_t count,
                float* scores) {
  const int64_t stride = kRest ? width : kVectors * kLanes;
  const auto product = [&](int64_t s) {
    return Product<kType, kVectors, kRest>(q, keys + s * stride, width);
  };
  Floats sums[kLanes];
  int64_t s = 0;
  for (; s + kLanes <= count; s += kLanes) {
    // Slot by slot, so that memory is read in order.
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = product(s + i);
    Isa::StoreFloats(scores + s, Isa::SumEach(sums));
  }
  if (s == count) return;
  // Slots after the last repeat it: their results are not used.
  for (int i = 0; i < kLanes; ++i) sums[i] = product(std::min(s + i, count - 1));
  Isa::StoreFloats(scores + s, Isa::SumEach(sums));
}

template <CacheType kType, bool kRest, int... kVectors>
constexpr auto ScoreTable(std::integer_sequence<int, kVectors...>) {
  return std::array{&ScoreSlots<kType, kVectors, kRest>...};
}

template <CacheType kType>
void Scores(const float* q, const Stored<kType>* keys, int64_t width, int64_t count,
            float* scores) {
  constexpr std::make_integer_sequence<int, kMostVectors + 1> kCounts;
  static constexpr std::array kTables = {ScoreTable<kType, false>(kCounts),
                                         ScoreTable<kType, true>(kCounts)};
  const int64_t vectors = std::min<int64_t>(kMostVectors, width / kLanes);
  kTables[vectors * kLanes < width][size_t(vectors)](q, keys, width, count, scores);
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

// out[d] = factor * sum of weights[s] * values[s][d] from d = `at` on: kVectors whole vectors and,
// if kRest, what is left of `width` after them.
template <CacheType kType, int kVectors, bool kRest>
void MixVectors(const float* weights, const Stored<kType>* values, int64_t width, int64_t count,
                int64_t at, float factor, float* out) {
  constexpr int kSums = kVectors + kRest;
  Floats acc[2][kSums];  // of even and of odd slots
#pragma GCC unroll 2
  for (auto& half : acc) {
#pragma GCC unroll 8
    for (auto& one : half) one = Isa::SplatFloat(0);
  }
  const auto add = [&](int64_t s, Floats (&to)[kSums]) {
    const Floats w = Isa::SplatFloat(weights[s]);
    const auto* value = values + s * width;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      to[v] = Isa::MultiplyAdd(Element<kType>::Load(value + at + v * kLanes), w, to[v]);
    }
    if constexpr (kRest) {
      const Floats last = LoadPart<kType>(value, at + kVectors * kLanes, width);
      to[kVectors] = Isa::MultiplyAdd(last, w, to[kVectors]);
    }
  };
  int64_t s = 0;
  for (; s + 1 < count; s += 2) {
    add(s, acc[0]);
    add(s + 1, acc[1]);
  }
  if (s < count) add(s, acc[0]);
#pragma GCC unroll 8
  for (int v = 0; v < kSums; ++v) {
    alignas(64) float part[kLanes];
    Isa::StoreFloats(part, Isa::MulFloats(Isa::AddFloats(acc[0][v], acc[1][v]),
                                          Isa::SplatFloat(factor)));
    const int64_t from = at + v * kLanes;
    std::memcpy(out + from, part, size_t(std::min<int64_t>(kLanes, width - from)) * 4);
  }
}

template <CacheType kType, bool kRest, int... kVectors>
constexpr auto MixTable(std::integer_sequence<int, kVectors...>) {
  return std::array{&MixVectors<kType, kVectors + !kRest, kRest>...};
}

template <CacheType kType>
void Mix(const float* weights, const Stored<kType>* values, int64_t width, int64_t count,
         float factor, float* out) {
  constexpr std::make_integer_sequence<int, kMostVectors> kCounts;
  static constexpr std::array kTables = {MixTable<kType, false>(kCounts),
                                         MixTable<kType, true>(kCounts)};
  for (int64_t at = 0; at < width;) {
    const int64_t left = width - at;
    const bool rest = left < kMostVectors * kLanes && left % kLanes != 0;
    const int64_t vectors = std::min<int64_t>(kMostVectors, left / kLanes);
    kTables[rest][size_t(vectors - !rest)](weights, values, width, count, at, factor, out);
    at += (vectors + rest) * kLanes;
  }
}

template <CacheType kType>
void Run(const CachedAttentionJob& job, int64_t item) {
  const int64_t b = item / job.kv_heads, width = job.width, padded = RoundUp(width, kLanes);
  auto* keys = static_cast<Stored<kType>*>(job.keys) + item * job.slots * width;
  auto* values = static_cast<Stored<kType>*>(job.values) + item * job.slots * width;
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
    Mix<kType>(scores, values + begin * width, width, count, 1.0f / sum, job.out + head * width);
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
