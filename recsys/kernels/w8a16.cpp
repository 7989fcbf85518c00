// Products of float32 or float16 activations with int8 weights on the CPU, for MindSpore's `ops.Custom` (AOT).
//
// Few rows only stream the weights from memory, and int8 is a quarter of the bytes. Weights are symmetric int8 with one
// scale for each output channel, or for each 128 inputs of it; they lie in panels (see w8a16_product.h), packed by
// recsys/quantization.py. All tokens' matrices, or all experts', are one call, spread over the cores by panels.
//
// Signature of an entry: int name(int count, void **params, int *dims, int64_t **shapes, const char **types,
// void *stream, void *extra); 0 = done.
// Shapes: T tokens, R experts, M rows of a token, K inputs, O outputs, P panels, G groups of inputs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "team.h"

namespace {

#if defined(__aarch64__)
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif

constexpr int kPanel = 32;
constexpr int64_t kBlock = 128;     // inputs of one block: a group's worth, and small enough for the first-level cache
constexpr int64_t kManyRows = 33;   // from so many rows on panels share a block of activations in the second-level cache
constexpr int kAhead = 2048;        // bytes of weights that are fetched ahead
constexpr int64_t kMostRowsAtOnce = 960;  // bounds the scratch memory of a thread

struct Problem {
  const void *x;
  const int8_t *weight;
  const float *scale;
  void *y;
  const float *packed;
  int64_t rows, inputs, outputs, groups;
  bool half;

  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }

  // Scales of a panel's columns for the block that begins at input `begin`; columns that do not exist keep 0.
  void scales_of(int64_t begin, int64_t panel, float *place) const {
    const float *from = scale + (groups > 1 ? begin / kBlock : 0) * outputs + panel * kPanel;
    std::memcpy(place, from, sizeof(float) * std::min<int64_t>(kPanel, outputs - panel * kPanel));
  }
};

// Rows of the tile that begins at `row`: as few tiles as possible, of nearly equal size.
inline int64_t tile_rows(int64_t row, int64_t rows, int64_t most) {
  const int64_t tiles = (rows + most - 1) / most, small = rows / tiles, large = rows % tiles;
  return row < large * (small + 1) ? small + 1 : small;
}

#define INLINE static inline __attribute__((always_inline))

namespace portable {
constexpr int kLanes = 4, kMostRows = 6;
typedef float Vector __attribute__((vector_size(16), aligned(4)));
INLINE Vector widen(const int8_t *w) {
  return Vector{static_cast<float>(w[0]), static_cast<float>(w[1]), static_cast<float>(w[2]), static_cast<float>(w[3])};
}
#include "w8a16_product.h"
}  // namespace portable

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
constexpr int kLanes = 8, kMostRows = 6;
typedef float Vector __attribute__((vector_size(32), aligned(4)));
INLINE Vector widen(const int8_t *w) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(w))));
}
#include "w8a16_product.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
constexpr int kLanes = 16, kMostRows = 12;
typedef float Vector __attribute__((vector_size(64), aligned(4)));
INLINE Vector widen(const int8_t *w) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(w))));
}
#include "w8a16_product.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

struct Path {
  void (*multiply)(const Problem &, int64_t, int64_t, float *);
  void (*pack)(const Problem &, float *);
};
constexpr Path kPortable{portable::multiply, portable::pack};

// The path of a name, or of the best instructions that the processor has for "auto"; null where it lacks them.
const Path *choose(const char *name) {
  const bool any = !std::strcmp(name, "auto");
#if defined(__x86_64__)
  static constexpr Path kAvx512{avx512::multiply, avx512::pack}, kAvx2{avx2::multiply, avx2::pack};
  static const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && (any || !std::strcmp(name, "avx512"))) return &kAvx512;
  if (has_avx2 && (any || !std::strcmp(name, "avx2"))) return &kAvx2;
#endif
  return any || !std::strcmp(name, "portable") ? &kPortable : nullptr;
}

// A thread's memory for sums, kept for its next call.
float *scratch_of(int64_t floats) {
  thread_local std::unique_ptr<float[]> scratch;
  thread_local int64_t size = 0;
  if (size < floats) scratch.reset(new float[floats]), size = floats;
  return scratch.get();
}

// A stretch of panels of one problem, and at most kMostRowsAtOnce of its rows.
struct Piece {
  Problem problem;
  int64_t first, panels;
};

