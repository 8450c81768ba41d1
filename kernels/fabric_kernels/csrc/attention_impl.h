// Attention, an item at a time: see attention.h. An item copies the keys and values of its head,
// then takes blocks of query rows. A row is a pair (token, query head of the group), so that heads
// which share keys share their tiles. Keys that no row of a block sees at either end are skipped.
// Included once for each instruction set, after its Isa.
#pragma once

namespace attention {

#include "attention_tile_impl.h"

// The memory of a thread for one item.
struct Scratch {
  int64_t stride;          // floats of a row: hd rounded up to whole tiles, zeros at the end
  float *k, *v;            // [keys, stride], keys rounded up to whole granules
  float *q, *q_turned;     // [kQueries, stride] and its transpose
  float *g, *g_turned;     // the same of the output's gradient
  float* out;              // [kQueries, stride]
  float *weights, *slopes; // [keys, kQueries]
  float *dk, *dv;          // [keys, stride]
  uint8_t* full;           // for each granule: every row sees all of it
};

inline int64_t Stride(const AttentionJob& job) { return RoundUp(job.width, kPanel); }
inline int64_t PaddedKeys(const AttentionJob& job) { return RoundUp(job.keys, kGranule); }

int64_t SumsFloats(const AttentionJob& job) { return 2 * PaddedKeys(job) * Stride(job); }

Scratch MakeScratch(const AttentionJob& job, bool backward, float* sums) {
  const int64_t stride = Stride(job), keys = PaddedKeys(job);
  const int64_t rows = keys * stride, block = kQueries * stride, scores = keys * kQueries;
  const bool own_sums = backward && sums == nullptr;
  const int64_t floats = 2 * rows + (backward ? 5 : 3) * block + (backward ? 2 : 1) * scores +
                         (own_sums ? 2 * rows : 0);
  float* next = reinterpret_cast<float*>(
      ThreadScratch(Slot::kPanel, size_t(floats) * sizeof(float) + size_t(keys / kGranule)));
  const auto take = [&next](int64_t n) {
    float* const taken = next;
    next += n;
    return taken;
  };
  Scratch s{};
  s.stride = stride;
  s.k = take(rows);
  s.v = take(rows);
  s.q = take(block);
  s.q_turned = take(block);
  s.out = take(block);
  s.weights = take(scores);
  if (backward) {
    s.g = take(block);
    s.g_turned = take(block);
    s.slopes = take(scores);
    s.dk = own_sums ? take(rows) : sums;
    s.dv = own_sums ? take(rows) : sums + rows;
  }
  s.full = reinterpret_cast<uint8_t*>(next);
  return s;
}

// Where a head of one row lies.
struct Head {
  int64_t batch, kv;
  explicit Head(const AttentionJob& job, int64_t head)
      : batch(head / job.kv_heads), kv(head % job.kv_heads) {}
  // Of key/value row s.
  int64_t Key(const AttentionJob& job, int64_t s) const {
    return ((batch * job.keys + s) * job.kv_heads + kv) * job.width;
  }
  // Of query row r, which is token r / group.
  int64_t Query(const AttentionJob& job, int64_t r) const {
    const int64_t token = r / job.group, member = r % job.group;
    return (((batch * job.queries + token) * job.kv_heads + kv) * job.group + member) * job.width;
  }
};

// Cosines and sines of a token; null without any.
struct Angles {
  const float *cos = nullptr, *sin = nullptr;
  Angles() = default;
  Angles(const AttentionJob& job, int64_t batch, int64_t token) {
    if (job.cos == nullptr) return;
    cos = job.cos + (batch * job.queries + token) * (job.width / 2);
    sin = job.sin + (batch * job.queries + token) * (job.width / 2);
  }
};

// to = rotate(x), then zeros up to `stride`. `x` null: zeros alone.
void LoadRow(const float* __restrict x, int64_t width, int64_t stride, Angles angles,
             float* __restrict to) {
  if (x == nullptr) {
    std::memset(to, 0, size_t(stride) * sizeof(float));
    return;
  }
  const int64_t half = width / 2;
  if (angles.cos == nullptr) {
    std::memcpy(to, x, size_t(width) * sizeof(float));
  } else {
    for (int64_t i = 0; i < half; ++i) {
      to[i] = x[i] * angles.cos[i] - x[half + i] * angles.sin[i];
      to[half + i] = x[half + i] * angles.cos[i] + x[i] * angles.sin[i];
    }
  }
  for (int64_t i = width; i < stride; ++i) to[i] = 0;
}

// to = factor * the transpose of rotate, applied to x.
void StoreRow(const float* __restrict x, int64_t width, Angles angles, float factor,
              float* __restrict to) {
  const int64_t half = width / 2;
  if (angles.cos == nullptr) {
    for (int64_t i = 0; i < width; ++i) to[i] = factor * x[i];
    return;
  }
  for (int64_t i = 0; i < half; ++i) {
    to[i] = factor * (x[i] * angles.cos[i] + x[half + i] * angles.sin[i]);
    to[half + i] = factor * (x[half + i] * angles.cos[i] - x[i] * angles.sin[i]);
  }
}

void LoadKeys(const AttentionJob& job, const Head& head, const Scratch& s) {
  for (int64_t i = 0; i < PaddedKeys(job); ++i) {
    const bool real = i < job.keys;
    const int64_t at = real ? head.Key(job, i) : 0;
    const Angles angles = real ? Angles(job, head.batch, i) : Angles();
    LoadRow(real ? job.k + at : nullptr, job.width, s.stride, angles, s.k + i * s.stride);
    LoadRow(real ? job.v + at : nullptr, job.width, s.stride, Angles(), s.v + i * s.stride);
  }
}

constexpr uint64_t kAllSeen = 0x0101010101010101;

// A block of query rows, and what they see.
struct Block {
  int64_t first, rows;       // valid rows; the others are zeros
  int64_t low, high;         // keys outside of which no row sees any; whole granules
  bool blind[kQueries];      // rows that see nothing
  const uint8_t* mask[kQueries];  // of each row; null where it counts as seeing everything

