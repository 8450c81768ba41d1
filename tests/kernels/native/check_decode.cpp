// A step of decoding through all layers in phases against its pieces, one call after another.
#include "decode_problem.h"
#include "phases.h"
#include "report.h"

namespace {

using namespace fabric;
using Floats = std::vector<float>;

// No thread but the caller's.
struct Alone {
  int64_t num_threads() const { return 1; }
  void Schedule(const std::function<void()>&) { std::abort(); }
};

Floats Norm(const Kernels& kernels, const DecodeJob& job, const Floats& x, const Floats* up,
            const float* gain) {
  Floats y(x.size(), kUnwritten);
  NormJob norm{};
  norm.gate = up == nullptr ? Gate::kNone : job.gate;
  norm.normalise = gain != nullptr;
  norm.width = int64_t(x.size()) / job.rows;
  norm.eps = job.eps;
  norm.x = x.data();
  norm.up = up == nullptr ? nullptr : up->data();
  norm.gain = gain;
  norm.y = y.data();
  for (int64_t row = 0; row < job.rows; ++row) kernels.norm->forward(norm, row);
  return y;
}

// The product of the rows of x with one matrix of a layer.
Floats Product(const Kernels& kernels, const DecodeJob& all, int64_t layer, Linear linear,
               const Floats& x) {
  Job job{};
  job.format = all.format;
  job.digits = 1;
  job.groups = 1;
  job.k = int64_t(x.size()) / all.rows;
  job.rows = all.rows;
  job.floats[0] = x.data();
  Matrix& matrix = job.matrix[0] = all.matrix[linear];
  matrix.bytes += layer * matrix.rows * matrix.row_bytes;
  matrix.scale = all.scales[linear][layer * all.scale_stride[linear]];
  Floats y(size_t(all.rows * matrix.rows), kUnwritten);
  job.out[0] = y.data();
  Floats factors(size_t(all.rows), kUnwritten);
  std::vector<int32_t> sums(size_t(all.rows), 0);
  auto* dwords = ThreadScratch(Slot::kOperand, kernels.operand_bytes(job, all.rows, true));
  const Operand operand{all.rows, kernels.steps(job), reinterpret_cast<int32_t*>(dwords),
                        sums.data(), factors.data()};
  for (int64_t row = 0; row < all.rows; ++row) kernels.prepare(job, operand, row, row, true);
  for (int64_t unit = 0; unit < kernels.units(job, true); ++unit) {
    kernels.run_few_rows(job, operand, unit, 0, all.rows);
  }
  return y;
}

void Add(Floats& h, const Floats& y) {
  for (size_t i = 0; i < h.size(); ++i) h[i] += y[i];
}

void PieceByPiece(const Kernels& kernels, DecodeProblem& p) {
  const DecodeJob& job = p.job;
  for (int64_t layer = 0; layer < job.layers; ++layer) {
    const auto gain = [&](const Floats& all) {
      return all.empty() ? nullptr : all.data() + layer * (int64_t(all.size()) / job.layers);
    };
    const auto linear = [&](Linear which, const Floats& x) {
      return Product(kernels, job, layer, which, x);
    };
    const Floats x = Norm(kernels, job, p.h, nullptr, gain(p.attention_gain));
    const Floats q = linear(kQuery, x), k = linear(kKey, x), v = linear(kValue, x);
    Floats attended(q.size(), kUnwritten);
    CachedAttentionJob attention = job.cache;
    attention.q = q.data();
    attention.k = k.data();
    attention.v = v.data();
    attention.out = attended.data();
    attention.keys = p.keys.data() + layer * job.cache_bytes;
    attention.values = p.values.data() + layer * job.cache_bytes;
    if (!p.key_scales.empty()) {
      const int64_t vectors = job.rows * attention.kv_heads * attention.slots;
      attention.key_scales += layer * vectors;
      attention.value_scales += layer * vectors;
    }
    for (int64_t i = 0; i < job.rows * attention.kv_heads; ++i) {
      kernels.cached_attention->run(attention, i);
    }
    if (!p.sub_gain.empty()) attended = Norm(kernels, job, attended, nullptr, gain(p.sub_gain));
    Add(p.h, linear(kOut, attended));
    const Floats y = Norm(kernels, job, p.h, nullptr, gain(p.mlp_gain));
    const Floats gate = linear(kGateLinear, y), up = linear(kUp, y);
    Add(p.h, linear(kDown, Norm(kernels, job, gate, &up, gain(p.mlp_sub_gain))));
  }
}

void CheckShape(const Kernels& kernels, const DecodeShape& shape, Report& report) {
  report.Begin(shape.Name());
  Random one, other;
  DecodeProblem found(one, shape), expected(other, shape);
  Floats shared(size_t(DecodeStep::SharedFloats(found.job)), kUnwritten);
  const DecodeStep step(kernels, found.job, shared.data());
  Alone pool;
  Phases<DecodeStep>::Run(pool, step.Counts(), step);
  PieceByPiece(kernels, expected);
  const auto compare = [&](const char* what, const auto& ours, const auto& theirs) {
    for (size_t i = 0; i < ours.size(); ++i) {
      report.Expect(ours[i] == theirs[i], what, 0, int64_t(i), ours[i], theirs[i]);
    }
  };
  compare("h", found.h, expected.h);
  compare("keys", found.keys, expected.keys);
  compare("values", found.values, expected.values);
  compare("key scales", found.key_scales, expected.key_scales);
  compare("value scales", found.value_scales, expected.value_scales);
}

}  // namespace

void CheckDecode(const fabric::Kernels& kernels, Report& report) {
  using F = Format;
  using G = Gate;
  using C = CacheType;
  const std::vector<DecodeShape> all = {
      {F::kTernary2, G::kSilu, C::kFloat32, false, 1, 3, 20, 1, 1, 4, 28, 5},
      {F::kTernary2, G::kSquaredRelu, C::kInt8, true, 1, 2, 132, 3, 2, 12, 260, 9},
      {F::kTernary2, G::kSilu, C::kBFloat16, true, 4, 2, 64, 2, 3, 16, 96, 17},
      {F::kTernary1_6, G::kSquaredRelu, C::kFloat32, true, 1, 2, 100, 2, 2, 8, 340, 3},
      {F::kTernary1_6, G::kSilu, C::kInt8, false, 3, 2, 44, 1, 4, 2, 77, 1},
  };
  for (const DecodeShape& shape : all) CheckShape(kernels, shape, report);
}
