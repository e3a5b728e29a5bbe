// The search of ARMOR for a 2:4 core under a block-diagonal Hessian.
//
// W ≈ A S B with A and B block diagonal. Given A and B the loss is the quadratic form
//     <S, AᵀA S BBᵀ> - 2 <S, C>,  C = AᵀWBᵀ,
// which separates over the blocks (i, j) of bA rows and bB columns. One block is worked on at a time: it
// stays in the cache. In here a block is transposed, columns first, so that a vector holds 16 rows; rows
// are padded with zeros to whole vectors. Blocks do not depend on each other, so that the result has the
// same bits for every number of threads.
#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {
constexpr int kLanes = 16;
using V = float __attribute__((vector_size(64)));
using I = int32_t __attribute__((vector_size(64)));

constexpr int kFirst[6] = {0, 0, 0, 1, 1, 2};
constexpr int kSecond[6] = {1, 2, 3, 2, 3, 3};
constexpr float kSingular = 1e-6f;  // as armor_algebra.py holds the determinant of a pair

V larger(V x, V y) { return x > y ? x : y; }
V larger(V x, float y) { return larger(x, V{} + y); }

// exp(x) for x <= 0, with a relative error of 2e-7.
V exponential(V x) {
  x = larger(x, -87.0f);
  I n = __builtin_convertvector(x * 1.44269504f - 0.5f, I);  // rounds to the nearest, for x <= 0
  V k = __builtin_convertvector(n, V);
  V r = x - k * 0.693359375f + k * 2.12194440e-4f;
  V p = (V{} + 1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * r * r + r + 1.0f;
  return p * (V)((n + 127) << 23);
}

float sum(V x) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
  return total;
}

// Transposes 16 vectors: in each round the lanes and the vectors whose numbers differ in one bit change
// places.
void transpose(V x[kLanes]) {
  I lane, lower, upper;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  for (int bit = 1; bit < kLanes; bit *= 2) {
    lower = (lane & bit) ? lane - bit + kLanes : lane;
    upper = (lane & bit) ? lane + kLanes : lane + bit;
    for (int l = 0; l < kLanes; ++l)
      if (!(l & bit)) {
        V low = x[l], high = x[l + bit];
        x[l] = __builtin_shuffle(low, high, lower);
        x[l + bit] = __builtin_shuffle(low, high, upper);
      }
  }
}

// One block (i, j), and the memory that is needed to work on it.
struct Block {
  int64_t rows, columns, vectors;  // of columns of V: rows / 16, rounded up
  std::vector<V> a_gram;           // [rows][vectors], AᵀA
  std::vector<V> scale;            // [vectors], its diagonal, > 0
  const float* b_gram;             // [columns][columns]
  std::vector<V> product, s, keep, error, half, direction, residual, inverse;  // [columns][vectors]

  Block(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), vectors((rows + kLanes - 1) / kLanes),
        a_gram(rows * vectors), scale(vectors) {
    for (auto* each : {&product, &s, &keep, &error, &half, &direction, &residual, &inverse})
      each->resize(columns * vectors);
  }

  void take_a(const float* gram) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < vectors; ++v)
        for (int lane = 0; lane < kLanes; ++lane) {
          int64_t c = v * kLanes + lane;
          a_gram[r * vectors + v][lane] = c < rows ? gram[r * rows + c] : 0;
          if (c == r) scale[v][lane] = std::max(gram[r * rows + c], FLT_MIN);
        }
    for (int64_t r = rows; r < vectors * kLanes; ++r) scale[r / kLanes][r % kLanes] = 1;
  }

  // A block `[rows][stride]` of any type, transposed.
  template <class T>
  void take(std::vector<V>& to, const T* from, int64_t stride) const {
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t c = 0; c < columns; c += kLanes) {
        V square[kLanes] = {};
        int64_t across = std::min<int64_t>(kLanes, columns - c);
        for (int64_t r = 0; r < std::min<int64_t>(kLanes, rows - v * kLanes); ++r)
          for (int64_t k = 0; k < across; ++k) square[r][k] = from[(v * kLanes + r) * stride + c + k];
        transpose(square);
        for (int64_t k = 0; k < across; ++k) to[(c + k) * vectors + v] = square[k];
      }
  }

  template <class T>
  void give(const std::vector<V>& from, T* to, int64_t stride) const {
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t c = 0; c < columns; c += kLanes) {
        V square[kLanes] = {};
        int64_t across = std::min<int64_t>(kLanes, columns - c);
        for (int64_t k = 0; k < across; ++k) square[k] = from[(c + k) * vectors + v];
        transpose(square);
        for (int64_t r = 0; r < std::min<int64_t>(kLanes, rows - v * kLanes); ++r)
          for (int64_t k = 0; k < across; ++k) to[(v * kLanes + r) * stride + c + k] = square[r][k];
      }
  }

  // out[c] = Σ_k left[c][k] right[k], `count` terms; left `[columns][stride]`, columns a multiple of 4.
  void multiply(const float* left, int64_t stride, int64_t count, const V* right, V* out) const {
    for (int64_t c = 0; c < columns; c += 4) {
      int64_t v = 0;
      for (; v + 2 <= vectors; v += 2) tile<2>(left + c * stride, stride, count, right + v, out + c * vectors + v);
      if (v < vectors) tile<1>(left + c * stride, stride, count, right + v, out + c * vectors + v);
    }
  }

  template <int N>
  void tile(const float* left, int64_t stride, int64_t count, const V* right, V* out) const {
    V total[4][N] = {};
    for (int64_t k = 0; k < count; ++k)
      for (int c = 0; c < 4; ++c)
        for (int v = 0; v < N; ++v) total[c][v] += left[c * stride + k] * right[k * vectors + v];
    for (int c = 0; c < 4; ++c)
      for (int v = 0; v < N; ++v) out[c * vectors + v] = total[c][v];
  }

  // AᵀA X BBᵀ, transposed as all is here.
  void apply(const std::vector<V>& x, std::vector<V>& out) {
    multiply(b_gram, columns, columns, x.data(), half.data());
    multiply((const float*)half.data(), vectors * kLanes, rows, a_gram.data(), out.data());
  }

  float inner(const std::vector<V>& x, const std::vector<V>& y) const {
    V total = {};
    for (int64_t k = 0; k < columns * vectors; ++k) total += x[k] * y[k];
    return sum(total);
  }
};

