/*
 * view.h -- how kernels see strided memory, and how they read and write numbers of any dtype.
 *
 * Host side: the common geometry of some views is made as simple as it can be (cpu/layout.h: sizes of 1 dropped, dims
 * ordered and joined), cut into pieces below 2^31 elements, and put into a struct that is passed to the kernel by
 * value.  Device side: a flat 32-bit index becomes one 64-bit offset per operand, by multiplication instead of
 * division.
 *
 * Included by the kernels of this folder.  Owns nothing.
 */
#ifndef HM_CUDA_VIEW_H
#define HM_CUDA_VIEW_H

#include "layout.h"
#include "kernels_cuda.h"

/* Threads of a block where nothing else is said, and most blocks of a grid: kernels stride over the rest. */
enum { HM_BLOCK = 256, HM_MAX_BLOCKS = 4096 };
/* Kernels are declared with __launch_bounds__(HM_BLOCK, 2): left alone, ptxas spills a register or two to fit one
 * more block on a multiprocessor. */

/* Elements of one launch at most.  (Tests build with a small one.) */
#ifndef HM_CUDA_PIECE
#define HM_CUDA_PIECE ((int64_t)1 << 31)
#endif

/* ====== Division by a number that does not change ====== */

/* n / size = (high half of n * magic + n) >> shift, for n below 2^31. */
typedef struct hm_divisor {
  uint32_t size, magic, shift;
} hm_divisor;

static inline hm_divisor hm_make_divisor(int64_t size) {
  if (size < 1) size = 1; /* of an empty tensor: nothing is divided */
  hm_divisor d = {(uint32_t)size, 0, 0};
  while (((uint64_t)1 << d.shift) < (uint64_t)size) d.shift++;
  d.magic = (uint32_t)((((uint64_t)1 << 32) * (((uint64_t)1 << d.shift) - (uint64_t)size)) / (uint64_t)size + 1);
  return d;
}

HM_DEV uint32_t hm_divide(uint32_t n, hm_divisor d) { return (__umulhi(n, d.magic) + n) >> d.shift; }

/* ====== Walks: K operands of one shape ====== */

template <int K> struct hm_walk {
  int32_t ndim;   /* at least 1 */
  uint32_t count; /* elements, or groups of them along the innermost dim; below 2^31 */
  hm_divisor size[HM_MAX_NDIM];
  int64_t stride[K][HM_MAX_NDIM];
};

/* A loop as a walk; `group` elements of the innermost dim count as one (they must divide it unless it is the only
 * dim). */
template <int K> static hm_walk<K> hm_make_walk(const hm_loop *l, int group = 1) {
  hm_walk<K> w;
  memset(&w, 0, sizeof w);
  w.ndim = l->ndim;
  int64_t count = 1;
  for (int d = 0; d < l->ndim; d++) {
    const int64_t unit = d == l->ndim - 1 ? group : 1, size = l->shape[d] / unit;
    count *= size;
    w.size[d] = hm_make_divisor(size > 0 ? size : 1);
    for (int k = 0; k < K; k++) w.stride[k][d] = l->stride[k][d] * unit;
  }
  w.count = (uint32_t)count;
  return w;
}

/* Offsets of element i. */
template <int K> HM_DEV void hm_offsets(const hm_walk<K> &w, uint32_t i, int64_t (&at)[K]) {
#pragma unroll
  for (int k = 0; k < K; k++) at[k] = 0;
  for (int d = w.ndim - 1; d > 0; d--) {
    const uint32_t q = hm_divide(i, w.size[d]), r = i - q * w.size[d].size;
#pragma unroll
    for (int k = 0; k < K; k++) at[k] += (int64_t)r * w.stride[k][d];
    i = q;
  }
#pragma unroll
  for (int k = 0; k < K; k++) at[k] += (int64_t)i * w.stride[k][0];
}

/* Calls run(loop, base) for pieces of a loop of at most HM_CUDA_PIECE - 1 elements; base[k]: where operand k
 * begins, in elements. */
