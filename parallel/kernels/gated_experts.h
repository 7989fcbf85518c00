// GELU experts with gates: the parts of a token's network see only the rows whose gates are open.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gelu_networks.h"
#include "row_products.h"
#include "rows.h"
#include "status.h"
#include "team.h"

namespace kernels {

// The rows of a block whose gate of an expert is not 0, where they begin in x, y and z, and where those of matrices that
// hold just them begin; where the rows of an expert's two weights begin.
struct OpenRows {
  std::vector<int64_t> index, x, y, z, own, first_weight, second_weight;

  void find(const GeluSizes& n, const float* gates, int64_t expert, int64_t rows) {
    index.clear(), x.clear(), y.clear(), z.clear();
    for (int64_t r = 0; r < rows; ++r)
      if (gates[r * n.experts + expert] != 0.0f)
        index.push_back(r), x.push_back(r * n.width), y.push_back(r * n.outputs), z.push_back(r * n.inner);
    steps(rows, n.part, own), steps(n.width, n.inner, first_weight), steps(n.part, n.outputs, second_weight);
  }
  int64_t count() const { return static_cast<int64_t>(index.size()); }

 private:
  static void steps(int64_t size, int64_t step, std::vector<int64_t>& at) {
    at.resize(size);
    for (int64_t i = 0; i < size; ++i) at[i] = i * step;
  }
};

inline OpenRows& own_open_rows() {
  thread_local OpenRows open;
  return open;
}

// Rows [first, first + rows) of token t. z: where x W1 + b1 is kept, [T, B, F], or null.
inline void gated_forward(const GeluSizes& n, const GeluWeights& w, int64_t t, int64_t first, int64_t rows,
                          float* z_out, float* y_out) {
  const int64_t start = t * n.batch + first;
  const float* gates = w.gates + start * n.experts;
  float *y = y_out + start * n.outputs, *z = z_out ? z_out + start * n.inner : nullptr;
  std::fill(y, y + rows * n.outputs, 0.0f);
  OpenRows& open = own_open_rows();
  for (int64_t e = 0; e < n.experts; ++e) {
    open.find(n, gates, e, rows);
    const int64_t count = open.count();
    const float *w1 = w.w1 + t * n.width * n.inner + e * n.part, *w2 = w.w2 + (t * n.inner + e * n.part) * n.outputs;
    const float *b1 = w.b1 + t * n.inner + e * n.part, *b2 = w.b2 + (t * n.experts + e) * n.outputs;
    float* inner = scratch<1>(count * n.part);
    const auto first_panel = [&](int64_t k, int64_t depth, int64_t column, int64_t width, float* panel) {
      pack_rows({w1 + column, open.first_weight.data() + k}, depth, width, panel);
    };
    const auto second_panel = [&](int64_t k, int64_t depth, int64_t column, int64_t width, float* panel) {
      pack_rows({w2 + column, open.second_weight.data() + k}, depth, width, panel);
    };
    multiply_rows<false>(count, n.part, n.width, {w.x + start * n.width, open.x.data()}, first_panel, false,
                         {inner, open.own.data()});
    for (int64_t i = 0; i < count; ++i) {
      const float gate = gates[open.index[i] * n.experts + e];
      gelu(b1, gate, n.part, inner + i * n.part, z ? z + open.z[i] + e * n.part : nullptr);
      float* own = y + open.y[i];
#pragma GCC ivdep
      for (int64_t o = 0; o < n.outputs; ++o) own[o] += gate * b2[o];
    }
    multiply_rows<false>(count, n.outputs, n.part, {inner, open.own.data()}, second_panel, true, {y, open.y.data()});
  }
}

// Expert e on rows of one block; `add`: whether its weights' gradients have begun. dx is added to.
inline void gated_backward(const GeluSizes& n, const GeluWeights& w, const float* z_all, const float* dy,
                           const GeluGradients& d, int64_t t, int64_t first, int64_t rows, int64_t e, bool add) {
  const int64_t start = t * n.batch + first, one = t * n.width * n.inner + e * n.part;
  const int64_t last = (t * n.inner + e * n.part) * n.outputs, biases = (t * n.experts + e) * n.outputs;
  const float *x = w.x + start * n.width, *change = dy + start * n.outputs, *gates = w.gates + start * n.experts + e;
  float *d_gates = d.gates + start * n.experts + e, *db1 = d.b1 + t * n.inner + e * n.part, *db2 = d.b2 + biases;
  if (!add) std::fill(db1, db1 + n.part, 0.0f), std::fill(db2, db2 + n.outputs, 0.0f);
  OpenRows& open = own_open_rows();
  open.find(n, w.gates + start * n.experts, e, rows);
  const int64_t count = open.count();
  float *h = scratch<1>(2 * count * n.part), *dz = h + count * n.part;
  const auto second_turned = [&](int64_t k, int64_t depth, int64_t column, int64_t width, float* panel) {
    pack_columns(w.w2 + last + column * n.outputs + k, n.outputs, depth, width, panel);
  };
  const auto first_turned = [&](int64_t k, int64_t depth, int64_t column, int64_t width, float* panel) {
    pack_columns(w.w1 + one + column * n.inner + k, n.inner, depth, width, panel);
  };
  const auto changes = [&](int64_t k, int64_t depth, int64_t column, int64_t width, float* panel) {
    pack_rows({change + column, open.y.data() + k}, depth, width, panel);
  };
  const auto inner_changes = [&](int64_t k, int64_t depth, int64_t column, int64_t width, float* panel) {
    pack_rows({dz + column, open.own.data() + k}, depth, width, panel);
  };
  multiply_rows<false>(count, n.part, n.outputs, {change, open.y.data()}, second_turned, false,
                       {dz, open.own.data()});
  for (int64_t i = 0; i < count; ++i) {
    const float gate = gates[open.index[i] * n.experts], *bias = w.b2 + biases, *own = change + open.y[i];
    const float* before = z_all + start * n.inner + open.z[i] + e * n.part;
    float sum = gelu_backward(before, n.part, gate, h + i * n.part, dz + i * n.part);
#pragma GCC ivdep
    for (int64_t o = 0; o < n.outputs; ++o) sum += bias[o] * own[o], db2[o] += gate * own[o];
    d_gates[open.index[i] * n.experts] = sum;
  }
  add_columns(dz, count, n.part, n.part, db1);
  multiply_rows<true>(n.part, n.outputs, count, {h, open.own.data()}, changes, add,
                      {d.w2 + last, open.second_weight.data()});
  multiply_rows<true>(n.width, n.part, count, {x, open.x.data()}, inner_changes, add,
                      {d.w1 + one, open.first_weight.data()});
  multiply_rows<false>(count, n.width, n.part, {dz, open.own.data()}, first_turned, true,
                       {d.x + start * n.width, open.x.data()});
}

inline int run_gated_forward(const GeluSizes& n, const GeluWeights& w, float* y, float* z) {
  const int64_t blocks = (n.batch + kExpertRows - 1) / kExpertRows;
  Team::get().run(static_cast<int>(n.tokens * blocks), [&](int block) {
    const int64_t first = block % blocks * kExpertRows;
    gated_forward(n, w, block / blocks, first, std::min(kExpertRows, n.batch - first), z, y);
  });
  return kDone;
}

inline int run_gated_backward(const GeluSizes& n, const GeluWeights& w, const float* z, const float* dy,
                              const GeluGradients& d) {
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
