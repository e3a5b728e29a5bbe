// Products with plain row-major matrices: the factors of a low-rank weight and the blocks of ARMOR.
#pragma once

#include <cstring>

#include "tiles.h"

namespace compress {

// Columns done at once: a register of pairs, or one of float32.
template <class V>
constexpr int kStep = kPairs<V> ? 32 : 16;

template <int M, int R, class V>
inline void add_columns(const V* w, ptrdiff_t ldw, Rows<const V> x, uint32_t mask, __m512 (&sums)[M][R]) {
  if constexpr (kPairs<V>) {
    __m512i part[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) part[m] = _mm512_maskz_loadu_epi16(mask, x.at(m, 0));
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m512i row = _mm512_maskz_loadu_epi16(mask, w + r * ldw);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sums[m][r] = add_pairs(sums[m][r], row, part[m]);
    }
  } else {
    __m512 part[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) part[m] = load16(x.at(m, 0), (__mmask16)mask);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m512 row = load16(w + r * ldw, (__mmask16)mask);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sums[m][r] = _mm512_fmadd_ps(row, part[m], sums[m][r]);
    }
  }
}

// Sums of R rows of w with M rows of x, over all columns.
template <int M, int R, class V>
inline void add_rows(const V* w, ptrdiff_t columns, Rows<const V> x, Sums<M>& result, int row) {
  __m512 sums[M][R];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sums[m][r] = _mm512_setzero_ps();
  const ptrdiff_t whole = columns / kStep<V> * kStep<V>;
  for (ptrdiff_t c = 0; c < whole; c += kStep<V>)
    add_columns<M, R, V>(w + c, columns, {x.at(0, c), x.stride}, ~0u, sums);
  if (whole < columns)
    add_columns<M, R, V>(w + whole, columns, {x.at(0, whole), x.stride}, (1u << (columns - whole)) - 1, sums);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) result[m][row + r] = sums[m][r];
}

// y[:, first .. first + count] for rows first .. first + count of w, at most 4 of them.
template <class V>
void thin_rows(const V* w, ptrdiff_t columns, Rows<const V> x, ptrdiff_t rows, const Output<V>& out,
               ptrdiff_t first, int count) {
  by_four(rows, [&](ptrdiff_t m0, auto M) {
    const Rows<const V> part{x.at(m0, 0), x.stride};
    Sums<M> sums;
    if (count == kRows) {
      add_rows<M, kRows, V>(w + first * columns, columns, part, sums, 0);
    } else {
      std::memset((void*)sums, 0, sizeof(sums));
      for (int row = 0; row < count; row++) add_rows<M, 1, V>(w + (first + row) * columns, columns, part, sums, row);
    }
    for (int m = 0; m < M; m++) {
      __m256 halves[kRows];
      for (int r = 0; r < kRows; r++) halves[r] = _mm256_add_ps(low(sums[m][r]), high(sums[m][r]));
      finish<V>(halves, out, m0 + m, first, count);
    }
  });
}

}  // namespace compress
