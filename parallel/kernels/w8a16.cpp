// Products of float32 or float16 activations with int8 weights on the CPU, for MindSpore's `ops.Custom` (AOT).
//
// Few rows only stream the weights from memory, and int8 is a quarter of the bytes; many are as fast as float32.
// Weights are symmetric int8 with one scale for each output channel, or for each 128 inputs of it; they lie in panels
// (see w8a16_product.inc), packed by parallel/layers/int8.py. All tokens' matrices, or all experts', are one call,
// spread over the cores by panels.
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

#include "products.h"
#include "status.h"
#include "team.h"

using namespace kernels;

namespace {

#if defined(__aarch64__)
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif

constexpr int kPanel = 32;
constexpr int64_t kBlock = 128;    // inputs of one block: a group's worth, and small enough for the first-level cache
constexpr int64_t kManyRows = 33;  // from so many rows on panels share a block of activations in the second-level cache
constexpr int kAhead = 2048;       // bytes of weights that are fetched ahead
constexpr int64_t kWideRows = 96;  // from so many rows on blocks of weights are widened for oneDNN, where there is one
constexpr int64_t kWidePanels = 12;  // panels of such a block,
constexpr int64_t kDeep = 384;       // and inputs of it: 0.6 MB, about half of a usual second-level cache
constexpr int64_t kGap = 16;         // floats between its rows, lest all of a column fall into few sets of the cache
constexpr int64_t kMostRowsAtOnce = 960;  // bounds the scratch memory of a thread

struct Problem {
  const void* x;
  const int8_t* weight;
  const float* scale;
  void* y;
  const float* packed;
  int64_t rows, inputs, outputs, groups;
  bool half, wide;

  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }

  // Scales of a panel's columns for the block that begins at input `begin`; columns that do not exist keep 0.
  void scales_of(int64_t begin, int64_t panel, float* place) const {
    const float* from = scale + (groups > 1 ? begin / kBlock : 0) * outputs + panel * kPanel;
    std::memcpy(place, from, sizeof(float) * std::min<int64_t>(kPanel, outputs - panel * kPanel));
  }
};

// A SwiGLU's first two products, what is added to them (one row for all, or one each), and where its inner rows go.
struct Gated {
  Problem first[2];
  const float *gate, *up;
  int64_t added, row;  // rows of what is added (0: nothing), and which of the token's rows the first one is
  float* packed;
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
typedef int32_t Integers __attribute__((vector_size(16), aligned(4)));
INLINE Vector widen(const int8_t* w) {
  return Vector{static_cast<float>(w[0]), static_cast<float>(w[1]), static_cast<float>(w[2]), static_cast<float>(w[3])};
}
INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
#include "panel_tile.inc"
#include "w8a16_product.inc"
}  // namespace portable

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
constexpr int kLanes = 8, kMostRows = 6;
typedef float Vector __attribute__((vector_size(32), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(32), aligned(4)));
INLINE Vector widen(const int8_t* w) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
}
INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#include "panel_tile.inc"
#include "w8a16_product.inc"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
constexpr int kLanes = 16, kMostRows = 12;
typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(64), aligned(4)));
INLINE Vector widen(const int8_t* w) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
}
INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#include "panel_tile.inc"
#include "w8a16_product.inc"
}  // namespace avx512
#pragma GCC pop_options
#endif

struct Path {
  void (*multiply)(const Problem&, int64_t, int64_t, float*);
  void (*pack)(const Problem&, float*);
  void (*gate_and_up)(const Gated&, int64_t, int64_t, float*);
};
constexpr Path kPortable{portable::multiply, portable::pack, portable::gate_and_up};

// The path of a name, or of the best instructions that the processor has for "auto"; null where it lacks them.
const Path* choose(const char* name) {
  const bool any = !std::strcmp(name, "auto");
#if defined(__x86_64__)
  static constexpr Path kAvx512{avx512::multiply, avx512::pack, avx512::gate_and_up};
  static constexpr Path kAvx2{avx2::multiply, avx2::pack, avx2::gate_and_up};
  static const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && (any || !std::strcmp(name, "avx512"))) return &kAvx512;
  if (has_avx2 && (any || !std::strcmp(name, "avx2"))) return &kAvx2;
#endif
  return any || !std::strcmp(name, "portable") ? &kPortable : nullptr;
}

// A thread's memory for sums, kept for its next call.
float* scratch_of(int64_t floats) {
  thread_local std::unique_ptr<float[]> scratch;
  thread_local int64_t size = 0;
  if (size < floats) scratch.reset(new float[floats]), size = floats;
  return scratch.get();
}

// Calls body(i) for all items, on several threads where the multiplications are worth it.
template <typename Body>
void share(int64_t items, int64_t multiplications, const Body& body) {
  const int64_t blocks = std::min(items, std::max<int64_t>(1, multiplications / 100000));
  Team::get().run(static_cast<int>(blocks), [&](int block) {
    for (int64_t i = items * block / blocks; i < items * (block + 1) / blocks; ++i) body(i);
  });
}

