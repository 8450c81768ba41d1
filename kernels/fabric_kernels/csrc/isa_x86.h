// What every x86 vector extension here shares: rearranging 16 bytes at a time (SSSE3).
// Included inside a target region.
#pragma once

struct X86 {
  // four[j] = bytes j, j+4, j+8, j+12 of `row`.
  static void Deinterleave4(const int8_t* row, int32_t* four) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(four), _mm_shuffle_epi8(bytes, order));
  }

  // out[b] = byte b of rows 0, 1, 2, 3, for 16 bytes; `out` is 16-byte aligned.
  static void TransposeBytes(const uint8_t* row0, const uint8_t* row1, const uint8_t* row2,
                             const uint8_t* row3, uint32_t* out) {
    const auto load = [](const uint8_t* p) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    };
    const __m128i r0 = load(row0), r1 = load(row1), r2 = load(row2), r3 = load(row3);
    const __m128i low01 = _mm_unpacklo_epi8(r0, r1), high01 = _mm_unpackhi_epi8(r0, r1);
    const __m128i low23 = _mm_unpacklo_epi8(r2, r3), high23 = _mm_unpackhi_epi8(r2, r3);
    __m128i* to = reinterpret_cast<__m128i*>(out);
    _mm_store_si128(to, _mm_unpacklo_epi16(low01, low23));
    _mm_store_si128(to + 1, _mm_unpackhi_epi16(low01, low23));
    _mm_store_si128(to + 2, _mm_unpacklo_epi16(high01, high23));
    _mm_store_si128(to + 3, _mm_unpackhi_epi16(high01, high23));
  }
};
