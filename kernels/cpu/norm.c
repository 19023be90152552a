/*
 * norm.c -- softmax and log_softmax along a dim, and their gradients.
 *
 * Compiled once per instruction set.  Called through hm_isa.norm.
 *
 * Rows are taken in blocks that fit L1 as dense f32 (f64) tiles, whatever dtype and strides the views have: a dim
 * with a stride is transposed into the tile, so that the arithmetic and its order are those of the dense case.  Rows
 * longer than a block are streamed leaf by leaf, and long rows that lie side by side step by step, 64 of them at once.
 * Sums: see vec.h.  A row with NaN or +inf, or of nothing but -inf,
 * is NaN, as the formulas give it.
 */
#include "../math.h"
#include "vec.h"

/* One op on dense rows of one type.  a: input or g; b: out (backward only); y: result, may be a. */
typedef void (*block_fn)(void *y, const void *a, const void *b, int64_t rows, int64_t length);

#define DEFINE_BLOCKS(T, S)                                                                                            \
  static void softmax_##S(void *ys, const void *as, const void *bs, int64_t rows, int64_t length) {                    \
    (void)bs;                                                                                                          \
    T *y = ys;                                                                                                         \
    const T *a = as;                                                                                                   \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      const T m = hm_max_row_##S(a + r * length, length);                                                              \
      for (int64_t i = 0; i < length; i++) y[r * length + i] = a[r * length + i] - m;                                  \
    }                                                                                                                  \
    for (int64_t i = 0; i < rows * length; i++) y[i] = hm_exp_##S(y[i]);                                               \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      const T s = hm_sum_row_##S(y + r * length, length);                                                              \
      for (int64_t i = 0; i < length; i++) y[r * length + i] /= s;                                                     \
    }                                                                                                                  \
  }                                                                                                                    \
  static void log_softmax_##S(void *ys, const void *as, const void *bs, int64_t rows, int64_t length) {                \
    (void)bs;                                                                                                          \
    T *y = ys;                                                                                                         \
    const T *a = as;                                                                                                   \
    T e[HM_BLOCK];                                                                                                     \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      const T m = hm_max_row_##S(a + r * length, length);                                                              \
      for (int64_t i = 0; i < length; i++) y[r * length + i] = a[r * length + i] - m;                                  \
    }                                                                                                                  \
    for (int64_t i = 0; i < rows * length; i++) e[i] = hm_exp_##S(y[i]);                                               \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      const T s = hm_log_##S(hm_sum_row_##S(e + r * length, length));                                                  \
      for (int64_t i = 0; i < length; i++) y[r * length + i] -= s;                                                     \
    }                                                                                                                  \
  }                                                                                                                    \
  static void softmax_backward_##S(void *ys, const void *as, const void *bs, int64_t rows, int64_t length) {           \
    T *y = ys;                                                                                                         \
    const T *g = as, *out = bs;                                                                                        \
    T product[HM_BLOCK];                                                                                               \
    for (int64_t i = 0; i < rows * length; i++) product[i] = g[i] * out[i];                                            \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      const T s = hm_sum_row_##S(product + r * length, length);                                                        \
      for (int64_t i = r * length; i < (r + 1) * length; i++) y[i] = out[i] * (g[i] - s);                              \
    }                                                                                                                  \
  }                                                                                                                    \
  static void log_softmax_backward_##S(void *ys, const void *as, const void *bs, int64_t rows, int64_t length) {       \
    T *y = ys;                                                                                                         \
    const T *g = as, *out = bs;                                                                                        \
    T e[HM_BLOCK];                                                                                                     \
    for (int64_t i = 0; i < rows * length; i++) e[i] = hm_exp_##S(out[i]);                                             \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      const T s = hm_sum_row_##S(g + r * length, length);                                                              \
      for (int64_t i = r * length; i < (r + 1) * length; i++) y[i] = g[i] - e[i] * s;                                  \
    }                                                                                                                  \
  }

DEFINE_BLOCKS(float, f32)
DEFINE_BLOCKS(double, f64)

