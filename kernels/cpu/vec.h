/*
 * vec.h -- what the reducing kernels share: native vectors, sums and maxima in one fixed order, tiles, rows.
 *
 * Included by reduce.c spread.c norm.c loss.c pool.c multi.c, each compiled once per instruction set, and by scan.c;
 * everything here is static.
 *
 * Order.  Whatever the instruction set, element i of a run goes to lane i mod 32; a lane takes its elements four at
 * a time, pairs first (which keeps chains of roundings short); lanes are folded in halves (16, 8, 4, 2, 1).  Runs
 * below 32 elements use four lanes. A native vector holds 4, 8 or 16 floats, so 32 lanes are 8, 4 or 2 of them: the
 * same additions in the same order, the same bits. Longer runs are cut into leaves of 1,024 elements, and leaves are
 * added pairwise.
 *
 * Tiles.  Inputs of another dtype or with gaps are converted piece by piece into a small buffer on the stack (a
 * tile) of the type that is computed in; dense inputs of that type are read where they lie.
 */
#ifndef HM_CPU_VEC_H
#define HM_CPU_VEC_H

#include <math.h>
#include <string.h>

#include "isa.h"

#if defined(__AVX512F__)
#define HM_VBYTES 64
#elif defined(__AVX2__)
#define HM_VBYTES 32
#else
#define HM_VBYTES 16
#endif

enum { HM_LANES = 32, HM_LEAF = 1024, HM_RAW_TILE = 512 };

/* hm_v_<S>: a native vector of T; hm_u_<S>: the same at any address. */
#define HM_VECTOR(T, S)                                                                                                \
  typedef T hm_v_##S __attribute__((vector_size(HM_VBYTES)));                                                          \
  typedef T hm_u_##S __attribute__((vector_size(HM_VBYTES), aligned(sizeof(T)), may_alias));
HM_VECTOR(float, f32)
HM_VECTOR(double, f64)
HM_VECTOR(int64_t, i64)
HM_VECTOR(uint64_t, u64)
HM_VECTOR(int32_t, i32)
HM_VECTOR(int16_t, i16)
#undef HM_VECTOR

/* mask ? x : y, lane by lane; mask is what a comparison of vectors gives. */
#define HM_VSELECT(mask, x, y) ((__typeof__(y))(((mask) & (__typeof__(mask))(x)) | (~(mask) & (__typeof__(mask))(y))))

/* How two values become one.  V: vectors, S: scalars.  In MAX and MIN a NaN wins over everything. */
#define HM_SUM_V(a, x) ((a) + (x))
#define HM_SUM_S(a, x) ((a) + (x))
#define HM_MAX_V(a, x) HM_VSELECT(((x) > (a)) | ((x) != (x)), x, a)
#define HM_MAX_S(a, x) (((x) > (a)) | ((x) != (x)) ? (x) : (a))
#define HM_MIN_V(a, x) HM_VSELECT(((x) < (a)) | ((x) != (x)), x, a)
#define HM_MIN_S(a, x) (((x) < (a)) | ((x) != (x)) ? (x) : (a))

/* Defines hm_<op>_combine_<S>, _leaf_, _fold_, _row_ for element type T and operation OP (SUM, MAX, MIN):
 *   combine  dst[i] = op(dst[i], src[i])
 *   leaf     n > 0 elements into 32 lanes; lanes without an element get `identity`
 *   fold     32 lanes into lane 0 (the others are used up)
 *   row      n > 0 dense elements into one value */
