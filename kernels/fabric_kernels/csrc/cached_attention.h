// Attention of one new token a row to the slots of a cache that are in use: a step of decoding.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fabric {

enum class CacheType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

// One layer. q and k are turned; k and v are stored in slot `positions[b]`; then
// out = softmax(scale * q . keys^T) . values over the slots [first[b], positions[b]].
struct CachedAttentionJob {
  CacheType type;
  int64_t batch;     // B
  int64_t slots;     // S
  int64_t kv_heads;  // K; the queries have K * group heads
  int64_t group;
  int64_t width;     // hd
  float scale;
  const float* q;    // [B, H, hd]
  const float* k;    // [B, K, hd]
  const float* v;    // [B, K, hd]
  const float* cos;  // [B, hd / 2]
  const float* sin;
  const int32_t* positions;  // [B]
  const int32_t* first;      // [B]
  void* keys;                // [B, K, S, hd] of the layer
  void* values;
  float* key_scales;         // [B, K, S] for int8
  float* value_scales;
  float* out;                // [B, H, hd]
};

// An item is a key/value head of a row.
struct CachedAttentionKernels {
  void (*run)(const CachedAttentionJob&, int64_t item);
};

}  // namespace fabric
