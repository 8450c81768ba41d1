// Attention of queries to the keys and values that a mask shows them, and its gradients.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fabric {

// out = softmax(scale * rotate(q) . rotate(k)^T) . v where `mask` is not 0. Query head h reads
// key/value head h / group. A query that sees nothing gets the mean of all values.
struct AttentionJob {
  int64_t batch;     // B
  int64_t queries;   // T
  int64_t keys;      // S
  int64_t kv_heads;  // K; the queries have K * group heads
  int64_t group;
  int64_t width;     // hd
  float scale;       // positive
  const float* q;       // [B, T, H, hd]
  const float* k;       // [B, S, K, hd]
  const float* v;       // [B, S, K, hd]
  const uint8_t* mask;  // [B, T, S], 0 or 1
  const float* cos;     // [B, T, hd / 2] or null: q and k are turned already; T == S with angles
  const float* sin;
  float* out;           // forward: [B, T, H, hd]
  const float* g;       // backward: the gradient by `out`
  float* dq;
  float* dk;
  float* dv;
  int64_t chunks;       // pieces that the queries of one key/value head are dealt to
};

// An item is one chunk of the queries of one key/value head of one row; item / chunks counts heads.
struct AttentionKernels {
  void (*forward)(const AttentionJob&, int64_t item);
  // Floats of the sums for dk and dv that an item computes.
  int64_t (*sums_floats)(const AttentionJob&);
  // Writes the item's part of dq, and its part of dk and dv into `sums`; with `sums` null, where
  // there is one chunk, dk and dv themselves.
  void (*backward)(const AttentionJob&, int64_t item, float* sums);
  // dk and dv of a head from the sums of its chunks, which follow one another. Overwrites those.
  void (*finish)(const AttentionJob&, int64_t head, float* sums);
};

}  // namespace fabric