#define HM_DEFINE_LANES(op, OP, T, S, identity)                                                                        \
  static inline void hm_##op##_combine_##S(T *restrict dst, const T *restrict src, int64_t n) {                        \
    for (int64_t i = 0; i < n; i++) dst[i] = HM_##OP##_S(dst[i], src[i]);                                              \
  }                                                                                                                    \
  static inline void hm_##op##_leaf_##S(T *restrict lanes, const T *restrict x, int64_t n) {                           \
    enum { V = HM_VBYTES / sizeof(T), P = HM_LANES / V };                                                              \
    int64_t i = HM_LANES;                                                                                              \
    if (n < HM_LANES) {                                                                                                \
      for (int l = 0; l < HM_LANES; l++) lanes[l] = l < n ? x[l] : identity;                                           \
      return;                                                                                                          \
    }                                                                                                                  \
    hm_v_##S acc[P];                                                                                                   \
    _Pragma("GCC unroll 16") for (int p = 0; p < P; p++) acc[p] = *(const hm_u_##S *)(x + p * V);                      \
    for (; i + 4 * HM_LANES <= n; i += 4 * HM_LANES) {                                                                 \
      _Pragma("GCC unroll 16") for (int p = 0; p < P; p++) {                                                           \
        const T *at = x + i + p * V;                                                                                   \
        const hm_v_##S x0 = *(const hm_u_##S *)at, x1 = *(const hm_u_##S *)(at + HM_LANES);                            \
        const hm_v_##S x2 = *(const hm_u_##S *)(at + 2 * HM_LANES), x3 = *(const hm_u_##S *)(at + 3 * HM_LANES);       \
        const hm_v_##S left = HM_##OP##_V(x0, x1), right = HM_##OP##_V(x2, x3), four = HM_##OP##_V(left, right);       \
        acc[p] = HM_##OP##_V(acc[p], four);                                                                            \
      }                                                                                                                \
    }                                                                                                                  \
    for (; i + HM_LANES <= n; i += HM_LANES) {                                                                         \
      _Pragma("GCC unroll 16") for (int p = 0; p < P; p++) {                                                           \
        const hm_v_##S v = *(const hm_u_##S *)(x + i + p * V);                                                         \
        acc[p] = HM_##OP##_V(acc[p], v);                                                                               \
      }                                                                                                                \
    }                                                                                                                  \
    _Pragma("GCC unroll 16") for (int p = 0; p < P; p++) * (hm_u_##S *)(lanes + p * V) = acc[p];                       \
    for (int l = 0; l < HM_LANES && i + l < n; l++) lanes[l] = HM_##OP##_S(lanes[l], x[i + l]);                        \
  }                                                                                                                    \
  static inline T hm_##op##_fold_##S(T *lanes) {                                                                       \
    _Pragma("GCC unroll 5") for (int w = HM_LANES / 2; w > 0; w /= 2) {                                                \
      for (int l = 0; l < w; l++) lanes[l] = HM_##OP##_S(lanes[l], lanes[l + w]);                                      \
    }                                                                                                                  \
    return lanes[0];                                                                                                   \
  }                                                                                                                    \
  __attribute__((noinline, unused)) static T hm_##op##_long_##S(const T *x, int64_t n) {                               \
    T lanes[HM_LANES] __attribute__((aligned(64)));                                                                    \
    if (n <= HM_LEAF) {                                                                                                \
      hm_##op##_leaf_##S(lanes, x, n);                                                                                 \
      return hm_##op##_fold_##S(lanes);                                                                                \
    }                                                                                                                  \
    int64_t half = HM_LEAF;                                                                                            \
    while (half * 2 < n) half *= 2;                                                                                    \
    const T a = hm_##op##_long_##S(x, half), b = hm_##op##_long_##S(x + half, n - half);                               \
    return HM_##OP##_S(a, b);                                                                                          \
  }                                                                                                                    \
  static inline T hm_##op##_row_##S(const T *x, int64_t n) {                                                           \
    if (n >= HM_LANES) return hm_##op##_long_##S(x, n);                                                                \
    T a = x[0];                                                                                                        \
    if (n < 4) {                                                                                                       \
      for (int64_t i = 1; i < n; i++) a = HM_##OP##_S(a, x[i]);                                                        \
      return a;                                                                                                        \
    }                                                                                                                  \
    T b = x[1], c = x[2], d = x[3];                                                                                    \
    int64_t i = 4;                                                                                                     \
    for (; i + 4 <= n; i += 4) {                                                                                       \
      a = HM_##OP##_S(a, x[i]);                                                                                        \
      b = HM_##OP##_S(b, x[i + 1]);                                                                                    \
      c = HM_##OP##_S(c, x[i + 2]);                                                                                    \
      d = HM_##OP##_S(d, x[i + 3]);                                                                                    \
    }                                                                                                                  \
    if (i < n) a = HM_##OP##_S(a, x[i]);                                                                               \
    if (i + 1 < n) b = HM_##OP##_S(b, x[i + 1]);                                                                       \
    if (i + 2 < n) c = HM_##OP##_S(c, x[i + 2]);                                                                       \
    a = HM_##OP##_S(a, b);                                                                                             \
    c = HM_##OP##_S(c, d);                                                                                             \
    return HM_##OP##_S(a, c);                                                                                          \
  }

