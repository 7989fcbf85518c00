// Per-token GELU networks, dense or as experts with gates. Shapes: see entries.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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

// All experts of a token are one network of inner width F whose pieces of f are scaled by the token's gates; without
// gates there is one expert, and it is always on.
struct GeluSizes {
  int64_t tokens, batch, width, inner, outputs, experts, part;
};

struct GeluWeights {
  const float *x, *w1, *b1, *w2, *b2, *gates;  // b2 [T, E, D]; gates [T, B, E] or null
};

// Rows of a block whose gate of this expert is not 0; false if that is all of them.
inline bool chosen_rows(const float* gates, int64_t experts, int64_t expert, int64_t rows,
                        std::vector<int64_t>& index) {
  index.clear();
  for (int64_t r = 0; r < rows; ++r)
    if (gates[r * experts + expert] != 0.0f) index.push_back(r);
  return static_cast<int64_t>(index.size()) != rows;
}

// Rows [first, first + rows) of token t. z: where x W1 + b1 is kept, [B, F], or null.
inline void gelu_forward(const GeluSizes& n, const GeluWeights& w, int64_t t, int64_t first, int64_t rows, float* z_out,
                         float* y_out) {
  const int64_t start = t * n.batch + first;
  const float *x = w.x + start * n.width, *gates = w.gates ? w.gates + start * n.experts : nullptr;
  float* y = y_out + start * n.outputs;
  thread_local std::vector<int64_t> index;
  const float* bias2 = w.b2 + t * n.experts * n.outputs;
  // y begins as the sum of the gates times their experts' biases.
  if (gates)
    multiply(false, false, rows, n.outputs, n.experts, {gates, n.experts}, {bias2, n.outputs}, false, y, n.outputs);
  for (int64_t e = 0; e < n.experts; ++e) {
    const bool sparse = gates && chosen_rows(gates, n.experts, e, rows, index);
    const int64_t count = sparse ? static_cast<int64_t>(index.size()) : rows;
    const float* bias1 = w.b1 + t * n.inner + e * n.part;
    if (count == 0) continue;
    Matrix input{x, n.width};
    if (sparse) {
      float* taken = scratch<0>(count * n.width);
      take_rows(x, n.width, index, taken);
      input.data = taken;
    }
    float* inner = scratch<1>(count * n.part);
    multiply(false, false, count, n.part, n.width, input, {w.w1 + t * n.width * n.inner + e * n.part, n.inner}, false,
             inner, n.part);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = sparse ? index[r] : r;
      gelu(bias1, gates ? gates[row * n.experts + e] : 1.0f, n.part, inner + r * n.part,
           z_out ? z_out + (start + row) * n.inner + e * n.part : nullptr);
    }
    const Matrix second{w.w2 + (t * n.inner + e * n.part) * n.outputs, n.outputs};
    float* output = sparse ? scratch<2>(count * n.outputs) : y;
    multiply(false, false, count, n.outputs, n.part, {inner, n.part}, second, gates && !sparse, output, n.outputs);
    if (sparse) add_rows(output, n.outputs, index, y);
  }
  for (int64_t r = 0; !gates && r < rows; ++r)
#pragma GCC ivdep
    for (int64_t i = 0; i < n.outputs; ++i) y[r * n.outputs + i] += bias2[i];
}

struct GeluGradients {
  float *x, *w1, *b1, *w2, *b2, *gates;
};

// The part of the last biases b2 of all experts, on rows of one block.
inline void bias_backward(const GeluSizes& n, const GeluWeights& w, const float* dy, const GeluGradients& d, int64_t t,
                          int64_t first, int64_t rows) {
  const int64_t start = t * n.batch + first;
  const Matrix change{dy + start * n.outputs, n.outputs};
  float* db2 = d.b2 + t * n.experts * n.outputs;
  if (!w.gates) {
    if (first == 0) std::fill(db2, db2 + n.outputs, 0.0f);
    add_columns(change.data, rows, n.outputs, n.outputs, db2);
    return;
  }
  const float* gates = w.gates + start * n.experts;
  float* d_gates = d.gates + start * n.experts;
  multiply(true, false, n.experts, n.outputs, rows, {gates, n.experts}, change, first > 0, db2, n.outputs);
  multiply(false, true, rows, n.experts, n.outputs, change, {w.b2 + t * n.experts * n.outputs, n.outputs}, false,
           d_gates, n.experts);
#pragma GCC ivdep
  for (int64_t i = 0; i < rows * n.experts; ++i)
    if (gates[i] == 0.0f) d_gates[i] = 0.0f;
}

