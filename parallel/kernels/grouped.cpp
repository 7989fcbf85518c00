// Per-token networks of the rankers on the CPU, forward and backward, for MindSpore's `ops.Custom(..., "aot")`.
//
// MindSpore runs such a network as a product, a bias, half a dozen elementwise kernels and another product, each of
// which goes through memory. Here a block of rows goes through the whole network while it lies in the cache, and
// experts see only the rows that chose them. The arithmetic is that of parallel/layers/{grouped,moe,relu_moe,norm}.py;
// tests/parallel/test_fused.py holds the two together.
//
// Signature of an entry: int name(int count, void **params, int *dims, int64_t **shapes, const char **types,
// void *stream, void *extra); 0 = done. Tensors are float32 and dense.
// Shapes: T tokens, B batch, D width, O outputs (mostly D), F inner width, E experts (each with f = F / E), R routed
// experts, A chosen ones.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "products.h"
#include "team.h"

namespace {

constexpr int64_t kForwardRows = 128, kBackwardRows = 256;  // rows of a block

// Buffers of a thread that outlive the call.
template <int kWhich>
float *scratch(int64_t size) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

void add_columns(const float *x, int64_t rows, int64_t width, int64_t stride, float *sums) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; ++i) sums[i] += x[r * stride + i];
}

// Rows `index` of x, one after the other.
void take_rows(const float *x, int64_t width, const std::vector<int64_t> &index, float *taken) {
  for (size_t r = 0; r < index.size(); ++r)
    std::memcpy(taken + r * width, x + index[r] * width, width * sizeof(float));
}

void add_rows(const float *taken, int64_t width, const std::vector<int64_t> &index, float *x) {
  for (size_t r = 0; r < index.size(); ++r) {
    float *to = x + index[r] * width;
    const float *from = taken + r * width;
    for (int64_t i = 0; i < width; ++i) to[i] += from[i];
  }
}

float dot(const float *x, const float *y, int64_t width) {
  float sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += x[i] * y[i];
  return sum;
}

// ---------------------------------------------------------------- GELU networks, dense or with gates

// 1 / (1 + exp(-x)). Bounded, since -ffast-math knows no infinity; beyond the bound nothing changes in float.
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(std::min(-x, 80.0f))); }

constexpr float kLinear = 1.5957691216057308f, kCubic = 0.044715f * kLinear;  // 2 sqrt(2 / pi)

// x sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form.
void gelu(const float *z, int64_t size, float *h) {
  for (int64_t i = 0; i < size; ++i) h[i] = z[i] * sigmoid(z[i] * (kLinear + kCubic * z[i] * z[i]));
}

// h = gelu(z) and d *= gelu'(z).
void gelu_backward(const float *z, int64_t size, float *h, float *d) {
  for (int64_t i = 0; i < size; ++i) {
    const float square = z[i] * z[i], gate = sigmoid(z[i] * (kLinear + kCubic * square));
    h[i] = z[i] * gate;
    d[i] *= gate + h[i] * (1.0f - gate) * (kLinear + 3.0f * kCubic * square);
  }
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
bool chosen_rows(const float *gates, int64_t experts, int64_t expert, int64_t rows, std::vector<int64_t> &index) {
  index.clear();
  for (int64_t r = 0; r < rows; ++r)
    if (gates[r * experts + expert] != 0.0f) index.push_back(r);
  return static_cast<int64_t>(index.size()) != rows;
}

// Rows [first, first + rows) of token t. z: where x W1 + b1 is kept, [B, F], or null.
void gelu_forward(const GeluSizes &n, const GeluWeights &w, int64_t t, int64_t first, int64_t rows, float *z_out,
                  float *y_out) {
  const int64_t start = t * n.batch + first;
  const float *x = w.x + start * n.width, *gates = w.gates ? w.gates + start * n.experts : nullptr;
  float *y = y_out + start * n.outputs;
  thread_local std::vector<int64_t> index;
  for (int64_t e = 0; e < n.experts; ++e) {
    const bool sparse = gates && chosen_rows(gates, n.experts, e, rows, index);
    const int64_t count = sparse ? static_cast<int64_t>(index.size()) : rows;
    const float *bias1 = w.b1 + t * n.inner + e * n.part, *bias2 = w.b2 + (t * n.experts + e) * n.outputs;
    if (e == 0 && (gates || count == 0)) std::fill(y, y + rows * n.outputs, 0.0f);
    if (count == 0) continue;
    Matrix input{x, n.width};
    if (sparse) {
      float *taken = scratch<0>(count * n.width);
      take_rows(x, n.width, index, taken);
      input.data = taken;
    }
    float *inner = scratch<1>(count * n.part);
    multiply(false, false, count, n.part, n.width, input, {w.w1 + t * n.width * n.inner + e * n.part, n.inner}, false,
             inner, n.part);
    for (int64_t r = 0; r < count; ++r) {
      float *row = inner + r * n.part;
      for (int64_t i = 0; i < n.part; ++i) row[i] += bias1[i];
      if (z_out)
        std::memcpy(z_out + (start + (sparse ? index[r] : r)) * n.inner + e * n.part, row, n.part * sizeof(float));
      gelu(row, n.part, row);
      if (gates) {
        const float gate = gates[(sparse ? index[r] : r) * n.experts + e];
        for (int64_t i = 0; i < n.part; ++i) row[i] *= gate;
      }
    }
    const Matrix second{w.w2 + (t * n.inner + e * n.part) * n.outputs, n.outputs};
    float *output = sparse ? scratch<2>(count * n.outputs) : y;
    multiply(false, false, count, n.outputs, n.part, {inner, n.part}, second, gates && !sparse, output, n.outputs);
    if (sparse) add_rows(output, n.outputs, index, y);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = sparse ? index[r] : r;
      const float gate = gates ? gates[row * n.experts + e] : 1.0f;
      for (int64_t i = 0; i < n.outputs; ++i) y[row * n.outputs + i] += gate * bias2[i];
    }
  }
}