HM_DEFINE_LANES(sum, SUM, float, f32, 0.0f)
HM_DEFINE_LANES(sum, SUM, double, f64, 0.0)
HM_DEFINE_LANES(max, MAX, float, f32, -INFINITY)
HM_DEFINE_LANES(max, MAX, double, f64, -(double)INFINITY)

/* ====== Tiles ====== */

static inline const char *hm_at(const void *base, int64_t elements, int dtype) {
  return (const char *)base + elements * hm_dtype_size(dtype);
}
static inline char *hm_at_mut(void *base, int64_t elements, int dtype) {
  return (char *)base + elements * hm_dtype_size(dtype);
}

/* Elements moved by size alone, whatever type they have. */
typedef uint8_t hm_any1 __attribute__((may_alias));
typedef uint16_t hm_any2 __attribute__((may_alias));
typedef uint32_t hm_any4 __attribute__((may_alias));
typedef uint64_t hm_any8 __attribute__((may_alias));

/* n elements of `size` bytes, `stride` elements apart, packed into dst. */
static inline void hm_gather(void *restrict dst, const void *restrict src, int size, int64_t n, int64_t stride) {
#define HM_MOVE(T)                                                                                                     \
  for (int64_t i = 0; i < n; i++) ((T *)dst)[i] = ((const T *)src)[i * stride];                                        \
  break
  switch (size) {
  case 1: HM_MOVE(hm_any1);
  case 2: HM_MOVE(hm_any2);
  case 4: HM_MOVE(hm_any4);
  default: HM_MOVE(hm_any8);
  }
#undef HM_MOVE
}

/* The way back. */
static inline void hm_scatter(void *restrict dst, const void *restrict src, int size, int64_t n, int64_t stride) {
#define HM_MOVE(T)                                                                                                     \
  for (int64_t i = 0; i < n; i++) ((T *)dst)[i * stride] = ((const T *)src)[i];                                        \
  break
  switch (size) {
  case 1: HM_MOVE(hm_any1);
  case 2: HM_MOVE(hm_any2);
  case 4: HM_MOVE(hm_any4);
  default: HM_MOVE(hm_any8);
  }
#undef HM_MOVE
}

/* n elements from src (any dtype and stride) into tile. */
static inline void hm_tile_fill(void *tile, int tile_dtype, const void *src, int dtype, int64_t n, int64_t stride) {
  if (stride == 1) {
    if (dtype == tile_dtype) memcpy(tile, src, (size_t)(n * hm_dtype_size(dtype)));
    else hm_cpu_isa()->convert(tile, tile_dtype, src, dtype, n);
    return;
  }
  if (dtype == tile_dtype) {
    hm_gather(tile, src, hm_dtype_size(dtype), n, stride);
    return;
  }
  uint64_t raw[HM_RAW_TILE];
  for (int64_t i = 0; i < n; i += HM_RAW_TILE) {
    const int64_t m = n - i < HM_RAW_TILE ? n - i : HM_RAW_TILE;
    hm_gather(raw, hm_at(src, i * stride, dtype), hm_dtype_size(dtype), m, stride);
    hm_cpu_isa()->convert(hm_at_mut(tile, i, tile_dtype), tile_dtype, raw, dtype, m);
  }
}

