// Attention and its gradients against double arithmetic, one query and one head at a time.
#include <algorithm>

#include "report.h"

namespace {

using fabric::AttentionJob;
using fabric::AttentionKernels;
using Doubles = std::vector<double>;

struct Shape {
  int64_t batch, queries, keys, kv_heads, group, width;
  bool angles;
  int64_t chunks;
};

// A job and all that it points to.
struct Problem {
  std::vector<float> q, k, v, g, cos, sin, out, dq, dk, dv;
  std::vector<uint8_t> mask;
  AttentionJob job;
};

enum class Masks { kRagged, kCausal };

std::vector<uint8_t> MakeMask(Random& random, const Shape& s, Masks kind) {
  std::vector<uint8_t> mask;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t t = 0; t < s.queries; ++t) {
      const bool blind = kind == Masks::kRagged && random.Below(8) == 0;
      for (int64_t i = 0; i < s.keys; ++i) {
        const bool seen = kind == Masks::kCausal ? i <= t : random.Below(3) > 0;
        mask.push_back(seen && !blind);
      }
    }
  }
  return mask;
}

void Fill(Random& random, const Shape& s, Masks kind, Problem* p) {
  const int64_t queries = s.batch * s.queries * s.kv_heads * s.group * s.width;
  const int64_t keys = s.batch * s.keys * s.kv_heads * s.width;
  p->q = random.Floats(queries);
  p->k = random.Floats(keys);
  p->v = random.Floats(keys);
  p->g = random.Floats(queries);
  p->mask = MakeMask(random, s, kind);
  const int64_t turns = s.angles ? s.batch * s.queries * (s.width / 2) : 0;
  for (const float angle : random.Floats(turns)) {
    p->cos.push_back(std::cos(3 * angle));
    p->sin.push_back(std::sin(3 * angle));
  }
  p->out = p->dq = std::vector<float>(size_t(queries), kUnwritten);
  p->dk = p->dv = std::vector<float>(size_t(keys), kUnwritten);
  AttentionJob& job = p->job;
  job = {s.batch, s.queries, s.keys, s.kv_heads, s.group, s.width, 2.5f};
  job.q = p->q.data();
  job.k = p->k.data();
  job.v = p->v.data();
  job.mask = p->mask.data();
  job.cos = s.angles ? p->cos.data() : nullptr;
  job.sin = s.angles ? p->sin.data() : nullptr;
  job.out = p->out.data();
  job.g = p->g.data();
  job.dq = p->dq.data();
  job.dk = p->dk.data();
  job.dv = p->dv.data();
  job.chunks = s.chunks;
}

// As the handlers of XLA's calls do, in one thread.
void Run(const AttentionKernels& kernels, const AttentionJob& job) {
  const int64_t heads = job.batch * job.kv_heads;
  for (int64_t i = 0; i < heads * job.chunks; ++i) kernels.forward(job, i);
  if (job.chunks == 1) {
    for (int64_t i = 0; i < heads; ++i) kernels.backward(job, i, nullptr);
    return;
  }
  const int64_t floats = kernels.sums_floats(job);
  for (int64_t head = 0; head < heads; ++head) {
    std::vector<float> sums(size_t(job.chunks * floats), kUnwritten);
    for (int64_t c = 0; c < job.chunks; ++c) {
      kernels.backward(job, head * job.chunks + c, sums.data() + c * floats);
    }
    kernels.finish(job, head, sums.data());
  }
}

struct Exact {
  Doubles out, dq, dk, dv;
};

// Rows of q or k, turned; with `back` the transpose of that.
void Rotate(const AttentionJob& job, int64_t heads, bool back, Doubles* x) {
  if (job.cos == nullptr) return;
  const int64_t half = job.width / 2;
  for (size_t row = 0; row < x->size() / size_t(job.width); ++row) {
    double* at = x->data() + row * size_t(job.width);
    const size_t token = row / size_t(heads) * size_t(half);
    for (int64_t i = 0; i < half; ++i) {
      const double c = job.cos[token + size_t(i)];
      const double s = back ? -job.sin[token + size_t(i)] : job.sin[token + size_t(i)];
      const double first = at[i], second = at[half + i];
      at[i] = first * c - second * s;
      at[half + i] = second * c + first * s;
    }
  }
}

