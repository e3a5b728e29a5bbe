// Products with a 2:4 weight in tiles, and its expansion.
#pragma once

#include <algorithm>

#include "tiles.h"

namespace compress {

// Tiles asked for before they are needed. Without it, waiting for memory and multiplying took turns
// from three rows of x on: 2.0 ms instead of 1.1 ms for 4096 x 4096 and 4 rows (Zen 4, one thread).
constexpr ptrdiff_t kAhead = 40;

// Indices into columns of x that meet the kept weights of two rows, from their positions.
struct Select {
  __m512i shifts, base, three;
  // Lanes of 16 bits, 32 of them: the weights of the first row, then of the second; x is 32 columns.
  static Select pairs() {
    alignas(64) uint8_t shift[64] = {};
    alignas(64) uint16_t group[32];
    for (int lane = 0; lane < 32; lane++) {
      shift[2 * lane] = (uint8_t)(2 * lane);
      group[lane] = (uint16_t)(lane % 16 / 2 * 4);
    }
    return {_mm512_load_si512(shift), _mm512_load_si512(group), _mm512_set1_epi16(3)};
  }
  // Lanes of 32 bits, 16 of them, for the 16 columns of a half of the tile.
  static Select singles(int half) {
    alignas(64) uint8_t shift[64] = {};
    alignas(64) uint32_t group[16];
    for (int lane = 0; lane < 16; lane++) {
      shift[4 * lane] = (uint8_t)(lane / 8 * 32 + half * 16 + lane % 8 * 2);
      group[lane] = (uint32_t)(lane % 8 / 2 * 4);
    }
    return {_mm512_load_si512(shift), _mm512_load_si512(group), _mm512_set1_epi32(3)};
  }
  __m512i operator()(uint64_t positions) const {
    const __m512i spread = _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64((long long)positions));
    return _mm512_ternarylogic_epi32(spread, three, base, 0xEA);  // (spread & three) | base
  }
};

inline void ask(const void* start, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) _mm_prefetch((const char*)start + line, _MM_HINT_T1);
}

// To the sums of a row of tiles, `count` tiles with M rows of x; kAsk: for what follows, from memory.
template <int M, bool kAsk, class V>
inline void add_tiles(Tiles<V> tiles, ptrdiff_t count, Rows<const V> x, Sums<M>& result) {
  const Select pairs = Select::pairs(), singles[2] = {Select::singles(0), Select::singles(1)};
  __m512 sums[M][kRows];  // of its own, so that they stay in registers
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) sums[m][r] = result[m][r];
  for (ptrdiff_t k = 0; k < count; k++) {
    if constexpr (kAsk) {
      ask(tiles.values[k + kAhead], sizeof(tiles.values[0]));
      ask(tiles.positions[k + kAhead], sizeof(tiles.positions[0]));
    }
    if constexpr (kPairs<V>) {
      __m512i part[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) part[m] = _mm512_loadu_si512(x.at(m, k * kColumns));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const __m512i index = pairs(tiles.positions[k][r]), w = _mm512_loadu_si512(tiles.values[k][2 * r]);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
          sums[m][r] = add_pairs(sums[m][r], w, _mm512_permutexvar_epi16(index, part[m]));
      }
    } else {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        __m512 part[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) part[m] = load16(x.at(m, k * kColumns + 16 * half));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
          const __m512i index = singles[half](tiles.positions[k][r]);
          const __m512 w = load8(tiles.values[k][2 * r] + 8 * half, tiles.values[k][2 * r + 1] + 8 * half);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++)
            sums[m][r] = _mm512_fmadd_ps(w, _mm512_permutexvar_ps(index, part[m]), sums[m][r]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) result[m][r] = sums[m][r];
}

// y[m, first .. first + count] from the sums of the pairs of rows of a tile.
template <class V>
inline void finish_tile(const __m512 (&sums)[kRows], const Output<V>& out, ptrdiff_t m, ptrdiff_t first, int count) {
  finish<V>({low(sums[0]), high(sums[0]), low(sums[1]), high(sums[1])}, out, m, first, std::min(count, kRows));
  if (count > kRows)
    finish<V>({low(sums[2]), high(sums[2]), low(sums[3]), high(sums[3])}, out, m, first + kRows, count - kRows);
}

