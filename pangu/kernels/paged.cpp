// PanGu-alpha's inference on the CPU: one call takes some new tokens of some sequences through all layers.
//
// Called through ctypes by pangu/generation/kernel_runner.py. Sequences of any lengths share a call, some with one new
// token, some with a part of their prompt. What they have seen lies in a cache of blocks of kSlots tokens, and each
// sequence has a table of its blocks, so nothing is reserved for tokens that may never come.
//
// What a token gives depends on its sequence alone, to the last bit: every sum runs in an order that neither the number
// of tokens in the call nor their places decide. So a row that joins a batch, a prompt that is read in parts, a prefix
// that another request has left in the cache and a sequence that is computed again change nothing.
// The arithmetic is that of pangu/model.py; tests/laws/test_cache.py holds the two together.
//
// Shapes: N new tokens, D width, H heads, K head width, F inner width, V vocabulary, S slots of a block.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention.h"
#include "choose.h"

using namespace kernels;

namespace {

INLINE Wide sigmoid_times(Wide x, Wide z) { return x / (1.0f + exponential(-z)); }

// GELU of `width` values, in place; room for whole vectors behind them.
void activate(Gelu kind, float* x, int64_t width) {
  if (kind == kErf) {
    for (int64_t i = 0; i < width; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.7071067811865476f));
    return;
  }
  for (int64_t i = 0; i < width; i += kWide) {
    const Wide v = load(x + i);
    // 1 + tanh z = 2 sigmoid 2z.
    store(x + i, sigmoid_times(v, kind == kFast ? 1.702f * v : 1.5957691216057308f * (v + 0.044715f * v * v * v)));
  }
}

// y = (x - mean) / sqrt(var + 1e-5) * gamma + beta for each row.
void normalize(const Norm& norm, const float* x, int64_t rows, int64_t width, float* y) {
  const int64_t even = width / kWide * kWide;
  for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
    Wide sums{};
    for (int64_t i = 0; i < even; i += kWide) sums += load(x + i);
    float sum = total(sums);
    for (int64_t i = even; i < width; ++i) sum += x[i];
    const float mean = sum / width;
    Wide squares{};
    for (int64_t i = 0; i < even; i += kWide) squares = fused(load(x + i) - mean, load(x + i) - mean, squares);
    float square = total(squares);
    for (int64_t i = even; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(square / width + 1e-5f);
    for (int64_t i = 0; i < even; i += kWide)
      store(y + i, fused((load(x + i) - mean) * scale, load(norm.gamma + i), load(norm.beta + i)));
    for (int64_t i = even; i < width; ++i) y[i] = (x[i] - mean) * scale * norm.gamma[i] + norm.beta[i];
  }
}

// ---------------------------------------------------------------- a call

class Call {
 public:
  Call(const Model& model, std::vector<Span> spans, const int32_t* ids) : m_(model), spans_(std::move(spans)) {
    const int64_t tokens = spans_.back().first + spans_.back().count;
    hidden_.resize(tokens * m_.width);
    for (const Span& span : spans_)
      for (int64_t i = 0; i < span.count; ++i) {
        const int64_t position = span.start + i, token = span.first + i;
        embed(ids[token], m_.places + position * m_.width, hidden_.data() + token * m_.width);
        cells_.push_back({span.table[position / kSlots], static_cast<int32_t>(position % kSlots)});
      }
  }

  // Logits [outputs, V] and their argmax.
  void run(float* logits, int32_t* best) {
    for (size_t i = 0; i + 1 < m_.layers.size(); ++i) {
      const Layer& layer = m_.layers[i];
      project(layer, nullptr);
      rest(layer);
    }
    top(m_.layers.back());
    const int64_t rows = tokens();
    if (rows == 0) return;
    if (!m_.norm_first) normalize(m_.norm, hidden_.data(), rows, m_.width, hidden_.data());
    x_.pack(hidden_.data(), rows, m_.width);
    multiply(m_.words, x_, [&](int64_t row, int64_t column, int64_t width, const float* values) {
      std::memcpy(logits + row * m_.vocabulary + column, values, width * sizeof(float));
    });
    Team::get().run(static_cast<int>(rows), [&](int row) {
      const float* x = logits + row * m_.vocabulary;
      best[row] = first_largest(x, m_.vocabulary);
    });
  }

