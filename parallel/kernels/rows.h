// Blocks of rows: what the kernels of the per-token networks share.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace kernels {

// Rows of a block; of those an expert sees only its share, so there the blocks are larger.
constexpr int64_t kForwardRows = 128, kBackwardRows = 256, kExpertRows = 1024;

// Buffers of a thread that outlive the call.
template <int kWhich>
float* scratch(int64_t size) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

inline void add_columns(const float* x, int64_t rows, int64_t width, int64_t stride, float* sums) {
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) sums[i] += x[r * stride + i];
}

// Rows `index` of x, one after the other.
inline void take_rows(const float* x, int64_t width, const std::vector<int64_t>& index, float* taken) {
  for (size_t r = 0; r < index.size(); ++r) std::memcpy(taken + r * width, x + index[r] * width, width * sizeof(float));
}

inline void add_rows(const float* taken, int64_t width, const std::vector<int64_t>& index, float* x) {
  for (size_t r = 0; r < index.size(); ++r) {
    float* to = x + index[r] * width;
    const float* from = taken + r * width;
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) to[i] += from[i];
  }
}

// 1 / (1 + exp(-x)). Bounded, since -ffast-math knows no infinity; beyond the bound nothing changes in float.
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(std::min(-x, 80.0f))); }

// sigmoid(x) and 1 - sigmoid(x). The second is no difference: a quotient of -ffast-math may be 1 - 6e-8 where it is 1
// in float, which a derivative then multiplies by powers of x.
struct Sigmoids {
  float open, closed;
};
inline Sigmoids sigmoids(float x) {
  const float e = std::exp(std::min(-x, 80.0f)), open = 1.0f / (1.0f + e);
  return {open, e * open};
}

}  // namespace kernels
