// Products of rows with float32 or int8 weights in panels, in which no row's result depends on what other rows there
// are.
//
// For kernels that are built for the machine they run on. Panels are those of w8a16.cpp; every sum runs over the inputs
// in their order, kBlock of them at a time, whatever the number of rows.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "team.h"
#include "wide.h"

namespace kernels {

constexpr int kPanel = 32, kAhead = 2048;
constexpr int64_t kBlock = 128;  // inputs whose products are summed before they join the others, as in w8a16.cpp

#if defined(__AVX512F__)
constexpr int kLanes = 16, kMostRows = 12;
typedef float Vector __attribute__((vector_size(64), aligned(4)));
INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Vector widen(const int8_t* w) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8, kMostRows = 6;
typedef float Vector __attribute__((vector_size(32), aligned(4)));
INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vector widen(const int8_t* w) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
}
#else
constexpr int kLanes = 4, kMostRows = 6;
typedef float Vector __attribute__((vector_size(16), aligned(4)));
INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
INLINE Vector widen(const int8_t* w) {
  return Vector{static_cast<float>(w[0]), static_cast<float>(w[1]), static_cast<float>(w[2]), static_cast<float>(w[3])};
}
#endif
INLINE Vector widen(const float* w) { return *reinterpret_cast<const Vector*>(w); }

#include "panel_tile.inc"

// Weights [O, K] as panels [ceil(O / kPanel), K, kPanel] of float or int8; scale [G, panels * kPanel] of int8.
struct Matrix {
  const void* panels;
  const float *scale, *bias;
  int64_t inputs, outputs, groups;
  int64_t count() const { return (outputs + kPanel - 1) / kPanel; }
};

// Rows of the tile that begins at `row`: as few tiles as possible, of nearly equal size.
inline int64_t tile_rows(int64_t row, int64_t rows) {
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows, small = rows / tiles, large = rows % tiles;
  return row < large * (small + 1) ? small + 1 : small;
}

// Rows of x [N, K] in tiles, each [K][rows of the tile].
class Packed {
 public:
  void pack(const float* x, int64_t rows, int64_t inputs) {
    rows_ = rows;
    if (rows == 1) {
      data_ = x;
      return;
    }
    if (static_cast<int64_t>(memory_.size()) < rows * inputs) memory_.resize(rows * inputs);
    data_ = memory_.data();
    float* to = memory_.data();
    std::vector<int64_t> begins;
    for (int64_t row = 0; row < rows; row += tile_rows(row, rows)) begins.push_back(row);
    Team::get().run(rows * inputs < 16384 ? 1 : static_cast<int>(begins.size()), [&](int first) {
      const size_t step = rows * inputs < 16384 ? begins.size() : 1;
      for (size_t i = first * step; i < (first + 1) * step; ++i) {
        const int64_t row = begins[i], count = tile_rows(row, rows);
        float* tile = to + row * inputs;
        for (int64_t k = 0; k < inputs; ++k)
          for (int64_t r = 0; r < count; ++r) tile[k * count + r] = x[(row + r) * inputs + k];
      }
    });
  }
  const float* data() const { return data_; }
  int64_t rows() const { return rows_; }

 private:
  std::vector<float> memory_;
  const float* data_ = nullptr;
  int64_t rows_ = 0;
};

inline float* scratch_of(int64_t floats) {
  thread_local std::unique_ptr<float[]> scratch;
  thread_local int64_t size = 0;
  if (size < floats) scratch.reset(new float[floats]), size = floats;
  return scratch.get();
}

template <int R, int P, typename W>
void add_rows(int64_t count, const float* x, const W* w, int64_t step, int64_t depth, const float* scale, float* y,
              int64_t y_step) {
  if constexpr (R > 1) {
    if (count < R) return add_rows<R - 1, P>(count, x, w, step, depth, scale, y, y_step);
  }
  for (int column = 0; column < kPanel; column += 2 * kLanes)
    add_tile<R, 1, P>(x, w + column, step, depth, scale + column, y + column, y_step);
}

