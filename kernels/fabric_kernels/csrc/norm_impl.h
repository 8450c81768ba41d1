// Norms and gates, row by row.
// Included once for each instruction set, after math_impl.h.
#pragma once

// Vectors of a row; the last may be incomplete, its missing elements read as zero.
struct RowPart {
  int64_t at;
  int64_t count;
  Isa::Floats Load(const float* row) const {
    if (count == kLanes) return Isa::LoadFloats(row + at);
    alignas(64) float part[kLanes] = {};
    std::memcpy(part, row + at, size_t(count) * 4);
    return Isa::LoadFloats(part);
  }
  void Store(float* row, Isa::Floats v) const {
    if (count == kLanes) return Isa::StoreFloats(row + at, v);
    alignas(64) float part[kLanes];
    Isa::StoreFloats(part, v);
    std::memcpy(row + at, part, size_t(count) * 4);
  }
};

template <class Body>
inline void ForEachPart(int64_t width, const Body& body) {
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) body(RowPart{at, kLanes});
  if (at < width) body(RowPart{at, width - at});
}

// act(g), and its derivative.
template <Gate kGate>
inline Isa::Floats Activate(Isa::Floats g, Isa::Floats* derivative) {
  using F = Isa::Floats;
  if constexpr (kGate == Gate::kSilu) {
    const F sigmoid = Sigmoid(g), one = Isa::SplatFloat(1);
    const F rest = Isa::MulFloats(g, Isa::SubFloats(one, sigmoid));
    *derivative = Isa::MulFloats(sigmoid, Isa::AddFloats(one, rest));
    return Isa::MulFloats(g, sigmoid);
  } else {
    const F positive = Isa::MaxFloats(Isa::SplatFloat(0), g);  // in this order NaN stays NaN
    *derivative = Isa::AddFloats(positive, positive);
    return Isa::MulFloats(positive, positive);
  }
}

template <Gate kGate>
void NormForward(const NormJob& job, int64_t m) {
  const int64_t width = job.width, offset = m * width;
  float* y = job.y + offset;
  const float* x = job.x + offset;
  Isa::Floats squares = Isa::SplatFloat(0);
  ForEachPart(width, [&](RowPart part) {
    Isa::Floats p = part.Load(x), derivative;
    if constexpr (kGate != Gate::kNone) {
      p = Isa::MulFloats(Activate<kGate>(p, &derivative), part.Load(job.up + offset));
      part.Store(y, p);
    }
    squares = Isa::MultiplyAdd(p, p, squares);
  });
  if (!job.normalise) return;
  const float mean = Isa::SumFloats(squares) / float(width);
  const Isa::Floats inverse = Isa::SplatFloat(1.0f / std::sqrt(mean + job.eps));
  const float* from = kGate == Gate::kNone ? x : y;
  ForEachPart(width, [&](RowPart part) {
    const Isa::Floats normal = Isa::MulFloats(part.Load(from), inverse);
    part.Store(y, Isa::MulFloats(normal, part.Load(job.gain)));
  });
}

// With t = dy * gain and c = sum(t p): dp = t / rms - p c / (n rms^3); then through the product.
template <Gate kGate>
void NormBackward(const NormJob& job, int64_t m) {
  const int64_t width = job.width, offset = m * width;
  const float* x = job.x + offset;
  const float* dy = job.dy + offset;
  float* scratch = reinterpret_cast<float*>(ThreadScratch(Slot::kRow, size_t(2 * width) * 4 + 64));
  float* act = scratch;            // act(g)
  float* derivative = act + width;
  Isa::Floats squares = Isa::SplatFloat(0), products = squares;
  ForEachPart(width, [&](RowPart part) {
    Isa::Floats p = part.Load(x);
    if constexpr (kGate != Gate::kNone) {
      Isa::Floats slope;
      p = Activate<kGate>(p, &slope);
      part.Store(act, p);
      part.Store(derivative, slope);
      p = Isa::MulFloats(p, part.Load(job.up + offset));
    }
    if (job.normalise) {
      squares = Isa::MultiplyAdd(p, p, squares);
      const Isa::Floats t = Isa::MulFloats(part.Load(dy), part.Load(job.gain));
      products = Isa::MultiplyAdd(t, p, products);
    }
  });
  float inverse = 1, pull = 0;
  if (job.normalise) {
    inverse = 1.0f / std::sqrt(Isa::SumFloats(squares) / float(width) + job.eps);
    pull = -inverse * inverse * inverse * (Isa::SumFloats(products) / float(width));
  }
  const Isa::Floats scale = Isa::SplatFloat(inverse), back = Isa::SplatFloat(pull);
  ForEachPart(width, [&](RowPart part) {
    Isa::Floats dp = part.Load(dy);
    if constexpr (kGate == Gate::kNone) {
      const Isa::Floats t = Isa::MulFloats(dp, part.Load(job.gain));
      dp = Isa::MultiplyAdd(part.Load(x), back, Isa::MulFloats(t, scale));
      part.Store(job.y + offset, dp);
    } else {
      const Isa::Floats a = part.Load(act), up = part.Load(job.up + offset);
      if (job.normalise) {
        const Isa::Floats t = Isa::MulFloats(dp, part.Load(job.gain));
        dp = Isa::MultiplyAdd(Isa::MulFloats(a, up), back, Isa::MulFloats(t, scale));
      }
      part.Store(job.y + offset, Isa::MulFloats(Isa::MulFloats(dp, up), part.Load(derivative)));
      part.Store(job.d_up + offset, Isa::MulFloats(dp, a));
    }
  });
}

void RunNormForward(const NormJob& job, int64_t row) {
  if (job.gate == Gate::kNone) return NormForward<Gate::kNone>(job, row);
  if (job.gate == Gate::kSilu) return NormForward<Gate::kSilu>(job, row);
  NormForward<Gate::kSquaredRelu>(job, row);
}

void RunNormBackward(const NormJob& job, int64_t row) {
  if (job.gate == Gate::kNone) return NormBackward<Gate::kNone>(job, row);
  if (job.gate == Gate::kSilu) return NormBackward<Gate::kSilu>(job, row);
  NormBackward<Gate::kSquaredRelu>(job, row);
}

constexpr NormKernels kNormKernels = {&RunNormForward, &RunNormBackward};
