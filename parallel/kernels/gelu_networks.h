// Per-token GELU networks. Shapes: see entries.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "products.h"
#include "rows.h"
#include "status.h"
#include "team.h"

namespace kernels {

constexpr float kLinear = 1.5957691216057308f, kCubic = 0.044715f * kLinear;  // 2 sqrt(2 / pi)

// h = gate gelu(z) of z = h + bias, in one pass; z is kept where `kept` is not null. gelu(z) = z sigmoid(2 u) with
// u = sqrt(2 / pi) (z + 0.044715 z^3): the tanh form.
inline void gelu(const float* bias, float gate, int64_t size, float* h, float* kept) {
  if (kept != nullptr) {
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) kept[i] = h[i] + bias[i];
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    const float z = h[i] + bias[i];
    h[i] = gate * z * sigmoid(z * (kLinear + kCubic * z * z));
  }
}

// h = gelu(z) and d *= gelu'(z).
inline void gelu_backward(const float* z, int64_t size, float* h, float* d) {
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    const float square = z[i] * z[i];
    const Sigmoids s = sigmoids(z[i] * (kLinear + kCubic * square));
    h[i] = z[i] * s.open;
    d[i] *= s.open + h[i] * s.closed * (kLinear + 3.0f * kCubic * square);
  }
}

// h = gate gelu(z), d *= gate gelu'(z); returns the gradient of the gate, the sum of gelu(z) d.
inline float gelu_backward(const float* z, int64_t size, float gate, float* h, float* d) {
  float sum = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    const float square = z[i] * z[i];
    const Sigmoids s = sigmoids(z[i] * (kLinear + kCubic * square));
    const float value = z[i] * s.open;
    sum += value * d[i];
    h[i] = gate * value;
    d[i] *= gate * (s.open + value * s.closed * (kLinear + 3.0f * kCubic * square));
  }
  return sum;
}

// The inner width F has `experts` parts of f.
struct GeluSizes {
  int64_t tokens, batch, width, inner, outputs, experts, part;
};

struct GeluWeights {
  const float *x, *w1, *b1, *w2, *b2, *gates;  // with gates [T, B, E] b2 is [T, E, O], else gates is null
};

struct GeluGradients {
  float *x, *w1, *b1, *w2, *b2, *gates;
};

// Rows [first, first + rows) of token t. z: where x W1 + b1 is kept, [T, B, F], or null.
inline void gelu_forward(const GeluSizes& n, const GeluWeights& w, int64_t t, int64_t first, int64_t rows, float* z_out,
                         float* y_out) {
  const int64_t start = t * n.batch + first;
  float *y = y_out + start * n.outputs, *inner = scratch<1>(rows * n.inner);
  multiply(false, false, rows, n.inner, n.width, {w.x + start * n.width, n.width},
           {w.w1 + t * n.width * n.inner, n.inner}, false, inner, n.inner);
  for (int64_t r = 0; r < rows; ++r)
    gelu(w.b1 + t * n.inner, 1.0f, n.inner, inner + r * n.inner, z_out ? z_out + (start + r) * n.inner : nullptr);
  multiply(false, false, rows, n.outputs, n.inner, {inner, n.inner}, {w.w2 + t * n.inner * n.outputs, n.outputs}, false,
           y, n.outputs);
  const float* bias = w.b2 + t * n.outputs;
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC ivdep
    for (int64_t i = 0; i < n.outputs; ++i) y[r * n.outputs + i] += bias[i];
}

// The same rows; gradients of weights are begun with the first block of a token and then added to.
inline void gelu_rows_backward(const GeluSizes& n, const GeluWeights& w, const float* z, const float* dy,
                               const GeluGradients& d, int64_t t, int64_t first, int64_t rows) {
  const int64_t start = t * n.batch + first, one = n.width * n.inner, last = n.inner * n.outputs;
  const bool add = first > 0;
  const Matrix x{w.x + start * n.width, n.width}, change{dy + start * n.outputs, n.outputs};
  float *db1 = d.b1 + t * n.inner, *db2 = d.b2 + t * n.outputs;
  if (!add) std::fill(db1, db1 + n.inner, 0.0f), std::fill(db2, db2 + n.outputs, 0.0f);
  add_columns(change.data, rows, n.outputs, n.outputs, db2);
  float *h = scratch<1>(2 * rows * n.inner), *dz = h + rows * n.inner;
  multiply(false, true, rows, n.inner, n.outputs, change, {w.w2 + t * last, n.outputs}, false, dz, n.inner);
  for (int64_t r = 0; r < rows; ++r)
    gelu_backward(z + (start + r) * n.inner, n.inner, h + r * n.inner, dz + r * n.inner);
  add_columns(dz, rows, n.inner, n.inner, db1);
  multiply(true, false, n.inner, n.outputs, rows, {h, n.inner}, change, add, d.w2 + t * last, n.outputs);
  multiply(true, false, n.width, n.inner, rows, x, {dz, n.inner}, add, d.w1 + t * one, n.inner);
  multiply(false, true, rows, n.width, n.inner, {dz, n.inner}, {w.w1 + t * one, n.inner}, false, d.x + start * n.width,
           n.width);
}

inline GeluSizes gelu_sizes(const int64_t* x, const int64_t* w1, const int64_t* w2, int64_t experts) {
  return {x[0], x[1], x[2], w1[2], w2[2], experts, w1[2] / experts};
}

inline int run_gelu_forward(const GeluSizes& n, const GeluWeights& w, float* y, float* z) {
  if (sgemm() == nullptr) return kNoProduct;
  const int64_t blocks = (n.batch + kForwardRows - 1) / kForwardRows;
  Team::get().run(static_cast<int>(n.tokens * blocks), [&](int block) {
    const int64_t first = block % blocks * kForwardRows;
    gelu_forward(n, w, block / blocks, first, std::min(kForwardRows, n.batch - first), z, y);
  });
  return kDone;
}

inline int run_gelu_backward(const GeluSizes& n, const GeluWeights& w, const float* z, const float* dy,
                             const GeluGradients& d) {
  if (sgemm() == nullptr) return kNoProduct;
  Team::get().run(static_cast<int>(n.tokens), [&](int t) {
    for (int64_t first = 0; first < n.batch; first += kBackwardRows)
      gelu_rows_backward(n, w, z, dy, d, t, first, std::min(kBackwardRows, n.batch - first));
  });
  return kDone;
}

}  // namespace kernels
