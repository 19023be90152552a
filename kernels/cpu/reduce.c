/*
 * reduce.c -- sum, mean, prod, amax, amin, any, all, bias gradients; max_dim, min_dim, argmax, argmin.
 *
 * Compiled once per instruction set.  Called through hm_isa.reduce; var, norm and their like go on to spread.c.
 *
 * The input's dims are split into kept and reduced ones (split.h).  Then one of two loops runs:
 *   rows      each output is a run (or a gather) of elements: 32 lanes over leaves of 1,024 elements
 *   columns   the innermost kept dim is dense: whole rows are added into a tile of columns, 32 rows to a leaf
 * Leaves are added pairwise within a chunk of about 65,536 elements, chunks pairwise through the workspace.  Leaves
 * and chunks depend on shapes and strides only, so the bits do not depend on threads or instruction set.  Products are
 * made in float64, so that what overflows float32 on the way may come back.
 */
#include "split.h"

enum { PARTS = HM_CHUNK / 32, MAX_BLOCK = 256 };

/* ====== Arithmetic by type ====== */

#define HM_PROD_V(a, x) ((a) * (x))
#define HM_PROD_S(a, x) ((a) * (x))

HM_DEFINE_LANES(min, MIN, float, f32, INFINITY)
HM_DEFINE_LANES(min, MIN, double, f64, (double)INFINITY)
HM_DEFINE_LANES(sum, SUM, uint64_t, u64, 0)
HM_DEFINE_LANES(prod, PROD, double, f64, 1.0)
HM_DEFINE_LANES(prod, PROD, uint64_t, u64, 1)
HM_DEFINE_LANES(max, MAX, int64_t, i64, INT64_MIN)
HM_DEFINE_LANES(min, MIN, int64_t, i64, INT64_MAX)

/* One operation on one type; x and acc are dense arrays of it. */
typedef struct reducer {
  int dtype;
  void (*leaf)(void *lanes, const void *x, int64_t n);
  void (*fold)(void *lanes);
  void (*row)(void *out, const void *x, int64_t n);
  void (*combine)(void *dst, const void *src, int64_t n);
  /* acc[c] = op over rows, four at a time, pairs first; `init`: acc holds nothing yet */
  void (*columns)(void *acc, const void *x, int64_t ld, int64_t rows, int64_t cols, bool init);
} reducer;

#define DEFINE_COLUMNS(name, T, OP)                                                                                    \
  static void name(void *accs, const void *xs, int64_t ld, int64_t rows, int64_t cols, bool init) {                    \
    T *restrict acc = accs;                                                                                            \
    const T *restrict x = xs;                                                                                          \
    if (init && rows < 4) {                                                                                            \
      memcpy(acc, x, (size_t)cols * sizeof(T));                                                                        \
      x += ld, rows--;                                                                                                 \
    }                                                                                                                  \
    for (; rows >= 4; rows -= 4, x += 4 * ld, init = false) {                                                          \
      const T *x1 = x + ld, *x2 = x + 2 * ld, *x3 = x + 3 * ld;                                                        \
      for (int64_t c = 0; c < cols; c++) {                                                                             \
        const T left = OP(x[c], x1[c]), right = OP(x2[c], x3[c]), four = OP(left, right);                              \
        acc[c] = init ? four : OP(acc[c], four);                                                                       \
      }                                                                                                                \
    }                                                                                                                  \
    for (; rows > 0; rows--, x += ld)                                                                                  \
      for (int64_t c = 0; c < cols; c++) acc[c] = OP(acc[c], x[c]);                                                    \
  }

