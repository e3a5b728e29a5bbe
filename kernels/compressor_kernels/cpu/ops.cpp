// The torch ops: what they accept, how their work is split over torch's threads.
//
// Rows of the weight are split, never a sum: results are the same bits for every number of threads, and
// every row of x has the bits that it has alone, but where torch multiplies.
#include <ATen/Parallel.h>
#include <ATen/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>

#include "sparse24.h"
#include "thin.h"

namespace {
using namespace compress;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kFewRows = 32;          // of x, that plain matrices are multiplied with; beyond, torch does it
constexpr int64_t kCache = 1 << 20;       // bytes of x that stay in the second cache while the weight passes
constexpr int64_t kPanel = 8 << 20;       // bytes of the weight that are dense at once
constexpr int64_t kGrain = 128 << 10;     // bytes of weight that are worth a thread

int64_t divup(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of the calling thread, kept from call to call; slots do not overlap.
char* scratch(int slot, int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory[2];
  thread_local int64_t size[2] = {0, 0};
  if (size[slot] < bytes) {
    size[slot] = divup(bytes, 4096) * 4096;
    memory[slot].reset((char*)std::aligned_alloc(4096, size[slot]));
    TORCH_CHECK(memory[slot] != nullptr, "no memory for ", bytes, " bytes");
  }
  return memory[slot].get();
}

template <class F>
void by_dtype(at::ScalarType dtype, const F& f) {
  if (dtype == at::kBFloat16) f(Bf16());
  else if (dtype == at::kHalf) f(Half());
  else if (dtype == at::kFloat) f(float());
  else TORCH_CHECK_TYPE(false, "dtype ", dtype, "; accepted: float32, bfloat16, float16");
}

template <class V>
V* data(const Tensor& tensor) {
  return static_cast<V*>(tensor.data_ptr());
}

// Rows of 64 · n columns, a stride apart that does not put them all into the same lines of a cache.
template <class V>
Rows<V> scratch_rows(int slot, int64_t rows, int64_t columns) {
  const int64_t stride = divup(columns, 64) * 64 + 64;
  return {(V*)scratch(slot, rows * stride * sizeof(V)), stride};
}

template <class V>
Rows<const V> constant(Rows<V> rows) {
  return {rows.start, rows.stride};
}

// Rows of x that whole tiles may read: its own, or a copy filled up with zeros.
template <class V>
Rows<const V> whole_rows(const Tensor& x) {
  const Rows<const V> own{data<V>(x), x.stride(0)};
  const int64_t columns = x.size(1), whole = divup(columns, kColumns) * kColumns;
  if (whole == columns) return own;
  const Rows<V> copy = scratch_rows<V>(0, x.size(0), columns);
  for (int64_t m = 0; m < x.size(0); m++) {
    std::memcpy(copy.at(m, 0), own.at(m, 0), columns * sizeof(V));
    std::memset((void*)copy.at(m, columns), 0, (whole - columns) * sizeof(V));
  }
  return constant(copy);
}

// x [..., in] as a matrix whose rows are contiguous.
Tensor matrix(const Tensor& x, int64_t columns, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == columns && x.scalar_type() == dtype && x.is_cpu(), "x is ",
                    x.scalar_type(), " ", x.sizes(), " on ", x.device(), ", not ", dtype, " [..., ", columns, "] on cpu");
  Tensor rows = x.dim() == 2 ? x : x.reshape({-1, columns});
  return rows.stride(1) == 1 || columns == 1 ? rows : rows.contiguous();
}

Tensor result(const Tensor& x, int64_t out_features) {
  at::DimVector shape(x.sizes());
  shape.back() = out_features;
  return at::empty(shape, x.options());
}

void check(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.is_cpu(),
                    name, " is ", tensor.scalar_type(), " ", tensor.sizes(), ", not contiguous ", dtype, " ", shape, " on cpu");
}

void check_bias(const OptionalTensor& bias, int64_t out_features, at::ScalarType dtype) {
  if (bias) check("bias", *bias, {out_features}, dtype);
}