/* The same, but where src is dense and of the tile's dtype nothing is moved: returns where the elements lie. */
static inline const void *hm_tile_in(void *tile, int tile_dtype, const void *src, int dtype, int64_t n,
                                     int64_t stride) {
  if (dtype == tile_dtype && (stride == 1 || n == 1)) return src;
  hm_tile_fill(tile, tile_dtype, src, dtype, n, stride);
  return tile;
}

/* n elements of a tile to dst (any dtype and stride), rounded once. */
static inline void hm_tile_out(void *dst, int dtype, int64_t stride, const void *tile, int tile_dtype, int64_t n) {
  if (stride == 1) {
    if (dst == tile || n == 0) return;
    if (dtype == tile_dtype) memcpy(dst, tile, (size_t)(n * hm_dtype_size(dtype)));
    else hm_cpu_isa()->convert(dst, dtype, tile, tile_dtype, n);
    return;
  }
  if (dtype == tile_dtype) {
    hm_scatter(dst, tile, hm_dtype_size(dtype), n, stride);
    return;
  }
  uint64_t raw[HM_RAW_TILE];
  for (int64_t i = 0; i < n; i += HM_RAW_TILE) {
    const int64_t m = n - i < HM_RAW_TILE ? n - i : HM_RAW_TILE;
    hm_cpu_isa()->convert(raw, dtype, hm_at(tile, i, tile_dtype), tile_dtype, m);
    hm_scatter(hm_at_mut(dst, i * stride, dtype), raw, hm_dtype_size(dtype), m, stride);
  }
}

/* ====== Rows: a tensor seen as many rows along one dim ====== */

enum { HM_ROW_VIEWS = 3, HM_BLOCK = 16384 };

/* Up to three views of one shape.  Row r is the r-th index of the other dims, row-major. */
typedef struct hm_rows {
  int nd;
  int64_t length, count;                     /* elements in a row, rows */
  int64_t n[HM_MAX_NDIM];                    /* the other dims, adjacent ones joined */
  int64_t stride[HM_ROW_VIEWS][HM_MAX_NDIM]; /* theirs, by view */
  int64_t step[HM_ROW_VIEWS];                /* stride along the row */
  const hm_view *view[HM_ROW_VIEWS];
} hm_rows;

/* Looks at n_views views of equal shape along dim (0-dim tensors are one row of one element). */
static inline void hm_rows_init(hm_rows *r, int dim, int n_views, const hm_view *const *view) {
  const hm_view *a = view[0];
  const bool scalar = a->ndim == 0;
  *r = (hm_rows){.length = scalar ? 1 : a->shape[dim], .count = 1};
  for (int v = 0; v < n_views; v++) {
    r->view[v] = view[v];
    r->step[v] = scalar || r->length == 1 ? 1 : view[v]->stride[dim];
  }
  for (int d = 0; d < a->ndim; d++) {
    if (d == dim || a->shape[d] == 1) continue;
    r->count *= a->shape[d];
    bool join = r->nd > 0;
    for (int v = 0; v < n_views && join; v++) join = r->stride[v][r->nd - 1] == view[v]->stride[d] * a->shape[d];
    const int at = join ? r->nd - 1 : r->nd++;
    r->n[at] = join ? r->n[at] * a->shape[d] : a->shape[d];
    for (int v = 0; v < n_views; v++) r->stride[v][at] = view[v]->stride[d];
  }
}

/* Where row i of view v begins, in elements. */
static inline int64_t hm_rows_offset(const hm_rows *r, int v, int64_t i) {
  int64_t offset = 0;
  for (int d = r->nd - 1; d > 0; d--) {
    offset += i % r->n[d] * r->stride[v][d];
    i /= r->n[d];
  }
  return r->nd ? offset + i * r->stride[v][0] : 0;
}

/* How many rows from i on lie in a run along the innermost dim, at most `want`. */
static inline int64_t hm_rows_run(const hm_rows *r, int64_t i, int64_t want) {
  if (!r->nd) return 1;
  const int64_t inner = r->n[r->nd - 1], left = inner - i % inner;
  return left < want ? left : want;
}

/* Rows to take together: what stays in L1; where a row has gaps as many as a block holds, so that whole lines are
 * used. At least one. */