float ratio(float x, float y) { return y > FLT_MIN ? x / y : 0; }

// Inverses of the six pairs of a group, entries 00, 01, 11.
void invert_pairs(const float* gram, int64_t stride, float inverse[6][3]) {
  for (int p = 0; p < 6; ++p) {
    float g00 = gram[kFirst[p] * stride + kFirst[p]], g11 = gram[kSecond[p] * stride + kSecond[p]];
    float g01 = gram[kFirst[p] * stride + kSecond[p]], both = g00 * g11;
    float determinant = std::max(std::max(both - g01 * g01, kSingular * both), FLT_MIN);
    inverse[p][0] = g11 / determinant;
    inverse[p][1] = -g01 / determinant;
    inverse[p][2] = g00 / determinant;
  }
}

// The pair that each lane takes: of the largest gain, or drawn with probability ∝ exp(gain / heat).
I choose(const V gain[6], float heat, V uniform) {
  I best = {};
  V highest = gain[0];
  for (int p = 1; p < 6; ++p) {
    best = gain[p] > highest ? I{} + p : best;
    highest = larger(highest, gain[p]);
  }
  if (heat == 0) return best;
  V weight[6], total = {};
  for (int p = 0; p < 6; ++p) total += weight[p] = exponential((gain[p] - highest) / heat);
  V bound = uniform * total, passed = {};
  I drawn = {};
  for (int p = 0; p < 5; ++p) {
    passed += weight[p];
    drawn -= passed <= bound;  // a comparison that holds is -1
  }
  return drawn;
}

// Group `group` of 16 rows: its new values, and what they change in `error`.
void visit(Block& x, int64_t group, int64_t v, float heat, V uniform) {
  int64_t first = 4 * group;
  const float* square = x.b_gram + first * x.columns + first;
  float inverse[6][3];
  invert_pairs(square, x.columns, inverse);
  V scale = x.scale[v], old[4], target[4], gain[6], value[6][2];
  for (int c = 0; c < 4; ++c) old[c] = x.s[(first + c) * x.vectors + v];
  for (int c = 0; c < 4; ++c) {
    V reach = {};
    for (int k = 0; k < 4; ++k) reach += old[k] * square[k * x.columns + c];
    target[c] = scale * reach - x.error[(first + c) * x.vectors + v];
  }
  for (int p = 0; p < 6; ++p) {
    V t0 = target[kFirst[p]], t1 = target[kSecond[p]];
    value[p][0] = (inverse[p][0] * t0 + inverse[p][1] * t1) / scale;
    value[p][1] = (inverse[p][1] * t0 + inverse[p][2] * t1) / scale;
    gain[p] = t0 * value[p][0] + t1 * value[p][1];
  }
  I pair = choose(gain, heat, uniform);
  V now[4] = {}, kept[4] = {};
  for (int p = 0; p < 6; ++p) {
    I here = pair == p;
    for (int end = 0; end < 2; ++end) {
      int c = end ? kSecond[p] : kFirst[p];
      now[c] = here ? value[p][end] : now[c];
      kept[c] = here ? V{} + 1.0f : kept[c];
    }
  }
  V change[4];
  for (int c = 0; c < 4; ++c) {
    int64_t place = (first + c) * x.vectors + v;
    change[c] = scale * (now[c] - old[c]);
    x.s[place] = now[c];
    x.keep[place] = kept[c];
  }
  for (int64_t c = 0; c < x.columns; ++c) {
    V moved = {};
    for (int k = 0; k < 4; ++k) moved += change[k] * x.b_gram[(first + k) * x.columns + c];
    x.error[c * x.vectors + v] += moved;
  }
}

