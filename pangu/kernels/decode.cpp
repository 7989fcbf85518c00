// Kernels of the decoding step on the CPU, for MindSpore's `ops.Custom(..., func_type="aot")`.
//
// With one new token per sequence a matrix product only streams its weights from memory, and the general kernels reach
// a third of what memory gives; what stands between them costs as much again, since the stream drives everything else
// out of the caches. Here one call does the whole step and reads whole rows of [outputs, inputs] weights once, on all
// cores. The arithmetic is that of pangu/model.py with the cache of pangu/generation/kv_cache.py; tests/laws/test_cache.py holds the
// two together.
//
// Signature of an entry: int name(int count, void **params, int *dims, int64_t **shapes, const char **types,
// void *stream, void *extra); 0 = done. Tensors are float32, indices int32.
// Shapes: B sequences, D width, H heads, K head width, C cache slots, V vocabulary.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "team.h"

namespace {

// ---------------------------------------------------------------- products

typedef float Vector __attribute__((vector_size(64), aligned(4)));
constexpr int kLanes = 16;
constexpr int kAhead = 1024;

inline float total(const Vector &v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// y[t][r] = sum over i of x[t][i] w[r][i] for T tokens and R rows, in U partial sums that need not wait for each other.
template <int T, int R, int U>
inline void dots(const float *x, const float *w, int64_t inputs, float *y) {
  Vector sums[T][R][U] = {};
  int64_t i = 0;
  for (; i + U * kLanes <= inputs; i += U * kLanes)
    for (int u = 0; u < U; ++u)
      for (int r = 0; r < R; ++r) {
        const Vector weight = *reinterpret_cast<const Vector *>(w + r * inputs + i + u * kLanes);
        // Ahead of the prefetcher, and past the caches: weights are not needed again before the next step.
        __builtin_prefetch(w + r * inputs + i + u * kLanes + kAhead, 0, 0);
        for (int t = 0; t < T; ++t)
          sums[t][r][u] += weight * *reinterpret_cast<const Vector *>(x + t * inputs + i + u * kLanes);
      }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) {
      Vector sum = sums[t][r][0];
      for (int u = 1; u < U; ++u) sum += sums[t][r][u];
      float value = total(sum);
      for (int64_t j = i; j < inputs; ++j) value += x[t * inputs + j] * w[r * inputs + j];
      y[t * R + r] = value;
    }
}

// R rows of x w^T from `row` on, for all tokens: `store(token, row, value)`.
template <int R, typename Store>
inline void tokens(const float *x, int64_t count, const float *w, int64_t inputs, int64_t row, const Store &store) {
  float y[4 * R];
  for (int64_t t = 0; t < count;) {
    const int done = count - t >= 4 ? 4 : count - t >= 2 ? 2 : 1;
    const float *token = x + t * inputs, *weights = w + row * inputs;
    if (done == 4) dots<4, R, R == 1 ? 2 : 1>(token, weights, inputs, y);
    else if (done == 2) dots<2, R, 2>(token, weights, inputs, y);
    else dots<1, R, R == 1 ? 4 : 2>(token, weights, inputs, y);
    for (int k = 0; k < done; ++k)
      for (int r = 0; r < R; ++r) store(t + k, row + r, y[k * R + r]);
    t += done;
  }
}

// Rows [first, last) of x w^T. For few tokens one row at a time, a single stream, which the prefetcher follows best;
// for more tokens several rows, so that what is loaded is used more than once.
template <typename Store>
void rows(const float *x, int64_t count, const float *w, int64_t inputs, int64_t first, int64_t last,
          const Store &store) {
  int64_t row = first;
  if (count >= 4)
    for (; row + 4 <= last; row += 4) tokens<4>(x, count, w, inputs, row, store);
  for (; row < last; ++row) tokens<1>(x, count, w, inputs, row, store);
}

// Rows of a block: about 128 KB of weights, which takes some microseconds.
inline int64_t block_rows(int64_t inputs) { return std::max<int64_t>(4, 32768 / std::max<int64_t>(inputs, 1) / 4 * 4); }

template <typename Store>
void product(const float *x, int64_t count, const float *w, int64_t inputs, int64_t outputs, const Store &store) {
  const int64_t size = block_rows(inputs);
  Team::get().run(static_cast<int>((outputs + size - 1) / size), [&](int block) {
    rows(x, count, w, inputs, block * size, std::min(outputs, (block + 1) * size), store);
  });
}

// ---------------------------------------------------------------- the step

struct Tanh {
  // 1 + tanh z = 2 sigmoid 2z.
  static float at(float x) { return x / (1.0f + std::exp(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }
};
struct Fast {
  static float at(float x) { return x / (1.0f + std::exp(-1.702f * x)); }
};
struct Erf {
  static float at(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.7071067811865476f)); }
};

struct Linear {
  const float *weight, *bias;
};

// Pointers of one layer, in the order in which pangu/generation/kv_cache.py gives them.
struct Layer {
  const float *gamma1, *beta1;
  Linear query, key, value, output;
  const float *gamma2, *beta2;
  Linear mapping, projection;
  float *keys, *values;  // [B, H, C, K]
};
constexpr int kPerLayer = 18;
static_assert(sizeof(Layer) == kPerLayer * sizeof(void *), "a layer is read as an array of pointers");

struct Sizes {
  int64_t batch, width, inner, vocabulary, heads, head_width, capacity;
};

// y = (x - mean) / sqrt(var + 1e-5) * gamma + beta for each row.
void norm(const float *x, int64_t count, int64_t width, const float *gamma, const float *beta, float *y) {
  for (int64_t t = 0; t < count; ++t, x += width, y += width) {
    float sum = 0, squares = 0;
    for (int64_t i = 0; i < width; ++i) sum += x[i];
    const float mean = sum / width;
    for (int64_t i = 0; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / width + 1e-5f);
    for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * scale * gamma[i] + beta[i];
  }
}

// Query, and key and value straight into the cache, slot `position` of each sequence.
void project(const Layer &layer, const Sizes &n, const float *query_input, const float *normed,
             const int32_t *position, float *query) {
  const int64_t size = block_rows(n.width), each = (n.width + size - 1) / size;
  Team::get().run(static_cast<int>(3 * each), [&](int block) {
    const int64_t which = block / each, first = block % each * size, last = std::min(n.width, first + size);
    const Linear &linear = which == 0 ? layer.query : which == 1 ? layer.key : layer.value;
    float *cache = which == 1 ? layer.keys : layer.values;
    rows(which == 0 ? query_input : normed, n.batch, linear.weight, n.width, first, last,
         [&](int64_t t, int64_t r, float value) {
           const int64_t slot = (t * n.heads + r / n.head_width) * n.capacity + position[t];
           float &place = which == 0 ? query[t * n.width + r] : cache[slot * n.head_width + r % n.head_width];
           place = value + linear.bias[r];
         });
  });
}

// softmax(q k^T / sqrt(K)) v over slots 0..position, for each sequence and head.
void attend(const Layer &layer, const Sizes &n, const float *query, const int32_t *position, float *mixed) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(n.head_width));
  Team::get().run(static_cast<int>(n.batch * n.heads), [&](int block) {
    const int64_t seen = position[block / n.heads] + 1;
    const float *q = query + block * n.head_width, *k = layer.keys + block * n.capacity * n.head_width;
    const float *v = layer.values + block * n.capacity * n.head_width;
    float *y = mixed + block * n.head_width;
    thread_local std::vector<float> weights;
    weights.resize(static_cast<size_t>(seen));
    float *weight = weights.data();
    rows(q, 1, k, n.head_width, 0, seen, [=](int64_t, int64_t slot, float value) { weight[slot] = value * scale; });
    float largest = weight[0], sum = 0;
    for (int64_t slot = 1; slot < seen; ++slot) largest = std::max(largest, weight[slot]);
    for (int64_t slot = 0; slot < seen; ++slot) weight[slot] = std::exp(weight[slot] - largest);
    for (int64_t slot = 0; slot < seen; ++slot) sum += weight[slot];
    std::fill(y, y + n.head_width, 0.0f);
    for (int64_t slot = 0; slot < seen; ++slot) {
      const float share = weight[slot] / sum;
      for (int64_t i = 0; i < n.head_width; ++i) y[i] += share * v[slot * n.head_width + i];
    }
  });
}