// A 2:4 weight: values [ceil(out / 4), ceil(in / 64), 4, 32], positions uint8 [ceil(out / 4), ceil(in / 64), 4, 8].
struct Weight {
  Tensor values, positions;
  int64_t out_features, in_features;

  void check_shapes() const {
    TORCH_CHECK_VALUE(out_features > 0 && in_features > 0, "a weight of ", out_features, " x ", in_features);
    const int64_t rows = divup(out_features, kTileRows), columns = divup(in_features, kColumns);
    check("values", values, {rows, columns, kTileRows, kColumns / 2}, values.scalar_type());
    check("positions", positions, {rows, columns, kTileRows, kColumns / 8}, at::kByte);
  }
  int64_t rows() const { return values.size(0); }
  int64_t columns() const { return values.size(1); }
  int64_t row_bytes() const { return columns() * kTileRows * (kColumns / 2 * values.element_size() + kColumns / 8); }
  template <class V>
  Tiles<V> row(int64_t t) const {
    const Tiles<V> all{(decltype(Tiles<V>::values))values.data_ptr(), (decltype(Tiles<V>::positions))positions.data_ptr()};
    return all.from(t * columns());
  }
  int count(int64_t t) const { return (int)std::min<int64_t>(kTileRows, out_features - t * kTileRows); }
};

template <class V>
Output<V> output(const Tensor& y, int64_t out_features, const OptionalTensor& bias) {
  return {{data<V>(y), out_features}, bias ? data<V>(*bias) : nullptr};
}

template <class V>
void few_rows(const Tensor& x, const Weight& weight, const OptionalTensor& bias, const Tensor& y) {
  const Rows<const V> rows = whole_rows<V>(x);
  const int64_t m = x.size(0), columns = weight.columns();
  const Output<V> out = output<V>(y, weight.out_features, bias);
  at::parallel_for(0, weight.rows(), divup(kGrain, weight.row_bytes()), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      tile_row<V>(weight.row<V>(t), columns, rows, m, out, t * kTileRows, weight.count(t));
  });
}

// Rows of tiles begin .. end as dense rows in `panel`.
template <class V>
void expand(const Weight& weight, int64_t begin, int64_t end, V* panel) {
  at::parallel_for(begin, end, divup(kGrain, weight.row_bytes()), [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++)
      expand_row<V>(weight.row<V>(t), weight.in_features, panel + (t - begin) * kTileRows * weight.in_features, weight.count(t));
  });
}

void by_panels(const Tensor& x, const Weight& weight, const OptionalTensor& bias, const Tensor& y) {
  const int64_t each = std::max<int64_t>(1, kPanel / (weight.in_features * x.element_size() * kTileRows));  // rows of tiles
  const Tensor rows = y.view({-1, weight.out_features});
  const int64_t most = std::min(each * kTileRows, weight.out_features);
  char* memory = scratch(0, most * weight.in_features * x.element_size());
  const Tensor panel = at::from_blob(memory, {most, weight.in_features}, x.options());
  for (int64_t t = 0; t < weight.rows(); t += each) {
    const int64_t begin = t * kTileRows, end = std::min(weight.out_features, begin + each * kTileRows);
    by_dtype(x.scalar_type(), [&](auto v) {
      expand<decltype(v)>(weight, t, divup(end, kTileRows), data<decltype(v)>(panel));
    });
    const Tensor part = panel.slice(0, 0, end - begin).t();
    Tensor columns = rows.slice(1, begin, end);
    if (bias) at::addmm_out(columns, bias->slice(0, begin, end), x, part);
    else at::mm_out(columns, x, part);
  }
}

// Where the CPU multiplies matrices, torch is faster with many rows of x by more than an expansion costs.
bool panels_pay(const Tensor& x) {
#ifdef COMPRESS_AMX
  return x.size(0) > kFewRows && x.scalar_type() == at::kBFloat16;
#else
  return false;
#endif
}