struct GeluGradients {
  float *x, *w1, *b1, *w2, *b2, *gates;
};

// Expert e on rows of one block; `add`: whether weights' gradients have begun.
void gelu_expert_backward(const GeluSizes &n, const GeluWeights &w, const float *z, const float *dy,
                          const GeluGradients &d, int64_t t, int64_t first, int64_t rows, int64_t e, bool add_weights,
                          bool add_input) {
  const int64_t start = t * n.batch + first;
  const float *x = w.x + start * n.width, *gates = w.gates ? w.gates + start * n.experts : nullptr;
  const float *change = dy + start * n.outputs;
  thread_local std::vector<int64_t> index;
  const bool sparse = gates && chosen_rows(gates, n.experts, e, rows, index);
  const int64_t count = sparse ? static_cast<int64_t>(index.size()) : rows;
  const Matrix first_weight{w.w1 + t * n.width * n.inner + e * n.part, n.inner};
  const Matrix second{w.w2 + (t * n.inner + e * n.part) * n.outputs, n.outputs};
  float *dw1 = d.w1 + t * n.width * n.inner + e * n.part, *db1 = d.b1 + t * n.inner + e * n.part;
  float *dw2 = d.w2 + (t * n.inner + e * n.part) * n.outputs, *db2 = d.b2 + (t * n.experts + e) * n.outputs;
  if (!add_weights) {
    std::fill(db1, db1 + n.part, 0.0f);
    std::fill(db2, db2 + n.outputs, 0.0f);
  }
  if (gates)
    for (int64_t r = 0; r < rows; ++r) d.gates[(start + r) * n.experts + e] = 0.0f;
  if (count == 0) {
    if (!add_weights) {
      for (int64_t i = 0; i < n.width; ++i) std::fill(dw1 + i * n.inner, dw1 + i * n.inner + n.part, 0.0f);
      std::fill(dw2, dw2 + n.part * n.outputs, 0.0f);
    }
    if (!add_input) std::fill(d.x + start * n.width, d.x + (start + rows) * n.width, 0.0f);
    return;
  }
  if (sparse) {
    float *taken = scratch<0>(count * (n.width + n.outputs));
    take_rows(x, n.width, index, taken);
    take_rows(change, n.outputs, index, taken + count * n.width);
    x = taken, change = taken + count * n.width;
  }
  float *h = scratch<1>(2 * count * n.part), *dz = h + count * n.part;
  multiply(false, true, count, n.part, n.outputs, {change, n.outputs}, second, false, dz, n.part);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = start + (sparse ? index[r] : r);
    float *own = h + r * n.part, *down = dz + r * n.part;
    const float *before = z + row * n.inner + e * n.part;
    if (!gates) {
      gelu_backward(before, n.part, own, down);
      for (int64_t i = 0; i < n.outputs; ++i) db2[i] += change[r * n.outputs + i];
      continue;
    }
    const float gate = w.gates[row * n.experts + e], *bias2 = w.b2 + (t * n.experts + e) * n.outputs;
    gelu(before, n.part, own);
    d.gates[row * n.experts + e] = dot(own, down, n.part) + dot(change + r * n.outputs, bias2, n.outputs);
    gelu_backward(before, n.part, own, down);
    for (int64_t i = 0; i < n.part; ++i) own[i] *= gate, down[i] *= gate;
    for (int64_t i = 0; i < n.outputs; ++i) db2[i] += gate * change[r * n.outputs + i];
  }
  add_columns(dz, count, n.part, n.part, db1);
  multiply(true, false, n.part, n.outputs, count, {h, n.part}, {change, n.outputs}, add_weights, dw2, n.outputs);
  multiply(true, false, n.width, n.part, count, {x, n.width}, {dz, n.part}, add_weights, dw1, n.inner);
  float *dx = d.x + start * n.width;
  if (!sparse) {
    multiply(false, true, count, n.width, n.part, {dz, n.part}, first_weight, add_input, dx, n.width);
    return;
  }
  if (!add_input) std::fill(dx, dx + rows * n.width, 0.0f);
  float *change_x = scratch<2>(count * n.width);
  multiply(false, true, count, n.width, n.part, {dz, n.part}, first_weight, false, change_x, n.width);
  add_rows(change_x, n.width, index, dx);
}