// Expert e on rows of one block; `add`: whether weights' gradients have begun.
inline void gelu_expert_backward(const GeluSizes& n, const GeluWeights& w, const float* z, const float* dy,
                                 const GeluGradients& d, int64_t t, int64_t first, int64_t rows, int64_t e,
                                 bool add_weights, bool add_input) {
  const int64_t start = t * n.batch + first;
  const float *x = w.x + start * n.width, *gates = w.gates ? w.gates + start * n.experts : nullptr;
  const float* change = dy + start * n.outputs;
  thread_local std::vector<int64_t> index;
  const bool sparse = gates && chosen_rows(gates, n.experts, e, rows, index);
  const int64_t count = sparse ? static_cast<int64_t>(index.size()) : rows;
  const Matrix first_weight{w.w1 + t * n.width * n.inner + e * n.part, n.inner};
  const Matrix second{w.w2 + (t * n.inner + e * n.part) * n.outputs, n.outputs};
  float *dw1 = d.w1 + t * n.width * n.inner + e * n.part, *db1 = d.b1 + t * n.inner + e * n.part;
  float* dw2 = d.w2 + (t * n.inner + e * n.part) * n.outputs;
  if (!add_weights) std::fill(db1, db1 + n.part, 0.0f);
  if (count == 0) {
    if (!add_weights) {
      for (int64_t i = 0; i < n.width; ++i) std::fill(dw1 + i * n.inner, dw1 + i * n.inner + n.part, 0.0f);
      std::fill(dw2, dw2 + n.part * n.outputs, 0.0f);
    }
    if (!add_input) std::fill(d.x + start * n.width, d.x + (start + rows) * n.width, 0.0f);
    return;
  }
  if (sparse) {
    float* taken = scratch<0>(count * (n.width + n.outputs));
    take_rows(x, n.width, index, taken);
    take_rows(change, n.outputs, index, taken + count * n.width);
    x = taken, change = taken + count * n.width;
  }
  float *h = scratch<1>(2 * count * n.part), *dz = h + count * n.part;
  multiply(false, true, count, n.part, n.outputs, {change, n.outputs}, second, false, dz, n.part);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = start + (sparse ? index[r] : r);
    float *own = h + r * n.part, *down = dz + r * n.part;
    const float* before = z + row * n.inner + e * n.part;
    if (!gates) {
      gelu_backward(before, n.part, own, down);
      continue;
    }
    const float gate = w.gates[row * n.experts + e];
    d.gates[row * n.experts + e] += gelu_backward(before, n.part, gate, own, down);
  }
  add_columns(dz, count, n.part, n.part, db1);
  multiply(true, false, n.part, n.outputs, count, {h, n.part}, {change, n.outputs}, add_weights, dw2, n.outputs);
  multiply(true, false, n.width, n.part, count, {x, n.width}, {dz, n.part}, add_weights, dw1, n.inner);
  float* dx = d.x + start * n.width;
  if (!sparse) {
    multiply(false, true, count, n.width, n.part, {dz, n.part}, first_weight, add_input, dx, n.width);
    return;
  }
  if (!add_input) std::fill(dx, dx + rows * n.width, 0.0f);
  float* change_x = scratch<2>(count * n.width);
  multiply(false, true, count, n.width, n.part, {dz, n.part}, first_weight, false, change_x, n.width);
  add_rows(change_x, n.width, index, dx);
}

inline GeluSizes gelu_sizes(const int64_t* x, const int64_t* w1, const int64_t* w2, int64_t experts) {
  return {x[0], x[1], x[2], w1[2], w2[2], experts, w1[2] / experts};
}

inline int run_gelu_forward(const GeluSizes& n, const GeluWeights& w, float* y, float* z) {
  if (sgemm() == nullptr) return kNoProduct;
  const int64_t most = w.gates ? kExpertRows : kForwardRows, blocks = (n.batch + most - 1) / most;
  Team::get().run(static_cast<int>(n.tokens * blocks), [&](int block) {
    const int64_t first = block % blocks * most;
    gelu_forward(n, w, block / blocks, first, std::min(most, n.batch - first), z, y);
  });
  return kDone;
}

inline int run_gelu_backward(const GeluSizes& n, const GeluWeights& w, const float* z, const float* dy,
                             const GeluGradients& d) {
  if (sgemm() == nullptr) return kNoProduct;
  const int64_t most = w.gates ? kExpertRows : kBackwardRows;
  Team::get().run(static_cast<int>(n.tokens), [&](int t) {
    for (int64_t first = 0; first < n.batch; first += most) {
      bias_backward(n, w, dy, d, t, first, std::min(most, n.batch - first));
      for (int64_t e = 0; e < n.experts; ++e)
        gelu_expert_backward(n, w, z, dy, d, t, first, std::min(most, n.batch - first), e, first > 0, e > 0);
    }
  });
  return kDone;
}

}  // namespace kernels