#define DEFINE_REDUCER(op, OP, T, S, id)                                                                               \
  static void op##_leaf_##S(void *lanes, const void *x, int64_t n) { hm_##op##_leaf_##S(lanes, x, n); }                \
  static void op##_fold_##S(void *lanes) { hm_##op##_fold_##S(lanes); }                                                \
  static void op##_row_##S(void *out, const void *x, int64_t n) { *(T *)out = hm_##op##_row_##S(x, n); }               \
  static void op##_combine_##S(void *dst, const void *src, int64_t n) { hm_##op##_combine_##S(dst, src, n); }          \
  DEFINE_COLUMNS(op##_columns_##S, T, HM_##OP##_S)                                                                     \
  static const reducer reduce_##op##_##S = {id,           op##_leaf_##S,    op##_fold_##S,                             \
                                            op##_row_##S, op##_combine_##S, op##_columns_##S};

DEFINE_REDUCER(sum, SUM, float, f32, HM_F32)
DEFINE_REDUCER(sum, SUM, double, f64, HM_F64)
DEFINE_REDUCER(sum, SUM, uint64_t, u64, HM_I64)
DEFINE_REDUCER(prod, PROD, double, f64, HM_F64)
DEFINE_REDUCER(prod, PROD, uint64_t, u64, HM_I64)
DEFINE_REDUCER(max, MAX, float, f32, HM_F32)
DEFINE_REDUCER(max, MAX, double, f64, HM_F64)
DEFINE_REDUCER(max, MAX, int64_t, i64, HM_I64)
DEFINE_REDUCER(min, MIN, float, f32, HM_F32)
DEFINE_REDUCER(min, MIN, double, f64, HM_F64)
DEFINE_REDUCER(min, MIN, int64_t, i64, HM_I64)

/* any and all work on bytes that are 0 or 1; lane 0 has the answer of a leaf, the others what changes nothing. */
#define OR(a, x) ((uint8_t)((a) | (x)))
#define AND(a, x) ((uint8_t)((a) & (x)))
#define DEFINE_LOGIC(op, OP, found, value)                                                                             \
  static void op##_row(void *out, const void *x, int64_t n) {                                                          \
    *(uint8_t *)out = memchr(x, found, (size_t)n) ? value : !value;                                                    \
  }                                                                                                                    \
  static void op##_leaf(void *lanes, const void *x, int64_t n) {                                                       \
    memset(lanes, !value, HM_LANES);                                                                                   \
    op##_row(lanes, x, n);                                                                                             \
  }                                                                                                                    \
  static void op##_combine(void *dst, const void *src, int64_t n) {                                                    \
    for (int64_t i = 0; i < n; i++) ((uint8_t *)dst)[i] = OP(((uint8_t *)dst)[i], ((const uint8_t *)src)[i]);          \
  }                                                                                                                    \
  static void op##_fold(void *lanes) { (void)lanes; }                                                                  \
  DEFINE_COLUMNS(op##_columns, uint8_t, OP)                                                                            \
  static const reducer reduce_##op = {HM_BOOL, op##_leaf, op##_fold, op##_row, op##_combine, op##_columns};

DEFINE_LOGIC(any, OR, 1, 1)
DEFINE_LOGIC(all, AND, 0, 0)

/* ====== What is reduced ====== */

/* Bit mask of the dims that the op reduces. */
static uint32_t reduced_dims(const hm_kernel_call *call) {
  const uint32_t everything = (1u << call->in[0].ndim) - 1;
  switch (call->op) {
  case HM_OP_LINEAR_BACKWARD_BIAS: return everything & ~(1u << (call->in[0].ndim - 1));
  case HM_OP_CONV2D_BACKWARD_BIAS: return everything & ~2u;
  case HM_OP_MAX_DIM:
  case HM_OP_MIN_DIM:
  case HM_OP_ARGMAX:
  case HM_OP_ARGMIN:
  case HM_OP_PROD: return call->attr[0].i == HM_NONE ? everything : everything & (1u << call->attr[0].i);
  default: break;
  }
  uint32_t mask = 0;
  for (int i = 0; i < call->attr[0].n; i++) mask |= 1u << call->attr[0].v[i];
  return call->attr[0].n ? mask & everything : everything;
}

static bool keeps_dims(const hm_kernel_call *call) {
  return call->op != HM_OP_LINEAR_BACKWARD_BIAS && call->op != HM_OP_CONV2D_BACKWARD_BIAS && call->attr[1].i != 0;
}

static bool is_index_op(int op) {
  return op == HM_OP_MAX_DIM || op == HM_OP_MIN_DIM || op == HM_OP_ARGMAX || op == HM_OP_ARGMIN;
}

static void plan_call(hm_split *p, const hm_kernel_call *call) {
  hm_split_make(p, call, reduced_dims(call), keeps_dims(call), !is_index_op(call->op));
}

/* rows x width values in buf become one row in its beginning: neighbours first, then neighbours of those. */
static void tree(const reducer *op, void *buf, int64_t rows, int64_t width) {
  for (int64_t w = 1; w < rows; w *= 2)
    for (int64_t i = 0; i + w < rows; i += 2 * w)
      op->combine(hm_at_mut(buf, i * width, op->dtype), hm_at(buf, (i + w) * width, op->dtype), width);
}

/* The last step of a value reduction: a mean is divided; then the results are written. */
static void finish(const hm_split *p, int64_t k, int64_t n, void *values) {
  if (p->call->op == HM_OP_MEAN) {
    float *f = values;
    double *d = values;
    if (p->type == HM_F64)
      for (int64_t i = 0; i < n; i++) d[i] /= (double)p->n_red;
    else
      for (int64_t i = 0; i < n; i++) f[i] /= (float)p->n_red;
  }
  hm_split_store(p, 0, k, n, values, p->type);
}

/* Where the partial results of a chunk begin in the workspace. */
static char *partials(const hm_split *p, int64_t chunk, int type) {
  return hm_at_mut(p->call->workspace, chunk * p->n_keep, type);
}

/* ====== Sums and their like: rows ====== */

/* One chunk of one output into *out. */
static void row_chunk(const hm_split *p, int64_t k, int64_t chunk, void *out) {
  uint64_t tile[HM_LEAF] __attribute__((aligned(64))), parts[PARTS] __attribute__((aligned(64)));
  const reducer *op = p->op;
  const int64_t base = hm_split_offset(p->nk, p->kn, p->ks, k), begin = chunk * p->chunk;
  const int64_t end = begin + p->chunk < p->n_red ? begin + p->chunk : p->n_red;
  int64_t leaves = 0;
  for (int64_t i = begin; i < end; i += HM_LEAF) {
    const int64_t n = end - i < HM_LEAF ? end - i : HM_LEAF;
    op->leaf(hm_at_mut(parts, leaves++ * HM_LANES, op->dtype), hm_split_run(p, base, i, n, tile), n);
  }
  tree(op, parts, leaves, HM_LANES);
  op->fold(parts);
  memcpy(out, parts, (size_t)hm_dtype_size(op->dtype));
}

/* Outputs [k, k + n), each of at most one leaf, into values.  Rows that lie end to end are converted together. */
static void short_rows(const hm_split *p, int64_t k, int64_t n, void *values) {
  uint64_t tile[HM_SPLIT_TILE] __attribute__((aligned(64)));
  const reducer *op = p->op;
  const bool dense = p->nk == 1 && p->ks[0] == p->n_red && (p->nr == 0 || (p->nr == 1 && p->rs[0] == 1));
  const int64_t group = dense ? (p->dtype == op->dtype ? n : HM_SPLIT_TILE / p->n_red) : 1;
  for (int64_t i = 0; i < n; i += group) {
    const int64_t rows = n - i < group ? n - i : group;
    const int64_t base = hm_split_offset(p->nk, p->kn, p->ks, k + i);
    const void *x = dense ? hm_tile_in(tile, op->dtype, hm_at(p->x, base, p->dtype), p->dtype, rows * p->n_red, 1)
                          : hm_split_run(p, base, 0, p->n_red, tile);
    for (int64_t r = 0; r < rows; r++)
      op->row(hm_at_mut(values, i + r, op->dtype), hm_at(x, r * p->n_red, op->dtype), p->n_red);
  }
}

static void reduce_rows(const hm_split *p, int threads) {
  int64_t block = 2 * HM_SPLIT_TILE / p->n_red;
  block = block < 1 ? 1 : block > MAX_BLOCK ? MAX_BLOCK : block;
  const int64_t blocks = (p->n_keep + block - 1) / block, units = blocks * p->n_chunks;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    const int64_t k = u / p->n_chunks * block, n = p->n_keep - k < block ? p->n_keep - k : block;
    uint64_t values[MAX_BLOCK];
    if (p->n_chunks > 1) {
      row_chunk(p, k, u % p->n_chunks, hm_at_mut(partials(p, u % p->n_chunks, p->type), k, p->type));
      continue;
    }
    if (p->n_red <= HM_LEAF) {
      short_rows(p, k, n, values);
    } else {
      for (int64_t i = 0; i < n; i++) row_chunk(p, k + i, 0, hm_at_mut(values, i, p->type));
    }
    finish(p, k, n, values);
  }
}