 private:
  struct Cell {
    int32_t block, slot;
  };

  int64_t tokens() const { return static_cast<int64_t>(hidden_.size()) / m_.width; }

  // y = word + place.
  void embed(int32_t id, const float* place, float* y) const {
    const int64_t panel = id / kPanel, column = id % kPanel;
    const int64_t base = panel * m_.width * kPanel + column;
    for (int64_t i = 0; i < m_.width; ++i) {
      float word;
      if (m_.words.scale) {
        const int64_t group = m_.words.groups > 1 ? i / kBlock : 0;
        word = static_cast<const int8_t*>(m_.words.panels)[base + i * kPanel] *
               m_.words.scale[(group * m_.words.count() + panel) * kPanel + column];
      } else {
        word = static_cast<const float*>(m_.words.panels)[base + i * kPanel];
      }
      y[i] = word + place[i];
    }
  }

  // Keys and values of all tokens into the cache; queries too unless the query layer asks for its own.
  void project(const Layer& layer, const Packed* queries) {
    normed_.resize(hidden_.size());
    normalize(layer.norm1, hidden_.data(), tokens(), m_.width, normed_.data());
    x_.pack(normed_.data(), tokens(), m_.width);
    const Matrix* matrices[] = {&layer.key, &layer.value, &layer.query};
    const Packed* inputs[] = {&x_, &x_, queries ? queries : &x_};
    const int64_t asked = queries ? queries->rows() : tokens();
    query_.resize(asked * m_.width);
    multiply(matrices, inputs, asked > 0 ? 3 : 2,
             [&](int which, int64_t row, int64_t column, int64_t width, const float* values) {
               if (which == 2) {
                 std::memcpy(query_.data() + row * m_.width + column, values, width * sizeof(float));
                 return;
               }
               const Cell cell = cells_[row];
               for (int64_t i = 0; i < width; ++i) {
                 const int64_t head = (column + i) / m_.head_width, d = (column + i) % m_.head_width;
                 const int64_t at = cell.block * m_.heads + head;
                 if (which == 0)
                   layer.keys[(at * m_.head_width + d) * kSlots + cell.slot] = values[i];
                 else
                   layer.values[(at * kSlots + cell.slot) * m_.padded() + d] = values[i];
               }
             });
  }

  // What comes after the projections, on all rows of hidden.
  void rest(const Layer& layer) {
    const int64_t rows = tokens();
    mixed_.resize(hidden_.size());
    attend_all(m_, layer, spans_, query_.data(), mixed_.data());
    add(layer.output, mixed_.data());
    normed_.resize(hidden_.size());
    normalize(layer.norm2, hidden_.data(), rows, m_.width, normed_.data());
    inner_.resize(rows * m_.inner);
    x_.pack(normed_.data(), rows, m_.width);
    multiply(layer.mapping, x_, [&](int64_t row, int64_t column, int64_t width, float* values) {
      activate(m_.gelu, values, width);
      std::memcpy(inner_.data() + row * m_.inner + column, values, width * sizeof(float));
    });
    add(layer.projection, inner_.data());
  }

  // hidden += linear(x)
  void add(const Matrix& linear, const float* x) {
    x_.pack(x, tokens(), linear.inputs);
    multiply(linear, x_, [&](int64_t row, int64_t column, int64_t width, const float* values) {
      float* to = hidden_.data() + row * m_.width + column;
      for (int64_t i = 0; i < width; ++i) to[i] += values[i];
    });
  }

