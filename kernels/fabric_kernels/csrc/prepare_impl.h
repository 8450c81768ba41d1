// Activations: quantised to int8 digits and laid out for the integer products.
// Included once for each instruction set, after its Isa.
#pragma once

inline int32_t LoadDword(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

constexpr int Planes(Format format) { return format == Format::kTernary2 ? 4 : 5; }

// Dwords of a row of packed bytes.
inline int64_t RowDwords(const Job& job) { return CeilDiv(job.matrix[0].row_bytes, 4); }

int64_t Steps(const Job& job) {
  if (!job.transposed) return RowDwords(job) * Planes(job.format);
  int64_t steps = 0;
  for (int g = 0; g < job.groups; ++g) steps += CeilDiv(job.matrix[g].rows, 4);
  return steps;
}

// Vectors of packed bytes in a row, for the few-rows kernel.
inline int64_t RowChunks(const Job& job) { return CeilDiv(job.matrix[0].row_bytes, kVecBytes); }

size_t OperandBytes(const Job& job, int64_t rows, bool few_rows) {
  if (few_rows) return size_t(rows * RowChunks(job) * Planes(job.format) * kVecBytes);
  return size_t(RoundUp(rows, Isa::kTileRows) * Steps(job) * 4);
}

// Largest |x|, as the bits of a float: comparing bits puts infinities and NaN above all numbers.
inline int32_t MaxAbsBits(const float* x, int64_t n) {
  Vec top = Isa::Zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) top = Isa::MaxAbsBits(top, x + i);
  int32_t bits = Isa::MaxLane(top);
  for (; i < n; ++i) bits = std::max(bits, LoadDword(x + i) & 0x7fffffff);
  return bits;
}