void multiply(const Tensor& x, const Weight& weight, const OptionalTensor& bias, const Tensor& y) {
  if (panels_pay(x)) return by_panels(x, weight, bias, y);
  const int64_t rows = x.size(0), held = kCache / (weight.in_features * x.element_size());
  const int64_t passes = divup(rows, std::clamp<int64_t>(held, 16, kMostRows));
  const int64_t each = divup(divup(rows, passes), 4) * 4;
  const Tensor all = y.view({-1, weight.out_features});
  for (int64_t m = 0; m < rows; m += each) {
    const int64_t end = std::min(m + each, rows);
    by_dtype(x.scalar_type(), [&](auto v) {
      few_rows<decltype(v)>(x.slice(0, m, end), weight, bias, all.slice(0, m, end));
    });
  }
}

template <class F>
Tensor product(const Tensor& x, const Weight& weight, const OptionalTensor& bias, const F& multiply) {
  weight.check_shapes();
  check_bias(bias, weight.out_features, weight.values.scalar_type());
  const Tensor rows = matrix(x, weight.in_features, weight.values.scalar_type()), y = result(x, weight.out_features);
  if (y.numel()) multiply(rows, weight, bias, y);
  return y;
}

Tensor sparse24(const Tensor& x, const Tensor& values, const Tensor& positions, const OptionalTensor& bias,
                int64_t out_features, int64_t in_features) {
  return product(x, {values, positions, out_features, in_features}, bias, multiply);
}

Tensor sparse24_by_panels(const Tensor& x, const Tensor& values, const Tensor& positions, const OptionalTensor& bias,
                          int64_t out_features, int64_t in_features) {
  return product(x, {values, positions, out_features, in_features}, bias, by_panels);
}

// y = blockdiag(blocks) x for groups begin .. end of at most 4 rows; a block has divup(size, 4) of them.
template <class V>
void block_rows(const Tensor& blocks, Rows<const V> x, int64_t m, Output<V> out, int64_t begin, int64_t end) {
  const int64_t size = blocks.size(1), groups = divup(size, kRows);
  for (int64_t g = begin; g < end; g++) {
    const int64_t block = g / groups, first = g % groups * kRows, at = block * size;
    const Output<V> here{{out.y.at(0, at), out.y.stride}, out.bias ? out.bias + at : nullptr};
    thin_rows<V>(data<V>(blocks) + block * size * size, size, {x.at(0, at), x.stride}, m, here, first,
                 (int)std::min<int64_t>(kRows, size - first));
  }
}

template <class V>
void few_rows_armor(const Tensor& x, const Weight& weight, const Tensor& a, const Tensor& b, const OptionalTensor& bias,
                    const Tensor& y) {
  const int64_t m = x.size(0), n = weight.out_features, k = weight.in_features, columns = weight.columns();
  const Rows<V> inner = scratch_rows<V>(0, m, k), outer = scratch_rows<V>(1, m, n);
  for (int64_t i = 0; i < m; i++)  // what fills up the last tile
    std::memset((void*)inner.at(i, k), 0, (columns * kColumns - k) * sizeof(V));
  const int64_t block = b.size(1), size = a.size(1);
  const Rows<const V> own{data<V>(x), x.stride(0)};
  const int64_t rows_b = b.size(0) * divup(block, kRows);
  at::parallel_for(0, rows_b, divup(kGrain, kRows * block * sizeof(V)), [&](int64_t begin, int64_t end) {
    block_rows<V>(b, own, m, {inner, nullptr}, begin, end);
  });
  const Output<V> out = output<V>(y, n, bias);
  const int64_t unit = std::lcm((int64_t)kTileRows, size);  // rows that are whole tiles and whole blocks of A
  at::parallel_for(0, divup(n, unit), divup(kGrain, unit / kTileRows * weight.row_bytes()), [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; u++) {
      const int64_t stop = std::min(n, (u + 1) * unit);
      for (int64_t t = u * unit / kTileRows; t * kTileRows < stop; t++)
        tile_row<V>(weight.row<V>(t), columns, constant(inner), m, {outer, nullptr}, t * kTileRows, weight.count(t));
      block_rows<V>(a, constant(outer), m, out, u * unit / size * divup(size, kRows), stop / size * divup(size, kRows));
    }
  });
}