void solve(const Path &path, std::vector<Problem> problems, int64_t floats) {
  thread_local std::vector<float> packed;
  if (static_cast<int64_t>(packed.size()) < floats) packed.resize(floats);
  std::vector<Piece> pieces;
  std::vector<Problem *> unpacked;
  int64_t place = 0, work = 0;
  for (Problem &problem : problems) {
    if (problem.rows == 1 && !problem.half) {
      problem.packed = static_cast<const float *>(problem.x);
    } else {
      problem.packed = packed.data() + place;
      place += problem.rows * problem.inputs;
      unpacked.push_back(&problem);
    }
    const int64_t together = problem.rows < kManyRows ? 1 : 4;  // panels that share a block of x in the second cache
    for (int64_t first = 0; first < problem.panels(); first += together)
      pieces.push_back({problem, first, std::min(together, problem.panels() - first)});
    work += problem.rows * problem.inputs * problem.outputs;
  }
  // Threads are worth their while from some microseconds on.
  const int64_t most = std::max<int64_t>(1, work / 100000);
  const auto share = [&](int64_t items, const auto &body) {
    const int64_t blocks = std::min(items, most);
    Team::get().run(static_cast<int>(blocks), [&](int block) {
      for (int64_t i = items * block / blocks; i < items * (block + 1) / blocks; ++i) body(i);
    });
  };
  share(static_cast<int64_t>(unpacked.size()), [&](int64_t i) {
    path.pack(*unpacked[i], const_cast<float *>(unpacked[i]->packed));
  });
  share(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const Piece &piece = pieces[i];
    path.multiply(piece.problem, piece.first, piece.panels,
                  scratch_of(piece.problem.rows * piece.panels * kPanel));
  });
}

// Adds rows [begin, end) of one matrix, in pieces whose scratch memory is bounded.
void add_problem(std::vector<Problem> &problems, Problem base, int64_t begin, int64_t end) {
  const int64_t size = base.half ? sizeof(Half) : sizeof(float);
  for (int64_t row = begin; row < end; row += kMostRowsAtOnce) {
    Problem problem = base;
    problem.rows = std::min(kMostRowsAtOnce, end - row);
    problem.x = static_cast<const char *>(base.x) + row * base.inputs * size;
    problem.y = static_cast<char *>(base.y) + row * base.outputs * size;
    problems.push_back(problem);
  }
}

// x [T, M, K], weight [T, (R,) P, K, kPanel] int8, scale [T, (R,) G, O], (counts [T, R] int32); y [T, M, O].
int run(const char *name, bool experts, int count, void **params, int64_t **shapes, const char **types) {
  const Path *path = choose(name);
  if (path == nullptr || count != (experts ? 5 : 4)) return 1;
  const int64_t tokens = shapes[0][0], rows = shapes[0][1], inputs = shapes[0][2];
  const int64_t each = experts ? shapes[1][1] : 1, *scales = shapes[2] + (experts ? 2 : 1);
  Problem base{};
  base.inputs = inputs, base.groups = scales[0], base.outputs = scales[1];
  base.half = !std::strcmp(types[0], "float16");
  if (shapes[1][experts ? 3 : 2] != inputs || shapes[1][experts ? 2 : 1] != base.panels()) return 2;
  if (base.groups > 1 && base.groups != (inputs + kBlock - 1) / kBlock) return 2;
  if (!base.half && std::strcmp(types[0], "float32")) return 2;
  const int64_t size = base.half ? sizeof(Half) : sizeof(float);
  const int32_t *counts = experts ? static_cast<const int32_t *>(params[3]) : nullptr;
  std::vector<Problem> problems;
  for (int64_t token = 0; token < tokens; ++token) {
    int64_t begin = 0;
    for (int64_t expert = 0; expert < each; ++expert) {
      Problem one = base;
      const int64_t matrix = token * each + expert, end = experts ? begin + counts[matrix] : rows;
      if (end > rows) return 3;
      one.x = static_cast<const char *>(params[0]) + token * rows * inputs * size;
      one.y = static_cast<char *>(params[count - 1]) + token * rows * base.outputs * size;
      one.weight = static_cast<const int8_t *>(params[1]) + matrix * base.panels() * inputs * kPanel;
      one.scale = static_cast<const float *>(params[2]) + matrix * base.groups * base.outputs;
      add_problem(problems, one, begin, end);
      begin = end;
    }
  }
  solve(*path, std::move(problems), tokens * rows * inputs);
  return 0;
}

}  // namespace

#define ENTRY(name)                                                                                              \
  extern "C" int dense_##name(int count, void **params, int *, int64_t **shapes, const char **types, void *,     \
                              void *) {                                                                          \
    return run(#name, false, count, params, shapes, types);                                                      \
  }                                                                                                              \
  extern "C" int experts_##name(int count, void **params, int *, int64_t **shapes, const char **types, void *,   \
                                void *) {                                                                        \
    return run(#name, true, count, params, shapes, types);                                                       \
  }

ENTRY(auto)
ENTRY(avx512)
ENTRY(avx2)
ENTRY(portable)