/* ====== Rows longer than a block ====== */

#define DEFINE_LONG(T, S, type)                                                                                        \
  static void long_forward_##S(const hm_rows *rows, int64_t r, bool log) {                                             \
    T tile[HM_LEAF], e[HM_LEAF];                                                                                       \
    const int64_t leaves = (rows->length + HM_LEAF - 1) / HM_LEAF;                                                     \
    const int64_t from = hm_rows_offset(rows, 0, r), to = hm_rows_offset(rows, 1, r);                                  \
    T m = -(T)INFINITY;                                                                                                \
    hm_pairs_##S p = {.count = 0};                                                                                     \
    for (int64_t k = 0; k < leaves; k++) {                                                                             \
      const hm_leaf l = hm_leaf_of(k, rows->length);                                                                   \
      const T top = hm_max_row_##S(hm_leaf_in(rows, 0, from, l, tile, type), l.n);                                     \
      m = HM_MAX_S(m, top);                                                                                            \
    }                                                                                                                  \
    for (int64_t k = 0; k < leaves; k++) {                                                                             \
      const hm_leaf l = hm_leaf_of(k, rows->length);                                                                   \
      const T *x = hm_leaf_in(rows, 0, from, l, tile, type);                                                           \
      for (int64_t i = 0; i < l.n; i++) e[i] = hm_exp_##S(x[i] - m);                                                   \
      hm_pairs_add_##S(&p, hm_sum_row_##S(e, l.n));                                                                    \
    }                                                                                                                  \
    const T s = hm_pairs_total_##S(&p), log_s = hm_log_##S(s);                                                         \
    for (int64_t k = 0; k < leaves; k++) {                                                                             \
      const hm_leaf l = hm_leaf_of(k, rows->length);                                                                   \
      const T *x = hm_leaf_in(rows, 0, from, l, tile, type);                                                           \
      if (log)                                                                                                         \
        for (int64_t i = 0; i < l.n; i++) e[i] = x[i] - m - log_s;                                                     \
      else                                                                                                             \
        for (int64_t i = 0; i < l.n; i++) e[i] = hm_exp_##S(x[i] - m) / s;                                             \
      hm_leaf_out(rows, 1, to, l, e, type);                                                                            \
    }                                                                                                                  \
  }                                                                                                                    \
  static void long_backward_##S(const hm_rows *rows, int64_t r, bool log) {                                            \
    T g_tile[HM_LEAF], o_tile[HM_LEAF], y[HM_LEAF];                                                                    \
    const int64_t leaves = (rows->length + HM_LEAF - 1) / HM_LEAF;                                                     \
    const int64_t at_g = hm_rows_offset(rows, 0, r), at_o = hm_rows_offset(rows, 1, r),                                \
                  to = hm_rows_offset(rows, 2, r);                                                                     \
    hm_pairs_##S p = {.count = 0};                                                                                     \
    for (int64_t k = 0; k < leaves; k++) {                                                                             \
      const hm_leaf l = hm_leaf_of(k, rows->length);                                                                   \
      const T *g = hm_leaf_in(rows, 0, at_g, l, g_tile, type);                                                         \
      const T *out = log ? NULL : hm_leaf_in(rows, 1, at_o, l, o_tile, type);                                          \
      for (int64_t i = 0; !log && i < l.n; i++) y[i] = g[i] * out[i];                                                  \
      hm_pairs_add_##S(&p, hm_sum_row_##S(log ? g : y, l.n));                                                          \
    }                                                                                                                  \
    const T s = hm_pairs_total_##S(&p);                                                                                \
    for (int64_t k = 0; k < leaves; k++) {                                                                             \
      const hm_leaf l = hm_leaf_of(k, rows->length);                                                                   \
      const T *g = hm_leaf_in(rows, 0, at_g, l, g_tile, type), *out = hm_leaf_in(rows, 1, at_o, l, o_tile, type);      \
      if (log)                                                                                                         \
        for (int64_t i = 0; i < l.n; i++) y[i] = g[i] - hm_exp_##S(out[i]) * s;                                        \
      else                                                                                                             \
        for (int64_t i = 0; i < l.n; i++) y[i] = out[i] * (g[i] - s);                                                  \
      hm_leaf_out(rows, 2, to, l, y, type);                                                                            \
    }                                                                                                                  \
  }