template <class F> static int hm_each_piece(hm_loop *l, int operands, int64_t *base, F run) {
  int64_t numel = 1;
  int dim = -1;
  for (int d = l->ndim - 1; d >= 0; d--) {
    numel *= l->shape[d];
    if (l->shape[d] > 1) dim = d;
  }
  if (numel < HM_CUDA_PIECE || dim < 0) return run(*l, base);
  const int64_t whole = l->shape[dim], half = whole > 128 ? whole / 128 * 64 : whole / 2;
  int64_t second[HM_MAX_IN + HM_MAX_OUT];
  for (int k = 0; k < operands; k++) second[k] = base[k] + half * l->stride[k][dim];
  l->shape[dim] = half;
  int status = hm_each_piece(l, operands, base, run);
  l->shape[dim] = whole - half;
  if (status == HM_OK) status = hm_each_piece(l, operands, second, run);
  l->shape[dim] = whole;
  return status;
}

/* Blocks for `n` threads of work. */
static inline unsigned hm_blocks(int64_t n, int64_t per_block = HM_BLOCK) {
  const int64_t blocks = (n + per_block - 1) / per_block;
  return (unsigned)(blocks < 1 ? 1 : blocks > HM_MAX_BLOCKS ? (int64_t)HM_MAX_BLOCKS : blocks);
}

HM_DEV uint32_t hm_global_thread(void) { return blockIdx.x * blockDim.x + threadIdx.x; }
HM_DEV uint32_t hm_global_threads(void) { return gridDim.x * blockDim.x; }

/* A view without dim `dim`. */
static inline hm_view hm_without_dim(const hm_view *v, int dim) {
  int64_t step;
  return hm__without_dim(v, dim, &step);
}

static inline char *hm_element(const void *data, int64_t at, int dtype) {
  return (char *)const_cast<void *>(data) + at * hm_dtype_size(dtype);
}

/* ====== One number of any dtype ====== */

/* Between what is computed in; out of range as half.h has it. */
HM_DEV void hm_number(float *to, float x) { *to = x; }
HM_DEV void hm_number(float *to, double x) { *to = (float)x; }
HM_DEV void hm_number(float *to, int64_t x) { *to = (float)x; }
HM_DEV void hm_number(double *to, float x) { *to = (double)x; }
HM_DEV void hm_number(double *to, double x) { *to = x; }
HM_DEV void hm_number(double *to, int64_t x) { *to = (double)x; }
HM_DEV void hm_number(int64_t *to, float x) { *to = hm_f32_to_i64(x); }
HM_DEV void hm_number(int64_t *to, double x) { *to = hm_f64_to_i64(x); }
HM_DEV void hm_number(int64_t *to, int64_t x) { *to = x; }

/* Element `at` of an array, as T (float, double or int64_t). */
template <class T> HM_DEV T hm_load(const void *data, int dtype, int64_t at) {
  T x;
  switch (dtype) {
  case HM_F32: hm_number(&x, static_cast<const float *>(data)[at]); break;
  case HM_F16: hm_number(&x, hm_dev_f16_to_f32(static_cast<const uint16_t *>(data)[at])); break;
  case HM_BF16: hm_number(&x, hm_dev_bf16_to_f32(static_cast<const uint16_t *>(data)[at])); break;
  case HM_F64: hm_number(&x, static_cast<const double *>(data)[at]); break;
  case HM_I64: hm_number(&x, static_cast<const int64_t *>(data)[at]); break;
  case HM_I32: hm_number(&x, (int64_t) static_cast<const int32_t *>(data)[at]); break;
  case HM_U8: hm_number(&x, (int64_t) static_cast<const uint8_t *>(data)[at]); break;
  default: hm_number(&x, (int64_t)(static_cast<const uint8_t *>(data)[at] != 0)); break;
  }
  return x;
}

/* N elements of an array; the dtype is looked at once, so that the loads run side by side. */
template <int N, class T> HM_DEV void hm_load_many(const void *data, int dtype, const int64_t *at, T *x) {
#define HM_LOADS(expression)                                                                                           \
  for (int i = 0; i < N; i++) hm_number(&x[i], (expression))
  switch (dtype) {
  case HM_F32:
#pragma unroll
    HM_LOADS(static_cast<const float *>(data)[at[i]]);
    break;
  case HM_F16:
#pragma unroll
    HM_LOADS(hm_dev_f16_to_f32(static_cast<const uint16_t *>(data)[at[i]]));
    break;
  case HM_BF16:
#pragma unroll
    HM_LOADS(hm_dev_bf16_to_f32(static_cast<const uint16_t *>(data)[at[i]]));
    break;
  case HM_F64:
#pragma unroll
    HM_LOADS(static_cast<const double *>(data)[at[i]]);
    break;
  default:
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = hm_load<T>(data, dtype, at[i]);
    break;
  }
#undef HM_LOADS
}

