// The product of a few rows with a panel of int8 weights; included once for every instruction set, after panel_tile.h.
//
// Few rows: the weights are widened to float32 in registers, by units that the multiplications leave idle. Many rows
// (`Problem::wide`): a block of some panels is widened once, scaled, into a second-level cache's worth of memory, and
// oneDNN multiplies with it.

// A tile of `count` rows against all columns of the panel.
template <int R>
static void add_rows(int count, const float* x, const int8_t* w, int64_t depth, const float* scale, float* y) {
  if constexpr (R > 1) {
    if (count < R) return add_rows<R - 1>(count, x, w, depth, scale, y);
  }
  constexpr int kParts = R == 1 ? 4 : R <= 3 ? 2 : 1;
  for (int column = 0; column < kPanel; column += 2 * kLanes)
    add_tile<R, kParts, 1>(x, w + column, 0, depth, scale + column, y + column, 0);
}

// sums [rows][kPanel] of one block of K; x is packed in tiles, each [K][rows of the tile].
static void add_block(const float* x, int64_t rows, int64_t inputs, int64_t begin, const int8_t* w, int64_t depth,
                      const float* scale, float* sums) {
  for (int64_t row = 0, count; row < rows; row += count) {
    count = tile_rows(row, rows, kMostRows);
    add_rows<kMostRows>(static_cast<int>(count), x + row * inputs + begin * count, w, depth, scale,
                        sums + row * kPanel);
  }
}

// sums [panels][rows][kPanel] = columns of x w for `panels` panels from the first one on, one matrix or two side by
// side: they read the same block of x while it is in the cache.
static void sum_panels(const Problem* problems, int count, int64_t first, int64_t panels, float* sums) {
  const int64_t rows = problems->rows, inputs = problems->inputs, size = rows * panels * kPanel;
  for (int64_t i = 0; i < count * size; ++i) sums[i] = 0.0f;
  for (int64_t begin = 0; begin < inputs; begin += kBlock) {
    const int64_t depth = inputs - begin < kBlock ? inputs - begin : kBlock;
    for (int which = 0; which < count; ++which)
      for (int64_t panel = 0; panel < panels; ++panel) {
        float scale[kPanel] = {};
        problems[which].scales_of(begin, first + panel, scale);
        const int8_t* w = problems[which].weight + ((first + panel) * inputs + begin) * kPanel;
        add_block(problems->packed, rows, inputs, begin, w, depth, scale, sums + which * size + panel * rows * kPanel);
      }
  }
}

// to [depth][panels * kPanel + kGap] = q s of panels from the first one on, inputs from `begin` on.
static void widen_block(const Problem& problem, int64_t first, int64_t panels, int64_t begin, int64_t depth,
                        float* to) {
  const int64_t stride = panels * kPanel + kGap;
  float scale[kWidePanels * kPanel] = {};
  for (int64_t k = 0; k < depth; ++k, to += stride) {
    if (k % kBlock == 0)
      for (int64_t panel = 0; panel < panels; ++panel)
        problem.scales_of(begin + k, first + panel, scale + panel * kPanel);
    const int8_t* w = problem.weight + (first * problem.inputs + begin + k) * kPanel;
    for (int64_t panel = 0; panel < panels; ++panel, w += problem.inputs * kPanel) {
      __builtin_prefetch(w + kAhead, 0, 1);
#pragma GCC unroll 8
      for (int i = 0; i < kPanel; i += kLanes)
        *reinterpret_cast<Vector*>(to + panel * kPanel + i) =
            widen(w + i) * *reinterpret_cast<const Vector*>(scale + panel * kPanel + i);
    }
  }
}

// y [rows][stride] = columns of x w for panels from the first one on; `width` of them exist.
static void multiply_wide(const Problem& problem, int64_t first, int64_t panels, int64_t width, float* widened,
                          float* y, int64_t stride) {
  for (int64_t begin = 0; begin < problem.inputs; begin += kDeep) {
    const int64_t depth = problem.inputs - begin < kDeep ? problem.inputs - begin : kDeep;
    widen_block(problem, first, panels, begin, depth, widened);
    ::multiply(false, false, problem.rows, width, depth, {problem.packed + begin, problem.inputs},
               {widened, panels * kPanel + kGap}, begin > 0, y, stride);
  }
}

// `sums` has room for rows * panels * kPanel, and for the widened block after it.
static void multiply(const Problem& problem, int64_t first, int64_t panels, float* sums) {
  const int64_t rows = problem.rows;
  if (problem.wide) {
    const int64_t begin = first * kPanel, width = std::min(panels * kPanel, problem.outputs - begin);
    float* widened = sums + rows * panels * kPanel;
    if (!problem.half)
      return multiply_wide(problem, first, panels, width, widened, static_cast<float*>(problem.y) + begin,
                           problem.outputs);
    multiply_wide(problem, first, panels, width, widened, sums, width);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < width; ++i)
        static_cast<Half*>(problem.y)[row * problem.outputs + begin + i] = static_cast<Half>(sums[row * width + i]);
    return;
  }
  sum_panels(&problem, 1, first, panels, sums);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t column = (first + panel) * kPanel;
    const int64_t width = problem.outputs - column < kPanel ? problem.outputs - column : kPanel;
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = sums + (panel * rows + row) * kPanel;
      const int64_t to = row * problem.outputs + column;
      if (problem.half)
        for (int64_t i = 0; i < width; ++i) static_cast<Half*>(problem.y)[to + i] = static_cast<Half>(from[i]);
      else
        for (int64_t i = 0; i < width; ++i) static_cast<float*>(problem.y)[to + i] = from[i];
    }
  }
}