  // The query layer: keys and values of all tokens, the rest only where logits are wanted.
  void top(const Layer& layer) {
    if (m_.norm_first) normalize(m_.norm, hidden_.data(), tokens(), m_.width, hidden_.data());
    std::vector<float> queries, kept;
    std::vector<Span> asking;
    for (const Span& span : spans_) {
      if (span.outputs == 0) continue;
      const int64_t skipped = span.count - span.outputs, first = static_cast<int64_t>(kept.size()) / m_.width;
      const float* from = m_.queries + (span.start + skipped) * m_.width;
      queries.insert(queries.end(), from, from + span.outputs * m_.width);
      const float* rows = hidden_.data() + (span.first + skipped) * m_.width;
      kept.insert(kept.end(), rows, rows + span.outputs * m_.width);
      asking.push_back({first, span.start + skipped, span.outputs, span.outputs, span.table});
    }
    const int64_t asked = static_cast<int64_t>(kept.size()) / m_.width;
    Packed packed;
    if (asked > 0) packed.pack(queries.data(), asked, m_.width);
    project(layer, &packed);
    hidden_.swap(kept);
    spans_.swap(asking);
    if (asked > 0) rest(layer);
  }

  const Model& m_;
  std::vector<Span> spans_;
  std::vector<Cell> cells_;
  std::vector<float> hidden_, normed_, query_, mixed_, inner_;
  Packed x_;
};

// ---------------------------------------------------------------- reading the arguments

class Reader {
 public:
  Reader(void* const* pointers, const int64_t* groups) : pointers_(pointers), groups_(groups) {}
  template <typename T = const float>
  T* next() {
    return static_cast<T*>(*pointers_++);
  }
  Norm norm() { return {next(), next()}; }
  Matrix matrix(int64_t inputs, int64_t outputs) {
    const void* panels = next<const void>();
    const float *scale = next(), *bias = next();
    return {panels, scale, bias, inputs, outputs, *groups_++};
  }

 private:
  void* const* pointers_;
  const int64_t* groups_;
};

// What `paged_run` refuses.
enum Refusal : int {
  kAccepted = 0,
  kBadSpan = 1,     // no new tokens, or more than the model has positions
  kBadOutputs = 2,  // logits of more tokens than are new
  kBadBlock = 3,    // no such block of the cache
  kBadToken = 4,    // an id outside the vocabulary
  kNoSpans = 5,
};

}  // namespace

