// The dot product alone, and reading alone.
// Included once for each instruction set, after its Isa.
#pragma once

constexpr int kChains = 2 * Isa::kTileRows;  // accumulators of a tile of the products

int32_t PeakDot(int64_t steps, const int8_t* operands) {
  Vec acc[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) acc[i] = Isa::Zero();
  const Vec w = Isa::And(Isa::Load(operands), Isa::Splat8(3));
  for (int64_t s = 0; s < steps; ++s) {
    // Read anew, which no compiler takes for a constant.
    const Vec a = Isa::Load(operands + (s & 1) * kVecBytes);
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) Isa::Dot(acc[i], w, a);
  }
#pragma GCC unroll 24
  for (int i = 1; i < kChains; ++i) acc[0] = Isa::Add32(acc[0], acc[i]);
  return Isa::Sum(acc[0]);
}

template <int kStreams>
int32_t ReadStreams(const uint8_t* from, int64_t bytes, int64_t ahead) {
  const int64_t stride = bytes / kStreams;
  Vec acc[kStreams][2];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) acc[s][0] = acc[s][1] = Isa::Zero();
  for (int64_t i = 0; i < stride; i += 2 * kVecBytes) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* at = from + s * stride + i;
#pragma GCC unroll 2
      for (int line = 0; line < 2 * kVecBytes; line += 64) __builtin_prefetch(at + ahead + line);
      acc[s][0] = Isa::Add32(acc[s][0], Isa::Load(at));
      acc[s][1] = Isa::Add32(acc[s][1], Isa::Load(at + kVecBytes));
    }
  }
  Vec total = Isa::Zero();
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) total = Isa::Add32(total, Isa::Add32(acc[s][0], acc[s][1]));
  return Isa::Sum(total);
}

int32_t PeakRead(const uint8_t* from, int64_t bytes, bool four, int64_t ahead) {
  return four ? ReadStreams<4>(from, bytes, ahead) : ReadStreams<1>(from, bytes, ahead);
}

constexpr PeakKernels kPeakKernels = {&PeakDot, int64_t{2} * kChains * kVecBytes, &PeakRead};
