// Norms over the last dim, and the sum of all squares.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "team.h"

namespace kernels {

constexpr int64_t kNormRows = 64;

// y = (x - mean) / sqrt(var + epsilon) * gamma + beta, or without the mean and beta.
template <bool kMean>
void norm_row(const float* x, int64_t width, float epsilon, float* mean, float* scale) {
  float sum = 0, squares = 0;
  if (kMean)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) sum += x[i];
  *mean = sum / width;
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) squares += (x[i] - *mean) * (x[i] - *mean);
  *scale = 1.0f / std::sqrt(squares / width + epsilon);
}

template <bool kMean>
void norm_forward(const float* x, int64_t rows, int64_t width, const float* gamma, const float* beta, float epsilon,
                  float* y) {
  const int64_t blocks = (rows + kNormRows - 1) / kNormRows;
  Team::get().run(static_cast<int>(blocks), [&](int block) {
    for (int64_t r = block * kNormRows; r < std::min(rows, (block + 1) * kNormRows); ++r) {
      const float* in = x + r * width;
      float *out = y + r * width, mean, scale;
      norm_row<kMean>(in, width, epsilon, &mean, &scale);
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) out[i] = (in[i] - mean) * scale * gamma[i] + (kMean ? beta[i] : 0.0f);
    }
  });
}

// The sums of dgamma and dbeta go block by block, so that the result does not depend on the number of threads.
template <bool kMean>
void norm_backward(const float* x, int64_t rows, int64_t width, const float* gamma, float epsilon, const float* dy,
                   float* dx, float* d_gamma, float* d_beta) {
  constexpr int64_t kRows = 4 * kNormRows;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  std::vector<float> partial(blocks * 2 * width, 0.0f);
  Team::get().run(static_cast<int>(blocks), [&](int block) {
    float *sum_gamma = partial.data() + block * 2 * width, *sum_beta = sum_gamma + width;
    for (int64_t r = block * kRows; r < std::min(rows, (block + 1) * kRows); ++r) {
      const float *in = x + r * width, *change = dy + r * width;
      float *out = dx + r * width, mean, scale, first = 0, second = 0;
      norm_row<kMean>(in, width, epsilon, &mean, &scale);
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) {
        const float normed = (in[i] - mean) * scale, inner = change[i] * gamma[i];
        first += inner, second += inner * normed;
        sum_gamma[i] += change[i] * normed;
        if (kMean) sum_beta[i] += change[i];
      }
      first = kMean ? first / width : 0.0f, second /= width;
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i)
        out[i] = (change[i] * gamma[i] - first - (in[i] - mean) * scale * second) * scale;
    }
  });
  std::fill(d_gamma, d_gamma + width, 0.0f);
  if (kMean) std::fill(d_beta, d_beta + width, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      d_gamma[i] += partial[block * 2 * width + i];
      if (kMean) d_beta[i] += partial[(block * 2 + 1) * width + i];
    }
}

// Sum over all of x^2: floats within a block, doubles over the blocks, in one order whatever the number of threads.
inline float sum_squares(const float* x, int64_t size) {
  constexpr int64_t kSize = 1 << 15;
  const int64_t blocks = (size + kSize - 1) / kSize;
  std::vector<float> partial(blocks);
  Team::get().run(static_cast<int>(blocks), [&](int block) {
    float sum = 0;
#pragma GCC ivdep
    for (int64_t i = block * kSize; i < std::min(size, (block + 1) * kSize); ++i) sum += x[i] * x[i];
    partial[block] = sum;
  });
  double total = 0;
  for (float sum : partial) total += sum;
  return static_cast<float>(total);
}

}  // namespace kernels