/* ====== Sums and their like: columns ====== */

/* One chunk of rows of `width` columns into the beginning of parts. */
static void column_chunk(const hm_split *p, int64_t base, int64_t chunk, int64_t width, void *parts, void *tile) {
  const reducer *op = p->op;
  const int64_t begin = chunk * p->chunk, end = begin + p->chunk < p->n_red ? begin + p->chunk : p->n_red;
  int64_t leaves = 0;
  for (int64_t leaf = begin; leaf < end; leaf += HM_SPLIT_ROWS) {
    const int64_t stop = leaf + HM_SPLIT_ROWS < end ? leaf + HM_SPLIT_ROWS : end;
    void *acc = hm_at_mut(parts, leaves++ * width, op->dtype);
    for (int64_t r = leaf; r < stop;) {
      int64_t rows = stop - r, ld;
      const void *x = hm_split_rows(p, base, r, &rows, width, tile, &ld);
      op->columns(acc, x, ld, rows, width, r == leaf);
      r += rows;
    }
  }
  tree(op, parts, leaves, width);
}

static void reduce_columns(const hm_split *p, int threads) {
  const int64_t units = hm_split_units(p);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    uint64_t parts[PARTS] __attribute__((aligned(64))), tile[HM_SPLIT_TILE] __attribute__((aligned(64)));
    const hm_split_unit c = hm_split_unit_of(p, u);
    const int type = p->type;
    column_chunk(p, c.base, c.chunk, c.width, parts, tile);
    if (p->n_chunks == 1) finish(p, c.k, c.width, parts);
    else memcpy(hm_at_mut(partials(p, c.chunk, type), c.k, type), parts, (size_t)(c.width * hm_dtype_size(type)));
  }
}

