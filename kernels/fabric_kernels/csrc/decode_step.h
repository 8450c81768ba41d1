// A step of decoding through all layers of a decoder, one token a row:
// h += o(norm(attention(q, k, v of norm(h)))), then h += down(norm(act(gate(norm(h))) * up(norm(h)))).
//
// A layer is five phases. What precedes a product (norm, gate, quantiser) is computed by each thread
// for itself: that takes less time than waiting for another's.
#pragma once

#include <cstdint>
#include <vector>

#include "job.h"

namespace fabric {

enum Linear { kQuery, kKey, kValue, kOut, kGateLinear, kUp, kDown, kLinears };

// All layers; pointers are to the first.
struct DecodeJob {
  Format format;
  Gate gate;
  float eps;
  int64_t rows;     // B, at most kFewRows
  int64_t layers;   // L
  int64_t hidden;   // D
  int64_t ffn;      // F
  int64_t heads;    // H
  Matrix matrix[kLinears];         // of layer 0, its scale not set
  const float* scales[kLinears];   // [L], or one for all
  int64_t scale_stride[kLinears];  // 1 or 0
  const float* attention_gain;     // [L, D]
  const float* sub_gain;           // [L, H hd] or null
  const float* mlp_gain;           // [L, D]
  const float* mlp_sub_gain;       // [L, F] or null
  CachedAttentionJob cache;        // of layer 0; its q, k, v and out are not read
  int64_t cache_bytes;             // of a layer's keys
  float* h;                        // [B, D], in and out
};

// How it is cut into phases and items, for Phases.
class DecodeStep {
 public:
  struct Local {
    Job job;
    Operand operand;
    CachedAttentionJob attention;
  };

  // Floats of the scratch that all threads share.
  static int64_t SharedFloats(const DecodeJob& job);

  DecodeStep(const Kernels& kernels, const DecodeJob& job, float* shared);

  std::vector<int64_t> Counts() const;
  void Enter(int phase, Local& local) const;
  void Ahead(int phase, int64_t item, const Local& local) const;
  void Begin(int phase, Local& local) const;
  void Run(int phase, int64_t item, Local& local) const;

 private:
  enum Kind { kProject, kAttend, kClose, kWiden, kNarrowAgain, kKinds };

  Job MakeJob(int64_t layer, Kind kind) const;
  CachedAttentionJob MakeAttention(int64_t layer) const;
  // The input of the phase's products, computed from `shared` into `to`; or where it lies already.
  const float* Input(int64_t layer, Kind kind, float* to) const;
  int64_t Width(Kind kind) const;

  const Kernels& kernels_;
  const DecodeJob& job_;
  float* q_;         // [B, H hd]
  float* k_;         // [B, K hd]
  float* v_;         // [B, K hd]
  float* attended_;  // [B, H hd]
  float* gate_;      // [B, F]
  float* up_;        // [B, F]
  float* added_;     // [B, D]: what is added to h
};

}  // namespace fabric
