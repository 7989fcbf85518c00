// Vectors of 16 floats whatever the processor has, so that sums over a row run in one order everywhere.

#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef INLINE
#define INLINE static inline __attribute__((always_inline))
#endif

namespace kernels {

typedef float Wide __attribute__((vector_size(64), aligned(4)));
typedef int32_t WideInt __attribute__((vector_size(64), aligned(4)));
constexpr int kWide = 16;

INLINE Wide load(const float* x) { return *reinterpret_cast<const Wide*>(x); }
INLINE void store(float* x, Wide v) { *reinterpret_cast<Wide*>(x) = v; }
#if defined(__AVX512F__)
INLINE Wide fused(Wide a, Wide b, Wide c) { return _mm512_fmadd_ps(a, b, c); }
#else
INLINE Wide fused(Wide a, Wide b, Wide c) { return a * b + c; }
#endif
INLINE float total(Wide v) {
  float parts[kWide], sum = 0;
  store(parts, v);
  for (int i = 0; i < kWide; ++i) sum += parts[i];
  return sum;
}
INLINE float largest(Wide v) {
  float parts[kWide];
  store(parts, v);
  return *std::max_element(parts, parts + kWide);
}

// e^x: 2^n e^r with n = round(x / ln 2), the series of e^r up to r^6 / 720; 2e-7 relative, at least 2^-126.
INLINE Wide exponential(Wide x) {
  x = x < -87.0f ? Wide{} - 87.0f : x;
  x = x > 88.0f ? Wide{} + 88.0f : x;
  const Wide n = (x * 1.44269504089f + 12582912.0f) - 12582912.0f;
  // ln 2 in two parts, so that little is lost of x - n ln 2.
  const Wide r = fused(n, Wide{} - 1.428606765330187e-6f, fused(n, Wide{} - 0.693145751953125f, x));
  Wide y = fused(r, Wide{} + 1.3888889e-3f, Wide{} + 8.3333333e-3f);
  y = fused(y, r, Wide{} + 4.1666667e-2f);
  y = fused(y, r, Wide{} + 1.6666667e-1f);
  y = fused(y, r, Wide{} + 0.5f);
  y = fused(y, r, Wide{} + 1.0f);
  y = fused(y, r, Wide{} + 1.0f);
  return y * (Wide)((__builtin_convertvector(n, WideInt) + 127) << 23);
}

// Place of the first largest of `size` floats.
inline int32_t first_largest(const float* x, int64_t size) {
  int64_t i = 0;
  float top = x[0];
  if (size >= kWide) {
    Wide most = load(x);
    for (; i + kWide <= size; i += kWide) {
      const Wide next = load(x + i);
      most = next > most ? next : most;
    }
    top = largest(most);
  }
  for (; i < size; ++i) top = std::max(top, x[i]);
  int64_t place = 0;
  while (place + 1 < size && x[place] != top) ++place;
  return static_cast<int32_t>(place);
}

}  // namespace kernels