DEFINE_LONG(float, f32, HM_F32)
DEFINE_LONG(double, f64, HM_F64)

static void long_row(const hm_rows *rows, int64_t r, bool backward, bool log, bool f64) {
  if (backward && f64) long_backward_f64(rows, r, log);
  else if (backward) long_backward_f32(rows, r, log);
  else if (f64) long_forward_f64(rows, r, log);
  else long_forward_f32(rows, r, log);
}

/* ====== Long rows side by side in memory ====== */

typedef struct work {
  hm_rows rows;
  block_fn fn;
  int type; /* computed in: HM_F32 or HM_F64 */
  bool backward, log;
} work;

enum { WIDE = 64, LONG_COLUMN = 1024 }; /* rows taken together; how long they must be */

/* Where `wide` neighbouring rows begin in the views, and from one to the next. */
typedef struct columns {
  const work *w;
  int64_t wide, at[HM_ROW_VIEWS], pitch[HM_ROW_VIEWS];
} columns;

/* Step l of all of them, dense: where it lies or in tile. */
static const void *column_step(const columns *c, int v, int64_t l, void *tile) {
  const hm_view *x = c->w->rows.view[v];
  return hm_tile_in(tile, c->w->type, hm_at(x->data, c->at[v] + l * c->w->rows.step[v], x->dtype), x->dtype, c->wide,
                    c->pitch[v]);
}

static void column_put(const columns *c, int v, int64_t l, const void *tile) {
  const hm_view *y = c->w->rows.view[v];
  hm_tile_out(hm_at_mut(y->data, c->at[v] + l * c->w->rows.step[v], y->dtype), y->dtype, c->pitch[v], tile, c->w->type,
              c->wide);
}