  // The mask of a granule for a row, a byte for each key; keys beyond the last are not seen.
  uint64_t Seen(const AttentionJob& job, int row, int64_t granule) const {
    const int64_t at = granule * kGranule, count = std::min<int64_t>(kGranule, job.keys - at);
    uint64_t seen = 0;
    if (mask[row] != nullptr) {
      std::memcpy(&seen, mask[row] + at, size_t(count));
    } else {
      seen = kAllSeen >> (8 * (kGranule - count));
    }
    return seen;
  }
};

// Looks at the masks of a block's tokens: `full` and the first and last granule that any row sees.
Block MakeBlock(const AttentionJob& job, const Head& head, int64_t first, uint8_t* full) {
  Block block{};
  block.first = first;
  block.rows = std::min<int64_t>(kQueries, job.queries * job.group - first);
  int token_rows[kQueries];  // one row of each token
  int tokens = 0;
  for (int r = 0; r < block.rows; ++r) {
    const int64_t token = (first + r) / job.group;
    if (r > 0 && token == (first + r - 1) / job.group) {
      block.mask[r] = block.mask[r - 1];
      block.blind[r] = block.blind[r - 1];
      continue;
    }
    const uint8_t* mask = job.mask + (head.batch * job.queries + token) * job.keys;
    block.blind[r] = std::memchr(mask, 1, size_t(job.keys)) == nullptr;
    block.mask[r] = block.blind[r] ? nullptr : mask;
    token_rows[tokens++] = r;
  }
  const int64_t granules = PaddedKeys(job) / kGranule;
  int64_t low = granules, high = 0;
  for (int64_t i = 0; i < granules; ++i) {
    uint64_t any = 0, all = kAllSeen;
    for (int t = 0; t < tokens; ++t) {
      const uint64_t seen = block.Seen(job, token_rows[t], i);
      any |= seen;
      all &= seen;
    }
    full[i] = all == kAllSeen;
    if (any != 0) {
      low = std::min(low, i);
      high = i + 1;
    }
  }
  block.low = low * kGranule;
  block.high = high * kGranule;
  return block;
}

// Minus infinity where a row does not see a key.
void Hide(const AttentionJob& job, const Block& block, const uint8_t* full, float* scores) {
  for (int64_t i = block.low / kGranule; i < block.high / kGranule; ++i) {
    if (full[i]) continue;
    uint64_t seen[kQueries];
    for (int r = 0; r < kQueries; ++r) {
      seen[r] = r < block.rows ? block.Seen(job, r, i) : kAllSeen;
    }
    for (int j = 0; j < kGranule; ++j) {
      float* row = scores + (i * kGranule + j - block.low) * kQueries;
      for (int r = 0; r < kQueries; ++r) {
        const bool sees = reinterpret_cast<const uint8_t*>(&seen[r])[j] != 0;
        row[r] = sees ? row[r] : -std::numeric_limits<float>::infinity();
      }
    }
  }
}

// e^(scale * (score - largest of the query)) in place; their sums for each query.
void Exponentials(int64_t keys, float scale, float* scores, float* sums) {
  const Lanes factor = Splat(scale);
  Lanes top[kVectors], sum[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    top[v] = Load(scores + v * kLanes);
    sum[v] = Lanes{};
  }
  for (int64_t s = 1; s < keys; ++s) {
    for (int v = 0; v < kVectors; ++v) {
      const Lanes x = Load(scores + s * kQueries + v * kLanes);
      top[v] = x > top[v] ? x : top[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) top[v] *= -factor;
  for (int64_t s = 0; s < keys; s += kGranule) {
    Lanes part[kVectors] = {};  // short sums first: they round less
    for (int64_t j = s; j < s + kGranule; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        float* at = scores + j * kQueries + v * kLanes;
        const Lanes e = Exp(MultiplyAdd(Load(at), factor, top[v]));
        Store(at, e);
        part[v] += e;
      }
    }
    for (int v = 0; v < kVectors; ++v) sum[v] += part[v];
  }
  for (int v = 0; v < kVectors; ++v) Store(sums + v * kLanes, sum[v]);
}

// The softmax of a block but for the division by `sums`, into s.weights.
Block Weigh(const AttentionJob& job, const Head& head, int64_t first, const Scratch& s,
            float* sums) {
  const Block block = MakeBlock(job, head, first, s.full);
  for (int r = 0; r < kQueries; ++r) {
    // Blind rows become zeros: their scores are equal, and no gradient goes through them.
    const bool real = r < block.rows && !block.blind[r];
    const int64_t row = first + r;
    LoadRow(real ? job.q + head.Query(job, row) : nullptr, job.width, s.stride,
            real ? Angles(job, head.batch, row / job.group) : Angles(), s.q + r * s.stride);
  }
  Turn(s.q, s.stride, s.q_turned);
  const int64_t keys = block.high - block.low;
  KeysByQueries(keys, job.width, s.k + block.low * s.stride, s.stride, s.q_turned, s.weights);
  Hide(job, block, s.full, s.weights);
  Exponentials(keys, job.scale, s.weights, sums);
  return block;
}

// Calls body(first row) for the blocks of an item. They are dealt in turn, so that the long ones of
// a causal mask are shared out.
template <class Body>
void EachBlock(const AttentionJob& job, int64_t item, const Body& body) {
  const int64_t rows = job.queries * job.group, step = job.chunks * kQueries;
  for (int64_t first = item % job.chunks * kQueries; first < rows; first += step) body(first);
}

void Forward(const AttentionJob& job, int64_t item) {
  const Head head(job, item / job.chunks);
  const Scratch s = MakeScratch(job, false, nullptr);
  LoadKeys(job, head, s);
  EachBlock(job, item, [&](int64_t first) {
    float sums[kQueries];
    const Block block = Weigh(job, head, first, s, sums);
    QueriesByWidth(block.high - block.low, s.weights, s.v + block.low * s.stride, s.stride, s.out);
    for (int r = 0; r < block.rows; ++r) {
      const float* from = s.out + r * s.stride;
      float* to = job.out + head.Query(job, first + r);
      for (int64_t i = 0; i < job.width; ++i) to[i] = from[i] / sums[r];
    }
  });
}

// weights = softmax; slopes, by weights, become the gradients by scores.
void Differentiate(int64_t keys, const float* sums, float* weights, float* slopes) {
  Lanes sum[kVectors], mean[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    sum[v] = Load(sums + v * kLanes);
    mean[v] = Lanes{};
  }
  for (int64_t s = 0; s < keys; s += kGranule) {
    Lanes part[kVectors] = {};
    for (int64_t j = s; j < s + kGranule; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        float* at = weights + j * kQueries + v * kLanes;
        const Lanes weight = Load(at) / sum[v];
        Store(at, weight);
        part[v] = MultiplyAdd(weight, Load(slopes + j * kQueries + v * kLanes), part[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) mean[v] += part[v];
  }
  for (int64_t s = 0; s < keys; ++s) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = slopes + s * kQueries + v * kLanes;
      Store(at, Load(weights + s * kQueries + v * kLanes) * (Load(at) - mean[v]));
    }
  }
}

void StoreKeys(const AttentionJob& job, const Head& head, int64_t stride, const float* dk,
               const float* dv) {
  for (int64_t i = 0; i < job.keys; ++i) {
    const int64_t at = head.Key(job, i);
    StoreRow(dk + i * stride, job.width, Angles(job, head.batch, i), job.scale, job.dk + at);
    StoreRow(dv + i * stride, job.width, Angles(), 1.0f, job.dv + at);
  }
}

void BackwardBlock(const AttentionJob& job, const Head& head, int64_t first, const Scratch& s) {
  float sums[kQueries];
  const Block block = Weigh(job, head, first, s, sums);
  for (int r = 0; r < kQueries; ++r) {
    LoadRow(r < block.rows ? job.g + head.Query(job, first + r) : nullptr, job.width, s.stride,
            Angles(), s.g + r * s.stride);
  }
  Turn(s.g, s.stride, s.g_turned);
  const int64_t keys = block.high - block.low, at = block.low * s.stride;
  KeysByQueries(keys, job.width, s.v + at, s.stride, s.g_turned, s.slopes);
  Differentiate(keys, sums, s.weights, s.slopes);
  AddKeysByWidth(keys, s.weights, s.g, s.stride, s.dv + at);
  AddKeysByWidth(keys, s.slopes, s.q, s.stride, s.dk + at);
  QueriesByWidth(keys, s.slopes, s.k + at, s.stride, s.out);
  for (int r = 0; r < block.rows; ++r) {
    StoreRow(s.out + r * s.stride, job.width, Angles(job, head.batch, (first + r) / job.group),
             block.blind[r] ? 0.0f : job.scale, job.dq + head.Query(job, first + r));
  }
}

void Backward(const AttentionJob& job, int64_t item, float* sums) {
  const Head head(job, item / job.chunks);
  const Scratch s = MakeScratch(job, true, sums);
  LoadKeys(job, head, s);
  const size_t bytes = size_t(PaddedKeys(job) * s.stride) * sizeof(float);
  std::memset(s.dk, 0, bytes);
  std::memset(s.dv, 0, bytes);
  EachBlock(job, item, [&](int64_t first) { BackwardBlock(job, head, first, s); });
  if (sums == nullptr) StoreKeys(job, head, s.stride, s.dk, s.dv);
}

void Finish(const AttentionJob& job, int64_t head, float* sums) {
  const int64_t floats = SumsFloats(job), stride = Stride(job);
  for (int64_t c = 1; c < job.chunks; ++c) {
    const float* from = sums + c * floats;
    for (int64_t i = 0; i < floats; ++i) sums[i] += from[i];
  }
  StoreKeys(job, Head(job, head), stride, sums, sums + PaddedKeys(job) * stride);
}

constexpr AttentionKernels kTable = {&Forward, &SumsFloats, &Backward, &Finish};

}  // namespace attention
