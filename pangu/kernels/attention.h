// The model in memory, and attention over a cache of blocks. Shapes: see paged.cpp.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "panel_product.h"

namespace kernels {

constexpr int kSlots = kWide;  // tokens of a block of the cache
constexpr int kQueries = 4;    // tokens of a sequence whose attention is computed together

enum Gelu : int64_t { kTanh, kFast, kErf };

struct Norm {
  const float *gamma, *beta;
};

struct Layer {
  Norm norm1, norm2;
  Matrix query, key, value, output, mapping, projection;
  float *keys, *values;  // [blocks, H, K, S] and [blocks, H, S, K padded to whole vectors]
};

struct Model {
  int64_t width, heads, head_width, inner, vocabulary, positions, blocks;
  Gelu gelu;
  bool norm_first;
  Matrix words;
  const float *places, *queries;  // [positions, D]
  Norm norm;
  std::vector<Layer> layers;
  int64_t padded() const { return (head_width + kWide - 1) / kWide * kWide; }
};

// New tokens of one sequence that lie side by side in the call.
struct Span {
  int64_t first, start, count,
      outputs;  // its first token in the call, that one's position, tokens, of those with logits
  const int32_t* table;
};

// score[t][slot] = q[t] k[slot] for B blocks from `block` on.
template <int T, int B>
INLINE void score_blocks(const Model& m, const Layer& layer, int64_t head, const int32_t* table, int64_t block,
                         const float* q, float* score, int64_t stride) {
  const float* k[B];
  for (int b = 0; b < B; ++b) k[b] = layer.keys + (table[block + b] * m.heads + head) * m.head_width * kSlots;
  Wide sums[T][B] = {};
  for (int64_t d = 0; d < m.head_width; ++d)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const Wide key = load(k[b] + d * kSlots);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sums[t][b] = fused(Wide{} + q[t * m.head_width + d], key, sums[t][b]);
    }
  for (int t = 0; t < T; ++t)
    for (int b = 0; b < B; ++b) store(score + t * stride + (block + b) * kSlots, sums[t][b]);
}

// Scores of `seen` slots to weights that add up to the number returned; those behind them get 0.
inline float soften(float* score, int64_t seen, int64_t stride) {
  const int64_t blocks = (seen + kSlots - 1) / kSlots;
  for (int64_t slot = seen; slot < blocks * kSlots; ++slot) score[slot] = -std::numeric_limits<float>::infinity();
  Wide most = load(score);
  for (int64_t b = 1; b < blocks; ++b) {
    const Wide next = load(score + b * kSlots);
    most = next > most ? next : most;
  }
  const float top = largest(most);
  Wide sums{};
  for (int64_t b = 0; b < blocks; ++b) {
    float* at = score + b * kSlots;
    Wide weight = exponential(load(at) - top);
    if (b == blocks - 1)
      for (int64_t slot = seen - b * kSlots; slot < kSlots; ++slot) weight[slot] = 0.0f;
    store(at, weight);
    sums += weight;
  }
  std::fill(score + blocks * kSlots, score + stride, 0.0f);
  return total(sums);
}

// y[t][0 .. W vectors) = sum over slots of weight[t][slot] v[slot].
template <int T, int W>
INLINE void mix_strip(const Model& m, const Layer& layer, int64_t head, const int32_t* table, int64_t seen,
                      const float* weight, int64_t stride, int64_t begin, float* y) {
  const int64_t padded = m.padded();
  Wide sums[T][W] = {};
  for (int64_t slot = 0; slot < seen; ++slot) {
    const float* v = layer.values + ((table[slot / kSlots] * m.heads + head) * kSlots + slot % kSlots) * padded + begin;
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      const Wide value = load(v + w * kWide);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sums[t][w] = fused(Wide{} + weight[t * stride + slot], value, sums[t][w]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int w = 0; w < W; ++w) store(y + t * padded + begin + w * kWide, sums[t][w]);
}

// softmax(q k^T / sqrt(K)) v for T tokens at `position` and on; q and mixed [T, D] at this head.
template <int T>
void attend(const Model& m, const Layer& layer, int64_t head, const int32_t* table, int64_t position,
            const float* query, float* mixed) {
  const int64_t seen = position + T, blocks = (seen + kSlots - 1) / kSlots, stride = blocks * kSlots;
  const int64_t padded = m.padded(), width = m.head_width;
  float *score = scratch_of(T * (stride + width + padded)), *q = score + T * stride, *y = q + T * width;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  for (int t = 0; t < T; ++t)
    for (int64_t d = 0; d < width; ++d) q[t * width + d] = query[t * m.width + d] * scale;
  int64_t block = 0;
  for (; block + 4 <= blocks; block += 4) score_blocks<T, 4>(m, layer, head, table, block, q, score, stride);
  for (; block < blocks; ++block) score_blocks<T, 1>(m, layer, head, table, block, q, score, stride);
  float sums[T];
  for (int t = 0; t < T; ++t) sums[t] = soften(score + t * stride, position + t + 1, stride);
  int64_t begin = 0;
  for (; begin + 4 * kWide <= padded; begin += 4 * kWide)
    mix_strip<T, 4>(m, layer, head, table, seen, score, stride, begin, y);
  for (; begin < padded; begin += kWide) mix_strip<T, 1>(m, layer, head, table, seen, score, stride, begin, y);
  for (int t = 0; t < T; ++t)
    for (int64_t d = 0; d < width; ++d) mixed[t * m.width + d] = y[t * padded + d] / sums[t];
}

inline void attend_all(const Model& m, const Layer& layer, const std::vector<Span>& spans, const float* query,
                       float* mixed) {
  struct Piece {
    const int32_t* table;
    int64_t first, position, count;
  };
  std::vector<Piece> pieces;
  for (const Span& span : spans)
    for (int64_t i = 0; i < span.count; i += kQueries)
      pieces.push_back({span.table, span.first + i, span.start + i, std::min<int64_t>(kQueries, span.count - i)});
  Team::get().run(static_cast<int>(pieces.size() * m.heads), [&](int item) {
    const Piece& piece = pieces[item / m.heads];
    const int64_t head = item % m.heads, place = piece.first * m.width + head * m.head_width;
    switch (piece.count) {
      case 4:
        return attend<4>(m, layer, head, piece.table, piece.position, query + place, mixed + place);
      case 3:
        return attend<3>(m, layer, head, piece.table, piece.position, query + place, mixed + place);
      case 2:
        return attend<2>(m, layer, head, piece.table, piece.position, query + place, mixed + place);
      default:
        return attend<1>(m, layer, head, piece.table, piece.position, query + place, mixed + place);
    }
  });
}

}  // namespace kernels
