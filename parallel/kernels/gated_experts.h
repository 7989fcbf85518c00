// GELU experts with gates: the parts of a token's network see only the rows whose gates are open.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gelu_networks.h"
#include "products.h"
#include "row_products.h"
#include "rows.h"
#include "status.h"
#include "team.h"

namespace kernels {

// The rows of a block whose gate of an expert is not 0, where they begin in x and y, and where those of a matrix of
// width f that holds just them begin.
struct OpenRows {
  std::vector<int64_t> index, x, y, own;

  void find(const GeluSizes& n, const float* gates, int64_t expert, int64_t rows) {
    index.clear(), x.clear(), y.clear(), own.clear();
    for (int64_t r = 0; r < rows; ++r) {
      if (gates[r * n.experts + expert] == 0.0f) continue;
      own.push_back(count() * n.part);
      index.push_back(r), x.push_back(r * n.width), y.push_back(r * n.outputs);
    }
  }
  int64_t count() const { return static_cast<int64_t>(index.size()); }
};

inline OpenRows& own_open_rows() {
  thread_local OpenRows open;
  return open;
}

// Weights of an expert up to this many floats are multiplied where the rows lie; of larger ones, which come from
// memory, oneDNN makes as much of copied rows.
constexpr int64_t kNearWeights = 1 << 17;

// Rows [first, first + rows) of token t. z: where x W1 + b1 is kept, [T, B, F], or null.
inline void gated_forward(const GeluSizes& n, const GeluWeights& w, int64_t t, int64_t first, int64_t rows,
                          float* z_out, float* y_out) {
  const int64_t start = t * n.batch + first;
  const float *x = w.x + start * n.width, *gates = w.gates + start * n.experts;
  float *y = y_out + start * n.outputs, *z = z_out ? z_out + start * n.inner : nullptr;
  const bool near = n.width * n.part <= kNearWeights && n.part * n.outputs <= kNearWeights;
  std::fill(y, y + rows * n.outputs, 0.0f);
  OpenRows& open = own_open_rows();
  for (int64_t e = 0; e < n.experts; ++e) {
    open.find(n, gates, e, rows);
    const int64_t count = open.count();
    if (count == 0) continue;
    const Matrix first_weight{w.w1 + t * n.width * n.inner + e * n.part, n.inner};
    const Matrix second{w.w2 + (t * n.inner + e * n.part) * n.outputs, n.outputs};
    const float *b1 = w.b1 + t * n.inner + e * n.part, *b2 = w.b2 + (t * n.experts + e) * n.outputs;
    float *inner = scratch<1>(count * n.part), *copied = near ? nullptr : scratch<0>(count * (n.width + n.outputs));
    if (near) {
      multiply_rows(count, n.part, n.width, {x, open.x.data()}, first_weight, false, {inner, open.own.data()});
    } else {
      take_rows(x, n.width, open.index, copied);
      multiply(false, false, count, n.part, n.width, {copied, n.width}, first_weight, false, inner, n.part);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float gate = gates[open.index[i] * n.experts + e];
      gelu(b1, gate, n.part, inner + open.own[i], z ? z + open.index[i] * n.inner + e * n.part : nullptr);
    }
    if (near)
      multiply_rows(count, n.outputs, n.part, {inner, open.own.data()}, second, true, {y, open.y.data()});
    else
      multiply(false, false, count, n.outputs, n.part, {inner, n.part}, second, false, copied, n.outputs);
    for (int64_t i = 0; i < count; ++i) {
      const float gate = gates[open.index[i] * n.experts + e], *from = copied + i * n.outputs;
      float* own = y + open.y[i];
#pragma GCC ivdep
      for (int64_t o = 0; o < n.outputs; ++o) own[o] += near ? gate * b2[o] : gate * b2[o] + from[o];
    }
  }
}

// The gradients that an expert's weights, biases and gates get from the rows `open` of a block, whose inputs are x and
// whose results' gradients are dy; dz [rows, f] comes as dy W2^T and leaves as the gradient of x W1 + b1.
inline void gated_weights_backward(const GeluSizes& n, const GeluWeights& w, const float* z, const GeluGradients& d,
                                   int64_t t, int64_t start, int64_t e, bool add, const OpenRows& open, const float* x,
                                   const float* dy, float* h, float* dz) {
  const int64_t count = open.count(), own = t * n.experts + e;
  float *db1 = d.b1 + own * n.part, *db2 = d.b2 + own * n.outputs;
  const float* b2 = w.b2 + own * n.outputs;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = start + open.index[i];
    const float gate = w.gates[row * n.experts + e], *change = dy + i * n.outputs;
    float sum = gelu_backward(z + row * n.inner + e * n.part, n.part, gate, h + i * n.part, dz + i * n.part);
#pragma GCC ivdep
    for (int64_t o = 0; o < n.outputs; ++o) sum += b2[o] * change[o], db2[o] += gate * change[o];
    d.gates[row * n.experts + e] = sum;
  }
  add_columns(dz, count, n.part, n.part, db1);
  multiply(true, false, n.part, n.outputs, count, {h, n.part}, {dy, n.outputs}, add, d.w2 + own * n.part * n.outputs,
           n.outputs);
  multiply(true, false, n.width, n.part, count, {x, n.width}, {dz, n.part}, add,
           d.w1 + t * n.width * n.inner + e * n.part, n.inner);
}