/* ====== Largest and smallest with their places ====== */

typedef struct finder {
  int dtype;
  /* Looks at n dense elements, the first of which has index i0; *index < 0: nothing seen yet. */
  void (*row)(void *value, int64_t *index, const void *x, int64_t n, int64_t i0);
  /* The same for every column of `rows` rows. */
  void (*columns)(void *value, int64_t *index, const void *x, int64_t ld, int64_t rows, int64_t cols, int64_t r0);
  /* Takes a later chunk's answers in. */
  void (*merge)(void *value, int64_t *index, const void *value2, const int64_t *index2, int64_t n);
} finder;

#define BETTER_MAX(v, a) (((v) > (a)) | (((v) != (v)) & ((a) == (a))))
#define BETTER_MIN(v, a) (((v) < (a)) | (((v) != (v)) & ((a) == (a))))
#define DEFINE_FINDER(op, OP, T, S, id)                                                                                \
  static void op##_find_row_##S(void *value, int64_t *index, const void *xs, int64_t n, int64_t i0) {                  \
    const T *x = xs;                                                                                                   \
    T *best = value;                                                                                                   \
    const T v = hm_##op##_row_##S(x, n);                                                                               \
    if (*index >= 0 && !BETTER_##OP(v, *best)) return;                                                                 \
    int64_t i = 0;                                                                                                     \
    while (i < n - 1 && x[i] != v && !(v != v && x[i] != x[i])) i++;                                                   \
    *best = x[i];                                                                                                      \
    *index = i0 + i;                                                                                                   \
  }                                                                                                                    \
  static void op##_find_columns_##S(void *value, int64_t *restrict index, const void *xs, int64_t ld, int64_t rows,    \
                                    int64_t cols, int64_t r0) {                                                        \
    const T *restrict x = xs;                                                                                          \
    T *restrict best = value;                                                                                          \
    for (int64_t r = 0; r < rows; r++, x += ld) {                                                                      \
      for (int64_t c = 0; c < cols; c++) {                                                                             \
        const bool take = BETTER_##OP(x[c], best[c]) | (index[c] < 0);                                                 \
        best[c] = take ? x[c] : best[c];                                                                               \
        index[c] = take ? r0 + r : index[c];                                                                           \
      }                                                                                                                \
    }                                                                                                                  \
  }                                                                                                                    \
  static void op##_find_merge_##S(void *value, int64_t *index, const void *value2, const int64_t *index2, int64_t n) { \
    T *best = value;                                                                                                   \
    const T *v = value2;                                                                                               \
    for (int64_t i = 0; i < n; i++)                                                                                    \
      if (BETTER_##OP(v[i], best[i])) best[i] = v[i], index[i] = index2[i];                                            \
  }                                                                                                                    \
  static const finder find_##op##_##S = {id, op##_find_row_##S, op##_find_columns_##S, op##_find_merge_##S};

