// Per-token SwiGLU networks, dense or with a router and routed experts. Shapes: see entries.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "products.h"
#include "rows.h"
#include "status.h"

namespace kernels {

struct Swiglu {
  const float *gate, *up, *down;  // [D, f], [D, f], [f, D]
};

struct SwigluGradient {
  float *gate, *up, *down;
};

// h = swish(a) * b
inline void swish(const float* a, const float* b, int64_t size, float* h) {
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) h[i] = a[i] * sigmoid(a[i]) * b[i];
}

// y [rows, O] = down(swish(x gate) * (x up) * scale of the row); a and b [rows, f] are kept where the caller says.
inline void swiglu_forward(const float* x, int64_t rows, int64_t width, int64_t inner, int64_t outputs, const Swiglu& w,
                           const float* scale, float* a, float* b, bool add, float* y) {
  multiply(false, false, rows, inner, width, {x, width}, {w.gate, inner}, false, a, inner);
  multiply(false, false, rows, inner, width, {x, width}, {w.up, inner}, false, b, inner);
  float* h = scratch<3>(rows * inner);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = h + r * inner;
    swish(a + r * inner, b + r * inner, inner, row);
    if (scale)
#pragma GCC ivdep
      for (int64_t i = 0; i < inner; ++i) row[i] *= scale[r];
  }
  multiply(false, false, rows, outputs, inner, {h, inner}, {w.down, outputs}, add, y, outputs);
}

// Adds to the weights' gradients if `add_weights`, to dx if `add_input`; `d_scale` gets the gradient of the scales.
inline void swiglu_rows_backward(const float* x, const float* dy, int64_t rows, int64_t width, int64_t inner,
                                 int64_t outputs, const Swiglu& w, const float* scale, const float* a, const float* b,
                                 bool add_weights, const SwigluGradient& d, float* d_scale, bool add_input, float* dx) {
  float *h = scratch<3>(3 * rows * inner), *da = h + rows * inner, *db = da + rows * inner;
  multiply(false, true, rows, inner, outputs, {dy, outputs}, {w.down, outputs}, false, da, inner);
  for (int64_t r = 0; r < rows; ++r) {
    const float *one = a + r * inner, *other = b + r * inner;
    float *own = h + r * inner, *down = da + r * inner, *up = db + r * inner;
    const float factor = scale ? scale[r] : 1.0f;
    float sum = 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < inner; ++i) {
      const Sigmoids s = sigmoids(one[i]);
      const float active = one[i] * s.open, change = down[i];
      sum += active * other[i] * change;
      own[i] = active * other[i] * factor;
      up[i] = change * active * factor;
      down[i] = change * other[i] * (s.open + active * s.closed) * factor;
    }
    if (d_scale) d_scale[r] = sum;
  }
  multiply(true, false, inner, outputs, rows, {h, inner}, {dy, outputs}, add_weights, d.down, outputs);
  multiply(true, false, width, inner, rows, {x, width}, {da, inner}, add_weights, d.gate, inner);
  multiply(true, false, width, inner, rows, {x, width}, {db, inner}, add_weights, d.up, inner);
  multiply(false, true, rows, width, inner, {da, inner}, {w.gate, inner}, add_input, dx, width);
  multiply(false, true, rows, width, inner, {db, inner}, {w.up, inner}, true, dx, width);
}

struct MoeSizes {
  int64_t tokens, batch, width, inner, outputs, routed, chosen;
  float alpha;
};

// Softmax of each row in place.
inline void softmax(float* x, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, x += width) {
    const float largest = *std::max_element(x, x + width);
    float sum = 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) sum += x[i] = std::exp(x[i] - largest);
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) x[i] /= sum;
  }
}

// The A largest of each row, the first of equals first, and their gates: divided by their sum if there are at least
// two, times alpha.
inline void choose(const float* probability, int64_t rows, const MoeSizes& n, int32_t* chosen, float* gates) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* p = probability + r * n.routed;
    float sum = 0;
    for (int64_t k = 0; k < n.chosen; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < n.routed; ++e) {
        bool taken = false;
        for (int64_t j = 0; j < k; ++j) taken |= chosen[r * n.chosen + j] == e;
        if (!taken && (best < 0 || p[e] > p[best])) best = e;
      }
      chosen[r * n.chosen + k] = static_cast<int32_t>(best);
      sum += gates[r * n.chosen + k] = p[best];
    }
    const float factor = n.chosen >= 2 ? n.alpha / sum : n.alpha;
    for (int64_t k = 0; k < n.chosen; ++k) gates[r * n.chosen + k] *= factor;
  }
}

