/*
 * norm.c -- softmax and log_softmax along a dim, and their gradients.
 *
 * Compiled once per instruction set.  Called through hm_isa.norm.
 *
 * Rows are taken in blocks that fit L1 as dense f32 (f64) tiles, whatever dtype and strides the views have: a dim
 * with a stride is transposed into the tile, so that the arithmetic and its order are those of the dense case.  Rows
 * longer than a block are streamed leaf by leaf.  Sums: see vec.h.  A row with NaN or +inf, or of nothing but -inf,
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

/* ====== Entry ====== */

typedef struct work {
  hm_rows rows;
  block_fn fn;
  int type; /* computed in: HM_F32 or HM_F64 */
  bool backward, log;
} work;

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
  if (!w.fn) return hm_cpu_fail(HM_ERR_UNSUPPORTED, "the cpu backend has no normalisation with op id %d", call->op);
  w.backward = call->op == HM_OP_SOFTMAX_BACKWARD || call->op == HM_OP_LOG_SOFTMAX_BACKWARD;
  w.log = call->op == HM_OP_LOG_SOFTMAX || call->op == HM_OP_LOG_SOFTMAX_BACKWARD;
  const hm_view *views[HM_ROW_VIEWS] = {&call->in[0], w.backward ? &call->in[1] : &call->out[0], &call->out[0]};
  hm_rows_init(&w.rows, (int)call->attr[0].i, w.backward ? 3 : 2, views);
  const int64_t length = w.rows.length, count = w.rows.count;
  if (length == 0 || count == 0) return HM_OK;
  const int threads = hm_cpu_threads(count * length, 16);
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