inline float AsFloat(int32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Digits of round(x * scale), most significant first, each to its own row of `digits`, `stride`
// apart; `sums` grows by each digit's sum. A value is sum_d digit_d * 256^(D-1-d).
template <int kDigits>
void SplitDigits(const float* x, int64_t n, float scale, int8_t* digits, int64_t stride) {
  const auto vector = [&](const float* from, int8_t* to) {
    Vec q = Isa::RoundScaled(from, scale);
    if constexpr (kDigits == 3) {
      Vec rest = Isa::Add32(q, Isa::Splat32(128));
      Vec high = Isa::template ShiftRightArithmetic32<8>(rest);
      Isa::StoreBytes(to + 2 * stride, Isa::Sub32(q, Isa::template ShiftLeft32<8>(high)));
      q = high;
    }
    if constexpr (kDigits >= 2) {
      Vec rest = Isa::Add32(q, Isa::Splat32(128));
      Vec high = Isa::template ShiftRightArithmetic32<8>(rest);
      Isa::StoreBytes(to + stride, Isa::Sub32(q, Isa::template ShiftLeft32<8>(high)));
      q = high;
    }
    Isa::StoreBytes(to, q);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vector(x + i, digits + i);
  if (i < n) {
    float tail[kLanes] = {};
    int8_t bytes[kDigits * kLanes];
    std::memcpy(tail, x + i, size_t(n - i) * 4);
    const int64_t whole = stride;
    stride = kLanes;
    vector(tail, bytes);
    for (int d = 0; d < kDigits; ++d) {
      std::memcpy(digits + d * whole + i, bytes + d * kLanes, size_t(n - i));
    }
  }
}

inline void SplitDigits(int digits, const float* x, int64_t n, float scale, int8_t* to,
                        int64_t stride) {
  if (digits == 1) return SplitDigits<1>(x, n, scale, to, stride);
  if (digits == 2) return SplitDigits<2>(x, n, scale, to, stride);
  SplitDigits<3>(x, n, scale, to, stride);
}

// The contracted row of token m in natural order: digit rows of `width` bytes at `row`, and the
// factor of its results. `width` covers zeros after each group's end.
float DigitRows(const Job& job, int64_t m, int64_t width, int8_t* row) {
  std::memset(row, 0, size_t(width * job.digits));
  if (job.codes != nullptr) {
    std::memcpy(row, job.codes + m * job.k, size_t(job.k));
    return 1.0f;
  }
  if (job.digits == 1) {
    // BitNet's rule for activations: scale = 127 / max(absmax, 1e-5), rounded as torch rounds it.
    const float* x = job.floats[0] + m * job.k;
    const float absmax = AsFloat(MaxAbsBits(x, job.k));
    if (!(absmax <= std::numeric_limits<float>::max())) return std::nanf("");
    const float scale = (1.0f / std::max(absmax, 1e-5f)) * 127.0f;
    SplitDigits(1, x, job.k, scale, row, width);
    return 1.0f / scale;
  }
  // Fixed point: the row's largest magnitude becomes about the largest number that the digits hold,
  // with room for the rounding of the float product.
  const float largest = job.digits == 2 ? 127.0f * 256 : 127.0f * 65536;
  float absmax = 0;
  for (int g = 0; g < job.groups; ++g) {
    const int64_t n = job.transposed ? job.matrix[g].rows : job.k;
    const float top = AsFloat(MaxAbsBits(job.floats[g] + m * n, n));
    if (!(top <= std::numeric_limits<float>::max())) return std::nanf("");
    absmax = std::max(absmax, job.transposed ? top * std::fabs(job.matrix[g].scale) : top);
    if (!job.transposed) break;
  }
  // Below this the reciprocal overflows; such a row is zero for every purpose.
  if (absmax < 1e-30f) return 0.0f;
  int64_t offset = 0;
  for (int g = 0; g < job.groups; ++g) {
    const int64_t n = job.transposed ? job.matrix[g].rows : job.k;
    const float scale = (job.transposed ? job.matrix[g].scale : 1.0f) * (largest / absmax);
    SplitDigits(job.digits, job.floats[g] + m * n, n, scale, row + offset, width);
    offset += RoundUp(n, 4);
    if (!job.transposed) break;
  }
  return absmax / largest;
}

// Calls put(step, dword) for each group of four digits of a natural row, in the order in which the
// packed bytes are unpacked.
template <class Put>
void ArrangeForward(const Job& job, const int8_t* row, const Put& put) {
  const int64_t dwords = RowDwords(job), width = job.matrix[0].row_bytes;
  if (job.format == Format::kTernary2) {
    for (int64_t i = 0; i < dwords; ++i) {
      int32_t four[4];
      Isa::Deinterleave4(row + 16 * i, four);
      for (int j = 0; j < 4; ++j) put(4 * i + j, four[j]);
    }
    return;
  }
  for (int j = 0; j < 5; ++j) {
    // A plane ends where the next begins, not at a dword.
    const int8_t* plane = row + j * width;
    int64_t i = 0;
    for (; 4 * i + 4 <= width; ++i) put(5 * i + j, LoadDword(plane + 4 * i));
    if (4 * i < width) {
      int32_t last = 0;
      std::memcpy(&last, plane + 4 * i, size_t(width - 4 * i));
      put(5 * i + j, last);
    }
  }
}

// For few rows: each vector of packed bytes has its digits in one vector for each plane.
template <int kPlanes>
void ArrangePlanes(const Job& job, const int8_t* digits, int32_t* base) {
  ArrangeForward(job, digits, [&](int64_t step, int32_t dword) {
    const int64_t i = step / kPlanes, j = step % kPlanes;
    base[((i / kLanes) * kPlanes + j) * kLanes + i % kLanes] = dword;
  });
}

void Prepare(const Job& job, const Operand& operand, int64_t m, int64_t slot, bool few_rows) {
  const int planes = Planes(job.format);
  // Natural rows hold the zeros that the last bytes of a packed row pad with.
  const int64_t width = RoundUp(
      job.transposed ? 4 * operand.steps : std::max(job.k, job.matrix[0].row_bytes * planes + 16),
      64);
  int8_t* row = reinterpret_cast<int8_t*>(
      ThreadScratch(Slot::kRow, size_t(width * kMaxDigits)));
  operand.factors[slot] = DigitRows(job, m, width, row);
  for (int g = 0; g < job.groups; ++g) {
    const Adapter& adapter = job.adapter[g];
    if (adapter.rank == 0) continue;
    const int64_t n = job.transposed ? job.matrix[g].rows : job.k;
    Narrow(job.floats[job.transposed ? g : 0] + m * n, n, job.transposed ? adapter.b : adapter.a,
           adapter.rank, adapter.scale, adapter.narrow + m * adapter.rank);
  }
  const int64_t chunks = RowChunks(job);
  for (int d = 0; d < job.digits; ++d) {
    const int8_t* digits = row + d * width;
    const int64_t r = slot * job.digits + d;
    int32_t sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += digits[i];
    operand.sums[r] = sum;
    if (few_rows) {
      int32_t* base = operand.dwords + r * chunks * planes * kLanes;
      std::memset(base, 0, size_t(chunks * planes * kVecBytes));
      if (job.format == Format::kTernary2) {
        ArrangePlanes<Planes(Format::kTernary2)>(job, digits, base);
      } else {
        ArrangePlanes<Planes(Format::kTernary1_6)>(job, digits, base);
      }
      continue;
    }
    int32_t* base = operand.dwords + (r / Isa::kTileRows) * operand.steps * Isa::kTileRows +
                    r % Isa::kTileRows;
    const auto put = [&](int64_t step, int32_t dword) { base[step * Isa::kTileRows] = dword; };
    if (!job.transposed) {
      ArrangeForward(job, digits, put);
    } else {
      for (int64_t s = 0; s < operand.steps; ++s) put(s, LoadDword(digits + 4 * s));
    }
  }
}