// What a layer needs beside its input, reused by all.
struct Scratch {
  std::vector<float> normed, query, mixed, inner;
  explicit Scratch(const Sizes &n)
      : normed(n.batch * n.width), query(n.batch * n.width), mixed(n.batch * n.width), inner(n.batch * n.inner) {}
};

// hidden += linear(x)
void add_product(const Linear &linear, const float *x, int64_t batch, int64_t inputs, int64_t outputs, float *hidden) {
  product(x, batch, linear.weight, inputs, outputs,
          [=](int64_t t, int64_t r, float value) { hidden[t * outputs + r] += value + linear.bias[r]; });
}

// One decoder layer on hidden [B, D], in place; `query_input` is null but for the query layer.
template <typename Gelu>
void decoder_layer(const Layer &layer, const Sizes &n, const int32_t *position, const float *query_input,
                   Scratch &scratch, float *hidden) {
  float *normed = scratch.normed.data(), *inner = scratch.inner.data();
  norm(hidden, n.batch, n.width, layer.gamma1, layer.beta1, normed);
  project(layer, n, query_input ? query_input : normed, normed, position, scratch.query.data());
  attend(layer, n, scratch.query.data(), position, scratch.mixed.data());
  add_product(layer.output, scratch.mixed.data(), n.batch, n.width, n.width, hidden);
  norm(hidden, n.batch, n.width, layer.gamma2, layer.beta2, normed);
  product(normed, n.batch, layer.mapping.weight, n.width, n.inner, [&](int64_t t, int64_t r, float value) {
    inner[t * n.inner + r] = Gelu::at(value + layer.mapping.bias[r]);
  });
  add_product(layer.projection, inner, n.batch, n.inner, n.width, hidden);
}

