// Row-major float products on one thread, for kernels that spread their own work over a `Team`: oneDNN's, which
// MindSpore has loaded already.

#pragma once

#include <dlfcn.h>

#include <cstdint>

namespace kernels {

typedef int (*Sgemm)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t, float,
                     float*, int64_t);

// Null where the process holds no oneDNN.
inline Sgemm find_sgemm() {
  for (const char* name : {"libdnnl.so.3", "libdnnl.so.2", "libdnnl.so"}) {
    void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (library != nullptr)
      if (void* symbol = dlsym(library, "dnnl_sgemm")) return reinterpret_cast<Sgemm>(symbol);
  }
  return nullptr;
}

inline Sgemm sgemm() {
  static const Sgemm found = find_sgemm();
  return found;
}

// A matrix in memory: the first element and how many elements lie from one row to the next.
struct Matrix {
  const float* data;
  int64_t stride;
};

// c [M, N] = a [M, K] b [K, N] (+ c if `add`). With `ta` a is stored [K, M], with `tb` b is stored [N, K].
inline void multiply(bool ta, bool tb, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, bool add, float* c,
                     int64_t c_stride) {
  sgemm()(ta ? 'T' : 'N', tb ? 'T' : 'N', m, n, k, 1.0f, a.data, a.stride, b.data, b.stride, add ? 1.0f : 0.0f, c,
          c_stride);
}

}  // namespace kernels
