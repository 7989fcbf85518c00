// Drawing the next token from a row of logits: pangu/generation/sampling.py, weight for weight in float32.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "wide.h"

namespace kernels {

// How a token is drawn: see `SamplingRule`. Temperature 0 takes the largest logit.
struct Rule {
  float temperature;
  int64_t top_k;
  double top_p, uniform;
};

constexpr int64_t kHead = 512;  // sorting so many is nearly always enough for a cut by probability

// The `count` tokens of largest weight, largest first, equal ones by id.
inline std::vector<int32_t> heaviest(const float* weight, int64_t size, int64_t count) {
  const auto before = [=](int32_t a, int32_t b) { return weight[a] > weight[b] || (weight[a] == weight[b] && a < b); };
  std::vector<int32_t> found(count);
  if (count > size / 8) {
    found.resize(size);
    std::iota(found.begin(), found.end(), 0);
    std::sort(found.begin(), found.end(), before);
    found.resize(count);
    return found;
  }
  std::iota(found.begin(), found.end(), 0);
  std::make_heap(found.begin(), found.end(), before);  // the last one of them on top
  for (int64_t i = count; i < size; ++i) {
    if (!(weight[i] > weight[found.front()])) continue;
    std::pop_heap(found.begin(), found.end(), before);
    found.back() = static_cast<int32_t>(i);
    std::push_heap(found.begin(), found.end(), before);
  }
  std::sort_heap(found.begin(), found.end(), before);
  return found;
}

inline double sum_of(const float* weight, const std::vector<int32_t>& tokens) {
  double sum = 0;
  for (int32_t token : tokens) sum += weight[token];
  return sum;
}

// weight = exp((logits - largest) / temperature), in place, with room for whole vectors; their sum.
inline double weigh(float* x, int64_t size, float temperature) {
  const float most = x[first_largest(x, size)];
  for (int64_t i = size; i % kWide != 0; ++i) x[i] = most;
  double sum = 0;
  for (int64_t i = 0; i < size; i += kWide) {
    Wide weight = exponential((load(x + i) - most) / temperature);
    for (int64_t j = size; j < i + kWide; ++j) weight[j - i] = 0.0f;
    store(x + i, weight);
    sum += total(weight);
  }
  return sum;
}

// The first token, in the order of their ids, up to which the weights exceed `target`.
inline int32_t draw_any(const float* weight, int64_t size, double target) {
  double sum = 0;
  for (int64_t i = 0; i < size; i += kWide) {
    const double next = sum + total(load(weight + i));
    if (next > target || i + kWide >= size) {
      for (int64_t j = i; j < std::min(size, i + kWide); ++j)
        if ((sum += weight[j]) > target) return static_cast<int32_t>(j);
    }
    sum = next;
  }
  return static_cast<int32_t>(size - 1);
}

// x: logits after biases and penalties, which are overwritten; room for whole vectors.
inline int32_t choose(float* x, int64_t size, const Rule& rule) {
  if (rule.temperature == 0.0f || rule.top_k == 1) return first_largest(x, size);
  double sum = weigh(x, size, rule.temperature);
  const bool few = rule.top_k > 0 && rule.top_k < size;
  if (!few && rule.top_p >= 1.0) return draw_any(x, size, rule.uniform * sum);
  std::vector<int32_t> tokens = heaviest(x, size, few ? rule.top_k : std::min(kHead, size));
  if (few) sum = sum_of(x, tokens);
  if (rule.top_p < 1.0) {
    const double enough = sum * rule.top_p;
    while (static_cast<int64_t>(tokens.size()) < size && !few && sum_of(x, tokens) < enough)
      tokens = heaviest(x, size, std::min<int64_t>(8 * tokens.size(), size));
    double reached = 0;
    size_t kept = 0;
    while (kept < tokens.size() && reached < enough) reached += x[tokens[kept++]];
    tokens.resize(std::max<size_t>(kept, 1));
    sum = sum_of(x, tokens);
  }
  const double target = rule.uniform * sum;
  double reached = 0;
  for (int32_t token : tokens)
    if ((reached += x[token]) > target) return token;
  return tokens.back();
}

}  // namespace kernels
