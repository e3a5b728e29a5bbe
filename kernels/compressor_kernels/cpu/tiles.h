// The layout of a 2:4 weight on a CPU, and the vector pieces that the kernels share.
//
// A weight [out, in] is cut into tiles of 8 rows and 32 columns, one row of tiles after another, filled
// up with zeros. A tile is 16 kept weights a row, in column order, and a word of 32 bits a row: two bits
// for each kept weight, its place in its group of four. These are the stored bytes in another order, and
// a thread reads two streams from their first byte to their last.
//
// The weight is not expanded. The positions of two rows become indices into 32 columns of x, a
// permutation of x brings the entries that meet their kept weights into their order, and the two are
// multiplied. Two rows at once, because a permutation of one register is cheaper than one of two: with
// the product behind it 1.3 cycles instead of 1.8 (Zen 4).
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace compress {

constexpr int kRows = 4;  // whose sums are stored at once
constexpr int kTileRows = 8;
constexpr int kColumns = 32;

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class V>
struct Tiles {
  const V (*values)[kTileRows][kColumns / 2];
  const uint64_t (*positions)[kTileRows / 2];  // of two rows
  Tiles from(ptrdiff_t tile) const { return {values + tile, positions + tile}; }
};

// A matrix whose element (m, c) is at start + m * stride + c.
template <class V>
struct Rows {
  V* start;
  ptrdiff_t stride;
  V* at(ptrdiff_t m, ptrdiff_t c) const { return start + m * stride + c; }
};

// What follows a product: where its sums go, and what is added to them.
template <class V>
struct Output {
  Rows<V> y;
  const V* bias;  // or null
};

inline __m512 load16(const float* p, __mmask16 mask = 0xFFFF) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load16(const Half* p, __mmask16 mask = 0xFFFF) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
}
inline __m512 load16(const Bf16* p, __mmask16 mask = 0xFFFF) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

// Eight from a, then eight from b.
inline __m512 load8(const float* a, const float* b) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
}
inline __m256i load8_bits(const void* a, const void* b) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)a)), _mm_loadu_si128((const __m128i*)b), 1);
}
inline __m512 load8(const Half* a, const Half* b) { return _mm512_cvtph_ps(load8_bits(a, b)); }
inline __m512 load8(const Bf16* a, const Bf16* b) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load8_bits(a, b)), 16));
}

inline __m128 load4(const float* p, __mmask8 mask) { return _mm_maskz_loadu_ps(mask, p); }
inline __m128 load4(const Half* p, __mmask8 mask) { return _mm_cvtph_ps(_mm_maskz_loadu_epi16(mask, p)); }
inline __m128 load4(const Bf16* p, __mmask8 mask) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, p)), 16));
}

inline void store4(float* p, __m128 sums, __mmask8 mask) { _mm_mask_storeu_ps(p, mask, sums); }
inline void store4(Half* p, __m128 sums, __mmask8 mask) {
  _mm_mask_storeu_epi16(p, mask, _mm_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Rounded to the nearest, ties to even, as torch does; a NaN stays one.
inline void store4(Bf16* p, __m128 sums, __mmask8 mask) {
  const __m128i bits = _mm_castps_si128(sums);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  __m128i rounded = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7FFF)), odd);
  const __mmask8 nan = _mm_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
  rounded = _mm_mask_mov_epi32(rounded, nan, _mm_set1_epi32(0x7FC00000));
  _mm_mask_storeu_epi16(p, mask, _mm_cvtepi32_epi16(_mm_srli_epi32(rounded, 16)));
}

// Lane i of the result is the sum of the lanes of sums[i], always added in the same order.
inline __m128 across(const __m256 (&sums)[kRows]) {
  const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
  return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}

inline __m256 low(__m512 sums) { return _mm512_castps512_ps256(sums); }
inline __m256 high(__m512 sums) { return _mm512_extractf32x8_ps(sums, 1); }

// The sums of `count` rows of the weight, from `first` on, for row m of x: bias added, rounded, stored.
template <class V>
inline void finish(const __m256 (&sums)[kRows], const Output<V>& out, ptrdiff_t m, ptrdiff_t first, int count) {
  const __mmask8 mask = (__mmask8)((1u << count) - 1);
  __m128 total = across(sums);
  if (out.bias) total = _mm_add_ps(total, load4(out.bias + first, mask));
  store4(out.y.at(m, first), total, mask);
}

// Four sums of every row of x: of four rows of a plain matrix, or of the pairs of rows of a tile.
template <int M>
using Sums = __m512[M][kRows];

// Products of 16-bit floats that the CPU sums in pairs; elsewhere they are computed as float32.
#ifdef __AVX512BF16__
template <class V>
constexpr bool kPairs = std::is_same_v<V, Bf16>;
inline __m512 add_pairs(__m512 sums, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
#else
template <class V>
constexpr bool kPairs = false;
inline __m512 add_pairs(__m512 sums, __m512i, __m512i) { return sums; }
#endif

// Call f with M as a constant, for at most 4 rows of x at once, and the first of them.
template <class F>
inline void by_four(ptrdiff_t rows, const F& f) {
  ptrdiff_t m = 0;
  for (; rows - m >= 4; m += 4) f(m, std::integral_constant<int, 4>());
  if (rows - m == 3) f(m, std::integral_constant<int, 3>());
  if (rows - m == 2) f(m, std::integral_constant<int, 2>());
  if (rows - m == 1) f(m, std::integral_constant<int, 1>());
}

}  // namespace compress