DEFINE_FINDER(max, MAX, float, f32, HM_F32)
DEFINE_FINDER(max, MAX, double, f64, HM_F64)
DEFINE_FINDER(max, MAX, int64_t, i64, HM_I64)
DEFINE_FINDER(min, MIN, float, f32, HM_F32)
DEFINE_FINDER(min, MIN, double, f64, HM_F64)
DEFINE_FINDER(min, MIN, int64_t, i64, HM_I64)

/* Workspace of an index op: values of all chunks (8 bytes each), then indices. */
static int64_t *index_partials(const hm_split *p, int64_t chunk) {
  return (int64_t *)p->call->workspace + (p->n_chunks + chunk) * p->n_keep;
}

/* Writes values (max_dim, min_dim) and indices of n outputs from k on. */
static void store_found(const hm_split *p, int64_t k, int64_t n, const void *values, const int64_t *index) {
  const bool with_value = p->call->op == HM_OP_MAX_DIM || p->call->op == HM_OP_MIN_DIM;
  if (with_value) hm_split_store(p, 0, k, n, values, p->type);
  hm_split_store(p, with_value ? 1 : 0, k, n, index, HM_I64);
}

static void find_in_row(const hm_split *p, const finder *f, int64_t k, int64_t chunk, void *value, int64_t *index) {
  uint64_t tile[HM_LEAF] __attribute__((aligned(64)));
  const int64_t base = hm_split_offset(p->nk, p->kn, p->ks, k), begin = chunk * p->chunk;
  const int64_t end = begin + p->chunk < p->n_red ? begin + p->chunk : p->n_red;
  *index = -1;
  for (int64_t i = begin; i < end; i += HM_LEAF) {
    const int64_t n = end - i < HM_LEAF ? end - i : HM_LEAF;
    f->row(value, index, hm_split_run(p, base, i, n, tile), n, i);
  }
}

static void find_rows(const hm_split *p, const finder *f, int threads) {
  int64_t block = 2 * HM_SPLIT_TILE / p->n_red;
  block = block < 1 ? 1 : block > MAX_BLOCK ? MAX_BLOCK : block;
  const int64_t units = (p->n_keep + block - 1) / block * p->n_chunks;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    const int64_t k = u / p->n_chunks * block, n = p->n_keep - k < block ? p->n_keep - k : block,
                  chunk = u % p->n_chunks;
    uint64_t values[MAX_BLOCK];
    int64_t index[MAX_BLOCK];
    if (p->n_chunks > 1) {
      find_in_row(p, f, k, chunk, hm_at_mut(partials(p, chunk, f->dtype), k, f->dtype), index_partials(p, chunk) + k);
      continue;
    }
    for (int64_t i = 0; i < n; i++) find_in_row(p, f, k + i, 0, hm_at_mut(values, i, f->dtype), index + i);
    store_found(p, k, n, values, index);
  }
}

static void find_columns(const hm_split *p, const finder *f, int threads) {
  const int64_t units = hm_split_units(p);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    uint64_t values[HM_SPLIT_COLS], tile[HM_SPLIT_TILE] __attribute__((aligned(64)));
    int64_t index[HM_SPLIT_COLS];
    const hm_split_unit c = hm_split_unit_of(p, u);
    const int64_t begin = c.chunk * p->chunk, end = begin + p->chunk < p->n_red ? begin + p->chunk : p->n_red;
    memset(values, 0, sizeof values);
    for (int64_t i = 0; i < c.width; i++) index[i] = -1;
    for (int64_t r = begin; r < end;) {
      int64_t rows = end - r, ld;
      const void *x = hm_split_rows(p, c.base, r, &rows, c.width, tile, &ld);
      f->columns(values, index, x, ld, rows, c.width, r);
      r += rows;
    }
    if (p->n_chunks == 1) {
      store_found(p, c.k, c.width, values, index);
    } else {
      memcpy(hm_at_mut(partials(p, c.chunk, f->dtype), c.k, f->dtype), values,
             (size_t)(c.width * hm_dtype_size(f->dtype)));
      memcpy(index_partials(p, c.chunk) + c.k, index, (size_t)c.width * sizeof *index);
    }
  }
}

/* ====== Entry ====== */

#define BY_TYPE(table, f32, f64, other) ((table) == HM_F32 ? (f32) : (table) == HM_F64 ? (f64) : (other))