extern "C" {

// sizes: layers, width, heads, inner, vocabulary, positions, blocks, which GELU, whether the last norm stands before
// the query layer. pointers: words (panels, scale, null), tables of places and queries, the last norm; of each layer
// norm1, norm2, then query, key, value, output, mapping and projection (panels, scale or null, bias), keys and values
// of the cache. groups: of each matrix in that order, the scales of an output. All of it must outlive the model.
void* paged_create(const int64_t* sizes, void* const* pointers, const int64_t* groups) {
  auto* m = new Model{};
  m->width = sizes[1], m->heads = sizes[2], m->inner = sizes[3], m->vocabulary = sizes[4], m->positions = sizes[5];
  m->blocks = sizes[6], m->gelu = static_cast<Gelu>(sizes[7]), m->norm_first = sizes[8] != 0;
  m->head_width = m->width / m->heads;
  Reader reader(pointers, groups);
  m->words = reader.matrix(m->width, m->vocabulary);
  m->places = reader.next(), m->queries = reader.next();
  m->norm = reader.norm();
  for (int64_t i = 0; i < sizes[0]; ++i) {
    Layer layer{};
    layer.norm1 = reader.norm(), layer.norm2 = reader.norm();
    for (Matrix* matrix : {&layer.query, &layer.key, &layer.value, &layer.output})
      *matrix = reader.matrix(m->width, m->width);
    layer.mapping = reader.matrix(m->width, m->inner);
    layer.projection = reader.matrix(m->inner, m->width);
    layer.keys = reader.next<float>(), layer.values = reader.next<float>();
    m->layers.push_back(layer);
  }
  return m;
}

void paged_destroy(void* model) { delete static_cast<Model*>(model); }

// spans [count, 4]: position of the first new token, new tokens, how many of the last ones need logits, where the table
// of its blocks begins in `tables`. ids: of all spans on end. logits [outputs, V], best [outputs]. Returns a `Refusal`.
int paged_run(const void* model, int64_t count, const int64_t* spans, const int32_t* tables, const int32_t* ids,
              float* logits, int32_t* best) {
  const Model& m = *static_cast<const Model*>(model);
  std::vector<Span> all;
  int64_t first = 0;
  for (int64_t i = 0; i < count; ++i, spans += 4) {
    const Span span{first, spans[0], spans[1], spans[2], tables + spans[3]};
    if (span.start < 0 || span.count < 1 || span.start + span.count > m.positions) return kBadSpan;
    if (span.outputs < 0 || span.outputs > span.count) return kBadOutputs;
    for (int64_t b = 0; b * kSlots < span.start + span.count; ++b)
      if (span.table[b] < 0 || span.table[b] >= m.blocks) return kBadBlock;
    for (int64_t t = 0; t < span.count; ++t)
      if (ids[first + t] < 0 || ids[first + t] >= m.vocabulary) return kBadToken;
    first += span.count;
    all.push_back(span);
  }
  if (all.empty()) return kNoSpans;
  Call(m, std::move(all), ids).run(logits, best);
  return kAccepted;
}

// Of each row of logits [rows, V]: log p of its target and how many tokens are likelier, and the k likeliest tokens,
// best first, equal ones by id, with their log p; top_ids and top_log_p [rows, k].
void paged_log_p(const float* logits, int64_t rows, int64_t vocabulary, const int32_t* targets, int64_t k, float* log_p,
                 int32_t* above, int32_t* top_ids, float* top_log_p) {
  Team::get().run(static_cast<int>(rows), [&](int row) {
    const float* x = logits + row * vocabulary;
    const float most = x[first_largest(x, vocabulary)];
    double sum = 0;
    for (int64_t i = 0; i < vocabulary; i += kWide) {
      float part[kWide];
      const int64_t width = std::min<int64_t>(kWide, vocabulary - i);
      std::fill(part, part + kWide, -1e30f);
      std::memcpy(part, x + i, width * sizeof(float));
      Wide weight = exponential(load(part) - most);
      for (int64_t j = width; j < kWide; ++j) weight[j] = 0.0f;
      sum += total(weight);
    }
    const float log_sum = static_cast<float>(std::log(sum) + most);
    const float target = x[targets[row]];
    log_p[row] = target - log_sum;
    int32_t higher = 0;
    for (int64_t i = 0; i < vocabulary; ++i) higher += x[i] > target;
    above[row] = higher;
    int32_t* ids = top_ids + row * k;
    int64_t found = 0;
    for (int64_t i = 0; k > 0 && i < vocabulary; ++i) {
      if (found == k && !(x[i] > x[ids[k - 1]])) continue;
      int64_t at = found < k ? found++ : k - 1;
      for (; at > 0 && x[i] > x[ids[at - 1]]; --at) ids[at] = ids[at - 1];
      ids[at] = static_cast<int32_t>(i);
    }
    for (int64_t i = 0; i < k; ++i) top_log_p[row * k + i] = x[ids[i]] - log_sum;
  });
}

// The next token of each of `count` requests, from row rows[i] of logits [.., V]: rules [count, 4] as temperature,
// top_k, top_p and a uniform number; changes to the logits, ids and values, of request i at first[i] .. first[i + 1).
void paged_choose(const float* logits, int64_t vocabulary, int64_t count, const int32_t* rows, const double* rules,
                  const int64_t* first, const int32_t* ids, const float* values, int32_t* chosen) {
  Team::get().run(static_cast<int>(count), [&](int i) {
    float* x = scratch_of(vocabulary + kWide);
    std::memcpy(x, logits + rows[i] * vocabulary, vocabulary * sizeof(float));
    for (int64_t j = first[i]; j < first[i + 1]; ++j) x[ids[j]] += values[j];
    const double* rule = rules + 4 * i;
    chosen[i] = choose(x, vocabulary, {static_cast<float>(rule[0]), static_cast<int64_t>(rule[1]), rule[2], rule[3]});
  });
}

}  // extern "C"