// Adds what query `row` (token `t` of batch row `b`, head `h`) contributes.
void AddQuery(const AttentionJob& job, const Doubles& q, const Doubles& k, int64_t b, int64_t t,
              int64_t h, Exact* exact) {
  const int64_t heads = job.kv_heads * job.group, width = job.width;
  const size_t row = size_t(((b * job.queries + t) * heads + h) * width);
  const uint8_t* mask = job.mask + (b * job.queries + t) * job.keys;
  const bool blind = std::find(mask, mask + job.keys, 1) == mask + job.keys;
  const auto key = [&](int64_t s) {
    return size_t(((b * job.keys + s) * job.kv_heads + h / job.group) * width);
  };
  Doubles weights(size_t(job.keys), 0.0), slopes(size_t(job.keys), 0.0);
  double top = -1e300, sum = 0, mean = 0;
  for (int64_t s = 0; s < job.keys; ++s) {
    for (int64_t d = 0; d < width && !blind; ++d) {
      weights[size_t(s)] += job.scale * q[row + size_t(d)] * k[key(s) + size_t(d)];
    }
    if (blind || mask[s]) top = std::max(top, weights[size_t(s)]);
  }
  for (int64_t s = 0; s < job.keys; ++s) {
    weights[size_t(s)] = blind || mask[s] ? std::exp(weights[size_t(s)] - top) : 0.0;
    sum += weights[size_t(s)];
  }
  for (int64_t s = 0; s < job.keys; ++s) {
    weights[size_t(s)] /= sum;
    for (int64_t d = 0; d < width; ++d) {
      const double v = job.v[key(s) + size_t(d)], g = job.g[row + size_t(d)];
      exact->out[row + size_t(d)] += weights[size_t(s)] * v;
      exact->dv[key(s) + size_t(d)] += weights[size_t(s)] * g;
      slopes[size_t(s)] += g * v;
    }
    mean += weights[size_t(s)] * slopes[size_t(s)];
  }
  for (int64_t s = 0; s < job.keys && !blind; ++s) {
    const double slope = job.scale * weights[size_t(s)] * (slopes[size_t(s)] - mean);
    for (int64_t d = 0; d < width; ++d) {
      exact->dq[row + size_t(d)] += slope * k[key(s) + size_t(d)];
      exact->dk[key(s) + size_t(d)] += slope * q[row + size_t(d)];
    }
  }
}

Exact Solve(const Problem& p) {
  const AttentionJob& job = p.job;
  const int64_t heads = job.kv_heads * job.group;
  Doubles q(p.q.begin(), p.q.end()), k(p.k.begin(), p.k.end());
  Rotate(job, heads, false, &q);
  Rotate(job, job.kv_heads, false, &k);
  Exact exact{Doubles(q.size()), Doubles(q.size()), Doubles(k.size()), Doubles(k.size())};
  for (int64_t b = 0; b < job.batch; ++b) {
    for (int64_t t = 0; t < job.queries; ++t) {
      for (int64_t h = 0; h < heads; ++h) AddQuery(job, q, k, b, t, h, &exact);
    }
  }
  Rotate(job, heads, true, &exact.dq);
  Rotate(job, job.kv_heads, true, &exact.dk);
  return exact;
}

void Compare(const char* what, const std::vector<float>& found, const Doubles& exact,
             int64_t width, Report& report) {
  double largest = 1e-6;
  for (const double x : exact) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < exact.size(); ++i) {
    report.Expect(std::fabs(found[i] - exact[i]) <= 2e-6 * largest, what,
                  int64_t(i) / width, int64_t(i) % width, found[i], exact[i]);
  }
}

void CheckShape(const AttentionKernels& kernels, Random& random, const Shape& s, Masks kind,
                Report& report) {
  report.Begin("attention B " + std::to_string(s.batch) + " T " + std::to_string(s.queries) +
               " S " + std::to_string(s.keys) + " K " + std::to_string(s.kv_heads) + " group " +
               std::to_string(s.group) + " hd " + std::to_string(s.width) + " angles " +
               std::to_string(s.angles) + " chunks " + std::to_string(s.chunks));
  Problem p;
  Fill(random, s, kind, &p);
  Run(kernels, p.job);
  const Exact exact = Solve(p);
  Compare("out", p.out, exact.out, s.width, report);
  Compare("dq", p.dq, exact.dq, s.width, report);
  Compare("dk", p.dk, exact.dk, s.width, report);
  Compare("dv", p.dv, exact.dv, s.width, report);
}

}  // namespace

void CheckAttention(const fabric::Kernels& kernels, Random& random, Report& report) {
  const std::vector<Shape> all = {
      {1, 1, 1, 1, 1, 1, false, 1},   {2, 7, 7, 3, 2, 8, true, 1},
      {2, 33, 50, 1, 4, 10, false, 2}, {1, 65, 65, 2, 3, 6, true, 3},
      {1, 40, 40, 1, 1, 64, true, 1},  {1, 5, 131, 1, 8, 33, false, 1},
  };
  for (const Shape& shape : all) {
    for (const Masks kind : {Masks::kRagged, Masks::kCausal}) {
      CheckShape(*kernels.attention, random, shape, kind, report);
    }
  }
}