static const reducer *reducer_of(int op, int compute) {
  switch (op) {
  case HM_OP_AMAX:
  case HM_OP_MAX_DIM:
  case HM_OP_ARGMAX: return BY_TYPE(compute, &reduce_max_f32, &reduce_max_f64, &reduce_max_i64);
  case HM_OP_AMIN:
  case HM_OP_MIN_DIM:
  case HM_OP_ARGMIN: return BY_TYPE(compute, &reduce_min_f32, &reduce_min_f64, &reduce_min_i64);
  case HM_OP_PROD: return BY_TYPE(compute, &reduce_prod_f64, &reduce_prod_f64, &reduce_prod_u64);
  case HM_OP_ANY: return &reduce_any;
  case HM_OP_ALL: return &reduce_all;
  case HM_OP_SUM:
  case HM_OP_MEAN:
  case HM_OP_LINEAR_BACKWARD_BIAS:
  case HM_OP_CONV2D_BACKWARD_BIAS: return BY_TYPE(compute, &reduce_sum_f32, &reduce_sum_f64, &reduce_sum_u64);
  default: return NULL;
  }
}

static const finder *finder_of(int op, int compute) {
  return op == HM_OP_MAX_DIM || op == HM_OP_ARGMAX ? BY_TYPE(compute, &find_max_f32, &find_max_f64, &find_max_i64)
                                                   : BY_TYPE(compute, &find_min_f32, &find_min_f64, &find_min_i64);
}

/* Outputs exist but nothing is reduced into them: sums are 0, products 1, means NaN, any false, all true. */
static int reduce_nothing(const hm_split *p) {
  const int op = p->call->op;
  if (is_index_op(op) || op == HM_OP_AMAX || op == HM_OP_AMIN)
    return hm_cpu_fail(HM_ERR_ARG, "a largest or smallest value of no elements does not exist");
  uint64_t value = op == HM_OP_ALL || op == HM_OP_PROD;
  const float nan32 = NAN;
  const double nan64 = (double)NAN, one64 = 1;
  if (op == HM_OP_MEAN && p->type == HM_F64) memcpy(&value, &nan64, sizeof nan64);
  else if (op == HM_OP_MEAN) memcpy(&value, &nan32, sizeof nan32);
  else if (op == HM_OP_PROD && p->type == HM_F64) memcpy(&value, &one64, sizeof one64);
  for (int64_t k = 0; k < p->n_keep; k++) hm_split_store(p, 0, k, 1, &value, p->type);
  return HM_OK;
}

static void merge_found(const hm_split *p, const finder *f) {
  for (int64_t c = 1; c < p->n_chunks; c++)
    f->merge(p->call->workspace, index_partials(p, 0), partials(p, c, f->dtype), index_partials(p, c), p->n_keep);
  store_found(p, 0, p->n_keep, p->call->workspace, index_partials(p, 0));
}

int HM_ISA_FN(hm_cpu_reduce)(const hm_kernel_call *call) {
  hm_split p;
  const reducer *op = reducer_of(call->op, call->compute);
  if (!op) return HM_ISA_FN(hm_cpu_spread)(call);
  plan_call(&p, call);
  p.op = op;
  p.type = op->dtype;
  if (p.n_keep == 0) return HM_OK;
  if (p.n_red == 0) return reduce_nothing(&p);
  const int threads = hm_cpu_threads(p.n_keep * p.n_red, hm_dtype_size(p.dtype));
  const finder *f = is_index_op(call->op) ? finder_of(call->op, call->compute) : NULL;
  if (f && p.columns) find_columns(&p, f, threads);
  else if (f) find_rows(&p, f, threads);
  else if (p.columns) reduce_columns(&p, threads);
  else reduce_rows(&p, threads);
  if (p.n_chunks == 1) return HM_OK;
  if (f) {
    merge_found(&p, f);
  } else {
    tree(p.op, call->workspace, p.n_chunks, p.n_keep);
    finish(&p, 0, p.n_keep, call->workspace);
  }
  return HM_OK;
}

/* The plan does not depend on the instruction set, so one of the three variants answers for all. */
#define HM_FIRST_baseline 1
#if HM_ISA_JOIN(HM_FIRST, HM_ISA)
int hm_cpu_reduce_workspace(const hm_kernel_call *call, size_t *bytes) {
  hm_split p;
  plan_call(&p, call);
  *bytes = p.n_chunks > 1 ? (size_t)(p.n_chunks * p.n_keep) * (is_index_op(call->op) ? 16 : 8) : 0;
  return HM_OK;
}
#endif