// Whether what a sweep made raises the loss: <2 E + AᵀA ΔS BBᵀ, ΔS> > 0, with S before it in `direction`
// and its half-gradient E in `residual`.
bool raises(Block& x) {
  for (int64_t k = 0; k < x.columns * x.vectors; ++k) x.direction[k] = x.s[k] - x.direction[k];
  float slope = 2 * x.inner(x.residual, x.direction);
  x.apply(x.direction, x.inverse);
  return slope + x.inner(x.inverse, x.direction) > 0;
}

void sweep(Block& x, const int64_t* order, const float* uniform, int64_t uniform_stride, float heat) {
  x.apply(x.s, x.error);
  for (int64_t k = 0; k < x.columns * x.vectors; ++k) x.error[k] -= x.product[k];
  if (!heat) {  // for `raises`
    x.residual = x.error;
    x.direction = x.s;
  }
  for (int64_t step = 0; step < x.columns / 4; ++step)
    for (int64_t v = 0; v < x.vectors; ++v) {
      V drawn = {};
      int64_t rows = std::min<int64_t>(kLanes, x.rows - v * kLanes);
      if (heat) std::memcpy(&drawn, uniform + step * uniform_stride + v * kLanes, rows * sizeof(float));
      visit(x, order[step], v, heat, drawn);
    }
}

void solve(Block& x, int64_t steps) {
  int64_t size = x.columns * x.vectors;
  x.apply(x.s, x.residual);
  for (int64_t c = 0; c < x.columns; ++c)
    for (int64_t v = 0; v < x.vectors; ++v) {
      int64_t k = c * x.vectors + v;
      x.inverse[k] = x.keep[k] / larger(x.scale[v] * x.b_gram[c * x.columns + c], FLT_MIN);
      x.residual[k] = x.product[k] - x.residual[k];
      x.direction[k] = x.residual[k] * x.inverse[k];
    }
  float power = x.inner(x.residual, x.direction);
  for (int64_t step = 0; step < steps; ++step) {
    x.apply(x.direction, x.error);
    float length = ratio(power, x.inner(x.direction, x.error));
    V total = {};
    for (int64_t k = 0; k < size; ++k) {
      x.s[k] += length * x.direction[k];
      x.residual[k] -= length * x.error[k];
      total += x.residual[k] * x.residual[k] * x.inverse[k];
    }
    float previous = power;
    power = sum(total);
    float turn = ratio(power, previous);
    for (int64_t k = 0; k < size; ++k)
      x.direction[k] = x.residual[k] * x.inverse[k] + turn * x.direction[k];
  }
}

// `work(block, i, j, place of its first weight)` for every block, over the threads of OpenMP.
template <class F>
void for_blocks(int64_t na, int64_t ba, int64_t nb, int64_t bb, const float* a_gram, const float* b_gram,
                const F& work) {
#pragma omp parallel
  {
    Block x(ba, bb);
    int64_t loaded = -1;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < na * nb; ++block) {
      int64_t i = block / nb, j = block % nb;
      if (i != loaded) x.take_a(a_gram + i * ba * ba);
      loaded = i;
      x.b_gram = b_gram + j * bb * bb;
      work(x, i, j, i * ba * nb * bb + j * bb);
    }
  }
}
}  // namespace

// Shapes: a_gram [na, ba, ba], b_gram [nb, bb, bb], product, s and mask [na * ba, nb * bb], order
// [bb / 4], uniform [bb / 4, nb, na * ba] or null; s and mask are overwritten. heat 0 is greedy.
extern "C" void compress_armor_sweep(int64_t na, int64_t ba, int64_t nb, int64_t bb, const float* a_gram,
                                     const float* b_gram, const float* product, float* s, bool* mask,
                                     const int64_t* order, const float* uniform, float heat) {
  int64_t out = na * ba, in = nb * bb;
  for_blocks(na, ba, nb, bb, a_gram, b_gram, [&](Block& x, int64_t i, int64_t j, int64_t place) {
    x.take(x.product, product + place, in);
    x.take(x.s, s + place, in);
    sweep(x, order, uniform ? uniform + j * out + i * ba : nullptr, nb * out, heat);
    if (!heat && raises(x)) return;
    x.give(x.s, s + place, in);
    x.give(x.keep, mask + place, in);
  });
}

// S on its mask by `steps` of conjugate gradients, one system for each block.
extern "C" void compress_armor_solve(int64_t na, int64_t ba, int64_t nb, int64_t bb, const float* a_gram,
                                     const float* b_gram, const float* product, float* s, const bool* mask,
                                     int64_t steps) {
  int64_t in = nb * bb;
  for_blocks(na, ba, nb, bb, a_gram, b_gram, [&](Block& x, int64_t, int64_t, int64_t place) {
    x.take(x.product, product + place, in);
    x.take(x.s, s + place, in);
    x.take(x.keep, mask + place, in);
    solve(x, steps);
    x.give(x.s, s + place, in);
  });
}