static inline int64_t hm_rows_per_block(const hm_rows *r) {
  const int64_t room = r->step[0] == 1 ? 2048 : HM_BLOCK, fit = r->length > 0 ? room / r->length : room;
  return fit < 1 ? 1 : fit > 1024 ? 1024 : fit;
}

/* Moves `rows` x `length` elements between memory with (1, step) strides and dense rows, sixteen steps at a time so
 * that lines stay in L1. */
#define HM_TRANSPOSE(T, TO, FROM)                                                                                      \
  for (int64_t l0 = 0; l0 < length; l0 += 16) {                                                                        \
    const int64_t l1 = l0 + 16 < length ? l0 + 16 : length;                                                            \
    for (int64_t j = 0; j < rows; j++)                                                                                 \
      for (int64_t l = l0; l < l1; l++) ((T *)dst)[TO] = ((const T *)src)[FROM];                                       \
  }                                                                                                                    \
  break
static inline void hm_rows_from_columns(void *restrict dst, const void *restrict src, int size, int64_t rows,
                                        int64_t length, int64_t step) {
  switch (size) {
  case 2: HM_TRANSPOSE(hm_any2, j * length + l, l * step + j);
  case 4: HM_TRANSPOSE(hm_any4, j * length + l, l * step + j);
  default: HM_TRANSPOSE(hm_any8, j * length + l, l * step + j);
  }
}
static inline void hm_rows_to_columns(void *restrict dst, const void *restrict src, int size, int64_t rows,
                                      int64_t length, int64_t step) {
  switch (size) {
  case 2: HM_TRANSPOSE(hm_any2, l * step + j, j * length + l);
  case 4: HM_TRANSPOSE(hm_any4, l * step + j, j * length + l);
  default: HM_TRANSPOSE(hm_any8, l * step + j, j * length + l);
  }
}
#undef HM_TRANSPOSE

/* True where `run` rows of view v from one offset on are one dense piece of memory. */
static inline bool hm_rows_dense(const hm_rows *r, int v, int64_t run) {
  return r->step[v] == 1 && (run == 1 || r->stride[v][r->nd - 1] == r->length);
}

/* True where neighbouring rows are neighbours in memory and the row is not. */
static inline bool hm_rows_columns(const hm_rows *r, int v, int64_t run) {
  return run > 1 && r->step[v] != 1 && r->stride[v][r->nd - 1] == 1 && hm_dtype_size(r->view[v]->dtype) > 1;
}

/* Rows [i, i + run) of view v, a run along the innermost dim, run * length <= HM_BLOCK, as dense rows of tile_dtype:
 * in `tile`, or
 * where they lie.  raw: scratch of HM_BLOCK elements of the view's dtype. */
static inline const void *hm_rows_in(const hm_rows *r, int v, int64_t i, int64_t run, void *tile, int tile_dtype,
                                     void *raw) {
  const int dtype = r->view[v]->dtype;
  const char *src = hm_at(r->view[v]->data, hm_rows_offset(r, v, i), dtype);
  if (hm_rows_dense(r, v, run)) return hm_tile_in(tile, tile_dtype, src, dtype, run * r->length, 1);
  if (hm_rows_columns(r, v, run)) {
    void *to = dtype == tile_dtype ? tile : raw;
    hm_rows_from_columns(to, src, hm_dtype_size(dtype), run, r->length, r->step[v]);
    return hm_tile_in(tile, tile_dtype, to, dtype, run * r->length, 1);
  }
  const int64_t pitch = run > 1 ? r->stride[v][r->nd - 1] : 0;
  for (int64_t j = 0; j < run; j++)
    hm_tile_fill(hm_at_mut(tile, j * r->length, tile_dtype), tile_dtype, hm_at(src, j * pitch, dtype), dtype, r->length,
                 r->step[v]);
  return tile;
}

/* Where a block of results may be written at once: the output itself where it is dense and of the tile's dtype, else
 * `tile`. */