/* The additions are those of vec.h for each row, in its order: lanes, leaves, pairs of leaves. */
#define DEFINE_COLUMNS(T, S)                                                                                           \
  static void column_top_##S(const columns *c, T *top) {                                                               \
    T tile[WIDE];                                                                                                      \
    for (int64_t k = 0; k < c->wide; k++) top[k] = -(T)INFINITY;                                                       \
    for (int64_t l = 0; l < c->w->rows.length; l++) {                                                                  \
      const T *x = column_step(c, 0, l, tile);                                                                         \
      for (int64_t k = 0; k < c->wide; k++) top[k] = HM_MAX_S(top[k], x[k]);                                           \
    }                                                                                                                  \
  }                                                                                                                    \
  /* What is summed at step l. */                                                                                      \
  static inline void column_term_##S(const columns *c, int64_t l, const T *top, T *restrict y) {                       \
    T tile[WIDE], tile2[WIDE];                                                                                         \
    const T *x = column_step(c, 0, l, tile);                                                                           \
    if (!c->w->backward) {                                                                                             \
      for (int64_t k = 0; k < c->wide; k++) y[k] = hm_exp_##S(x[k] - top[k]);                                          \
    } else if (c->w->log) {                                                                                            \
      for (int64_t k = 0; k < c->wide; k++) y[k] = x[k];                                                               \
    } else {                                                                                                           \
      const T *out = column_step(c, 1, l, tile2);                                                                      \
      for (int64_t k = 0; k < c->wide; k++) y[k] = x[k] * out[k];                                                      \
    }                                                                                                                  \
  }                                                                                                                    \
  static void column_leaf_##S(const columns *c, hm_leaf leaf, const T *top, T *sum) {                                  \
    T lane[HM_LANES][WIDE], x[4][WIDE];                                                                                \
    memset(lane, 0, sizeof lane);                                                                                      \
    int64_t i = leaf.n < HM_LANES ? leaf.n : HM_LANES;                                                                 \
    for (int64_t l = 0; l < i; l++) column_term_##S(c, leaf.at + l, top, lane[l]);                                     \
    for (; i + 4 * HM_LANES <= leaf.n; i += 4 * HM_LANES) {                                                            \
      for (int64_t l = 0; l < HM_LANES; l++) {                                                                         \
        for (int64_t q = 0; q < 4; q++) column_term_##S(c, leaf.at + i + q * HM_LANES + l, top, x[q]);                 \
        for (int64_t k = 0; k < c->wide; k++) lane[l][k] += (x[0][k] + x[1][k]) + (x[2][k] + x[3][k]);                 \
      }                                                                                                                \
    }                                                                                                                  \
    for (; i < leaf.n; i++) {                                                                                          \
      column_term_##S(c, leaf.at + i, top, x[0]);                                                                      \
      for (int64_t k = 0; k < c->wide; k++) lane[i % HM_LANES][k] += x[0][k];                                          \
    }                                                                                                                  \
    for (int64_t half = HM_LANES / 2; half > 0; half /= 2)                                                             \
      for (int64_t l = 0; l < half; l++)                                                                               \
        for (int64_t k = 0; k < c->wide; k++) lane[l][k] += lane[l + half][k];                                         \
    memcpy(sum, lane[0], (size_t)c->wide * sizeof(T));                                                                 \
  }                                                                                                                    \
  static void column_sum_##S(const columns *c, const T *top, T *total) {                                               \
    hm_pairs_##S pairs[WIDE];                                                                                          \
    T sum[WIDE];                                                                                                       \
    for (int64_t k = 0; k < c->wide; k++) pairs[k].count = 0;                                                          \
    for (int64_t leaf = 0; leaf < hm_leaf_count(c->w->rows.length); leaf++) {                                          \
      column_leaf_##S(c, hm_leaf_of(leaf, c->w->rows.length), top, sum);                                               \
      for (int64_t k = 0; k < c->wide; k++) hm_pairs_add_##S(&pairs[k], sum[k]);                                       \
    }                                                                                                                  \
    for (int64_t k = 0; k < c->wide; k++) total[k] = hm_pairs_total_##S(&pairs[k]);                                    \
  }                                                                                                                    \
  static void columns_##S(const columns *c) {                                                                          \
    T top[WIDE] = {0}, sum[WIDE], log_sum[WIDE], tile[WIDE], tile2[WIDE], y[WIDE];                                     \
    const bool backward = c->w->backward, log = c->w->log;                                                             \
    if (!backward) column_top_##S(c, top);                                                                             \
    column_sum_##S(c, top, sum);                                                                                       \
    for (int64_t k = 0; k < c->wide && log && !backward; k++) log_sum[k] = hm_log_##S(sum[k]);                         \
    for (int64_t l = 0; l < c->w->rows.length; l++) {                                                                  \
      const T *x = column_step(c, 0, l, tile), *out = backward ? column_step(c, 1, l, tile2) : NULL;                   \
      if (backward && log)                                                                                             \
        for (int64_t k = 0; k < c->wide; k++) y[k] = x[k] - hm_exp_##S(out[k]) * sum[k];                               \
      else if (backward)                                                                                               \
        for (int64_t k = 0; k < c->wide; k++) y[k] = out[k] * (x[k] - sum[k]);                                         \
      else if (log)                                                                                                    \
        for (int64_t k = 0; k < c->wide; k++) y[k] = x[k] - top[k] - log_sum[k];                                       \
      else                                                                                                             \
        for (int64_t k = 0; k < c->wide; k++) y[k] = hm_exp_##S(x[k] - top[k]) / sum[k];                               \
      column_put(c, backward ? 2 : 1, l, y);                                                                           \
    }                                                                                                                  \
  }

DEFINE_COLUMNS(float, f32)
DEFINE_COLUMNS(double, f64)

