// Products with a 2:4 weight in tiles, and its expansion.
#pragma once

#include "tiles.h"

namespace compress {

// Tiles asked for before they are needed. Without it, waiting for memory and multiplying took turns
// from three rows of x on: 2.0 ms instead of 1.1 ms for 4096 x 4096 and 4 rows (Zen 4, one thread).
constexpr ptrdiff_t kAhead = 40;

struct Select16 {  // 32 indices of 16 bits into 64 columns of x, from the positions of a row
  __m512i shifts, base, three = _mm512_set1_epi16(3);
  Select16() {
    alignas(64) uint8_t shift[64];
    alignas(64) uint16_t group[32];
    for (int lane = 0; lane < 32; lane++) {
      shift[2 * lane] = (uint8_t)(2 * lane);
      shift[2 * lane + 1] = 0;
      group[lane] = (uint16_t)(4 * (lane / 2));
    }
    shifts = _mm512_load_si512(shift);
    base = _mm512_load_si512(group);
  }
  __m512i operator()(uint64_t positions) const {
    const __m512i spread = _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64((long long)positions));
    return _mm512_ternarylogic_epi32(spread, three, base, 0xEA);  // (spread & three) | base
  }
};

struct Select32 {  // 16 indices of 32 bits into 32 columns of x, from half of the positions
  __m512i shifts, base, three = _mm512_set1_epi32(3);
  Select32() {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    shifts = _mm512_slli_epi32(lane, 1);
    base = _mm512_slli_epi32(_mm512_srli_epi32(lane, 1), 2);
  }
  __m512i operator()(uint32_t positions) const {
    const __m512i spread = _mm512_srlv_epi32(_mm512_set1_epi32((int)positions), shifts);
    return _mm512_ternarylogic_epi32(spread, three, base, 0xEA);
  }
};

// Sums of a row of `count` tiles with M rows of x, over all columns.
template <int M, class V>
inline void add_tiles(Tiles<V> tiles, ptrdiff_t count, Rows<const V> x, Sums<M>& result) {
  const Select16 select16;
  const Select32 select32;
  __m512 sums[M][kRows];  // of its own, so that they stay in registers
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) sums[m][r] = _mm512_setzero_ps();
  for (ptrdiff_t k = 0; k < count; k++) {
    for (size_t line = 0; line < sizeof(tiles.values[0]); line += 64)
      _mm_prefetch((const char*)tiles.values[k + kAhead] + line, _MM_HINT_T1);
    _mm_prefetch((const char*)tiles.positions[k + kAhead], _MM_HINT_T1);
    if constexpr (kPairs<V>) {
      __m512i x0[M], x1[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        x0[m] = _mm512_loadu_si512(x.at(m, k * kColumns));
        x1[m] = _mm512_loadu_si512(x.at(m, k * kColumns + 32));
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const __m512i index = select16(tiles.positions[k][r]), w = _mm512_loadu_si512(tiles.values[k][r]);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
          sums[m][r] = add_pairs(sums[m][r], w, _mm512_permutex2var_epi16(x0[m], index, x1[m]));
      }
    } else {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        __m512 x0[M], x1[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
          x0[m] = load16(x.at(m, k * kColumns + 32 * half));
          x1[m] = load16(x.at(m, k * kColumns + 32 * half + 16));
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
          const __m512i index = select32((uint32_t)(tiles.positions[k][r] >> 32 * half));
          const __m512 w = load16(tiles.values[k][r] + 16 * half);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++)
            sums[m][r] = _mm512_fmadd_ps(w, _mm512_permutex2var_ps(x0[m], index, x1[m]), sums[m][r]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) result[m][r] = sums[m][r];
}

// y[:, first .. first + count] from one row of tiles; the others of its rows do not exist.
template <class V>
void tile_row(Tiles<V> tiles, ptrdiff_t ktiles, Rows<const V> x, ptrdiff_t rows, const Output<V>& out,
              ptrdiff_t first, int count) {
  by_four(rows, [&](ptrdiff_t m0, auto M) {
    Sums<M> sums;
    add_tiles<M, V>(tiles, ktiles, {x.at(m0, 0), x.stride}, sums);
    for (int m = 0; m < M; m++) finish<V>(sums[m], out, m0 + m, first, count);
  });
}

// Columns kept by 16 groups: bit 4 g + p for each position p of group g.
inline uint64_t kept_columns(uint64_t positions) {
  const __m128i kept = _mm_set_epi8(0, 12, 10, 9, 12, 0, 6, 5, 10, 6, 0, 3, 9, 5, 3, 0);  // by i0 | i1 << 2
  const __m128i groups = _mm_cvtsi64_si128((long long)positions), low = _mm_set1_epi8(15);
  const __m128i even = _mm_shuffle_epi8(kept, _mm_and_si128(groups, low));
  const __m128i odd = _mm_shuffle_epi8(kept, _mm_and_si128(_mm_srli_epi16(groups, 4), low));
  return (uint64_t)_mm_cvtsi128_si64(_mm_or_si128(even, _mm_slli_epi16(odd, 4)));
}

// Store 64 columns of a dense row; only the first `columns` of them exist.
inline void expand64(const float* values, uint64_t kept, float* dense, uint64_t there) {
  for (int quarter = 0; quarter < 4; quarter++) {
    const __m512 w = _mm512_maskz_expand_ps((__mmask16)(kept >> 16 * quarter), _mm512_castps256_ps512(_mm256_loadu_ps(values + 8 * quarter)));
    _mm512_mask_storeu_ps(dense + 16 * quarter, (__mmask16)(there >> 16 * quarter), w);
  }
}
template <class V>
inline void expand64(const V* values, uint64_t kept, V* dense, uint64_t there) {
  for (int half = 0; half < 2; half++) {
    const __m256i w = _mm256_loadu_si256((const __m256i*)(values + 16 * half));
    const __m512i wide = _mm512_maskz_expand_epi16((__mmask32)(kept >> 32 * half), _mm512_castsi256_si512(w));
    _mm512_mask_storeu_epi16(dense + 32 * half, (__mmask32)(there >> 32 * half), wide);
  }
}

// The dense rows of one row of tiles, `count` of them, each with `columns` columns.
template <class V>
void expand_row(Tiles<V> tiles, ptrdiff_t columns, V* dense, int count) {
  for (ptrdiff_t k = 0; k * kColumns < columns; k++) {
    const ptrdiff_t left = columns - k * kColumns;
    const uint64_t there = left >= kColumns ? ~0ull : (1ull << left) - 1;
    for (int r = 0; r < count; r++)
      expand64(tiles.values[k][r], kept_columns(tiles.positions[k][r]), dense + r * columns + k * kColumns, there);
  }
}

}  // namespace compress
