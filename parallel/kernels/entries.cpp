// Per-token networks of the rankers on the CPU, forward and backward, for MindSpore's `ops.Custom(..., "aot")`.
//
// MindSpore runs such a network as a product, a bias, half a dozen elementwise kernels and another product, each of
// which goes through memory. Here a block of rows goes through the whole network while it lies in the cache, and
// experts see only the rows that chose them. The arithmetic is that of parallel/layers/{grouped,moe,relu_moe,norm}.py;
// tests/parallel/layers/test_fused.py holds the two together.
//
// Loops are marked ivdep: else the compiler asks at run time whether tensors lie side by side, takes another path where
// they do, and rounds differently there, so that a resumed run would not be the straight one to the bit.
//
// Signature of an entry: int name(int count, void **params, int *dims, int64_t **shapes, const char **types,
// void *stream, void *extra); 0 = done. Tensors are float32 and dense.
// Shapes: T tokens, B batch, D width, O outputs (mostly D), F inner width, E experts (each with f = F / E), R routed
// experts, A chosen ones.

#include <algorithm>
#include <cstdint>

#include "exchange.h"
#include "gated_experts.h"
#include "gelu_networks.h"
#include "linear.h"
#include "norms.h"
#include "products.h"
#include "rows.h"
#include "status.h"
#include "swiglu_networks.h"
#include "team.h"
#include "updates.h"

using namespace kernels;

namespace {

int64_t size_of(int dims, const int64_t* shape) {
  int64_t size = 1;
  for (int i = 0; i < dims; ++i) size *= shape[i];
  return size;
}

// Of all dims but the last.
int64_t rows_of(int dims, const int64_t* shape) { return size_of(dims - 1, shape); }

const float* in(void** params, int i) { return static_cast<const float*>(params[i]); }
float* out(void** params, int i) { return static_cast<float*>(params[i]); }

}  // namespace

#define ENTRY(name) \
  extern "C" int name(int count, void** params, int* dims, int64_t** shapes, const char**, void*, void*)

// Whether there is a product to work with.
extern "C" int ready() { return sgemm() != nullptr; }

namespace {

LinearSizes linear_sizes(const int64_t* x, const int64_t* w) { return {x[0], x[1], x[2], w[2]}; }

}  // namespace

// x, w, b (or without b) -> y
ENTRY(linear) {
  if (count < 3 || count > 4) return kBadCall;
  if (sgemm() == nullptr) return kNoProduct;
  linear_forward(linear_sizes(shapes[0], shapes[1]), in(params, 0), in(params, 1), count == 4 ? in(params, 2) : nullptr,
                 out(params, count - 1));
  return kDone;
}

// x, w, dy -> dx, dw (and db)
ENTRY(linear_backward) {
  if (count < 5 || count > 6) return kBadCall;
  if (sgemm() == nullptr) return kNoProduct;
  linear_gradients(linear_sizes(shapes[0], shapes[1]), in(params, 0), in(params, 1), in(params, 2), out(params, 3),
                   out(params, 4), count == 6 ? out(params, 5) : nullptr);
  return kDone;
}

namespace {

// x, w1, b1, w2, b2, or x, gates, w1, b1, w2, b2 where the experts are gated.
GeluWeights gelu_inputs(void** params, bool gated) {
  const int next = gated ? 2 : 1;
  return {in(params, 0),        in(params, next),     in(params, next + 1),
          in(params, next + 2), in(params, next + 3), gated ? in(params, 1) : nullptr};
}

}  // namespace

// x, w1, b1, w2, b2 -> y
ENTRY(feed_forward) {
  if (count != 6) return kBadCall;
  return run_gelu_forward(gelu_sizes(shapes[0], shapes[1], shapes[3], 1), gelu_inputs(params, false), out(params, 5),
                          nullptr);
}

// x, w1, b1, w2, b2 -> y, z
ENTRY(feed_forward_kept) {
  if (count != 7) return kBadCall;
  return run_gelu_forward(gelu_sizes(shapes[0], shapes[1], shapes[3], 1), gelu_inputs(params, false), out(params, 5),
                          out(params, 6));
}

// x, w1, b1, w2, b2, z, dy -> dx, dw1, db1, dw2, db2
ENTRY(feed_forward_backward) {
  if (count != 12) return kBadCall;
  return run_gelu_backward(gelu_sizes(shapes[0], shapes[1], shapes[3], 1), gelu_inputs(params, false), in(params, 5),
                           in(params, 6),
                           {out(params, 7), out(params, 8), out(params, 9), out(params, 10), out(params, 11), nullptr});
}

