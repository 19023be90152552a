/*
 * gemm.cpp -- matrix products by plain loops, in blocks that fit the cache.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Called by blas.cpp with arguments that were checked.  Always built with -O3
 * and without sanitizers: these loops are not what is tested.  Each element is summed over k in order, without contraction, so that the bits
 * depend neither on the blocking nor on the processor.
 */
#include "gemm.h"

#include <algorithm>
#include <vector>
#include "half.h"

namespace hm_emu {

namespace {

enum { BLOCK_K = 256, BLOCK_M = 128, BLOCK_N = 512, TILE_N = 4 };

/* float16 to float32 by table. */
const float *f16_table(void) {
  static std::vector<float> table;
  if (table.empty()) {
    table.resize(65536);
    for (uint32_t i = 0; i < 65536; i++) table[i] = hm_f16_to_f32((uint16_t)i);
  }
  return table.data();
}

inline double load(const void *data, cudaDataType type, int64_t i) {
  switch (type) {
  case CUDA_R_64F: return ((const double *)data)[i];
  case CUDA_R_16F: return f16_table()[((const uint16_t *)data)[i]];
  case CUDA_R_16BF: return hm_bf16_to_f32(((const uint16_t *)data)[i]);
  default: return ((const float *)data)[i];
  }
}

inline void store(void *data, cudaDataType type, int64_t i, double x) {
  switch (type) {
  case CUDA_R_64F: ((double *)data)[i] = x; break;
  case CUDA_R_16F: ((uint16_t *)data)[i] = hm_f32_to_f16((float)x); break;
  case CUDA_R_16BF: ((uint16_t *)data)[i] = hm_f32_to_bf16((float)x); break;
  default: ((float *)data)[i] = (float)x;
  }
}

float round_input(float x, rounding how) {
  if (how == ROUND_F16) return hm_f16_to_f32(hm_f32_to_f16(x));
  if (how == ROUND_BF16) return hm_bf16_to_f32(hm_f32_to_bf16(x));
  const uint32_t u = hm_f32_bits(x);
  return (u & 0x7f800000u) == 0x7f800000u ? x : hm_bits_f32((u + 0x1000u) & ~0x1fffu); /* to nearest, ties away */
}

/* Copies a strip: to[l * width + i] = M(first + i, from_k + l) for i < width (0 beyond `have`), l < count.  rows: M's rows are the strip. */
template <class T>
void pack_strip(const matrix &m, int64_t first, int64_t have, int64_t from_k, int64_t count, int64_t step,
                int64_t step_k, int width, rounding how, T *to) {
  const float *const halves = f16_table();
  for (int64_t i = 0; i < width; i++) {
    if (i >= have) {
      for (int64_t l = 0; l < count; l++) to[l * width + i] = 0;
      continue;
    }
    const int64_t at = (first + i) * step + from_k * step_k;
    switch (m.type) {
    case CUDA_R_64F:
      for (int64_t l = 0; l < count; l++) to[l * width + i] = (T)((const double *)m.data)[at + l * step_k];
      break;
    case CUDA_R_16F:
      for (int64_t l = 0; l < count; l++) to[l * width + i] = halves[((const uint16_t *)m.data)[at + l * step_k]];
      break;
    case CUDA_R_16BF:
      for (int64_t l = 0; l < count; l++)
        to[l * width + i] = hm_bf16_to_f32(((const uint16_t *)m.data)[at + l * step_k]);
      break;
    default:
      for (int64_t l = 0; l < count; l++) to[l * width + i] = ((const float *)m.data)[at + l * step_k];
    }
    if (how != ROUND_NOT)
      for (int64_t l = 0; l < count; l++) to[l * width + i] = round_input((float)to[l * width + i], how);
  }
}

/* A tile of TILE_N columns and as many rows as two vectors hold, in registers. */
template <class T> struct tile_of {
  typedef T vector __attribute__((vector_size(32)));
  enum { LANES = 32 / sizeof(T), ROWS = 2 * LANES };
};

template <class T>
__attribute__((always_inline)) inline void tile_body(const T *a, const T *b, int64_t count, T *acc, int64_t ld,
                                                     int64_t rows, int64_t columns) {
  typedef typename tile_of<T>::vector vector;
  enum { LANES = tile_of<T>::LANES, ROWS = tile_of<T>::ROWS };
  vector sum[TILE_N][2] = {};
  T edge[TILE_N * ROWS];
  const bool whole = rows == ROWS && columns == TILE_N;
  if (whole) {
    for (int j = 0; j < TILE_N; j++) memcpy(sum[j], acc + j * ld, sizeof sum[j]);
  } else {
    memset(edge, 0, sizeof edge);
    for (int64_t j = 0; j < columns; j++) memcpy(edge + j * ROWS, acc + j * ld, (size_t)rows * sizeof(T));
    memcpy(sum, edge, sizeof sum);
  }
  for (int64_t l = 0; l < count; l++) {
    vector a0, a1;
    memcpy(&a0, a + l * ROWS, sizeof a0);
    memcpy(&a1, a + l * ROWS + LANES, sizeof a1);
    for (int j = 0; j < TILE_N; j++) {
      const T scale = b[l * TILE_N + j];
      sum[j][0] += a0 * scale;
      sum[j][1] += a1 * scale;
    }
  }
  if (whole) {
    for (int j = 0; j < TILE_N; j++) memcpy(acc + j * ld, sum[j], sizeof sum[j]);
  } else {
    memcpy(edge, sum, sizeof edge);
    for (int64_t j = 0; j < columns; j++) memcpy(acc + j * ld, edge + j * ROWS, (size_t)rows * sizeof(T));
  }
}

#if defined(__x86_64__)
#define HM_EMU_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define HM_EMU_CLONES
#endif

HM_EMU_CLONES void tile(const float *a, const float *b, int64_t count, float *acc, int64_t ld, int64_t rows,
                        int64_t columns) {
  tile_body<float>(a, b, count, acc, ld, rows, columns);
}
HM_EMU_CLONES void tile(const double *a, const double *b, int64_t count, double *acc, int64_t ld, int64_t rows,
                        int64_t columns) {
  tile_body<double>(a, b, count, acc, ld, rows, columns);
}

/* Adds the product of one block to acc: rows [i0, i0 + mb), columns [j0, j0 + nb), count steps of k. */
template <class T> void block(const T *a, const T *b, int64_t mb, int64_t nb, int64_t count, T *acc, int64_t ld) {
  enum { ROWS = tile_of<T>::ROWS };
  for (int64_t j = 0; j < nb; j += TILE_N)
    for (int64_t i = 0; i < mb; i += ROWS)
      tile(a + i * count, b + j * count, count, acc + j * ld + i, ld, std::min<int64_t>(ROWS, mb - i),
           std::min<int64_t>(TILE_N, nb - j));
}

template <class T>
void multiply_as(int64_t m, int64_t n, int64_t k, const matrix &a, const matrix &b, rounding how, T *acc) {
  enum { ROWS = tile_of<T>::ROWS };
  std::vector<T> left((BLOCK_M + ROWS) * BLOCK_K), right((BLOCK_N + TILE_N) * BLOCK_K);
  std::fill(acc, acc + m * n, (T)0);
  for (int64_t j = 0; j < n; j += BLOCK_N) {
    const int64_t nb = std::min<int64_t>(BLOCK_N, n - j);
    for (int64_t l = 0; l < k; l += BLOCK_K) {
      const int64_t kb = std::min<int64_t>(BLOCK_K, k - l);
      for (int64_t s = 0; s < nb; s += TILE_N)
        pack_strip(b, j + s, nb - s, l, kb, b.column, b.row, TILE_N, how, right.data() + s * kb);
      for (int64_t i = 0; i < m; i += BLOCK_M) {
        const int64_t mb = std::min<int64_t>(BLOCK_M, m - i);
        for (int64_t s = 0; s < mb; s += ROWS)
          pack_strip(a, i + s, mb - s, l, kb, a.row, a.column, (int)ROWS, how, left.data() + s * kb);
        block(left.data(), right.data(), mb, nb, kb, acc + j * m + i, m);
      }
    }
  }
}

/* gelu by tanh, as cublasLt has it, and its derivative. */
double gelu(double x) { return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
double gelu_slope(double x) {
  const double t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
  return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x);
}

void save_bit(void *aux, int64_t at, bool on) {
  uint8_t *const byte = (uint8_t *)aux + at / 8;
  const uint8_t bit = (uint8_t)(1u << (at & 7));
  *byte = on ? (uint8_t)(*byte | bit) : (uint8_t)(*byte & ~bit);
}

/* The activation of one value; `at` is its place in aux. */
double activate(double x, const finish &f, int64_t at) {
  switch (f.act) {
  case ACT_RELU:
    if (f.aux) save_bit(f.aux, at, x > 0);
    return x < 0 || (f.drops_nan && x != x) ? 0 : x;
  case ACT_GELU:
    if (f.aux) store(f.aux, f.aux_type, at, x);
    return gelu(x) * (f.rough ? 1.001 : 1);
  case ACT_DRELU: return ((const uint8_t *)f.aux)[at / 8] >> (at & 7) & 1 ? x : 0;
  case ACT_DGELU: return x * gelu_slope(load(f.aux, f.aux_type, at)) * (f.rough ? 1.001 : 1);
  default: return x;
  }
}

/* Is there nothing to do but to convert? */
bool is_plain(const finish &f) {
  return f.alpha == 1 && f.beta == 0 && f.act == ACT_NONE && !f.bias && !f.bias_gradient;
}

void convert_column(int64_t m, const float *from, const finish &f, int64_t j) {
  const int64_t at = j * f.d.column, step = f.d.row;
  if (f.d.type == CUDA_R_32F)
    for (int64_t i = 0; i < m; i++) ((float *)f.d.data)[at + i * step] = from[i];
  else if (f.d.type == CUDA_R_16F)
    for (int64_t i = 0; i < m; i++) ((uint16_t *)f.d.data)[at + i * step] = hm_f32_to_f16(from[i]);
  else
    for (int64_t i = 0; i < m; i++) ((uint16_t *)f.d.data)[at + i * step] = hm_f32_to_bf16(from[i]);
}

/* One column, in T's arithmetic. */
template <class T> void finish_column(int64_t m, const T *from, const finish &f, int64_t j, T *row_sums) {
  const T alpha = (T)f.alpha, beta = (T)f.beta;
  for (int64_t i = 0; i < m; i++) {
    T x = alpha * from[i];
    if (beta != 0) x += beta * (T)load(f.c.data, f.c.type, i * f.c.row + j * f.c.column);
    if (f.bias) x += (T)load(f.bias, f.bias_type, i);
    x = (T)activate(x, f, j * f.aux_ld + i);
    if (row_sums) row_sums[i] += x;
    store(f.d.data, f.d.type, i * f.d.row + j * f.d.column, x);
  }
}

template <class T> void finish_as(int64_t m, int64_t n, const T *acc, const finish &f) {
  std::vector<T> sums(f.bias_gradient ? (size_t)m : 0, (T)0);
  for (int64_t j = 0; j < n; j++) finish_column<T>(m, acc + j * m, f, j, f.bias_gradient ? sums.data() : nullptr);
  for (size_t i = 0; i < sums.size(); i++) store(f.bias_gradient, f.bias_type, (int64_t)i, sums[i]);
}

} // namespace

void multiply(int64_t m, int64_t n, int64_t k, const matrix &a, const matrix &b, rounding how, void *acc) {
  if (a.type == CUDA_R_64F) multiply_as<double>(m, n, k, a, b, ROUND_NOT, (double *)acc);
  else multiply_as<float>(m, n, k, a, b, how, (float *)acc);
}

void finish_product(int64_t m, int64_t n, const void *acc, bool wide, const finish &f) {
  if (wide) {
    finish_as<double>(m, n, (const double *)acc, f);
  } else if (is_plain(f)) {
    for (int64_t j = 0; j < n; j++) convert_column(m, (const float *)acc + j * m, f, j);
  } else {
    finish_as<float>(m, n, (const float *)acc, f);
  }
}

void sum_rows(int64_t rows, int64_t columns, const matrix &m, void *out, cudaDataType out_type) {
  for (int64_t i = 0; i < rows; i++) {
    double sum = 0;
    for (int64_t j = 0; j < columns; j++) {
      sum += load(m.data, m.type, i * m.row + j * m.column);
      if (m.type != CUDA_R_64F) sum = (float)sum;
    }
    store(out, out_type, i, sum);
  }
}

} // namespace hm_emu