GeluSizes gelu_sizes(const int64_t *x, const int64_t *w1, const int64_t *w2, int64_t experts) {
  return {x[0], x[1], x[2], w1[2], w2[2], experts, w1[2] / experts};
}

int run_gelu_forward(const GeluSizes &n, const GeluWeights &w, float *y, float *z) {
  if (sgemm() == nullptr) return 1;
  const int64_t blocks = (n.batch + kForwardRows - 1) / kForwardRows;
  Team::get().run(static_cast<int>(n.tokens * blocks), [&](int block) {
    const int64_t first = block % blocks * kForwardRows;
    gelu_forward(n, w, block / blocks, first, std::min(kForwardRows, n.batch - first), z, y);
  });
  return 0;
}

int run_gelu_backward(const GeluSizes &n, const GeluWeights &w, const float *z, const float *dy,
                      const GeluGradients &d) {
  if (sgemm() == nullptr) return 1;
  Team::get().run(static_cast<int>(n.tokens), [&](int t) {
    for (int64_t first = 0; first < n.batch; first += kBackwardRows)
      for (int64_t e = 0; e < n.experts; ++e)
        gelu_expert_backward(n, w, z, dy, d, t, first, std::min(kBackwardRows, n.batch - first), e, first > 0, e > 0);
  });
  return 0;
}

// ---------------------------------------------------------------- SwiGLU networks, dense or with routed experts

struct Swiglu {
  const float *gate, *up, *down;  // [D, f], [D, f], [f, D]
};

struct SwigluGradient {
  float *gate, *up, *down;
};

// h = swish(a) * b
void swish(const float *a, const float *b, int64_t size, float *h) {
  for (int64_t i = 0; i < size; ++i) h[i] = a[i] * sigmoid(a[i]) * b[i];
}

// y [rows, O] = down(swish(x gate) * (x up) * scale of the row); a and b [rows, f] are kept where the caller says.
void swiglu_forward(const float *x, int64_t rows, int64_t width, int64_t inner, int64_t outputs, const Swiglu &w,
                    const float *scale, float *a, float *b, bool add, float *y) {
  multiply(false, false, rows, inner, width, {x, width}, {w.gate, inner}, false, a, inner);
  multiply(false, false, rows, inner, width, {x, width}, {w.up, inner}, false, b, inner);
  float *h = scratch<3>(rows * inner);
  for (int64_t r = 0; r < rows; ++r) {
    float *row = h + r * inner;
    swish(a + r * inner, b + r * inner, inner, row);
    if (scale)
      for (int64_t i = 0; i < inner; ++i) row[i] *= scale[r];
  }
  multiply(false, false, rows, outputs, inner, {h, inner}, {w.down, outputs}, add, y, outputs);
}

