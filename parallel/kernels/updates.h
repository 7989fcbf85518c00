// Updates of parameters in place.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "team.h"

namespace kernels {

struct AdamScalars {
  float rate, beta1, beta2, epsilon, decay;
};

// m and v move towards the gradient, p against m / (sqrt(v) + epsilon) + decay p: one pass over all four.
inline void adam_update(float* p, float* m, float* v, const float* gradient, int64_t size, const AdamScalars& s) {
  constexpr int64_t kSize = 1 << 14;
  Team::get().run(static_cast<int>((size + kSize - 1) / kSize), [=](int block) {
    const int64_t last = std::min(size, (block + int64_t{1}) * kSize);
#pragma GCC ivdep
    for (int64_t i = block * kSize; i < last; ++i) {
      const float g = gradient[i];
      m[i] = s.beta1 * m[i] + (1.0f - s.beta1) * g;
      v[i] = s.beta2 * v[i] + (1.0f - s.beta2) * g * g;
      p[i] -= s.rate * (m[i] / (std::sqrt(v[i]) + s.epsilon) + s.decay * p[i]);
    }
  });
}

}  // namespace kernels