// x, gates, w1, b1, w2, b2 -> y
ENTRY(gated_experts) {
  if (count != 7) return kBadCall;
  return run_gated_forward(gelu_sizes(shapes[0], shapes[2], shapes[4], shapes[1][2]), gelu_inputs(params, true),
                           out(params, 6), nullptr);
}

// x, gates, w1, b1, w2, b2 -> y, z
ENTRY(gated_experts_kept) {
  if (count != 8) return kBadCall;
  return run_gated_forward(gelu_sizes(shapes[0], shapes[2], shapes[4], shapes[1][2]), gelu_inputs(params, true),
                           out(params, 6), out(params, 7));
}

// x, gates, w1, b1, w2, b2, z, dy -> dx, dgates, dw1, db1, dw2, db2
ENTRY(gated_experts_backward) {
  if (count != 14) return kBadCall;
  return run_gated_backward(
      gelu_sizes(shapes[0], shapes[2], shapes[4], shapes[1][2]), gelu_inputs(params, true), in(params, 6),
      in(params, 7),
      {out(params, 8), out(params, 10), out(params, 11), out(params, 12), out(params, 13), out(params, 9)});
}

namespace {

int run_swiglu(int64_t** shapes, void** params, float* y, float* a, float* b) {
  if (sgemm() == nullptr) return kNoProduct;
  const int64_t tokens = shapes[0][0], batch = shapes[0][1], width = shapes[0][2], inner = shapes[1][2];
  const int64_t blocks = (batch + kForwardRows - 1) / kForwardRows, one = width * inner, outputs = shapes[3][2];
  Team::get().run(static_cast<int>(tokens * blocks), [&](int block) {
    const int64_t t = block / blocks, first = block % blocks * kForwardRows, start = t * batch + first;
    const int64_t rows = std::min(kForwardRows, batch - first);
    float* own = a ? a + start * inner : scratch<6>(2 * rows * inner);
    swiglu_forward(in(params, 0) + start * width, rows, width, inner, outputs,
                   {in(params, 1) + t * one, in(params, 2) + t * one, in(params, 3) + t * inner * outputs}, nullptr,
                   own, b ? b + start * inner : own + rows * inner, false, y + start * outputs);
  });
  return kDone;
}

MoeSizes moe_sizes(int64_t** shapes, int64_t chosen, float alpha) {
  return {shapes[0][0], shapes[0][1], shapes[0][2], shapes[2][2], shapes[4][2], shapes[1][2], chosen, alpha};
}

MoeWeights moe_weights(void** params) {
  return {in(params, 0),
          in(params, 1),
          {in(params, 2), in(params, 3), in(params, 4)},
          {in(params, 5), in(params, 6), in(params, 7)}};
}

int run_moe(const MoeSizes& n, const MoeWeights& w, const MoeKept& kept, float* y) {
  if (sgemm() == nullptr) return kNoProduct;
  Team::get().run(static_cast<int>(n.tokens), [&](int t) { moe_forward(n, w, kept, t, y); });
  return kDone;
}

}  // namespace

// x, gate, up, down -> y
ENTRY(swiglu) {
  if (count != 5) return kBadCall;
  return run_swiglu(shapes, params, out(params, 4), nullptr, nullptr);
}

// x, gate, up, down -> y, a, b
ENTRY(swiglu_kept) {
  if (count != 7) return kBadCall;
  return run_swiglu(shapes, params, out(params, 4), out(params, 5), out(params, 6));
}

// x, gate, up, down, a, b, dy -> dx, dgate, dup, ddown
ENTRY(swiglu_backward) {
  if (count != 11) return kBadCall;
  if (sgemm() == nullptr) return kNoProduct;
  const int64_t batch = shapes[0][1], width = shapes[0][2], inner = shapes[1][2], outputs = shapes[3][2];
  const int64_t one = width * inner, last = inner * outputs;
  Team::get().run(static_cast<int>(shapes[0][0]), [&](int t) {
    for (int64_t first = 0; first < batch; first += kBackwardRows) {
      const int64_t rows = std::min(kBackwardRows, batch - first), start = t * batch + first;
      swiglu_rows_backward(in(params, 0) + start * width, in(params, 6) + start * outputs, rows, width, inner, outputs,
                           {in(params, 1) + t * one, in(params, 2) + t * one, in(params, 3) + t * last}, nullptr,
                           in(params, 4) + start * inner, in(params, 5) + start * inner, first > 0,
                           {out(params, 8) + t * one, out(params, 9) + t * one, out(params, 10) + t * last}, nullptr,
                           false, out(params, 7) + start * width);
    }
  });
  return kDone;
}

