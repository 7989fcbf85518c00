// Products of rows that lie anywhere in memory, for experts that see only the rows that chose them: no row is copied
// to where a product wants it, and results go straight to their own rows.
//
// A tile of kTileRows rows of the result and kTileColumns columns stays in registers while the sums run in the order
// of the depth, kDepth at a time.

#pragma once

#include <algorithm>
#include <cstdint>

#include "products.h"
#include "rows.h"

#ifndef INLINE
#define INLINE static inline __attribute__((always_inline))
#endif

namespace kernels {

#if defined(__AVX512F__)
constexpr int kTileLanes = 16, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileLanes = 8, kTileVectors = 2;
#else
constexpr int kTileLanes = 4, kTileVectors = 4;
#endif
constexpr int kTileRows = 6, kTileColumns = kTileLanes * kTileVectors;
// A panel of kDepth weights by kTileColumns stays in the first-level cache, kGroup columns of them in the second, and
// kBlockRows rows of a result are written before the next ones, since lines far apart are slow to reach in memory.
constexpr int64_t kDepth = 256, kGroup = 256, kBlockRows = 24;
typedef float Lanes __attribute__((vector_size(kTileLanes * 4), aligned(4)));

// Row r begins at data + at[r].
struct Rows {
  const float* data;
  const int64_t* at;
};

struct RowsOut {
  float* data;
  const int64_t* at;
};

// The sums of a tile: over k of element k of row r times panel[k][..].
template <int R>
INLINE void sum_tile(const Rows& a, int64_t depth, const float* panel, Lanes (&sums)[R][kTileVectors]) {
  const float* row[R];
  for (int r = 0; r < R; ++r) row[r] = a.data + a.at[r];
  for (int64_t k = 0; k < depth; ++k, panel += kTileColumns) {
    Lanes weight[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) weight[v] = *reinterpret_cast<const Lanes*>(panel + v * kTileLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Lanes value = Lanes{} + row[r][k];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] += value * weight[v];
    }
  }
}

// Puts or adds a tile's sums to `width` columns of its rows.
template <int R>
void make_tile(int64_t rows, const Rows& a, int64_t depth, const float* panel, bool add, int64_t width,
               const RowsOut& c) {
  if constexpr (R > 1) {
    if (rows < R) return make_tile<R - 1>(rows, a, depth, panel, add, width, c);
  }
  Lanes sums[R][kTileVectors] = {};
  sum_tile<R>(a, depth, panel, sums);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    float* to = c.data + c.at[r];
    if (width == kTileColumns) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        Lanes& place = *reinterpret_cast<Lanes*>(to + v * kTileLanes);
        place = add ? place + sums[r][v] : sums[r][v];
      }
      continue;
    }
    const float* from = reinterpret_cast<const float*>(sums[r]);
    for (int64_t i = 0; i < width; ++i) to[i] = add ? to[i] + from[i] : from[i];
  }
}

// Panels [depth][kTileColumns], one after the other, of `width` columns of the rows of b; further columns are 0.
inline void pack_rows(const Matrix& b, int64_t depth, int64_t width, float* panels) {
  for (int64_t k = 0; k < depth; ++k) {
    const float* from = b.data + k * b.stride;
    float* to = panels + k * kTileColumns;
    int64_t column = 0;
    for (; column + kTileColumns <= width; column += kTileColumns, to += depth * kTileColumns)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v)
        *reinterpret_cast<Lanes*>(to + v * kTileLanes) =
            *reinterpret_cast<const Lanes*>(from + column + v * kTileLanes);
    if (column < width) std::fill(std::copy(from + column, from + width, to), to + kTileColumns, 0.0f);
  }
}

// Rows of c [rows, columns] = rows of a [rows, depth] times b (+ c if `add`).
inline void multiply_rows(int64_t rows, int64_t columns, int64_t depth, const Rows& a, const Matrix& b, bool add,
                          const RowsOut& c) {
  float* panels = scratch<7>(kDepth * kGroup);
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t deep = std::min(kDepth, depth - k);
    for (int64_t group = 0; rows > 0 && group < columns; group += kGroup) {
      const int64_t end = std::min(group + kGroup, columns);
      pack_rows({b.data + k * b.stride + group, b.stride}, deep, end - group, panels);
      for (int64_t block = 0; block < rows; block += kBlockRows) {
        const int64_t last = std::min(rows, block + kBlockRows);
        for (int64_t column = group; column < end; column += kTileColumns) {
          const float* panel = panels + (column - group) * deep;
          const int64_t width = std::min<int64_t>(kTileColumns, end - column);
          for (int64_t r = block; r < last; r += kTileRows)
            make_tile<kTileRows>(last - r, {a.data + k, a.at + r}, deep, panel, add || k > 0, width,
                                 {c.data + column, c.at + r});
        }
      }
    }
  }
}

}  // namespace kernels
