/*
 * loss.c -- cross entropy with softmax fused in, and its gradient.
 *
 * Compiled once per instruction set.  Called through hm_isa.loss; nll_loss goes on to nll.c.
 *
 * Logits are rows along the class dim, taken in blocks as in norm.c.  The forward op keeps each row's log of the sum
 * of exponentials (lse); the gradient takes exp(x - lse) and divides by its sum, which removes the rounding of lse.
 * Losses are added in double, position by position within a piece, piece by piece; pieces depend on the number of
 * positions only.
 */

#include "../math.h"
#include "vec.h"

enum { MEAN, SUM, NONE };
enum { MAX_PIECES = 1024 };

typedef struct work {
  const hm_kernel_call *call;
  hm_rows rows; /* views: x; backward: out too */
  const hm_view *target, *lse;
  const hm_view *g;    /* backward */
  const hm_view *loss; /* forward */
  int type;            /* computed in: HM_F32 or HM_F64 */
  int reduction;
  int64_t ignore, valid; /* valid: positions that are not ignored */
  double smoothing;
} work;

/* Offset of element i, counted row-major, of a view. */
static int64_t offset_of(const hm_view *v, int64_t i) {
  int64_t offset = 0;
  for (int d = v->ndim - 1; d > 0; d--) {
    offset += i % v->shape[d] * v->stride[d];
    i /= v->shape[d];
  }
  return v->ndim ? offset + i * v->stride[0] : 0;
}

static int64_t target_at(const hm_view *v, int64_t i) {
  const int64_t at = offset_of(v, i);
  switch (v->dtype) {
  case HM_I64: return ((const int64_t *)v->data)[at];
  case HM_I32: return ((const int32_t *)v->data)[at];
  default: return ((const uint8_t *)v->data)[at];
  }
}

/* One element of a floating view. */
static double float_at(const hm_view *v, int64_t i) {
  double value;
  hm_cpu_isa()->convert(&value, HM_F64, hm_at(v->data, offset_of(v, i), v->dtype), v->dtype, 1);
  return value;
}

static void float_put(const hm_view *v, int64_t i, double value) {
  hm_cpu_isa()->convert(hm_at_mut(v->data, offset_of(v, i), v->dtype), v->dtype, &value, HM_F64, 1);
}

/* ====== Rows ====== */

/* What the loss of a row is made of: x[target] - max, log of the sum of e^(x - max), sum of (x - max) where smoothing
 * asks for it. */
typedef struct row_parts {
  double picked, log_sum, shifted_sum;
} row_parts;

static double row_loss(const work *w, row_parts p) {
  const double nll = p.log_sum - p.picked;
  if (w->smoothing == 0) return nll;
  const double classes = (double)w->rows.length, smooth = classes * p.log_sum - p.shifted_sum;
  return (1 - w->smoothing) * nll + w->smoothing / classes * smooth;
}