// Rows of x that meet a row of tiles in one call.
constexpr ptrdiff_t kMostRows = 128;
// Tiles that all of them meet before the next: these, and four rows of x, stay in the first cache.
constexpr ptrdiff_t kStretch = 32;

// y[:, first .. first + count] from one row of tiles; the others of its rows do not exist.
template <class V>
void tile_row(Tiles<V> tiles, ptrdiff_t ktiles, Rows<const V> x, ptrdiff_t rows, const Output<V>& out,
              ptrdiff_t first, int count) {
  __m512 sums[kMostRows][kRows];
  for (ptrdiff_t m = 0; m < rows; m++)
    for (int r = 0; r < kRows; r++) sums[m][r] = _mm512_setzero_ps();
  const ptrdiff_t stretch = rows > 4 ? kStretch : ktiles;
  for (ptrdiff_t k = 0; k < ktiles; k += stretch) {
    const ptrdiff_t here = std::min(stretch, ktiles - k);
    by_four(rows, [&](ptrdiff_t m0, auto M) {
      const Rows<const V> part{x.at(m0, k * kColumns), x.stride};
      auto& result = *reinterpret_cast<Sums<M>*>(sums + m0);
      if (m0 == 0) add_tiles<M, true, V>(tiles.from(k), here, part, result);
      else add_tiles<M, false, V>(tiles.from(k), here, part, result);
    });
  }
  for (ptrdiff_t m = 0; m < rows; m++) finish_tile<V>(sums[m], out, m, first, count);
}

// Columns kept by 16 groups: bit 4 g + p for each position p of group g.
inline uint64_t kept_columns(uint64_t positions) {
  const __m128i kept = _mm_set_epi8(0, 12, 10, 9, 12, 0, 6, 5, 10, 6, 0, 3, 9, 5, 3, 0);  // by i0 | i1 << 2
  const __m128i groups = _mm_cvtsi64_si128((long long)positions), low = _mm_set1_epi8(15);
  const __m128i even = _mm_shuffle_epi8(kept, _mm_and_si128(groups, low));
  const __m128i odd = _mm_shuffle_epi8(kept, _mm_and_si128(_mm_srli_epi16(groups, 4), low));
  return (uint64_t)_mm_cvtsi128_si64(_mm_or_si128(even, _mm_slli_epi16(odd, 4)));
}

// Store 32 columns of a dense row; only some of them exist.
inline void expand32(const float* values, uint32_t kept, float* dense, uint32_t there) {
  for (int half = 0; half < 2; half++) {
    const __m512 w = _mm512_castps256_ps512(_mm256_loadu_ps(values + 8 * half));
    _mm512_mask_storeu_ps(dense + 16 * half, (__mmask16)(there >> 16 * half), _mm512_maskz_expand_ps((__mmask16)(kept >> 16 * half), w));
  }
}
template <class V>
inline void expand32(const V* values, uint32_t kept, V* dense, uint32_t there) {
  const __m512i w = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)values));
  _mm512_mask_storeu_epi16(dense, there, _mm512_maskz_expand_epi16(kept, w));
}

// The dense rows of one row of tiles, `count` of them, each with `columns` columns.
template <class V>
void expand_row(Tiles<V> tiles, ptrdiff_t columns, V* dense, int count) {
  for (ptrdiff_t k = 0; k * kColumns < columns; k++) {
    const ptrdiff_t left = columns - k * kColumns;
    const uint32_t there = left >= kColumns ? ~0u : (1u << left) - 1;
    V* here = dense + k * kColumns;
    for (int r = 0; r < count; r++) {
      const uint64_t kept = kept_columns(tiles.positions[k][r / 2]) >> r % 2 * 32;
      expand32(tiles.values[k][r], (uint32_t)kept, here + r * columns, there);
    }
  }
}

}  // namespace compress