// Place of the first largest.
int32_t argmax(const float *x, int64_t size) {
  float largest = x[0];
  for (int64_t i = 1; i < size; ++i) largest = std::max(largest, x[i]);
  int64_t place = 0;
  while (place + 1 < size && x[place] != largest) ++place;
  return static_cast<int32_t>(place);
}

// Inputs: ids [B], positions [B]; tables of words [V, D], positions and queries [P, D]; gamma and beta of the final
// norm; then each layer's. Outputs: logits [B, V], their argmax [B].
template <typename Gelu, bool kNormFirst>
int step(int count, void **params, int64_t **shapes) {
  constexpr int kBefore = 7;
  const int layers = (count - kBefore - 2) / kPerLayer;
  if (layers < 1 || count != kBefore + layers * kPerLayer + 2) return 1;
  const int32_t *ids = static_cast<int32_t *>(params[0]), *position = static_cast<int32_t *>(params[1]);
  const float *words = static_cast<float *>(params[2]), *places = static_cast<float *>(params[3]);
  const float *queries = static_cast<float *>(params[4]);
  const float *gamma = static_cast<float *>(params[5]), *beta = static_cast<float *>(params[6]);
  float *logits = static_cast<float *>(params[count - 2]);
  int32_t *best = static_cast<int32_t *>(params[count - 1]);
  Sizes n{};
  n.batch = shapes[0][0], n.vocabulary = shapes[2][0], n.width = shapes[2][1];
  n.inner = shapes[kBefore + 12][0];  // of the first layer's mapping
  n.head_width = shapes[kBefore + 16][1];
  n.heads = n.width / n.head_width;
  n.capacity = shapes[kBefore + 16][0] / (n.batch * n.heads);
  for (int64_t t = 0; t < n.batch; ++t)
    if (position[t] < 0 || position[t] >= std::min(n.capacity, shapes[3][0]) || ids[t] < 0 || ids[t] >= n.vocabulary)
      return 2;

  Scratch scratch(n);
  std::vector<float> hidden(n.batch * n.width), query(n.batch * n.width);
  for (int64_t t = 0; t < n.batch; ++t)
    for (int64_t i = 0; i < n.width; ++i) {
      hidden[t * n.width + i] = words[ids[t] * n.width + i] + places[position[t] * n.width + i];
      query[t * n.width + i] = queries[position[t] * n.width + i];
    }
  for (int l = 0; l < layers; ++l) {
    const bool top = l == layers - 1;
    Layer layer;
    std::memcpy(&layer, params + kBefore + l * kPerLayer, sizeof(layer));
    if (top && kNormFirst) norm(hidden.data(), n.batch, n.width, gamma, beta, hidden.data());
    decoder_layer<Gelu>(layer, n, position, top ? query.data() : nullptr, scratch, hidden.data());
  }
  if (!kNormFirst) norm(hidden.data(), n.batch, n.width, gamma, beta, hidden.data());
  product(hidden.data(), n.batch, words, n.width, n.vocabulary,
          [=](int64_t t, int64_t r, float value) { logits[t * n.vocabulary + r] = value; });
  for (int64_t t = 0; t < n.batch; ++t) best[t] = argmax(logits + t * n.vocabulary, n.vocabulary);
  return 0;
}

}  // namespace

#define STEP(name, gelu, norm_first)                                                                             \
  extern "C" int name(int count, void **params, int *, int64_t **shapes, const char **, void *, void *) {        \
    return step<gelu, norm_first>(count, params, shapes);                                                        \
  }

STEP(step_tanh_before_query, Tanh, true)
STEP(step_tanh_after_query, Tanh, false)
STEP(step_fast_before_query, Fast, true)
STEP(step_fast_after_query, Fast, false)
STEP(step_erf_before_query, Erf, true)
STEP(step_erf_after_query, Erf, false)