// sums [panels][N][kPanel] of x times `panels` panels from `first` on. One row alone takes four panels at once, two or
// three rows two: their chains of additions are what the processor would wait for.
template <typename W>
void sum_panels(const Matrix& m, const Packed& x, int64_t first, int64_t panels, float* sums) {
  const int64_t rows = x.rows(), step = m.inputs * kPanel, size = rows * kPanel;
  std::fill(sums, sums + panels * size, 0.0f);
  for (int64_t begin = 0; begin < m.inputs; begin += kBlock) {
    const int64_t depth = std::min(kBlock, m.inputs - begin);
    const W* w = static_cast<const W*>(m.panels) + first * step + begin * kPanel;
    const float* scale = nullptr;
    if (sizeof(W) == 1) scale = m.scale + ((m.groups > 1 ? begin / kBlock : 0) * m.count() + first) * kPanel;
    for (int64_t row = 0, count; row < rows; row += count) {
      count = tile_rows(row, rows);
      const float* from = x.data() + row * m.inputs + begin * count;
      float* to = sums + row * kPanel;
      int64_t p = 0;
      if (count == 1)
        for (; p + 4 <= panels; p += 4)
          add_rows<1, 4>(count, from, w + p * step, step, depth, scale + p * kPanel, to + p * size, size);
      if (count <= 3)
        for (; p + 2 <= panels; p += 2)
          add_rows<3, 2>(count, from, w + p * step, step, depth, scale + p * kPanel, to + p * size, size);
      for (; p < panels; ++p)
        add_rows<kMostRows, 1>(count, from, w + p * step, step, depth, scale + p * kPanel, to + p * size, size);
    }
  }
}

// put(which, row, column, width, values) for all rows and panels of `count` matrices, x[which] times matrices[which];
// the bias is in the values, which may be written, and whose array goes on for a whole panel.
template <typename Put>
void multiply(const Matrix* const* matrices, const Packed* const* x, int count, const Put& put) {
  int64_t all = 0;
  for (int i = 0; i < count; ++i) all += matrices[i]->count();
  const int64_t wanted = x[0]->rows() == 1 ? 4 : x[0]->rows() <= 3 ? 2 : 1;
  const int64_t together = std::max<int64_t>(1, std::min(wanted, all / (2 * Team::get().size())));
  std::vector<int64_t> starts(count + 1, 0);
  for (int i = 0; i < count; ++i) starts[i + 1] = starts[i] + (matrices[i]->count() + together - 1) / together;
  Team::get().run(static_cast<int>(starts[count]), [&](int item) {
    int which = 0;
    while (item >= starts[which + 1]) ++which;
    const Matrix& m = *matrices[which];
    const int64_t first = (item - starts[which]) * together, panels = std::min(together, m.count() - first);
    const int64_t rows = x[which]->rows();
    float* sums = scratch_of(panels * rows * kPanel);
    if (m.scale)
      sum_panels<int8_t>(m, *x[which], first, panels, sums);
    else
      sum_panels<float>(m, *x[which], first, panels, sums);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = (first + p) * kPanel, width = std::min<int64_t>(kPanel, m.outputs - column);
      for (int64_t row = 0; row < rows; ++row) {
        float* values = sums + (p * rows + row) * kPanel;
        for (int64_t i = 0; m.bias && i < width; ++i) values[i] += m.bias[column + i];
        put(which, row, column, width, values);
      }
    }
  });
}

template <typename Put>
void multiply(const Matrix& matrix, const Packed& x, const Put& put) {
  const Matrix* matrices[] = {&matrix};
  const Packed* inputs[] = {&x};
  multiply(matrices, inputs, 1,
           [&](int, int64_t row, int64_t column, int64_t width, float* values) { put(row, column, width, values); });
}

}  // namespace kernels
