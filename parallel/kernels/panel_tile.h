// A few rows times panels of weights, in registers; included once for every instruction set, inside a namespace that
// names kLanes (float32 values of a vector), Vector, kMostRows (rows whose sums fit into the registers), multiply_add
// (a b + c, rounded once where the processor can) and widen (kLanes weights to float32, from int8 or float).
//
// A panel holds kPanel columns of a weight, [K, kPanel], so that one row of it is read as a whole.

// y[p][r][0 .. 2 kLanes) += scale[p] * sum over k < depth of x[k][r] w[p][k][..], for R rows and P panels, in U partial
// sums that need not wait for each other. Panels lie `w_step` weights apart and their sums `y_step` floats; scale is
// for int8 only. What a row gives depends on U alone, not on R or P.
template <int R, int U, int P, typename W>
INLINE void add_tile(const float* x, const W* w, int64_t w_step, int64_t depth, const float* scale, float* y,
                     int64_t y_step) {
  Vector sums[U][P][R][2] = {};
  int64_t k = 0;
  for (; k + U <= depth; k += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const W* row = w + p * w_step + (k + u) * kPanel;
        __builtin_prefetch(reinterpret_cast<const char*>(row) + kAhead, 0, 1);
        const Vector left = widen(row), right = widen(row + kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Vector value = Vector{} + x[(k + u) * R + r];
          sums[u][p][r][0] = multiply_add(value, left, sums[u][p][r][0]);
          sums[u][p][r][1] = multiply_add(value, right, sums[u][p][r][1]);
        }
      }
  }
  for (; k < depth; ++k)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Vector left = widen(w + p * w_step + k * kPanel), right = widen(w + p * w_step + k * kPanel + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vector value = Vector{} + x[k * R + r];
        sums[0][p][r][0] = multiply_add(value, left, sums[0][p][r][0]);
        sums[0][p][r][1] = multiply_add(value, right, sums[0][p][r][1]);
      }
    }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Vector sum = sums[0][p][r][half];
#pragma GCC unroll 4
        for (int u = 1; u < U; ++u) sum += sums[u][p][r][half];
        Vector& place = *reinterpret_cast<Vector*>(y + p * y_step + r * kPanel + half * kLanes);
        if constexpr (sizeof(W) == 1)
          place = multiply_add(sum, *reinterpret_cast<const Vector*>(scale + p * kPanel + half * kLanes), place);
        else
          place += sum;
      }
}
