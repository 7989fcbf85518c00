// A linear layer with weights for each token. Shapes: see entries.cpp.

#pragma once

#include <algorithm>
#include <cstdint>

#include "products.h"
#include "rows.h"
#include "team.h"

namespace kernels {

struct LinearSizes {
  int64_t tokens, batch, inputs, outputs;
};

// y [T, B, O] = x [T, B, I] w [T, I, O] + b [T, 1, O]; b may be null.
inline void linear_forward(const LinearSizes& n, const float* x, const float* w, const float* b, float* y) {
  const int64_t blocks = (n.batch + kBackwardRows - 1) / kBackwardRows;
  Team::get().run(static_cast<int>(n.tokens * blocks), [&](int block) {
    const int64_t t = block / blocks, first = block % blocks * kBackwardRows;
    const int64_t rows = std::min(kBackwardRows, n.batch - first), start = t * n.batch + first;
    float* own = y + start * n.outputs;
    multiply(false, false, rows, n.outputs, n.inputs, {x + start * n.inputs, n.inputs},
             {w + t * n.inputs * n.outputs, n.outputs}, false, own, n.outputs);
    for (int64_t r = 0; b && r < rows; ++r)
#pragma GCC ivdep
      for (int64_t i = 0; i < n.outputs; ++i) own[r * n.outputs + i] += b[t * n.outputs + i];
  });
}

inline void linear_gradients(const LinearSizes& n, const float* x, const float* w, const float* dy, float* dx,
                             float* dw, float* db) {
  Team::get().run(static_cast<int>(n.tokens), [&](int t) {
    const Matrix input{x + t * n.batch * n.inputs, n.inputs}, change{dy + t * n.batch * n.outputs, n.outputs};
    multiply(false, true, n.batch, n.inputs, n.outputs, change, {w + t * n.inputs * n.outputs, n.outputs}, false,
             dx + t * n.batch * n.inputs, n.inputs);
    multiply(true, false, n.inputs, n.outputs, n.batch, input, change, false, dw + t * n.inputs * n.outputs, n.outputs);
    if (db == nullptr) return;
    std::fill(db + t * n.outputs, db + (t + 1) * n.outputs, 0.0f);
    add_columns(change.data, n.batch, n.outputs, n.outputs, db + t * n.outputs);
  });
}

}  // namespace kernels