static inline void *hm_rows_target(const hm_rows *r, int v, int64_t i, int64_t run, void *tile, int tile_dtype) {
  const hm_view *w = r->view[v];
  return w->dtype == tile_dtype && hm_rows_dense(r, v, run) ? hm_at_mut(w->data, hm_rows_offset(r, v, i), w->dtype)
                                                            : tile;
}

/* Dense rows back into rows [i, i + run) of view v, rounded once; nothing to do where hm_rows_target gave the output
 * itself. */
static inline void hm_rows_out(const hm_rows *r, int v, int64_t i, int64_t run, const void *tile, int tile_dtype,
                               void *raw) {
  const int dtype = r->view[v]->dtype;
  char *dst = hm_at_mut(r->view[v]->data, hm_rows_offset(r, v, i), dtype);
  if (hm_rows_dense(r, v, run)) {
    hm_tile_out(dst, dtype, 1, tile, tile_dtype, run * r->length);
    return;
  }
  if (hm_rows_columns(r, v, run)) {
    const void *from = tile;
    if (dtype != tile_dtype) {
      hm_cpu_isa()->convert(raw, dtype, tile, tile_dtype, run * r->length);
      from = raw;
    }
    hm_rows_to_columns(dst, from, hm_dtype_size(dtype), run, r->length, r->step[v]);
    return;
  }
  const int64_t pitch = run > 1 ? r->stride[v][r->nd - 1] : 0;
  for (int64_t j = 0; j < run; j++)
    hm_tile_out(hm_at_mut(dst, j * pitch, dtype), dtype, r->step[v], hm_at(tile, j * r->length, tile_dtype), tile_dtype,
                r->length);
}

/* ====== Rows longer than a block: leaf by leaf ====== */

/* Leaf number i of a row of `length` elements: where it begins in the row, how many it has. */
typedef struct hm_leaf {
  int64_t at, n;
} hm_leaf;

static inline hm_leaf hm_leaf_of(int64_t i, int64_t length) {
  const int64_t at = i * HM_LEAF;
  return (hm_leaf){at, length - at < HM_LEAF ? length - at : HM_LEAF};
}

static inline int64_t hm_leaf_count(int64_t length) { return (length + HM_LEAF - 1) / HM_LEAF; }

/* The elements of a leaf of view v in the row that begins at `offset`, dense: where they lie or in tile. */
static inline const void *hm_leaf_in(const hm_rows *r, int v, int64_t offset, hm_leaf l, void *tile, int type) {
  const hm_view *w = r->view[v];
  return hm_tile_in(tile, type, hm_at(w->data, offset + l.at * r->step[v], w->dtype), w->dtype, l.n, r->step[v]);
}

/* A dense leaf back into view v. */
static inline void hm_leaf_out(const hm_rows *r, int v, int64_t offset, hm_leaf l, const void *tile, int type) {
  const hm_view *w = r->view[v];
  hm_tile_out(hm_at_mut(w->data, offset + l.at * r->step[v], w->dtype), w->dtype, r->step[v], tile, type, l.n);
}

/* Sums of leaves arrive one by one and are joined pairwise: sum[i] holds 2^i leaves where bit i of count is set. */
#define HM_DEFINE_PAIRS(T, S)                                                                                          \
  typedef struct hm_pairs_##S {                                                                                        \
    T sum[48];                                                                                                         \
    int64_t count;                                                                                                     \
  } hm_pairs_##S;                                                                                                      \
  static inline void hm_pairs_add_##S(hm_pairs_##S *p, T x) {                                                          \
    int i = 0;                                                                                                         \
    for (int64_t c = p->count++; c & 1; c >>= 1) x = p->sum[i++] + x;                                                  \
    p->sum[i] = x;                                                                                                     \
  }                                                                                                                    \
  static inline T hm_pairs_total_##S(const hm_pairs_##S *p) {                                                          \
    T x = 0;                                                                                                           \
    for (int i = 0; i < 48; i++)                                                                                       \
      if (p->count >> i & 1) x = p->sum[i] + x;                                                                        \
    return x;                                                                                                          \
  }
HM_DEFINE_PAIRS(float, f32)
HM_DEFINE_PAIRS(double, f64)

#endif