#define DEFINE_ROWS(T, S, type)                                                                                        \
  /* y = e^(x - top) */                                                                                                \
  __attribute__((noinline)) static void exp_below_##S(T *restrict y, const T *restrict x, T top, int64_t n) {          \
    for (int64_t i = 0; i < n; i++) y[i] = hm_exp_##S(x[i] - top);                                                     \
  }                                                                                                                    \
  /* Dense rows x of one block; parts and lse by row; target < 0: ignored. */                                          \
  static void forward_##S(const work *w, const void *xs, int64_t n, const int64_t *target, row_parts *parts,           \
                          double *lse) {                                                                               \
    T e[HM_BLOCK];                                                                                                     \
    const T *x = xs;                                                                                                   \
    const int64_t length = w->rows.length;                                                                             \
    for (int64_t r = 0; r < n; r++) {                                                                                  \
      const T m = hm_max_row_##S(x + r * length, length);                                                              \
      for (int64_t i = r * length; i < (r + 1) * length; i++) e[i] = x[i] - m;                                         \
      parts[r].picked = target[r] < 0 ? 0 : (double)e[r * length + target[r]];                                         \
      parts[r].shifted_sum = w->smoothing == 0 ? 0 : (double)hm_sum_row_##S(e + r * length, length);                   \
      lse[r] = (double)m;                                                                                              \
    }                                                                                                                  \
    for (int64_t i = 0; i < n * length; i++) e[i] = hm_exp_##S(e[i]);                                                  \
    for (int64_t r = 0; r < n; r++) {                                                                                  \
      parts[r].log_sum = (double)hm_log_##S(hm_sum_row_##S(e + r * length, length));                                   \
      lse[r] += parts[r].log_sum;                                                                                      \
    }                                                                                                                  \
  }                                                                                                                    \
  static void forward_long_##S(const work *w, int64_t r, int64_t target, row_parts *parts, double *lse) {              \
    T tile[HM_LEAF], e[HM_LEAF];                                                                                       \
    const hm_rows *rows = &w->rows;                                                                                    \
    const int64_t leaves = hm_leaf_count(rows->length), from = hm_rows_offset(rows, 0, r);                             \
    hm_pairs_##S sum = {.count = 0}, shifted = {.count = 0};                                                           \
    T m = -(T)INFINITY, picked = 0;                                                                                    \
    for (int64_t k = 0; k < leaves; k++) {                                                                             \
      const hm_leaf l = hm_leaf_of(k, rows->length);                                                                   \
      const T top = hm_max_row_##S(hm_leaf_in(rows, 0, from, l, tile, type), l.n);                                     \
      m = HM_MAX_S(m, top);                                                                                            \
    }                                                                                                                  \
    for (int64_t k = 0; k < leaves; k++) {                                                                             \
      const hm_leaf l = hm_leaf_of(k, rows->length);                                                                   \
      const T *x = hm_leaf_in(rows, 0, from, l, tile, type);                                                           \
      if (target >= l.at && target < l.at + l.n) picked = x[target - l.at] - m;                                        \
      if (w->smoothing != 0) {                                                                                         \
        for (int64_t i = 0; i < l.n; i++) e[i] = x[i] - m;                                                             \
        hm_pairs_add_##S(&shifted, hm_sum_row_##S(e, l.n));                                                            \
      }                                                                                                                \
      exp_below_##S(e, x, m, l.n);                                                                                     \
      hm_pairs_add_##S(&sum, hm_sum_row_##S(e, l.n));                                                                  \
    }                                                                                                                  \
    const T log_sum = hm_log_##S(hm_pairs_total_##S(&sum));                                                            \
    *parts = (row_parts){(double)picked, (double)log_sum, (double)hm_pairs_total_##S(&shifted)};                       \
    *lse = (double)m + (double)log_sum;                                                                                \
  }                                                                                                                    \
  /* y = (softmax - q) * coef on dense rows; y may be x. */                                                            \
  static void backward_##S(const work *w, void *ys, const void *xs, int64_t n, const int64_t *target,                  \
                           const double *lse, const double *coef) {                                                    \
    T *y = ys;                                                                                                         \
    const T *x = xs;                                                                                                   \
    const int64_t length = w->rows.length;                                                                             \
    const T share = (T)(w->smoothing / (double)length), rest = (T)(1 - w->smoothing);                                  \
    for (int64_t r = 0; r < n; r++) {                                                                                  \
      const T top = (T)lse[r];                                                                                         \
      for (int64_t i = r * length; i < (r + 1) * length; i++) y[i] = x[i] - top;                                       \
    }                                                                                                                  \
    for (int64_t i = 0; i < n * length; i++) y[i] = hm_exp_##S(y[i]);                                                  \
    for (int64_t r = 0; r < n; r++) {                                                                                  \
      T *row = y + r * length;                                                                                         \
      if (target[r] < 0) {                                                                                             \
        memset(row, 0, (size_t)length * sizeof(T));                                                                    \
        continue;                                                                                                      \
      }                                                                                                                \
      const T s = hm_sum_row_##S(row, length), c = (T)coef[r];                                                         \
      const T at_target = (row[target[r]] / s - share - rest) * c;                                                     \
      for (int64_t i = 0; i < length; i++) row[i] = (row[i] / s - share) * c;                                          \
      row[target[r]] = at_target;                                                                                      \
    }                                                                                                                  \
  }                                                                                                                    \
  static void backward_long_##S(const work *w, int64_t r, int64_t target, double lse, double coef) {                   \
    T tile[HM_LEAF], e[HM_LEAF];                                                                                       \
    const hm_rows *rows = &w->rows;                                                                                    \
    const int64_t leaves = hm_leaf_count(rows->length), from = hm_rows_offset(rows, 0, r),                             \
                  to = hm_rows_offset(rows, 1, r);                                                                     \
    const T share = (T)(w->smoothing / (double)rows->length), rest = (T)(1 - w->smoothing), c = (T)coef, top = (T)lse; \
    hm_pairs_##S sum = {.count = 0};                                                                                   \
    for (int64_t k = 0; k < leaves && target >= 0; k++) {                                                              \
      const hm_leaf l = hm_leaf_of(k, rows->length);                                                                   \
      const T *x = hm_leaf_in(rows, 0, from, l, tile, type);                                                           \
      exp_below_##S(e, x, top, l.n);                                                                                   \
      hm_pairs_add_##S(&sum, hm_sum_row_##S(e, l.n));                                                                  \
    }                                                                                                                  \
    const T s = hm_pairs_total_##S(&sum);                                                                              \
    for (int64_t k = 0; k < leaves; k++) {                                                                             \
      const hm_leaf l = hm_leaf_of(k, rows->length);                                                                   \
      if (target < 0) {                                                                                                \
        memset(e, 0, sizeof e);                                                                                        \
      } else {                                                                                                         \
        const T *x = hm_leaf_in(rows, 0, from, l, tile, type);                                                         \
        for (int64_t i = 0; i < l.n; i++) e[i] = hm_exp_##S(x[i] - top) / s - share;                                   \
        if (target >= l.at && target < l.at + l.n) e[target - l.at] -= rest;                                           \
        for (int64_t i = 0; i < l.n; i++) e[i] *= c;                                                                   \
      }                                                                                                                \
      hm_leaf_out(rows, 1, to, l, e, type);                                                                            \
    }                                                                                                                  \
  }

