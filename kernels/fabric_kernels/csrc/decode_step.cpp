#include "decode_step.h"

#include <algorithm>

namespace fabric {
namespace {

constexpr int64_t kLine = 64;              // bytes
constexpr int64_t kAheadBytes = 64 << 10;  // of weights, asked for while others finish a phase

int64_t Padded(int64_t floats) { return (floats + 15) / 16 * 16; }
size_t PaddedBytes(size_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t AttentionWidth(const DecodeJob& job) { return job.heads * job.cache.width; }
int64_t KeyWidth(const DecodeJob& job) { return job.cache.kv_heads * job.cache.width; }

}  // namespace

int64_t DecodeStep::SharedFloats(const DecodeJob& job) {
  const int64_t b = job.rows;
  return 2 * Padded(b * AttentionWidth(job)) + 2 * Padded(b * KeyWidth(job)) +
         2 * Padded(b * job.ffn) + Padded(b * job.hidden);
}

DecodeStep::DecodeStep(const Kernels& kernels, const DecodeJob& job, float* shared)
    : kernels_(kernels), job_(job) {
  const auto take = [&](int64_t width) {
    float* part = shared;
    shared += Padded(job.rows * width);
    return part;
  };
  q_ = take(AttentionWidth(job));
  k_ = take(KeyWidth(job));
  v_ = take(KeyWidth(job));
  attended_ = take(AttentionWidth(job));
  gate_ = take(job.ffn);
  up_ = take(job.ffn);
  added_ = take(job.hidden);
}

int64_t DecodeStep::Width(Kind kind) const {
  return kind == kClose ? AttentionWidth(job_) : kind == kNarrowAgain ? job_.ffn : job_.hidden;
}

std::vector<int64_t> DecodeStep::Counts() const {
  std::vector<int64_t> counts(size_t(job_.layers) * kKinds);
  for (int kind = 0; kind < kKinds; ++kind) {
    const int64_t count = kind == kAttend ? job_.rows * job_.cache.kv_heads
                                          : kernels_.units(MakeJob(0, Kind(kind)), true);
    for (size_t i = size_t(kind); i < counts.size(); i += kKinds) counts[i] = count;
  }
  return counts;
}

Job DecodeStep::MakeJob(int64_t layer, Kind kind) const {
  Job job{};
  job.format = job_.format;
  job.digits = 1;
  job.k = Width(kind);
  job.rows = job_.rows;
  const auto add = [&](Linear linear, float* out) {
    Matrix& matrix = job.matrix[job.groups];
    matrix = job_.matrix[linear];
    matrix.bytes += layer * matrix.rows * matrix.row_bytes;
    matrix.scale = job_.scales[linear][layer * job_.scale_stride[linear]];
    job.out[job.groups++] = out;
  };
  switch (kind) {
    case kProject:
      add(kQuery, q_);
      add(kKey, k_);
      add(kValue, v_);
      break;
    case kClose:
      add(kOut, added_);
      break;
    case kWiden:
      add(kGateLinear, gate_);
      add(kUp, up_);
      break;
    default:
      add(kDown, added_);
  }
  return job;
}

CachedAttentionJob DecodeStep::MakeAttention(int64_t layer) const {
  CachedAttentionJob job = job_.cache;
  job.q = q_;
  job.k = k_;
  job.v = v_;
  job.out = attended_;
  job.keys = static_cast<uint8_t*>(job.keys) + layer * job_.cache_bytes;
  job.values = static_cast<uint8_t*>(job.values) + layer * job_.cache_bytes;
  if (job.key_scales != nullptr) {
    const int64_t vectors = layer * job.batch * job.kv_heads * job.slots;
    job.key_scales += vectors;
    job.value_scales += vectors;
  }
  return job;
}

const float* DecodeStep::Input(int64_t layer, Kind kind, float* to) const {
  NormJob norm{};
  norm.width = Width(kind);
  norm.eps = job_.eps;
  norm.y = to;
  switch (kind) {
    case kProject:
      norm.x = job_.h;
      norm.gain = job_.attention_gain;
      break;
    case kClose:
      if (job_.sub_gain == nullptr) return attended_;
      norm.x = attended_;
      norm.gain = job_.sub_gain;
      break;
    case kWiden:
      norm.x = job_.h;
      norm.gain = job_.mlp_gain;
      break;
    default:
      norm.x = gate_;
      norm.up = up_;
      norm.gate = job_.gate;
      norm.gain = job_.mlp_sub_gain;
  }
  norm.normalise = norm.gain != nullptr;
  if (norm.normalise) norm.gain += layer * norm.width;
  for (int64_t row = 0; row < job_.rows; ++row) kernels_.norm->forward(norm, row);
  return to;
}

void DecodeStep::Enter(int phase, Local& local) const {
  const int64_t layer = phase / kKinds;
  const Kind kind = Kind(phase % kKinds);
  if (kind == kAttend) {
    local.attention = MakeAttention(layer);
  } else {
    local.job = MakeJob(layer, kind);
  }
}

void DecodeStep::Ahead(int phase, int64_t item, const Local& local) const {
  if (phase % kKinds == kAttend) return;
  const FewRowsRange range = kernels_.few_rows_range(local.job, item);
  const Matrix& matrix = local.job.matrix[range.group];
  for (int part = 0; part < kRowParts; ++part) {
    const uint8_t* from = matrix.bytes + range.Begin(part) * matrix.row_bytes;
    const int64_t rows = range.End(part) - range.Begin(part);
    const int64_t bytes = std::min(kAheadBytes / kRowParts, rows * matrix.row_bytes);
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at, 0, 2);
  }
}

void DecodeStep::Begin(int phase, Local& local) const {
  const Kind kind = Kind(phase % kKinds);
  if (kind == kAttend) return;
  Job& job = local.job;
  const int64_t rows = job_.rows;
  const size_t dwords = PaddedBytes(kernels_.operand_bytes(job, rows, true));
  const size_t input = PaddedBytes(size_t(rows * job.k) * sizeof(float));
  uint8_t* scratch = ThreadScratch(Slot::kOperand, dwords + input + 2 * kLine);
  float* own = reinterpret_cast<float*>(scratch + dwords);
  job.floats[0] = Input(phase / kKinds, kind, own);
  local.operand = Operand{rows, kernels_.steps(job), reinterpret_cast<int32_t*>(scratch),
                          reinterpret_cast<int32_t*>(scratch + dwords + input),
                          reinterpret_cast<float*>(scratch + dwords + input + kLine)};
  static_assert(kFewRows * sizeof(float) <= kLine);
  for (int64_t row = 0; row < rows; ++row) kernels_.prepare(job, local.operand, row, row, true);
}

void DecodeStep::Run(int phase, int64_t item, Local& local) const {
  const Kind kind = Kind(phase % kKinds);
  if (kind == kAttend) return kernels_.cached_attention->run(local.attention, item);
  kernels_.run_few_rows(local.job, local.operand, item, 0, job_.rows);
  if (kind != kClose && kind != kNarrowAgain) return;
  const FewRowsRange range = kernels_.few_rows_range(local.job, item);
  for (int64_t row = 0; row < job_.rows; ++row) {
    float* h = job_.h + row * job_.hidden;
    const float* added = added_ + row * job_.hidden;
    for (int part = 0; part < kRowParts; ++part) {
      for (int64_t n = range.Begin(part); n < range.End(part); ++n) h[n] += added[n];
    }
  }
}

}  // namespace fabric