Tensor block_diagonal(const Tensor& x, const Tensor& blocks) {
  const Tensor rows = x.reshape({-1, blocks.size(0), blocks.size(1)}).transpose(0, 1);
  return at::matmul(rows, blocks.transpose(1, 2)).transpose(0, 1).reshape(x.sizes()).contiguous();  // a view of blocks of one
}

Tensor armor(const Tensor& x, const Tensor& values, const Tensor& positions, const Tensor& a, const Tensor& b,
             const OptionalTensor& bias) {
  const auto dtype = values.scalar_type();
  TORCH_CHECK_VALUE(a.dim() == 3 && b.dim() == 3, "a and b are not stacks of blocks");
  const Weight weight{values, positions, a.size(0) * a.size(1), b.size(0) * b.size(1)};
  weight.check_shapes();
  check("a", a, {a.size(0), a.size(1), a.size(1)}, dtype);
  check("b", b, {b.size(0), b.size(1), b.size(1)}, dtype);
  check_bias(bias, weight.out_features, dtype);
  const Tensor rows = matrix(x, weight.in_features, dtype);
  const Tensor y = result(x, weight.out_features);
  if (!y.numel()) return y;
  if (rows.size(0) > kFewRows) {
    multiply(block_diagonal(rows, b), weight, {}, y);
    const Tensor wrapped = block_diagonal(y, a);
    return bias ? wrapped.add(*bias) : wrapped;
  }
  by_dtype(dtype, [&](auto v) { few_rows_armor<decltype(v)>(rows, weight, a, b, bias, y); });
  return y;
}

template <class V>
void thin(const Tensor& w, Rows<const V> x, int64_t m, const Output<V>& out) {
  const int64_t n = w.size(0), columns = w.size(1);
  at::parallel_for(0, divup(n, kRows), divup(kGrain, kRows * std::max<int64_t>(1, columns) * sizeof(V)), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++)
      thin_rows<V>(data<V>(w), columns, x, m, out, g * kRows, (int)std::min<int64_t>(kRows, n - g * kRows));
  });
}

Tensor dense(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  const auto dtype = w.scalar_type();
  TORCH_CHECK_VALUE(w.dim() == 2, "w is ", w.sizes(), ", not a matrix");
  check("w", w, w.sizes(), dtype);
  check_bias(bias, w.size(0), dtype);
  const Tensor rows = matrix(x, w.size(1), dtype);
  if (rows.size(0) > kFewRows) return at::linear(x, w, bias);
  const Tensor y = result(x, w.size(0));
  if (!y.numel()) return y;
  by_dtype(dtype, [&](auto v) {
    using V = decltype(v);
    thin<V>(w, {data<V>(rows), rows.stride(0)}, rows.size(0), output<V>(y, w.size(0), bias));
  });
  return y;
}

Tensor lowrank(const Tensor& x, const Tensor& u, const Tensor& v, const OptionalTensor& bias) {
  const auto dtype = u.scalar_type();
  TORCH_CHECK_VALUE(u.dim() == 2 && v.dim() == 2, "u and v are not matrices");
  const int64_t out_features = u.size(0), in_features = v.size(1);
  check("u", u, {out_features, v.size(0)}, dtype);
  check("v", v, {v.size(0), in_features}, dtype);
  check_bias(bias, out_features, dtype);
  const Tensor rows = matrix(x, in_features, dtype);
  if (rows.size(0) > kFewRows) return at::linear(at::linear(x, v), u, bias);
  const Tensor y = result(x, out_features);
  if (!y.numel()) return y;
  by_dtype(dtype, [&](auto value) {
    using V = decltype(value);
    const Rows<V> inner = scratch_rows<V>(0, rows.size(0), v.size(0));
    thin<V>(v, {data<V>(rows), rows.stride(0)}, rows.size(0), {inner, nullptr});
    thin<V>(u, constant(inner), rows.size(0), output<V>(y, out_features, bias));
  });
  return y;
}