DEFINE_ROWS(float, f32, HM_F32)
DEFINE_ROWS(double, f64, HM_F64)

/* ====== Pieces: fixed ranges of positions ====== */

enum { GROUP = 256 }; /* rows handled together, at most */

/* Targets of n positions from r on; -1 stands for "ignored". */
static void read_targets(const work *w, int64_t r, int64_t n, int64_t *target) {
  for (int64_t i = 0; i < n; i++) {
    const int64_t t = target_at(w->target, r + i);
    target[i] = t == w->ignore ? -1 : t;
  }
}

/* How many rows from r on can be taken together, before `end`. */
static int64_t group_of(const work *w, int64_t r, int64_t end) {
  const int64_t fit = hm_rows_per_block(&w->rows), want = fit < GROUP ? fit : GROUP;
  return hm_rows_run(&w->rows, r, want < end - r ? want : end - r);
}

/* Loss and lse of positions [begin, end); returns the sum of their losses. */
static double forward_piece(const work *w, int64_t begin, int64_t end) {
  double tile[HM_BLOCK], raw[HM_BLOCK], lse[GROUP], total = 0;
  int64_t target[GROUP];
  row_parts parts[GROUP];
  for (int64_t r = begin; r < end;) {
    const int64_t n = group_of(w, r, end);
    read_targets(w, r, n, target);
    if (w->rows.length > HM_BLOCK) {
      if (w->type == HM_F64) forward_long_f64(w, r, target[0], parts, lse);
      else forward_long_f32(w, r, target[0], parts, lse);
    } else {
      const void *x = hm_rows_in(&w->rows, 0, r, n, tile, w->type, raw);
      if (w->type == HM_F64) forward_f64(w, x, n, target, parts, lse);
      else forward_f32(w, x, n, target, parts, lse);
    }
    for (int64_t i = 0; i < n; i++) {
      const double loss = target[i] < 0 ? 0 : row_loss(w, parts[i]);
      float_put(w->lse, r + i, lse[i]);
      if (w->reduction == NONE) float_put(w->loss, r + i, loss);
      total += loss;
    }
    r += n;
  }
  return total;
}

