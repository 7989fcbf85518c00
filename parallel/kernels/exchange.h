// Token mixing and residuals: kernels that stay on the `Team`, where MindSpore's would wake its own threads between
// ours.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "team.h"

namespace kernels {

// y [R, B, S, K] = x [S, B, R, K] with the roles of S and R exchanged.
inline void exchange(const float* x, int64_t sources, int64_t batch, int64_t targets, int64_t piece, float* y) {
  constexpr int64_t kRows = 128;
  const int64_t blocks = (batch + kRows - 1) / kRows;
  Team::get().run(static_cast<int>(targets * blocks), [=](int block) {
    const int64_t r = block / blocks, first = block % blocks * kRows, last = std::min(batch, first + kRows);
    for (int64_t b = first; b < last; ++b)
      for (int64_t s = 0; s < sources; ++s)
        std::memcpy(y + ((r * batch + b) * sources + s) * piece, x + ((s * batch + b) * targets + r) * piece,
                    piece * sizeof(float));
  });
}

inline void add(const float* x, const float* y, int64_t size, float* sum) {
  constexpr int64_t kSize = 1 << 15;
  Team::get().run(static_cast<int>((size + kSize - 1) / kSize), [=](int block) {
    const int64_t last = std::min(size, (block + int64_t{1}) * kSize);
#pragma GCC ivdep
    for (int64_t i = block * kSize; i < last; ++i) sum[i] = x[i] + y[i];
  });
}

}  // namespace kernels
