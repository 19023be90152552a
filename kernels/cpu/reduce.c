/*
 * reduce.c -- sum, mean, amax, amin, any, all, bias gradients; max_dim, min_dim, argmax, argmin.
 *
 * Compiled once per instruction set.  Called through hm_isa.reduce.
 *
 * A plan splits the input's dims into kept and reduced ones, orders each by stride and joins what lies together.
 * Then one of two loops runs:
 *   rows      each output is a run (or a gather) of elements: 32 lanes over leaves of 1,024 elements
 *   columns   the innermost kept dim is dense: whole rows are added into a tile of columns, 32 rows to a leaf
 * Leaves are added pairwise within a chunk of about 65,536 elements, chunks pairwise through the workspace.  Leaves
 * and chunks depend on shapes and strides only, so the bits do not depend on threads or instruction set.
 */
#include "vec.h"

enum { CHUNK = 65536, LEAF_ROWS = 32, COLS = 512, PARTS = CHUNK / 32, TILE = 2048, MAX_BLOCK = 256 };

/* ====== Arithmetic by type ====== */

HM_DEFINE_LANES(min, MIN, float, f32, INFINITY)
HM_DEFINE_LANES(min, MIN, double, f64, (double)INFINITY)
HM_DEFINE_LANES(sum, SUM, uint64_t, u64, 0)
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

/* ====== The plan ====== */

typedef struct plan {
  const hm_kernel_call *call;
  const reducer *op;
  const char *x;
  int dtype;                                /* of x */
  int nk, nr;                               /* kept and reduced dims, outermost first */
  int64_t kn[HM_MAX_NDIM], ks[HM_MAX_NDIM]; /* kept: size, stride in x */
  int64_t ko[HM_MAX_NDIM];                  /* kept: stride in the outputs, in their elements */
  int64_t rn[HM_MAX_NDIM], rs[HM_MAX_NDIM]; /* reduced */
  int64_t n_keep, n_red;
  bool columns;
  int64_t cols, width, outer; /* columns: size of the inner kept dim, of a tile; product of the other kept dims */
  int64_t chunk, n_chunks;    /* reduced elements (rows) to a chunk */
} plan;

typedef struct dim {
  int64_t n, stride, out;
} dim;

/* Larger strides outside; repeated dims (stride 0) outermost. */
static bool dim_before(const dim *a, const dim *b) {
  return b->stride != 0 && (a->stride == 0 || a->stride > b->stride);
}

static void sort_dims(dim *d, int n) {
  for (int i = 1; i < n; i++) {
    const dim x = d[i];
    int j = i;
    for (; j > 0 && dim_before(&x, &d[j - 1]); j--) d[j] = d[j - 1];
    d[j] = x;
  }
}

/* Joins dims that lie together in x and in the output; returns how many are left. */
static int join_dims(dim *d, int n) {
  int m = 0;
  for (int i = 0; i < n; i++) {
    if (m > 0 && d[m - 1].stride == d[i].stride * d[i].n && d[m - 1].out == d[i].out * d[i].n) {
      d[m - 1] = (dim){d[m - 1].n * d[i].n, d[i].stride, d[i].out};
    } else {
      d[m++] = d[i];
    }
  }
  return m;
}