HM_DEV uint16_t hm_to_f16(float x) { return hm_dev_f32_to_f16(x); }
HM_DEV uint16_t hm_to_f16(double x) { return hm_f64_to_f16(x); }
HM_DEV uint16_t hm_to_f16(int64_t x) { return hm_i64_to_f16(x); }
HM_DEV uint16_t hm_to_bf16(float x) { return hm_dev_f32_to_bf16(x); }
HM_DEV uint16_t hm_to_bf16(double x) { return hm_f64_to_bf16(x); }
HM_DEV uint16_t hm_to_bf16(int64_t x) { return hm_i64_to_bf16(x); }
HM_DEV int32_t hm_to_i32(float x) { return hm_f32_to_i32(x); }
HM_DEV int32_t hm_to_i32(double x) { return hm_f64_to_i32(x); }
HM_DEV int32_t hm_to_i32(int64_t x) { return (int32_t)x; }

/* Writes x, rounded once, as element `at` of an array. */
template <class T> HM_DEV void hm_store(void *data, int dtype, int64_t at, T x) {
  switch (dtype) {
  case HM_F32: hm_number(static_cast<float *>(data) + at, x); break;
  case HM_F16: static_cast<uint16_t *>(data)[at] = hm_to_f16(x); break;
  case HM_BF16: static_cast<uint16_t *>(data)[at] = hm_to_bf16(x); break;
  case HM_F64: hm_number(static_cast<double *>(data) + at, x); break;
  case HM_I64: hm_number(static_cast<int64_t *>(data) + at, x); break;
  case HM_I32: static_cast<int32_t *>(data)[at] = hm_to_i32(x); break;
  case HM_U8: static_cast<uint8_t *>(data)[at] = (uint8_t)hm_to_i32(x); break;
  default: static_cast<uint8_t *>(data)[at] = x != (T)0; break;
  }
}

HM_DEV void hm_move(void *dst, int64_t to, const void *src, int64_t from, int size) {
  switch (size) {
  case 1: static_cast<uint8_t *>(dst)[to] = static_cast<const uint8_t *>(src)[from]; break;
  case 2: static_cast<uint16_t *>(dst)[to] = static_cast<const uint16_t *>(src)[from]; break;
  case 4: static_cast<uint32_t *>(dst)[to] = static_cast<const uint32_t *>(src)[from]; break;
  default: static_cast<uint64_t *>(dst)[to] = static_cast<const uint64_t *>(src)[from]; break;
  }
}

HM_DEV bool hm_is_int(int dtype) { return dtype <= HM_I64; }

/* One element from any dtype to any other: through int64 or double, which hold what they read exactly. */
HM_DEV void hm_convert(void *dst, int to_dtype, int64_t to, const void *src, int dtype, int64_t from) {
  if (dtype == to_dtype)
    hm_move(dst, to, src, from,
            dtype == HM_I64 || dtype == HM_F64   ? 8
            : dtype == HM_I32 || dtype == HM_F32 ? 4
            : dtype >= HM_F16                    ? 2
                                                 : 1);
  else if (hm_is_int(dtype)) hm_store<int64_t>(dst, to_dtype, to, hm_load<int64_t>(src, dtype, from));
  else hm_store<double>(dst, to_dtype, to, hm_load<double>(src, dtype, from));
}

/* ====== V numbers that lie side by side, by accesses of up to 16 bytes ====== */

/* May V elements at multiples of V be read or written at once?  data: where the first lies. */
static inline bool hm_runs_align(const void *data, int dtype, int v) {
  const uintptr_t bytes = (uintptr_t)(v * hm_dtype_size(dtype)), unit = bytes < 16 ? bytes : 16;
  return (uintptr_t)data % unit == 0;
}

/* The dtypes that the functions below take. */
static inline bool hm_runs_take(int dtype) {
  return dtype == HM_F32 || dtype == HM_F16 || dtype == HM_BF16 || dtype == HM_BOOL || dtype == HM_U8;
}

HM_DEV void hm_unpack_half(uint32_t word, bool is_f16, float *x) {
  const uint16_t low = (uint16_t)word, high = (uint16_t)(word >> 16);
  x[0] = is_f16 ? hm_dev_f16_to_f32(low) : hm_dev_bf16_to_f32(low);
  x[1] = is_f16 ? hm_dev_f16_to_f32(high) : hm_dev_bf16_to_f32(high);
}