// Adds to the weights' gradients if `add_weights`, to dx if `add_input`; `d_scale` gets the gradient of the scales.
void swiglu_rows_backward(const float *x, const float *dy, int64_t rows, int64_t width, int64_t inner, int64_t outputs,
                          const Swiglu &w, const float *scale, const float *a, const float *b, bool add_weights,
                          const SwigluGradient &d, float *d_scale, bool add_input, float *dx) {
  float *h = scratch<3>(3 * rows * inner), *da = h + rows * inner, *db = da + rows * inner;
  multiply(false, true, rows, inner, outputs, {dy, outputs}, {w.down, outputs}, false, da, inner);
  for (int64_t r = 0; r < rows; ++r) {
    const float *one = a + r * inner, *other = b + r * inner;
    float *own = h + r * inner, *down = da + r * inner, *up = db + r * inner;
    const float factor = scale ? scale[r] : 1.0f;
    float sum = 0;
    for (int64_t i = 0; i < inner; ++i) {
      const float gate = sigmoid(one[i]), active = one[i] * gate, change = down[i];
      sum += active * other[i] * change;
      own[i] = active * other[i] * factor;
      up[i] = change * active * factor;
      down[i] = change * other[i] * (gate + active * (1.0f - gate)) * factor;
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
void softmax(float *x, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, x += width) {
    const float largest = *std::max_element(x, x + width);
    float sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += x[i] = std::exp(x[i] - largest);
    for (int64_t i = 0; i < width; ++i) x[i] /= sum;
  }
}

// The A largest of each row, the first of equals first, and their gates: divided by their sum if there are at least
// two, times alpha.
void choose(const float *probability, int64_t rows, const MoeSizes &n, int32_t *chosen, float *gates) {
  for (int64_t r = 0; r < rows; ++r) {
    const float *p = probability + r * n.routed;
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
  void make(const int32_t *chosen, int64_t count, int64_t active, int64_t experts) {
    rows.resize(experts), places.resize(experts);
    for (int64_t e = 0; e < experts; ++e) rows[e].clear(), places[e].clear();
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < active; ++k) {
        const int32_t e = chosen[r * active + k];
        rows[e].push_back(r), places[e].push_back(r * active + k);
      }
  }
};

Plan &own_plan() {
  thread_local Plan plan;
  return plan;
}

// Inputs of the mixture in this order: x, router [T, D, R]; gate, up, down of the shared expert [T, ..]; of the routed
// ones [T, R, ..].
struct MoeWeights {
  const float *x, *router;
  Swiglu shared, routed;

  Swiglu shared_of(const MoeSizes &n, int64_t t) const {
    const int64_t at = t * n.width * n.inner;
    return {shared.gate + at, shared.up + at, shared.down + t * n.inner * n.outputs};
  }
  Swiglu routed_of(const MoeSizes &n, int64_t t, int64_t e) const {
    const int64_t own = t * n.routed + e, at = own * n.width * n.inner;
    return {routed.gate + at, routed.up + at, routed.down + own * n.inner * n.outputs};
  }
};

// Kept for the backward pass: probabilities [T, B, R], chosen [T, B, A], and per token the products by gate and up of
// the shared expert's rows, then of each expert's, [T, B (1 + A), f].
struct MoeKept {
  float *probability;
  int32_t *chosen;
  float *a, *b;
};

// All rows of token t.
void moe_forward(const MoeSizes &n, const MoeWeights &w, const MoeKept &kept, int64_t t, float *y_out) {
  const float *x = w.x + t * n.batch * n.width;
  float *y = y_out + t * n.batch * n.outputs;
  const int64_t all = n.batch * (1 + n.chosen);
  float *probability = kept.probability ? kept.probability + t * n.batch * n.routed
                                        : scratch<4>(n.batch * n.routed);
  thread_local std::vector<int32_t> chosen_here;
  chosen_here.resize(n.batch * n.chosen);
  int32_t *chosen = kept.chosen ? kept.chosen + t * n.batch * n.chosen : chosen_here.data();
  multiply(false, false, n.batch, n.routed, n.width, {x, n.width}, {w.router + t * n.width * n.routed, n.routed}, false,
           probability, n.routed);
  softmax(probability, n.batch, n.routed);
  float *gates = scratch<5>(n.batch * n.chosen);
  choose(probability, n.batch, n, chosen, gates);
  float *a = kept.a ? kept.a + t * all * n.inner : scratch<6>(2 * n.batch * n.inner);
  float *b = kept.b ? kept.b + t * all * n.inner : a + n.batch * n.inner;
  swiglu_forward(x, n.batch, n.width, n.inner, n.outputs, w.shared_of(n, t), nullptr, a, b, false, y);
  Plan &plan = own_plan();
  plan.make(chosen, n.batch, n.chosen, n.routed);
  int64_t begin = n.batch;
  for (int64_t e = 0; e < n.routed; ++e) {
    const int64_t count = static_cast<int64_t>(plan.rows[e].size());
    if (count == 0) continue;
    float *taken = scratch<0>(count * (n.width + n.outputs + 1)), *made = taken + count * n.width;
    float *scale = made + count * n.outputs;
    take_rows(x, n.width, plan.rows[e], taken);
    for (int64_t r = 0; r < count; ++r) scale[r] = gates[plan.places[e][r]];
    const int64_t at = kept.a ? begin * n.inner : 0;
    swiglu_forward(taken, count, n.width, n.inner, n.outputs, w.routed_of(n, t, e), scale, a + at, b + at, false,
                   made);
    add_rows(made, n.outputs, plan.rows[e], y);
    begin += count;
  }
}

struct MoeGradients {
  float *x, *router;
  SwigluGradient shared, routed;
};

// dlogits from the gradient of the gates, through alpha, the division by the sum and the softmax.
void router_backward(const MoeSizes &n, const float *probability, const int32_t *chosen, const float *d_gates,
                     float *d_logits) {
  for (int64_t r = 0; r < n.batch; ++r) {
    const float *p = probability + r * n.routed, *dg = d_gates + r * n.chosen;
    const int32_t *own = chosen + r * n.chosen;
    float *d = d_logits + r * n.routed, sum = 0, weighed = 0, total = 0;
    std::fill(d, d + n.routed, 0.0f);
    for (int64_t k = 0; k < n.chosen; ++k) sum += p[own[k]], weighed += dg[k] * p[own[k]];
    for (int64_t k = 0; k < n.chosen; ++k)
      d[own[k]] = n.alpha * (n.chosen >= 2 ? (dg[k] - weighed / sum) / sum : dg[k]);
    for (int64_t e = 0; e < n.routed; ++e) total += d[e] * p[e];
    for (int64_t e = 0; e < n.routed; ++e) d[e] = p[e] * (d[e] - total);
  }
}

void moe_backward(const MoeSizes &n, const MoeWeights &w, const MoeKept &kept, const float *dy_all,
                  const MoeGradients &d, int64_t t) {
  const int64_t all = n.batch * (1 + n.chosen), one = n.width * n.inner;
  const int64_t last = n.inner * n.outputs;
  const float *x = w.x + t * n.batch * n.width, *dy = dy_all + t * n.batch * n.outputs;
  float *dx = d.x + t * n.batch * n.width;
  const float *probability = kept.probability + t * n.batch * n.routed;
  const float *a = kept.a + t * all * n.inner, *b = kept.b + t * all * n.inner;
  const int32_t *kept_chosen = kept.chosen + t * n.batch * n.chosen;
  thread_local std::vector<int32_t> chosen;
  chosen.resize(n.batch * n.chosen);
  float *gates = scratch<5>(2 * n.batch * n.chosen), *d_gates = gates + n.batch * n.chosen;
  choose(probability, n.batch, n, chosen.data(), gates);
  swiglu_rows_backward(x, dy, n.batch, n.width, n.inner, n.outputs, w.shared_of(n, t), nullptr, a, b, false,
                  {d.shared.gate + t * one, d.shared.up + t * one, d.shared.down + t * last}, nullptr, false, dx);
  Plan &plan = own_plan();
  plan.make(kept_chosen, n.batch, n.chosen, n.routed);
  int64_t begin = n.batch;
  for (int64_t e = 0; e < n.routed; ++e) {
    const int64_t count = static_cast<int64_t>(plan.rows[e].size()), at = t * n.routed + e;
    const SwigluGradient own{d.routed.gate + at * one, d.routed.up + at * one, d.routed.down + at * last};
    if (count == 0) {
      for (float *gradient : {own.gate, own.up}) std::fill(gradient, gradient + one, 0.0f);
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
  float *d_logits = scratch<4>(n.batch * n.routed);
  router_backward(n, probability, kept_chosen, d_gates, d_logits);
  const Matrix router{w.router + t * n.width * n.routed, n.routed};
  multiply(true, false, n.width, n.routed, n.batch, {x, n.width}, {d_logits, n.routed}, false,
           d.router + t * n.width * n.routed, n.routed);
  multiply(false, true, n.batch, n.width, n.routed, {d_logits, n.routed}, router, true, dx, n.width);
}

// ---------------------------------------------------------------- norms over the last dim

constexpr int64_t kNormRows = 64;

// y = (x - mean) / sqrt(var + epsilon) * gamma + beta, or without the mean and beta.
template <bool kMean>
void norm_row(const float *x, int64_t width, float epsilon, float *mean, float *scale) {
  float sum = 0, squares = 0;
  if (kMean)
    for (int64_t i = 0; i < width; ++i) sum += x[i];
  *mean = sum / width;
  for (int64_t i = 0; i < width; ++i) squares += (x[i] - *mean) * (x[i] - *mean);
  *scale = 1.0f / std::sqrt(squares / width + epsilon);
}

template <bool kMean>
void norm_forward(const float *x, int64_t rows, int64_t width, const float *gamma, const float *beta, float epsilon,
                  float *y) {
  const int64_t blocks = (rows + kNormRows - 1) / kNormRows;
  Team::get().run(static_cast<int>(blocks), [&](int block) {
    for (int64_t r = block * kNormRows; r < std::min(rows, (block + 1) * kNormRows); ++r) {
      const float *in = x + r * width;
      float *out = y + r * width, mean, scale;
      norm_row<kMean>(in, width, epsilon, &mean, &scale);
      for (int64_t i = 0; i < width; ++i) out[i] = (in[i] - mean) * scale * gamma[i] + (kMean ? beta[i] : 0.0f);
    }
  });
}

// The sums of dgamma and dbeta go block by block, so that the result does not depend on the number of threads.
template <bool kMean>
void norm_backward(const float *x, int64_t rows, int64_t width, const float *gamma, float epsilon, const float *dy,
                   float *dx, float *d_gamma, float *d_beta) {
  constexpr int64_t kRows = 4 * kNormRows;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  std::vector<float> partial(blocks * 2 * width, 0.0f);
  Team::get().run(static_cast<int>(blocks), [&](int block) {
    float *sum_gamma = partial.data() + block * 2 * width, *sum_beta = sum_gamma + width;
    for (int64_t r = block * kRows; r < std::min(rows, (block + 1) * kRows); ++r) {
      const float *in = x + r * width, *change = dy + r * width;
      float *out = dx + r * width, mean, scale, first = 0, second = 0;
      norm_row<kMean>(in, width, epsilon, &mean, &scale);
      for (int64_t i = 0; i < width; ++i) {
        const float normed = (in[i] - mean) * scale, inner = change[i] * gamma[i];
        first += inner, second += inner * normed;
        sum_gamma[i] += change[i] * normed;
        if (kMean) sum_beta[i] += change[i];
      }
      first = kMean ? first / width : 0.0f, second /= width;
      for (int64_t i = 0; i < width; ++i)
        out[i] = (change[i] * gamma[i] - first - (in[i] - mean) * scale * second) * scale;
    }
  });
  std::fill(d_gamma, d_gamma + width, 0.0f);
  if (kMean) std::fill(d_beta, d_beta + width, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < width; ++i) {
      d_gamma[i] += partial[block * 2 * width + i];
      if (kMean) d_beta[i] += partial[(block * 2 + 1) * width + i];
    }
}

int64_t rows_of(int dims, const int64_t *shape) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < dims; ++i) rows *= shape[i];
  return rows;
}

const float *in(void **params, int i) { return static_cast<const float *>(params[i]); }
float *out(void **params, int i) { return static_cast<float *>(params[i]); }

}  // namespace

#define ENTRY(name) \
  extern "C" int name(int count, void **params, int *dims, int64_t **shapes, const char **, void *, void *)

// Whether there is a product to work with.
extern "C" int ready() { return sgemm() != nullptr; }

// x, w1, b1, w2, b2 -> y
ENTRY(feed_forward) {
  if (count != 6) return 2;
  return run_gelu_forward(gelu_sizes(shapes[0], shapes[1], shapes[3], 1),
                          {in(params, 0), in(params, 1), in(params, 2), in(params, 3), in(params, 4), nullptr},
                          out(params, 5), nullptr);
}

// x, w1, b1, w2, b2 -> y, z
ENTRY(feed_forward_kept) {
  if (count != 7) return 2;
  return run_gelu_forward(gelu_sizes(shapes[0], shapes[1], shapes[3], 1),
                          {in(params, 0), in(params, 1), in(params, 2), in(params, 3), in(params, 4), nullptr},
                          out(params, 5), out(params, 6));
}

// x, w1, b1, w2, b2, z, dy -> dx, dw1, db1, dw2, db2
ENTRY(feed_forward_backward) {
  if (count != 12) return 2;
  return run_gelu_backward(gelu_sizes(shapes[0], shapes[1], shapes[3], 1),
                           {in(params, 0), in(params, 1), in(params, 2), in(params, 3), in(params, 4), nullptr},
                           in(params, 5), in(params, 6),
                           {out(params, 7), out(params, 8), out(params, 9), out(params, 10), out(params, 11), nullptr});
}

// x, gates, w1, b1, w2, b2 -> y
ENTRY(gated_experts) {
  if (count != 7) return 2;
  return run_gelu_forward(gelu_sizes(shapes[0], shapes[2], shapes[4], shapes[1][2]),
                          {in(params, 0), in(params, 2), in(params, 3), in(params, 4), in(params, 5), in(params, 1)},
                          out(params, 6), nullptr);
}

// x, gates, w1, b1, w2, b2 -> y, z
ENTRY(gated_experts_kept) {
  if (count != 8) return 2;
  return run_gelu_forward(gelu_sizes(shapes[0], shapes[2], shapes[4], shapes[1][2]),
                          {in(params, 0), in(params, 2), in(params, 3), in(params, 4), in(params, 5), in(params, 1)},
                          out(params, 6), out(params, 7));
}

// x, gates, w1, b1, w2, b2, z, dy -> dx, dgates, dw1, db1, dw2, db2
ENTRY(gated_experts_backward) {
  if (count != 14) return 2;
  return run_gelu_backward(gelu_sizes(shapes[0], shapes[2], shapes[4], shapes[1][2]),
                           {in(params, 0), in(params, 2), in(params, 3), in(params, 4), in(params, 5), in(params, 1)},
                           in(params, 6), in(params, 7),
                           {out(params, 8), out(params, 10), out(params, 11), out(params, 12), out(params, 13),
                            out(params, 9)});
}

namespace {

int run_swiglu(int64_t **shapes, void **params, float *y, float *a, float *b) {
  if (sgemm() == nullptr) return 1;
  const int64_t tokens = shapes[0][0], batch = shapes[0][1], width = shapes[0][2], inner = shapes[1][2];
  const int64_t blocks = (batch + kForwardRows - 1) / kForwardRows, one = width * inner, outputs = shapes[3][2];
  Team::get().run(static_cast<int>(tokens * blocks), [&](int block) {
    const int64_t t = block / blocks, first = block % blocks * kForwardRows, start = t * batch + first;
    const int64_t rows = std::min(kForwardRows, batch - first);
    float *own = a ? a + start * inner : scratch<6>(2 * rows * inner);
    swiglu_forward(in(params, 0) + start * width, rows, width, inner, outputs,
                   {in(params, 1) + t * one, in(params, 2) + t * one, in(params, 3) + t * inner * outputs}, nullptr,
                   own, b ? b + start * inner : own + rows * inner, false, y + start * outputs);
  });
  return 0;
}

MoeSizes moe_sizes(int64_t **shapes, int64_t chosen, float alpha) {
  return {shapes[0][0], shapes[0][1], shapes[0][2], shapes[2][2], shapes[4][2], shapes[1][2], chosen, alpha};
}

MoeWeights moe_weights(void **params) {
  return {in(params, 0), in(params, 1), {in(params, 2), in(params, 3), in(params, 4)},
          {in(params, 5), in(params, 6), in(params, 7)}};
}

int run_moe(const MoeSizes &n, const MoeWeights &w, const MoeKept &kept, float *y) {
  if (sgemm() == nullptr) return 1;
  Team::get().run(static_cast<int>(n.tokens), [&](int t) { moe_forward(n, w, kept, t, y); });
  return 0;
}

}  // namespace

// x, gate, up, down -> y
ENTRY(swiglu) {
  if (count != 5) return 2;
  return run_swiglu(shapes, params, out(params, 4), nullptr, nullptr);
}

// x, gate, up, down -> y, a, b
ENTRY(swiglu_kept) {
  if (count != 7) return 2;
  return run_swiglu(shapes, params, out(params, 4), out(params, 5), out(params, 6));
}

// x, gate, up, down, a, b, dy -> dx, dgate, dup, ddown
ENTRY(swiglu_backward) {
  if (count != 11) return 2;
  if (sgemm() == nullptr) return 1;
  const int64_t batch = shapes[0][1], width = shapes[0][2], inner = shapes[1][2], outputs = shapes[3][2];
  const int64_t one = width * inner, last = inner * outputs;
  Team::get().run(static_cast<int>(shapes[0][0]), [&](int t) {
    for (int64_t first = 0; first < batch; first += kBackwardRows) {
      const int64_t rows = std::min(kBackwardRows, batch - first), start = t * batch + first;
      swiglu_rows_backward(in(params, 0) + start * width, in(params, 6) + start * outputs, rows, width, inner, outputs,
                           {in(params, 1) + t * one, in(params, 2) + t * one, in(params, 3) + t * last}, nullptr,
                           in(params, 4) + start * inner, in(params, 5) + start * inner, first > 0,
                           {out(params, 8) + t * one, out(params, 9) + t * one, out(params, 10) + t * last}, nullptr,
                           false, out(params, 7) + start * width);
    }
  });
  return 0;
}

// x, router, shared gate, up, down, routed gate, up, down, sizes [A] (its length counts), alpha [1] -> y
ENTRY(sparse_experts) {
  if (count != 11) return 2;
  return run_moe(moe_sizes(shapes, shapes[8][0], in(params, 9)[0]), moe_weights(params),
                 {nullptr, nullptr, nullptr, nullptr}, out(params, 10));
}

// the same -> y, probabilities, chosen, a, b
ENTRY(sparse_experts_kept) {
  if (count != 15) return 2;
  return run_moe(moe_sizes(shapes, shapes[8][0], in(params, 9)[0]), moe_weights(params),
                 {out(params, 11), static_cast<int32_t *>(params[12]), out(params, 13), out(params, 14)},
                 out(params, 10));
}

// the same, probabilities, chosen, a, b, dy -> dx, drouter, dgate, dup, ddown of the shared, of the routed
ENTRY(sparse_experts_backward) {
  if (count != 23) return 2;
  if (sgemm() == nullptr) return 1;
  const MoeSizes n = moe_sizes(shapes, shapes[8][0], in(params, 9)[0]);
  const MoeWeights w = moe_weights(params);
  const MoeKept kept{out(params, 10), static_cast<int32_t *>(params[11]), out(params, 12), out(params, 13)};
  const MoeGradients d{out(params, 15), out(params, 16), {out(params, 17), out(params, 18), out(params, 19)},
                       {out(params, 20), out(params, 21), out(params, 22)}};
  Team::get().run(static_cast<int>(n.tokens), [&](int t) { moe_backward(n, w, kept, in(params, 14), d, t); });
  return 0;
}

// x, gamma, beta, epsilon [1] -> y
ENTRY(layer_norm) {
  if (count != 5) return 2;
  norm_forward<true>(in(params, 0), rows_of(dims[0], shapes[0]), shapes[1][0], in(params, 1), in(params, 2),
                     in(params, 3)[0], out(params, 4));
  return 0;
}

// x, gamma, epsilon [1], dy -> dx, dgamma, dbeta
ENTRY(layer_norm_backward) {
  if (count != 7) return 2;
  norm_backward<true>(in(params, 0), rows_of(dims[0], shapes[0]), shapes[1][0], in(params, 1), in(params, 2)[0],
                      in(params, 3), out(params, 4), out(params, 5), out(params, 6));
  return 0;
}

// x, gamma, epsilon [1] -> y
ENTRY(rms_norm) {
  if (count != 4) return 2;
  norm_forward<false>(in(params, 0), rows_of(dims[0], shapes[0]), shapes[1][0], in(params, 1), nullptr,
                      in(params, 2)[0], out(params, 3));
  return 0;
}

// x, gamma, epsilon [1], dy -> dx, dgamma
ENTRY(rms_norm_backward) {
  if (count != 6) return 2;
  norm_backward<false>(in(params, 0), rows_of(dims[0], shapes[0]), shapes[1][0], in(params, 1), in(params, 2)[0],
                       in(params, 3), out(params, 4), out(params, 5), nullptr);
  return 0;
}