// The pairs (row, k) that chose each expert, in the order of the rows.
struct Plan {
  std::vector<std::vector<int64_t>> rows, places;
  void make(const int32_t* chosen, int64_t count, int64_t active, int64_t experts) {
    rows.resize(experts), places.resize(experts);
    for (int64_t e = 0; e < experts; ++e) rows[e].clear(), places[e].clear();
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < active; ++k) {
        const int32_t e = chosen[r * active + k];
        rows[e].push_back(r), places[e].push_back(r * active + k);
      }
  }
};

inline Plan& own_plan() {
  thread_local Plan plan;
  return plan;
}

// Inputs of the mixture in this order: x, router [T, D, R]; gate, up, down of the shared expert [T, ..]; of the routed
// ones [T, R, ..].
struct MoeWeights {
  const float *x, *router;
  Swiglu shared, routed;

  Swiglu shared_of(const MoeSizes& n, int64_t t) const {
    const int64_t at = t * n.width * n.inner;
    return {shared.gate + at, shared.up + at, shared.down + t * n.inner * n.outputs};
  }
  Swiglu routed_of(const MoeSizes& n, int64_t t, int64_t e) const {
    const int64_t own = t * n.routed + e, at = own * n.width * n.inner;
    return {routed.gate + at, routed.up + at, routed.down + own * n.inner * n.outputs};
  }
};

// Kept for the backward pass: probabilities [T, B, R], chosen [T, B, A], and per token the products by gate and up of
// the shared expert's rows, then of each expert's, [T, B (1 + A), f].
struct MoeKept {
  float* probability;
  int32_t* chosen;
  float *a, *b;
};

// All rows of token t.
inline void moe_forward(const MoeSizes& n, const MoeWeights& w, const MoeKept& kept, int64_t t, float* y_out) {
  const float* x = w.x + t * n.batch * n.width;
  float* y = y_out + t * n.batch * n.outputs;
  const int64_t all = n.batch * (1 + n.chosen);
  float* probability = kept.probability ? kept.probability + t * n.batch * n.routed : scratch<4>(n.batch * n.routed);
  thread_local std::vector<int32_t> chosen_here;
  chosen_here.resize(n.batch * n.chosen);
  int32_t* chosen = kept.chosen ? kept.chosen + t * n.batch * n.chosen : chosen_here.data();
  multiply(false, false, n.batch, n.routed, n.width, {x, n.width}, {w.router + t * n.width * n.routed, n.routed}, false,
           probability, n.routed);
  softmax(probability, n.batch, n.routed);
  float* gates = scratch<5>(n.batch * n.chosen);
  choose(probability, n.batch, n, chosen, gates);
  float* a = kept.a ? kept.a + t * all * n.inner : scratch<6>(2 * n.batch * n.inner);
  float* b = kept.b ? kept.b + t * all * n.inner : a + n.batch * n.inner;
  swiglu_forward(x, n.batch, n.width, n.inner, n.outputs, w.shared_of(n, t), nullptr, a, b, false, y);
  Plan& plan = own_plan();
  plan.make(chosen, n.batch, n.chosen, n.routed);
  int64_t begin = n.batch;
  for (int64_t e = 0; e < n.routed; ++e) {
    const int64_t count = static_cast<int64_t>(plan.rows[e].size());
    if (count == 0) continue;
    float *taken = scratch<0>(count * (n.width + n.outputs + 1)), *made = taken + count * n.width;
    float* scale = made + count * n.outputs;
    take_rows(x, n.width, plan.rows[e], taken);
    for (int64_t r = 0; r < count; ++r) scale[r] = gates[plan.places[e][r]];
    const int64_t at = kept.a ? begin * n.inner : 0;
    swiglu_forward(taken, count, n.width, n.inner, n.outputs, w.routed_of(n, t, e), scale, a + at, b + at, false, made);
    add_rows(made, n.outputs, plan.rows[e], y);
    begin += count;
  }
}

struct MoeGradients {
  float *x, *router;
  SwigluGradient shared, routed;
};