/* Gradient of positions [begin, end). */
static void backward_piece(const work *w, int64_t begin, int64_t end) {
  double tile[HM_BLOCK], raw[HM_BLOCK], lse[GROUP], coef[GROUP];
  int64_t target[GROUP];
  for (int64_t r = begin; r < end;) {
    const int64_t n = group_of(w, r, end);
    read_targets(w, r, n, target);
    for (int64_t i = 0; i < n; i++) {
      lse[i] = float_at(w->lse, r + i);
      coef[i] = float_at(w->g, w->reduction == NONE ? r + i : 0);
      if (w->reduction == MEAN) coef[i] /= (double)w->valid;
    }
    if (w->rows.length > HM_BLOCK) {
      if (w->type == HM_F64) backward_long_f64(w, r, target[0], lse[0], coef[0]);
      else backward_long_f32(w, r, target[0], lse[0], coef[0]);
    } else {
      const void *x = hm_rows_in(&w->rows, 0, r, n, tile, w->type, raw);
      void *y = hm_rows_target(&w->rows, 1, r, n, tile, w->type);
      if (w->type == HM_F64) backward_f64(w, y, x, n, target, lse, coef);
      else backward_f32(w, y, x, n, target, lse, coef);
      if (y == tile) hm_rows_out(&w->rows, 1, r, n, y, w->type, raw);
    }
    r += n;
  }
}

/* ====== Entry ====== */

/* Looks at every target; counts those that are not ignored. */
static int check_targets(work *w, int64_t positions) {
  const int64_t classes = w->rows.length;
  w->valid = 0;
  for (int64_t i = 0; i < positions; i++) {
    const int64_t t = target_at(w->target, i);
    if (t == w->ignore) continue;
    if (t < 0 || t >= classes) {
      char at[HM_POSITION_TEXT];
      return hm_cpu_fail(
          HM_ERR_ARG,
          "cross_entropy: target %lld at index %s (from 0) is not a class: there are C = %lld classes, 0 to %lld\n"
          "  hint: class labels count from 0; ignore_index is %lld",
          (long long)t, hm_cpu_position_text(w->target, i, at), (long long)classes, (long long)classes - 1,
          (long long)w->ignore);
    }
    w->valid++;
  }
  return HM_OK;
}

static void run_backward(const work *w, int64_t pieces, int64_t piece, int threads) {
  const int64_t count = w->rows.count;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < pieces; p++)
    backward_piece(w, p * piece, p * piece + piece < count ? p * piece + piece : count);
}

static void run_forward(const work *w, int64_t pieces, int64_t piece, int threads) {
  const int64_t count = w->rows.count;
  double sum[MAX_PIECES], total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < pieces; p++)
    sum[p] = forward_piece(w, p * piece, p * piece + piece < count ? p * piece + piece : count);
  for (int64_t p = 0; p < pieces; p++) total += sum[p];
  if (w->reduction == MEAN) float_put(w->loss, 0, w->valid ? total / (double)w->valid : (double)NAN);
  if (w->reduction == SUM) float_put(w->loss, 0, total);
}

int HM_ISA_FN(hm_cpu_loss)(const hm_kernel_call *call) {
  const bool backward = call->op == HM_OP_CROSS_ENTROPY_BACKWARD;
  if (!backward && call->op != HM_OP_CROSS_ENTROPY) return hm_cpu_nll(call);
  const hm_view *x = &call->in[backward ? 1 : 0];
  work w = {.call = call,
            .target = &call->in[backward ? 2 : 1],
            .lse = backward ? &call->in[3] : &call->out[1],
            .g = backward ? &call->in[0] : NULL,
            .loss = backward ? NULL : &call->out[0],
            .type = call->compute == HM_F64 ? HM_F64 : HM_F32,
            .reduction = (int)call->attr[0].i,
            .ignore = call->attr[1].i,
            .smoothing = call->attr[2].f};
  const hm_view *views[HM_ROW_VIEWS] = {x, backward ? &call->out[0] : x, x};
  hm_rows_init(&w.rows, x->ndim > 1 ? 1 : 0, backward ? 2 : 1, views);
  const int64_t count = w.rows.count;
  const int status = check_targets(&w, count);
  if (status != HM_OK) return status;
  if (w.rows.length == 0 && count > 0)
    return hm_cpu_fail(HM_ERR_ARG, "cross_entropy: the logits have no classes (C = 0)");
  const int threads = hm_cpu_threads(count * w.rows.length, 16);
  int64_t piece = (count + MAX_PIECES - 1) / MAX_PIECES, least = 2048 / (w.rows.length > 0 ? w.rows.length : 1);
  least = least < 1 ? 1 : least > GROUP ? GROUP : least;
  if (piece < least) piece = least;
  const int64_t pieces = (count + piece - 1) / piece;
  if (backward) run_backward(&w, pieces, piece, threads);
  else run_forward(&w, pieces, piece, threads);
  return HM_OK;
}
