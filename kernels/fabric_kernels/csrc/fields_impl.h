// Packed bytes in a vector, and the fields or digits in them.
// Included once for each instruction set, after its Isa.
#pragma once

// One vector of packed bytes of a row from `begin`; bytes after the row's end are zero.
inline Vec LoadRow(const uint8_t* row, int64_t begin, int64_t row_bytes) {
  if (begin + kVecBytes <= row_bytes) return Isa::Load(row + begin);
  alignas(64) uint8_t part[kVecBytes] = {};
  std::memcpy(part, row + begin, size_t(row_bytes - begin));
  return Isa::Load(part);
}

// The digit in front of a base-3 fraction: floor(3 r / 256), bytewise. Averages round up, which
// taking 1 off beforehand makes good for every byte.
inline Vec LeadingDigit(Vec r) {
  r = Isa::SubtractSaturated8(r, Isa::Splat8(1));
  const Vec three_quarters = Isa::Average8(r, Isa::Average8(r, Isa::Zero()));
  return Isa::And(Isa::template ShiftRight16<6>(three_quarters), Isa::Splat8(3));
}

inline Vec Triple(Vec r) { return Isa::Add8(r, Isa::Add8(r, r)); }

// Takes the lowest field (or leading digit) off every byte and moves the next one there.
template <Format kFormat>
inline Vec NextField(Vec& bytes) {
  if constexpr (kFormat == Format::kTernary2) {
    const Vec field = Isa::And(bytes, Isa::Splat8(3));
    bytes = Isa::template ShiftRight16<2>(bytes);
    return field;
  } else {
    const Vec digit = LeadingDigit(bytes);
    bytes = Triple(bytes);
    return digit;
  }
}

// Calls put(j, codes) for each field or digit of a vector of packed bytes.
template <class Put>
inline void Fields(Format format, Vec bytes, const Put& put) {
  if (format == Format::kTernary2) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) put(j, NextField<Format::kTernary2>(bytes));
  } else {
#pragma GCC unroll 5
    for (int j = 0; j < 5; ++j) put(j, NextField<Format::kTernary1_6>(bytes));
  }
}