// Expert e on rows of one block; `add`: whether its weights' gradients have begun. dx is added to.
inline void gated_backward(const GeluSizes& n, const GeluWeights& w, const float* z, const float* dy,
                           const GeluGradients& d, int64_t t, int64_t first, int64_t rows, int64_t e, bool add) {
  const int64_t start = t * n.batch + first, one = t * n.width * n.inner + e * n.part, own = t * n.experts + e;
  if (!add) {
    std::fill(d.b1 + own * n.part, d.b1 + (own + 1) * n.part, 0.0f);
    std::fill(d.b2 + own * n.outputs, d.b2 + (own + 1) * n.outputs, 0.0f);
  }
  OpenRows& open = own_open_rows();
  open.find(n, w.gates + start * n.experts, e, rows);
  const int64_t count = open.count();
  const float* w2 = w.w2 + own * n.part * n.outputs;
  if (count == 0) {
    if (add) return;
    for (int64_t i = 0; i < n.width; ++i) std::fill_n(d.w1 + one + i * n.inner, n.part, 0.0f);
    std::fill_n(d.w2 + own * n.part * n.outputs, n.part * n.outputs, 0.0f);
    return;
  }
  float *x = scratch<0>(count * (n.width + n.outputs)), *change = x + count * n.width;
  take_rows(w.x + start * n.width, n.width, open.index, x);
  take_rows(dy + start * n.outputs, n.outputs, open.index, change);
  float *h = scratch<1>(2 * count * n.part), *dz = h + count * n.part;
  multiply(false, true, count, n.part, n.outputs, {change, n.outputs}, {w2, n.outputs}, false, dz, n.part);
  gated_weights_backward(n, w, z, d, t, start, e, add, open, x, change, h, dz);
  multiply(false, true, count, n.width, n.part, {dz, n.part}, {w.w1 + one, n.inner}, false, x, n.width);
  add_rows(x, n.width, open.index, d.x + start * n.width);
}

inline int run_gated_forward(const GeluSizes& n, const GeluWeights& w, float* y, float* z) {
  if (sgemm() == nullptr) return kNoProduct;
  const int64_t blocks = (n.batch + kExpertRows - 1) / kExpertRows;
  Team::get().run(static_cast<int>(n.tokens * blocks), [&](int block) {
    const int64_t first = block % blocks * kExpertRows;
    gated_forward(n, w, block / blocks, first, std::min(kExpertRows, n.batch - first), z, y);
  });
  return kDone;
}

inline int run_gated_backward(const GeluSizes& n, const GeluWeights& w, const float* z, const float* dy,
                              const GeluGradients& d) {
  if (sgemm() == nullptr) return kNoProduct;
  Team::get().run(static_cast<int>(n.tokens), [&](int t) {
    std::fill(d.x + t * n.batch * n.width, d.x + (t + 1) * n.batch * n.width, 0.0f);
    std::fill(d.gates + t * n.batch * n.experts, d.gates + (t + 1) * n.batch * n.experts, 0.0f);
    for (int64_t first = 0; first < n.batch; first += kExpertRows)
      for (int64_t e = 0; e < n.experts; ++e)
        gated_backward(n, w, z, dy, d, t, first, std::min(kExpertRows, n.batch - first), e, first > 0);
  });
  return kDone;
}

}  // namespace kernels