/* Bit mask of the dims that the op reduces. */
static uint32_t reduced_dims(const hm_kernel_call *call) {
  const uint32_t everything = (1u << call->in[0].ndim) - 1;
  switch (call->op) {
  case HM_OP_LINEAR_BACKWARD_BIAS: return everything & ~(1u << (call->in[0].ndim - 1));
  case HM_OP_CONV2D_BACKWARD_BIAS: return everything & ~2u;
  case HM_OP_MAX_DIM:
  case HM_OP_MIN_DIM:
  case HM_OP_ARGMAX:
  case HM_OP_ARGMIN: return call->attr[0].i == HM_NONE ? everything : everything & (1u << call->attr[0].i);
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

/* Cuts the reduced elements into chunks. */
static void plan_chunks(plan *p) {
  const int64_t inner_red = p->nr ? p->rs[p->nr - 1] : 0;
  p->columns = p->nk > 0 && p->ks[p->nk - 1] == 1 && inner_red != 1;
  p->chunk = CHUNK;
  if (p->columns) {
    p->cols = p->kn[p->nk - 1];
    p->width = p->cols < COLS ? p->cols : COLS;
    p->outer = p->n_keep / p->cols;
    const int64_t rows = CHUNK / p->width / LEAF_ROWS * LEAF_ROWS;
    p->chunk = rows < LEAF_ROWS ? LEAF_ROWS : rows;
  }
  p->n_chunks = (p->n_red + p->chunk - 1) / p->chunk;
}

static void make_plan(plan *p, const hm_kernel_call *call) {
  const hm_view *x = &call->in[0], *out = &call->out[0];
  const uint32_t mask = reduced_dims(call);
  const bool keep = keeps_dims(call);
  dim kept[HM_MAX_NDIM], red[HM_MAX_NDIM];
  int nk = 0, nr = 0, at = 0;
  *p = (plan){.call = call, .x = x->data, .dtype = x->dtype, .n_keep = 1, .n_red = 1};
  for (int d = 0; d < x->ndim; d++) {
    const bool reduced = mask >> d & 1;
    const int64_t n = x->shape[d], stride = x->stride[d], to = reduced ? 0 : out->stride[keep ? d : at];
    if (reduced) p->n_red *= n;
    else p->n_keep *= n, at++;
    if (n == 1) continue;
    if (reduced) red[nr++] = (dim){n, stride, 0};
    else kept[nk++] = (dim){n, stride, to};
  }
  sort_dims(kept, nk);
  if (!is_index_op(call->op)) sort_dims(red, nr);
  p->nk = join_dims(kept, nk);
  p->nr = join_dims(red, nr);
  for (int i = 0; i < p->nk; i++) p->kn[i] = kept[i].n, p->ks[i] = kept[i].stride, p->ko[i] = kept[i].out;
  for (int i = 0; i < p->nr; i++) p->rn[i] = red[i].n, p->rs[i] = red[i].stride;
  if (p->n_keep > 0 && p->n_red > 0) plan_chunks(p);
}

/* Offset of flat index i over n dims of sizes `size` and strides `stride`. */
static int64_t offset_of(int n, const int64_t *size, const int64_t *stride, int64_t i) {
  int64_t offset = 0;
  for (int d = n - 1; d > 0; d--) {
    offset += i % size[d] * stride[d];
    i /= size[d];
  }
  return n ? offset + i * stride[0] : 0;
}

/* Reduced elements [i, i + n) of the output whose elements begin at `base`, dense: where they lie or in tile. */
static const void *fetch(const plan *p, int64_t base, int64_t i, int64_t n, void *tile) {
  const int type = p->op->dtype;
  if (p->nr <= 1) {
    const int64_t stride = p->nr ? p->rs[0] : 1;
    return hm_tile_in(tile, type, hm_at(p->x, base + i * stride, p->dtype), p->dtype, n, stride);
  }
  const int64_t inner = p->rn[p->nr - 1], stride = p->rs[p->nr - 1];
  for (int64_t done = 0; done < n;) {
    const int64_t left = inner - (i + done) % inner, run = left < n - done ? left : n - done;
    const char *src = hm_at(p->x, base + offset_of(p->nr, p->rn, p->rs, i + done), p->dtype);
    hm_tile_fill(hm_at_mut(tile, done, type), type, src, p->dtype, run, stride);
    done += run;
  }
  return tile;
}

/* rows x width values in buf become one row in its beginning: neighbours first, then neighbours of those. */
static void tree(const reducer *op, void *buf, int64_t rows, int64_t width) {
  for (int64_t w = 1; w < rows; w *= 2)
    for (int64_t i = 0; i + w < rows; i += 2 * w)
      op->combine(hm_at_mut(buf, i * width, op->dtype), hm_at(buf, (i + w) * width, op->dtype), width);
}

/* n results, those of outputs from k on in the plan's order, into out[which]. */
static void store(const plan *p, int which, int64_t k, int64_t n, const void *values, int type) {
  const hm_view *out = &p->call->out[which];
  const int64_t inner = p->nk ? p->kn[p->nk - 1] : 1, step = p->nk ? p->ko[p->nk - 1] : 1;
  for (int64_t done = 0; done < n;) {
    const int64_t left = inner - (k + done) % inner, run = left < n - done ? left : n - done;
    const int64_t to = offset_of(p->nk, p->kn, p->ko, k + done);
    hm_tile_out(hm_at_mut(out->data, to, out->dtype), out->dtype, run == 1 ? 1 : step, hm_at(values, done, type), type,
                run);
    done += run;
  }
}

/* The last step of a value reduction: a mean is divided; then the results are written. */
static void finish(const plan *p, int64_t k, int64_t n, void *values) {
  if (p->call->op == HM_OP_MEAN) {
    float *f = values;
    double *d = values;
    if (p->op->dtype == HM_F64)
      for (int64_t i = 0; i < n; i++) d[i] /= (double)p->n_red;
    else
      for (int64_t i = 0; i < n; i++) f[i] /= (float)p->n_red;
  }
  store(p, 0, k, n, values, p->op->dtype);
}

/* Where the partial results of a chunk begin in the workspace. */
static char *partials(const plan *p, int64_t chunk, int type) {
  return hm_at_mut(p->call->workspace, chunk * p->n_keep, type);
}

/* ====== Sums and their like: rows ====== */

/* One chunk of one output into *out. */
static void row_chunk(const plan *p, int64_t k, int64_t chunk, void *out) {
  uint64_t tile[HM_LEAF] __attribute__((aligned(64))), parts[PARTS] __attribute__((aligned(64)));
  const reducer *op = p->op;
  const int64_t base = offset_of(p->nk, p->kn, p->ks, k), begin = chunk * p->chunk;
  const int64_t end = begin + p->chunk < p->n_red ? begin + p->chunk : p->n_red;
  int64_t leaves = 0;
  for (int64_t i = begin; i < end; i += HM_LEAF) {
    const int64_t n = end - i < HM_LEAF ? end - i : HM_LEAF;
    op->leaf(hm_at_mut(parts, leaves++ * HM_LANES, op->dtype), fetch(p, base, i, n, tile), n);
  }
  tree(op, parts, leaves, HM_LANES);
  op->fold(parts);
  memcpy(out, parts, (size_t)hm_dtype_size(op->dtype));
}

/* Outputs [k, k + n), each of at most one leaf, into values.  Rows that lie end to end are converted together. */
static void short_rows(const plan *p, int64_t k, int64_t n, void *values) {
  uint64_t tile[TILE] __attribute__((aligned(64)));
  const reducer *op = p->op;
  const bool dense = p->nk == 1 && p->ks[0] == p->n_red && (p->nr == 0 || (p->nr == 1 && p->rs[0] == 1));
  const int64_t group = dense ? (p->dtype == op->dtype ? n : TILE / p->n_red) : 1;
  for (int64_t i = 0; i < n; i += group) {
    const int64_t rows = n - i < group ? n - i : group;
    const int64_t base = offset_of(p->nk, p->kn, p->ks, k + i);
    const void *x = dense ? hm_tile_in(tile, op->dtype, hm_at(p->x, base, p->dtype), p->dtype, rows * p->n_red, 1)
                          : fetch(p, base, 0, p->n_red, tile);
    for (int64_t r = 0; r < rows; r++)
      op->row(hm_at_mut(values, i + r, op->dtype), hm_at(x, r * p->n_red, op->dtype), p->n_red);
  }
}

static void reduce_rows(const plan *p, int threads) {
  int64_t block = 2 * TILE / p->n_red;
  block = block < 1 ? 1 : block > MAX_BLOCK ? MAX_BLOCK : block;
  const int64_t blocks = (p->n_keep + block - 1) / block, units = blocks * p->n_chunks;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    const int64_t k = u / p->n_chunks * block, n = p->n_keep - k < block ? p->n_keep - k : block;
    uint64_t values[MAX_BLOCK];
    if (p->n_chunks > 1) {
      row_chunk(p, k, u % p->n_chunks, hm_at_mut(partials(p, u % p->n_chunks, p->op->dtype), k, p->op->dtype));
      continue;
    }
    if (p->n_red <= HM_LEAF) {
      short_rows(p, k, n, values);
    } else {
      for (int64_t i = 0; i < n; i++) row_chunk(p, k + i, 0, hm_at_mut(values, i, p->op->dtype));
    }
    finish(p, k, n, values);
  }
}

/* ====== Sums and their like: columns ====== */

/* Rows [r, r + rows) of a tile of columns, dense or where they lie: returns the first, *ld is their distance.  At
 * most TILE elements
 * where they must be moved: *rows says how many came. */
static const void *fetch_rows(const plan *p, int64_t base, int64_t r, int64_t *rows, int64_t width, void *tile,
                              int64_t *ld) {
  const int type = p->op->dtype;
  const int64_t most = TILE / width / 4 * 4;
  if (p->nr <= 1) {
    const int64_t stride = p->nr ? p->rs[0] : width;
    const char *src = hm_at(p->x, base + r * stride, p->dtype);
    if (p->dtype == type) {
      *ld = stride;
      return src;
    }
    if (*rows > most) *rows = most;
    *ld = width;
    if (stride == width) return hm_tile_in(tile, type, src, p->dtype, *rows * width, 1);
  }
  if (*rows > most) *rows = most;
  *ld = width;
  for (int64_t i = 0; i < *rows; i++) {
    const int64_t at = base + offset_of(p->nr, p->rn, p->rs, r + i);
    hm_tile_fill(hm_at_mut(tile, i * width, type), type, hm_at(p->x, at, p->dtype), p->dtype, width, 1);
  }
  return tile;
}

/* One chunk of rows of `width` columns into the beginning of parts. */
static void column_chunk(const plan *p, int64_t base, int64_t chunk, int64_t width, void *parts, void *tile) {
  const reducer *op = p->op;
  const int64_t begin = chunk * p->chunk, end = begin + p->chunk < p->n_red ? begin + p->chunk : p->n_red;
  int64_t leaves = 0;
  for (int64_t leaf = begin; leaf < end; leaf += LEAF_ROWS) {
    const int64_t stop = leaf + LEAF_ROWS < end ? leaf + LEAF_ROWS : end;
    void *acc = hm_at_mut(parts, leaves++ * width, op->dtype);
    for (int64_t r = leaf; r < stop;) {
      int64_t rows = stop - r, ld;
      const void *x = fetch_rows(p, base, r, &rows, width, tile, &ld);
      op->columns(acc, x, ld, rows, width, r == leaf);
      r += rows;
    }
  }
  tree(op, parts, leaves, width);
}

/* Work unit u of a column plan: which tile of which outer index, first column, width. */
typedef struct column_unit {
  int64_t k, width, base, chunk;
} column_unit;

static column_unit unit_of(const plan *p, int64_t u) {
  const int64_t tiles = (p->cols + p->width - 1) / p->width;
  const int64_t chunk = u % p->n_chunks, tile = u / p->n_chunks % tiles, outer = u / p->n_chunks / tiles;
  const int64_t first = tile * p->width, left = p->cols - first;
  const int64_t k = outer * p->cols + first;
  return (column_unit){k, left < p->width ? left : p->width, offset_of(p->nk, p->kn, p->ks, k), chunk};
}

static int64_t column_units(const plan *p) { return p->outer * ((p->cols + p->width - 1) / p->width) * p->n_chunks; }

static void reduce_columns(const plan *p, int threads) {
  const int64_t units = column_units(p);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    uint64_t parts[PARTS] __attribute__((aligned(64))), tile[TILE] __attribute__((aligned(64)));
    const column_unit c = unit_of(p, u);
    const int type = p->op->dtype;
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
static int64_t *index_partials(const plan *p, int64_t chunk) {
  return (int64_t *)p->call->workspace + (p->n_chunks + chunk) * p->n_keep;
}

/* Writes values (max_dim, min_dim) and indices of n outputs from k on. */
static void store_found(const plan *p, int64_t k, int64_t n, const void *values, const int64_t *index) {
  const bool with_value = p->call->op == HM_OP_MAX_DIM || p->call->op == HM_OP_MIN_DIM;
  if (with_value) store(p, 0, k, n, values, p->op->dtype);
  store(p, with_value ? 1 : 0, k, n, index, HM_I64);
}

static void find_in_row(const plan *p, const finder *f, int64_t k, int64_t chunk, void *value, int64_t *index) {
  uint64_t tile[HM_LEAF] __attribute__((aligned(64)));
  const int64_t base = offset_of(p->nk, p->kn, p->ks, k), begin = chunk * p->chunk;
  const int64_t end = begin + p->chunk < p->n_red ? begin + p->chunk : p->n_red;
  *index = -1;
  for (int64_t i = begin; i < end; i += HM_LEAF) {
    const int64_t n = end - i < HM_LEAF ? end - i : HM_LEAF;
    f->row(value, index, fetch(p, base, i, n, tile), n, i);
  }
}

static void find_rows(const plan *p, const finder *f, int threads) {
  int64_t block = 2 * TILE / p->n_red;
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

static void find_columns(const plan *p, const finder *f, int threads) {
  const int64_t units = column_units(p);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    uint64_t values[COLS], tile[TILE] __attribute__((aligned(64)));
    int64_t index[COLS];
    const column_unit c = unit_of(p, u);
    const int64_t begin = c.chunk * p->chunk, end = begin + p->chunk < p->n_red ? begin + p->chunk : p->n_red;
    memset(values, 0, sizeof values);
    for (int64_t i = 0; i < c.width; i++) index[i] = -1;
    for (int64_t r = begin; r < end;) {
      int64_t rows = end - r, ld;
      const void *x = fetch_rows(p, c.base, r, &rows, c.width, tile, &ld);
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

/* Outputs exist but nothing is reduced into them: sums are 0, means NaN, any false, all true. */
static int reduce_nothing(const plan *p) {
  const int op = p->call->op;
  if (is_index_op(op) || op == HM_OP_AMAX || op == HM_OP_AMIN)
    return hm_cpu_fail(HM_ERR_ARG, "a largest or smallest value of no elements does not exist");
  uint64_t value = op == HM_OP_ALL;
  const float nan32 = NAN;
  const double nan64 = (double)NAN;
  if (op == HM_OP_MEAN && p->op->dtype == HM_F64) memcpy(&value, &nan64, sizeof nan64);
  else if (op == HM_OP_MEAN) memcpy(&value, &nan32, sizeof nan32);
  for (int64_t k = 0; k < p->n_keep; k++) store(p, 0, k, 1, &value, p->op->dtype);
  return HM_OK;
}

static void merge_found(const plan *p, const finder *f) {
  for (int64_t c = 1; c < p->n_chunks; c++)
    f->merge(p->call->workspace, index_partials(p, 0), partials(p, c, f->dtype), index_partials(p, c), p->n_keep);
  store_found(p, 0, p->n_keep, p->call->workspace, index_partials(p, 0));
}

int HM_ISA_FN(hm_cpu_reduce)(const hm_kernel_call *call) {
  plan p;
  make_plan(&p, call);
  p.op = reducer_of(call->op, call->compute);
  if (!p.op) return hm_cpu_fail(HM_ERR_UNSUPPORTED, "the cpu backend has no reduction with op id %d", call->op);
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
  plan p;
  make_plan(&p, call);
  *bytes = p.n_chunks > 1 ? (size_t)(p.n_chunks * p.n_keep) * (is_index_op(call->op) ? 16 : 8) : 0;
  return HM_OK;
}
#endif