HM_DEV uint32_t hm_pack_half(const float *x, bool is_f16) {
  const uint16_t low = is_f16 ? hm_dev_f32_to_f16(x[0]) : hm_dev_f32_to_bf16(x[0]);
  const uint16_t high = is_f16 ? hm_dev_f32_to_f16(x[1]) : hm_dev_f32_to_bf16(x[1]);
  return (uint32_t)low | (uint32_t)high << 16;
}

/* W words of 4 bytes at an address aligned to all of them, up to 16 bytes. */
template <int W> HM_DEV void hm_load_words(const void *p, uint32_t *w) {
  if constexpr (W % 4 == 0) {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      const uint4 q = hm_load16(static_cast<const uint4 *>(p) + i / 4);
      w[i] = q.x, w[i + 1] = q.y, w[i + 2] = q.z, w[i + 3] = q.w;
    }
  } else if constexpr (W == 2) {
    const uint2 q = *static_cast<const uint2 *>(p);
    w[0] = q.x, w[1] = q.y;
  } else {
    w[0] = *static_cast<const uint32_t *>(p);
  }
}

template <int W> HM_DEV void hm_store_words(void *p, const uint32_t *w) {
  if constexpr (W % 4 == 0) {
#pragma unroll
    for (int i = 0; i < W; i += 4)
      hm_store16(static_cast<uint4 *>(p) + i / 4, make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]));
  } else if constexpr (W == 2) {
    *static_cast<uint2 *>(p) = make_uint2(w[0], w[1]);
  } else {
    *static_cast<uint32_t *>(p) = w[0];
  }
}

/* Elements [at, at + V) of an array as float; V is 4 or 8. */
template <int V> HM_DEV void hm_load_run(const void *data, int dtype, int64_t at, float *x) {
  uint32_t w[V];
  if (dtype == HM_F32) {
    hm_load_words<V>(static_cast<const float *>(data) + at, w);
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = __uint_as_float(w[i]);
  } else if (dtype == HM_F16 || dtype == HM_BF16) {
    hm_load_words<V / 2>(static_cast<const uint16_t *>(data) + at, w);
    if (dtype == HM_F16) {
#pragma unroll
      for (int i = 0; i < V; i += 2) hm_unpack_half(w[i / 2], true, x + i);
    } else {
#pragma unroll
      for (int i = 0; i < V; i += 2) hm_unpack_half(w[i / 2], false, x + i);
    }
  } else {
    hm_load_words<V / 4>(static_cast<const uint8_t *>(data) + at, w);
    const bool is_bool = dtype == HM_BOOL;
#pragma unroll
    for (int i = 0; i < V; i++) {
      const uint32_t byte = w[i / 4] >> (i % 4 * 8) & 255u;
      x[i] = (float)(is_bool ? (uint32_t)(byte != 0) : byte);
    }
  }
}

template <int V> HM_DEV void hm_store_run(void *data, int dtype, int64_t at, const float *x) {
  uint32_t w[V];
  if (dtype == HM_F32) {
#pragma unroll
    for (int i = 0; i < V; i++) w[i] = __float_as_uint(x[i]);
    hm_store_words<V>(static_cast<float *>(data) + at, w);
  } else if (dtype == HM_F16 || dtype == HM_BF16) {
    if (dtype == HM_F16) {
#pragma unroll
      for (int i = 0; i < V; i += 2) w[i / 2] = hm_pack_half(x + i, true);
    } else {
#pragma unroll
      for (int i = 0; i < V; i += 2) w[i / 2] = hm_pack_half(x + i, false);
    }
    hm_store_words<V / 2>(static_cast<uint16_t *>(data) + at, w);
  } else {
    const bool is_bool = dtype == HM_BOOL;
#pragma unroll
    for (int i = 0; i < V / 4; i++) w[i] = 0;
#pragma unroll
    for (int i = 0; i < V; i++)
      w[i / 4] |= (is_bool ? (uint32_t)(x[i] != 0.0f) : (uint32_t)(uint8_t)hm_f32_to_i32(x[i])) << (i % 4 * 8);
    hm_store_words<V / 4>(static_cast<uint8_t *>(data) + at, w);
  }
}

#endif