static bool side_by_side(const hm_rows *r) {
  return r->length >= LONG_COLUMN && r->nd > 0 && r->step[0] != 1 && r->stride[0][r->nd - 1] == 1 &&
         r->n[r->nd - 1] > 4;
}

static void run_columns(const work *w, int threads) {
  const hm_rows *r = &w->rows;
  const int64_t inner = r->n[r->nd - 1], tiles = (inner + WIDE - 1) / WIDE, units = r->count / inner * tiles;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    const int64_t first = u % tiles * WIDE, left = inner - first;
    columns c = {.w = w, .wide = left < WIDE ? left : WIDE};
    for (int v = 0; v < HM_ROW_VIEWS && r->view[v]; v++) {
      c.at[v] = hm_rows_offset(r, v, u / tiles * inner + first);
      c.pitch[v] = r->stride[v][r->nd - 1];
    }
    if (w->type == HM_F64) columns_f64(&c);
    else columns_f32(&c);
  }
}

/* ====== Entry ====== */

/* Rows [begin, end), in runs along the innermost other dim. */
static void do_block(const work *w, int64_t begin, int64_t end) {
  double a_tile[HM_BLOCK], b_tile[HM_BLOCK], raw[HM_BLOCK];
  const int out = w->backward ? 2 : 1;
  for (int64_t r = begin; r < end;) {
    const int64_t run = hm_rows_run(&w->rows, r, end - r);
    const void *a = hm_rows_in(&w->rows, 0, r, run, a_tile, w->type, raw);
    const void *b = w->backward ? hm_rows_in(&w->rows, 1, r, run, b_tile, w->type, raw) : NULL;
    void *y = hm_rows_target(&w->rows, out, r, run, a_tile, w->type);
    w->fn(y, a, b, run, w->rows.length);
    if (y == a_tile) hm_rows_out(&w->rows, out, r, run, y, w->type, raw);
    r += run;
  }
}

static block_fn block_of(int op, bool f64) {
  switch (op) {
  case HM_OP_SOFTMAX: return f64 ? softmax_f64 : softmax_f32;
  case HM_OP_LOG_SOFTMAX: return f64 ? log_softmax_f64 : log_softmax_f32;
  case HM_OP_SOFTMAX_BACKWARD: return f64 ? softmax_backward_f64 : softmax_backward_f32;
  case HM_OP_LOG_SOFTMAX_BACKWARD: return f64 ? log_softmax_backward_f64 : log_softmax_backward_f32;
  default: return NULL;
  }
}

int HM_ISA_FN(hm_cpu_norm)(const hm_kernel_call *call) {
  const bool f64 = call->compute == HM_F64;
  work w = {.fn = block_of(call->op, f64), .type = f64 ? HM_F64 : HM_F32};
  if (!w.fn) return HM_ISA_FN(hm_cpu_normalize)(call);
  w.backward = call->op == HM_OP_SOFTMAX_BACKWARD || call->op == HM_OP_LOG_SOFTMAX_BACKWARD;
  w.log = call->op == HM_OP_LOG_SOFTMAX || call->op == HM_OP_LOG_SOFTMAX_BACKWARD;
  const hm_view *views[HM_ROW_VIEWS] = {&call->in[0], w.backward ? &call->in[1] : &call->out[0], &call->out[0]};
  hm_rows_init(&w.rows, (int)call->attr[0].i, w.backward ? 3 : 2, views);
  const int64_t length = w.rows.length, count = w.rows.count;
  if (length == 0 || count == 0) return HM_OK;
  const int threads = hm_cpu_threads(count * length, 16);
  if (side_by_side(&w.rows)) {
    run_columns(&w, threads);
    return HM_OK;
  }
  const bool streamed = length > HM_BLOCK;
  const int64_t block = streamed ? 1 : hm_rows_per_block(&w.rows);
  const int64_t blocks = (count + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < blocks; b++) {
    if (streamed) long_row(&w.rows, b, w.backward, w.log, f64);
    else do_block(&w, b * block, b * block + block < count ? b * block + block : count);
  }
  return HM_OK;
}