// Panels that are worked on together: they share a block of x in the second-level cache, or are widened as one block.
int64_t panels_together(const Problem& problem, int64_t many) {
  return problem.wide ? kWidePanels : problem.rows < kManyRows ? 1 : many;
}

// Floats of scratch memory for `panels` of `count` products with the same x.
int64_t scratch_for(const Problem& problem, int64_t panels, int64_t count) {
  return count * problem.rows * panels * kPanel + (problem.wide ? kDeep * (panels * kPanel + kGap) : 0);
}

// body(problem, first panel, panels) for stretches of panels of all problems.
template <typename Body>
void share_panels(const std::vector<Problem>& problems, int64_t many, const Body& body) {
  struct Stretch {
    int64_t problem, first, panels;
  };
  std::vector<Stretch> stretches;
  int64_t work = 0;
  for (size_t i = 0; i < problems.size(); ++i) {
    const int64_t all = problems[i].panels(), together = panels_together(problems[i], many);
    for (int64_t first = 0; first < all; first += together)
      stretches.push_back({static_cast<int64_t>(i), first, std::min(together, all - first)});
    work += problems[i].rows * problems[i].inputs * problems[i].outputs;
  }
  share(static_cast<int64_t>(stretches.size()), work,
        [&](int64_t i) { body(stretches[i].problem, stretches[i].first, stretches[i].panels); });
}

// Packs the rows of all problems where they are not read as they are; `packed` keeps them until the next call.
void pack_all(const Path& path, std::vector<Problem>& problems, std::vector<float>& packed) {
  std::vector<Problem*> unpacked;
  int64_t size = 0;
  for (Problem& problem : problems) {
    problem.wide = problem.rows >= kWideRows && sgemm() != nullptr;
    if ((problem.rows == 1 || problem.wide) && !problem.half) {
      problem.packed = static_cast<const float*>(problem.x);
    } else {
      unpacked.push_back(&problem);
      size += problem.rows * problem.inputs;
    }
  }
  if (static_cast<int64_t>(packed.size()) < size) packed.resize(size);
  std::vector<float*> to;
  float* next = packed.data();
  for (Problem* problem : unpacked) {
    problem->packed = next;
    to.push_back(next);
    next += problem->rows * problem->inputs;
  }
  share(static_cast<int64_t>(unpacked.size()), size * 20, [&](int64_t i) { path.pack(*unpacked[i], to[i]); });
}

void multiply_all(const Path& path, const std::vector<Problem>& problems) {
  share_panels(problems, 4, [&](int64_t i, int64_t first, int64_t panels) {
    path.multiply(problems[i], first, panels, scratch_of(scratch_for(problems[i], panels, 1)));
  });
}

void solve(const Path& path, std::vector<Problem> problems) {
  thread_local std::vector<float> packed;
  pack_all(path, problems, packed);
  multiply_all(path, problems);
}

// Adds rows [begin, end) of one matrix, in parts whose scratch memory is bounded.
void add_problem(std::vector<Problem>& problems, Problem base, int64_t begin, int64_t end) {
  const int64_t size = base.half ? sizeof(Half) : sizeof(float);
  for (int64_t row = begin; row < end; row += kMostRowsAtOnce) {
    Problem problem = base;
    problem.rows = std::min(kMostRowsAtOnce, end - row);
    problem.x = static_cast<const char*>(base.x) + row * base.inputs * size;
    problem.y = static_cast<char*>(base.y) + row * base.outputs * size;
    problems.push_back(problem);
  }
}

// x [T, M, K], weight [T, (R,) P, K, kPanel] int8, scale [T, (R,) G, O], (counts [T, R] int32); y [T, M, O].
int run(const char* name, bool experts, int count, void** params, int64_t** shapes, const char** types) {
  const Path* path = choose(name);
  if (path == nullptr || count != (experts ? 5 : 4)) return kNoProduct;
  const int64_t tokens = shapes[0][0], rows = shapes[0][1], inputs = shapes[0][2];
  const int64_t each = experts ? shapes[1][1] : 1, *scales = shapes[2] + (experts ? 2 : 1);
  Problem base{};
  base.inputs = inputs, base.groups = scales[0], base.outputs = scales[1];
  base.half = !std::strcmp(types[0], "float16");
  if (shapes[1][experts ? 3 : 2] != inputs || shapes[1][experts ? 2 : 1] != base.panels()) return kBadCall;
  if (base.groups > 1 && base.groups != (inputs + kBlock - 1) / kBlock) return kBadCall;
  if (!base.half && std::strcmp(types[0], "float32")) return kBadCall;
  const int64_t size = base.half ? sizeof(Half) : sizeof(float);
  const int32_t* counts = experts ? static_cast<const int32_t*>(params[3]) : nullptr;
  std::vector<Problem> problems;
  for (int64_t token = 0; token < tokens; ++token) {
    int64_t begin = 0;
    for (int64_t expert = 0; expert < each; ++expert) {
      Problem one = base;
      const int64_t matrix = token * each + expert, end = experts ? begin + counts[matrix] : rows;
      if (end > rows) return kBadCounts;
      one.x = static_cast<const char*>(params[0]) + token * rows * inputs * size;
      one.y = static_cast<char*>(params[count - 1]) + token * rows * base.outputs * size;
      one.weight = static_cast<const int8_t*>(params[1]) + matrix * base.panels() * inputs * kPanel;
      one.scale = static_cast<const float*>(params[2]) + matrix * base.groups * base.outputs;
      add_problem(problems, one, begin, end);
      begin = end;
    }
  }
  solve(*path, std::move(problems));
  return kDone;
}