// 1 / (1 + e^-x): 2^t as 2^round(t) times the series of the rest, 1e-7 relative.
INLINE Vector sigmoid(Vector x) {
  Vector t = x * -1.44269504089f;
  t = t < -126.0f ? Vector{} - 126.0f : t;
  t = t > 126.0f ? Vector{} + 126.0f : t;
  const Vector whole = (t + 12582912.0f) - 12582912.0f, f = t - whole;
  Vector power = f * 1.5403530e-4f + 1.3333558e-3f;
  power = power * f + 9.6181291e-3f;
  power = power * f + 5.5504109e-2f;
  power = power * f + 2.4022651e-1f;
  power = power * f + 6.9314718e-1f;
  power = power * f + 1.0f;
  const Integers exponent = (__builtin_convertvector(whole, Integers) + 127) << 23;
  return 1.0f / (1.0f + power * (Vector)exponent);
}

// As `gate_and_up`, for many rows, whose inner rows lie [rows][inner].
static void gate_and_up_wide(const Gated& gated, int64_t first, int64_t panels, float* sums) {
  const int64_t rows = gated.first[0].rows, inner = gated.first[0].outputs, column = first * kPanel;
  const int64_t width = std::min(panels * kPanel, inner - column), size = rows * panels * kPanel;
  for (int which = 0; which < 2; ++which)
    multiply_wide(gated.first[which], first, panels, width, sums + 2 * size, sums + which * size, panels * kPanel);
  for (int64_t row = 0; row < rows; ++row) {
    float *gate = sums + row * panels * kPanel, *up = gate + size;
    if (gated.added) {
      const int64_t from = gated.added > 1 ? (gated.row + row) * inner + column : column;
      for (int64_t i = 0; i < width; ++i) gate[i] += gated.gate[from + i], up[i] += gated.up[from + i];
    }
    for (int64_t i = 0; i < panels * kPanel; i += kLanes) {
      Vector& g = *reinterpret_cast<Vector*>(gate + i);
      g *= sigmoid(g) * *reinterpret_cast<const Vector*>(up + i);
    }
    std::memcpy(gated.packed + row * inner + column, gate, sizeof(float) * width);
  }
}

// swish(x gate + a) * (x up + b) for panels of the inner width, straight into the tiles that the last product reads.
// `sums` has room for 2 * rows * panels * kPanel, and for the widened block after it.
static void gate_and_up(const Gated& gated, int64_t first, int64_t panels, float* sums) {
  const Problem& problem = gated.first[0];
  if (problem.wide) return gate_and_up_wide(gated, first, panels, sums);
  const int64_t rows = problem.rows, inner = problem.outputs, size = rows * panels * kPanel;
  sum_panels(gated.first, 2, first, panels, sums);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t column = (first + panel) * kPanel;
    const int64_t width = inner - column < kPanel ? inner - column : kPanel;
    for (int64_t begin = 0, count; begin < rows; begin += count) {
      count = tile_rows(begin, rows, kMostRows);
      for (int64_t r = 0; r < count; ++r) {
        float *gate = sums + (panel * rows + begin + r) * kPanel, *up = gate + size;
        if (gated.added) {
          const int64_t from = gated.added > 1 ? (gated.row + begin + r) * inner + column : column;
          for (int64_t i = 0; i < width; ++i) gate[i] += gated.gate[from + i], up[i] += gated.up[from + i];
        }
        for (int64_t i = 0; i < kPanel; i += kLanes) {
          Vector& g = *reinterpret_cast<Vector*>(gate + i);
          g *= sigmoid(g) * *reinterpret_cast<const Vector*>(up + i);
        }
      }
      // A column at a time: the tile lies [inner][rows of the tile].
      for (int64_t i = 0; i < width; ++i) {
        float* to = gated.packed + begin * inner + (column + i) * count;
        const float* from = sums + (panel * rows + begin) * kPanel + i;
        for (int64_t r = 0; r < count; ++r) to[r] = from[r * kPanel];
      }
    }
  }
}

// Rows of x in tiles, each [K][rows of the tile], as float32.
template <typename X>
static void pack_rows(const X* x, int64_t rows, int64_t inputs, float* packed) {
  for (int64_t row = 0, count; row < rows; row += count) {
    count = tile_rows(row, rows, kMostRows);
    float* tile = packed + row * inputs;
    for (int64_t begin = 0; begin < inputs; begin += kBlock) {  // a block at a time: one row alone would miss the cache
      const int64_t end = inputs - begin < kBlock ? inputs : begin + kBlock;
      for (int64_t r = 0; r < count; ++r)
        for (int64_t k = begin; k < end; ++k) tile[k * count + r] = static_cast<float>(x[(row + r) * inputs + k]);
    }
  }
}

static void pack(const Problem& problem, float* packed) {
  if (problem.wide) {  // half precision only: rows as they lie
    for (int64_t i = 0; i < problem.rows * problem.inputs; ++i)
      packed[i] = static_cast<float>(static_cast<const Half*>(problem.x)[i]);
    return;
  }
  if (problem.half)
    pack_rows(static_cast<const Half*>(problem.x), problem.rows, problem.inputs, packed);
  else
    pack_rows(static_cast<const float*>(problem.x), problem.rows, problem.inputs, packed);
}