// x, router, shared gate, up, down, routed gate, up, down, sizes [A] (its length counts), alpha [1] -> y
ENTRY(sparse_experts) {
  if (count != 11) return kBadCall;
  return run_moe(moe_sizes(shapes, shapes[8][0], in(params, 9)[0]), moe_weights(params),
                 {nullptr, nullptr, nullptr, nullptr}, out(params, 10));
}

// the same -> y, probabilities, chosen, a, b
ENTRY(sparse_experts_kept) {
  if (count != 15) return kBadCall;
  return run_moe(moe_sizes(shapes, shapes[8][0], in(params, 9)[0]), moe_weights(params),
                 {out(params, 11), static_cast<int32_t*>(params[12]), out(params, 13), out(params, 14)},
                 out(params, 10));
}

// the same, probabilities, chosen, a, b, dy -> dx, drouter, dgate, dup, ddown of the shared, of the routed
ENTRY(sparse_experts_backward) {
  if (count != 23) return kBadCall;
  if (sgemm() == nullptr) return kNoProduct;
  const MoeSizes n = moe_sizes(shapes, shapes[8][0], in(params, 9)[0]);
  const MoeWeights w = moe_weights(params);
  const MoeKept kept{out(params, 10), static_cast<int32_t*>(params[11]), out(params, 12), out(params, 13)};
  const MoeGradients d{out(params, 15),
                       out(params, 16),
                       {out(params, 17), out(params, 18), out(params, 19)},
                       {out(params, 20), out(params, 21), out(params, 22)}};
  Team::get().run(static_cast<int>(n.tokens), [&](int t) { moe_backward(n, w, kept, in(params, 14), d, t); });
  return kDone;
}

// x, gamma, beta, epsilon [1] -> y
ENTRY(layer_norm) {
  if (count != 5) return kBadCall;
  norm_forward<true>(in(params, 0), rows_of(dims[0], shapes[0]), shapes[1][0], in(params, 1), in(params, 2),
                     in(params, 3)[0], out(params, 4));
  return kDone;
}

// x, gamma, epsilon [1], dy -> dx, dgamma, dbeta
ENTRY(layer_norm_backward) {
  if (count != 7) return kBadCall;
  norm_backward<true>(in(params, 0), rows_of(dims[0], shapes[0]), shapes[1][0], in(params, 1), in(params, 2)[0],
                      in(params, 3), out(params, 4), out(params, 5), out(params, 6));
  return kDone;
}

// x, gamma, epsilon [1] -> y
ENTRY(rms_norm) {
  if (count != 4) return kBadCall;
  norm_forward<false>(in(params, 0), rows_of(dims[0], shapes[0]), shapes[1][0], in(params, 1), nullptr,
                      in(params, 2)[0], out(params, 3));
  return kDone;
}

// x, gamma, epsilon [1], dy -> dx, dgamma
ENTRY(rms_norm_backward) {
  if (count != 6) return kBadCall;
  norm_backward<false>(in(params, 0), rows_of(dims[0], shapes[0]), shapes[1][0], in(params, 1), in(params, 2)[0],
                       in(params, 3), out(params, 4), out(params, 5), nullptr);
  return kDone;
}

// x -> sum of its squares
ENTRY(squares) {
  if (count != 2) return kBadCall;
  out(params, 1)[0] = sum_squares(in(params, 0), size_of(dims[0], shapes[0]));
  return kDone;
}

// parameter, m, v, gradient, [rate, beta1, beta2, epsilon, decay] -> 0; the first three are changed in place
ENTRY(adam) {
  if (count != 6) return kBadCall;
  const float* s = in(params, 4);
  adam_update(out(params, 0), out(params, 1), out(params, 2), in(params, 3), size_of(dims[0], shapes[0]),
              {s[0], s[1], s[2], s[3], s[4]});
  out(params, 5)[0] = 0.0f;
  return kDone;
}

// x [S, B, R, K] -> [R, B, S, K]
ENTRY(exchange_tokens) {
  if (count != 2 || dims[0] != 4) return kBadCall;
  exchange(in(params, 0), shapes[0][0], shapes[0][1], shapes[0][2], shapes[0][3], out(params, 1));
  return kDone;
}

// x, y -> x + y
ENTRY(add_residual) {
  if (count != 3) return kBadCall;
  add(in(params, 0), in(params, 1), size_of(dims[0], shapes[0]), out(params, 2));
  return kDone;
}