// One matrix of a token: weight [T, P, K, kPanel], scale [T, G, O].
bool matrix(int64_t token, void** params, int64_t** shapes, int place, int64_t inputs, Problem& problem) {
  problem.inputs = inputs, problem.groups = shapes[place + 1][1], problem.outputs = shapes[place + 1][2];
  problem.weight = static_cast<const int8_t*>(params[place]) + token * problem.panels() * inputs * kPanel;
  problem.scale = static_cast<const float*>(params[place + 1]) + token * problem.groups * problem.outputs;
  return shapes[place][1] == problem.panels() && shapes[place][2] == inputs &&
         (problem.groups == 1 || problem.groups == (inputs + kBlock - 1) / kBlock);
}

// x [T, M, D]; gate, up, down and their scales; (what is added to x gate and x up, [T, 1 or M, F]); y [T, M, O].
// float32.
int run_swiglu(const char* name, bool adds, int count, void** params, int64_t** shapes, const char** types) {
  const Path* path = choose(name);
  if (path == nullptr || count != (adds ? 10 : 8)) return kNoProduct;
  const int64_t tokens = shapes[0][0], rows = shapes[0][1], inputs = shapes[0][2];
  const int64_t inner = shapes[2][2], added = adds ? shapes[7][1] : 0;
  if (std::strcmp(types[0], "float32") || (adds && added != 1 && added != rows)) return kBadCall;
  thread_local std::vector<float> packed, middle;
  if (static_cast<int64_t>(middle.size()) < tokens * rows * inner) middle.resize(tokens * rows * inner);
  std::vector<Problem> firsts, lasts;
  std::vector<Gated> all;
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t row = 0; row < rows; row += kMostRowsAtOnce) {
      Problem gate{}, up{}, down{};
      if (!matrix(token, params, shapes, 1, inputs, gate) || !matrix(token, params, shapes, 3, inputs, up) ||
          !matrix(token, params, shapes, 5, inner, down) || gate.outputs != inner || up.outputs != inner)
        return kBadCall;
      gate.rows = up.rows = down.rows = std::min(kMostRowsAtOnce, rows - row);
      gate.x = static_cast<const float*>(params[0]) + (token * rows + row) * inputs;
      down.y = static_cast<float*>(params[count - 1]) + (token * rows + row) * down.outputs;
      Gated gated{{gate, up}, nullptr, nullptr, added, row, middle.data() + (token * rows + row) * inner};
      if (adds) {
        gated.gate = static_cast<const float*>(params[7]) + token * added * inner;
        gated.up = static_cast<const float*>(params[8]) + token * added * inner;
      }
      down.packed = gated.packed;
      firsts.push_back(gate), lasts.push_back(down), all.push_back(gated);
    }
  pack_all(*path, firsts, packed);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].first[0].packed = all[i].first[1].packed = firsts[i].packed;
    all[i].first[0].wide = all[i].first[1].wide = lasts[i].wide = firsts[i].wide;
  }
  share_panels(firsts, 2, [&](int64_t i, int64_t first, int64_t panels) {
    path->gate_and_up(all[i], first, panels, scratch_of(scratch_for(firsts[i], panels, 2)));
  });
  multiply_all(*path, lasts);
  return kDone;
}

}  // namespace

#define ENTRY(name)                                                                                                   \
  extern "C" int dense_##name(int count, void** params, int*, int64_t** shapes, const char** types, void*, void*) {   \
    return run(#name, false, count, params, shapes, types);                                                           \
  }                                                                                                                   \
  extern "C" int experts_##name(int count, void** params, int*, int64_t** shapes, const char** types, void*, void*) { \
    return run(#name, true, count, params, shapes, types);                                                            \
  }                                                                                                                   \
  extern "C" int swiglu_##name(int count, void** params, int*, int64_t** shapes, const char** types, void*, void*) {  \
    return run_swiglu(#name, false, count, params, shapes, types);                                                    \
  }                                                                                                                   \
  extern "C" int added_swiglu_##name(int count, void** params, int*, int64_t** shapes, const char** types, void*,     \
                                     void*) {                                                                         \
    return run_swiglu(#name, true, count, params, shapes, types);                                                     \
  }

ENTRY(auto)
ENTRY(avx512)
ENTRY(avx2)
ENTRY(portable)