// y[rows[j]] is column j of `inner`, or j - rank of `outer`, and its bias, added to what was rounded.
template <class V>
void place_rows(Rows<const V> inner, int64_t rank, Rows<const V> outer, int64_t m, const int64_t* rows, const Output<V>& out,
                int64_t out_features) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < out_features; j++) {
      const V* value = j < rank ? inner.at(i, j) : outer.at(i, j - rank);
      V* y = out.y.at(i, rows[j]);
      if (out.bias) store4(y, _mm_add_ps(load4(value, 1), load4(out.bias + rows[j], 1)), 1);
      else *y = *value;
    }
}

Tensor pivot(const Tensor& x, const Tensor& v, const Tensor& c, const Tensor& order, const OptionalTensor& bias) {
  const auto dtype = v.scalar_type();
  TORCH_CHECK_VALUE(v.dim() == 2 && c.dim() == 2, "v and c are not matrices");
  const int64_t rank = v.size(0), out_features = rank + c.size(0), in_features = v.size(1);
  check("v", v, {rank, in_features}, dtype);
  check("c", c, {c.size(0), rank}, dtype);
  check("rows", order, {out_features}, at::kLong);
  check_bias(bias, out_features, dtype);
  const Tensor rows = matrix(x, in_features, dtype), y = result(x, out_features);
  if (!y.numel()) return y;
  const int64_t m = rows.size(0);
  for (int64_t j = 0; j < out_features; j++)
    TORCH_CHECK_VALUE((uint64_t)data<int64_t>(order)[j] < (uint64_t)out_features, "rows are not those of ", out_features);
  if (m > kFewRows) {
    const Tensor inner = at::linear(rows, v), stacked = at::cat({inner, at::linear(inner, c)}, 1);
    Tensor all = y.view({m, out_features});
    all.index_copy_(1, order, stacked);
    return bias ? y.add(*bias) : y;
  }
  by_dtype(dtype, [&](auto value) {
    using V = decltype(value);
    const Rows<V> inner = scratch_rows<V>(0, m, rank), outer = scratch_rows<V>(1, m, c.size(0));
    thin<V>(v, {data<V>(rows), rows.stride(0)}, m, {inner, nullptr});
    thin<V>(c, constant(inner), m, {outer, nullptr});
    place_rows<V>(constant(inner), rank, constant(outer), m, data<int64_t>(order), output<V>(y, out_features, bias), out_features);
  });
  return y;
}

TORCH_LIBRARY_FRAGMENT(compressor_kernels, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("cpu_sparse24(Tensor x, Tensor values, Tensor positions, Tensor? bias, int out_features, int in_features) -> Tensor", tags);
  m.def("cpu_sparse24_by_panels(Tensor x, Tensor values, Tensor positions, Tensor? bias, int out_features, int in_features) -> Tensor", tags);
  m.def("cpu_armor(Tensor x, Tensor values, Tensor positions, Tensor a, Tensor b, Tensor? bias) -> Tensor", tags);
  m.def("cpu_lowrank(Tensor x, Tensor u, Tensor v, Tensor? bias) -> Tensor", tags);
  m.def("cpu_pivot(Tensor x, Tensor v, Tensor c, Tensor rows, Tensor? bias) -> Tensor", tags);
  m.def("cpu_dense(Tensor x, Tensor w, Tensor? bias) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(compressor_kernels, CPU, m) {
  m.impl("cpu_sparse24", TORCH_FN(sparse24));
  m.impl("cpu_sparse24_by_panels", TORCH_FN(sparse24_by_panels));
  m.impl("cpu_armor", TORCH_FN(armor));
  m.impl("cpu_lowrank", TORCH_FN(lowrank));
  m.impl("cpu_pivot", TORCH_FN(pivot));
  m.impl("cpu_dense", TORCH_FN(dense));
}

}  // namespace