// dlogits from the gradient of the gates, through alpha, the division by the sum and the softmax.
inline void router_backward(const MoeSizes& n, const float* probability, const int32_t* chosen, const float* d_gates,
                            float* d_logits) {
  for (int64_t r = 0; r < n.batch; ++r) {
    const float *p = probability + r * n.routed, *dg = d_gates + r * n.chosen;
    const int32_t* own = chosen + r * n.chosen;
    float *d = d_logits + r * n.routed, sum = 0, weighed = 0, total = 0;
    std::fill(d, d + n.routed, 0.0f);
    for (int64_t k = 0; k < n.chosen; ++k) sum += p[own[k]], weighed += dg[k] * p[own[k]];
    for (int64_t k = 0; k < n.chosen; ++k)
      d[own[k]] = n.alpha * (n.chosen >= 2 ? (dg[k] - weighed / sum) / sum : dg[k]);
    for (int64_t e = 0; e < n.routed; ++e) total += d[e] * p[e];
    for (int64_t e = 0; e < n.routed; ++e) d[e] = p[e] * (d[e] - total);
  }
}

inline void moe_backward(const MoeSizes& n, const MoeWeights& w, const MoeKept& kept, const float* dy_all,
                         const MoeGradients& d, int64_t t) {
  const int64_t all = n.batch * (1 + n.chosen), one = n.width * n.inner;
  const int64_t last = n.inner * n.outputs;
  const float *x = w.x + t * n.batch * n.width, *dy = dy_all + t * n.batch * n.outputs;
  float* dx = d.x + t * n.batch * n.width;
  const float* probability = kept.probability + t * n.batch * n.routed;
  const float *a = kept.a + t * all * n.inner, *b = kept.b + t * all * n.inner;
  const int32_t* kept_chosen = kept.chosen + t * n.batch * n.chosen;
  thread_local std::vector<int32_t> chosen;
  chosen.resize(n.batch * n.chosen);
  float *gates = scratch<5>(2 * n.batch * n.chosen), *d_gates = gates + n.batch * n.chosen;
  choose(probability, n.batch, n, chosen.data(), gates);
  swiglu_rows_backward(x, dy, n.batch, n.width, n.inner, n.outputs, w.shared_of(n, t), nullptr, a, b, false,
                       {d.shared.gate + t * one, d.shared.up + t * one, d.shared.down + t * last}, nullptr, false, dx);
  Plan& plan = own_plan();
  plan.make(kept_chosen, n.batch, n.chosen, n.routed);
  int64_t begin = n.batch;
  for (int64_t e = 0; e < n.routed; ++e) {
    const int64_t count = static_cast<int64_t>(plan.rows[e].size()), at = t * n.routed + e;
    const SwigluGradient own{d.routed.gate + at * one, d.routed.up + at * one, d.routed.down + at * last};
    if (count == 0) {
      for (float* gradient : {own.gate, own.up}) std::fill(gradient, gradient + one, 0.0f);
      std::fill(own.down, own.down + last, 0.0f);
      continue;
    }
    float *taken = scratch<0>(count * (2 * n.width + n.outputs + 2)), *change = taken + count * n.width;
    float *made = change + count * n.outputs, *scale = made + count * n.width, *d_scale = scale + count;
    take_rows(x, n.width, plan.rows[e], taken);
    take_rows(dy, n.outputs, plan.rows[e], change);
    for (int64_t r = 0; r < count; ++r) scale[r] = gates[plan.places[e][r]];
    swiglu_rows_backward(taken, change, count, n.width, n.inner, n.outputs, w.routed_of(n, t, e), scale,
                         a + begin * n.inner, b + begin * n.inner, false, own, d_scale, false, made);
    add_rows(made, n.width, plan.rows[e], dx);
    for (int64_t r = 0; r < count; ++r) d_gates[plan.places[e][r]] = d_scale[r];
    begin += count;
  }
  float* d_logits = scratch<4>(n.batch * n.routed);
  router_backward(n, probability, kept_chosen, d_gates, d_logits);
  const Matrix router{w.router + t * n.width * n.routed, n.routed};
  multiply(true, false, n.width, n.routed, n.batch, {x, n.width}, {d_logits, n.routed}, false,
           d.router + t * n.width * n.routed, n.routed);
  multiply(false, true, n.batch, n.width, n.routed, {d_logits, n.routed}, router, true, dx, n.width);
}

}  // namespace kernels
