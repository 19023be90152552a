/*
 * rownorm.c -- layer_norm and rms_norm along the last dims, and their gradients.
 *
 * Compiled once per instruction set.  Called through norm.c, which hands on what is not a softmax; its entry also hands
 * batch_norm and group_norm to normalize.c.
 *
 * A row is one piece of memory.  Up to CHUNK numbers it is converted once and stays in L1 for all passes (mean, spread, result); a
 * longer one is streamed chunk by chunk.  Gradients of weight and bias are summed in order over a block of rows (normalize.h), and the
 * blocks are added in order.  Sums of a row are kept in LANES columns, so that they are vectors with one order for every instruction set.
 */
#include "normalize.h"
#include "vec.h"

enum { CHUNK = 4096, LANES = 64 };

/* mean 0 and no bias make rms_norm of layer_norm. */
#define DEFINE_ROWS(T, S)                                                                                              \
  static double fold_##S(const T *restrict lanes) {                                                                    \
    T half[LANES / 2];                                                                                                 \
    for (int l = 0; l < LANES / 2; l++) half[l] = lanes[l] + lanes[l + LANES / 2];                                     \
    _Pragma("GCC unroll 5") for (int w = LANES / 4; w > 0; w /= 2) for (int l = 0; l < w; l++) half[l] += half[l + w]; \
    return (double)half[0];                                                                                            \
  }                                                                                                                    \
  /* The sum of squares about mean. */                                                                                 \
  static double row_spread_##S(const T *restrict x, int64_t n, T mean) {                                               \
    T lanes[LANES] = {0};                                                                                              \
    int64_t i = 0;                                                                                                     \
    for (; i + 2 * LANES <= n; i += 2 * LANES)                                                                         \
      for (int l = 0; l < LANES; l++) {                                                                                \
        const T a = x[i + l] - mean, b = x[i + l + LANES] - mean;                                                      \
        lanes[l] += a * a + b * b;                                                                                     \
      }                                                                                                                \
    for (; i < n; i += LANES)                                                                                          \
      for (int l = 0; l < LANES && i + l < n; l++) {                                                                   \
        const T a = x[i + l] - mean;                                                                                   \
        lanes[l] += a * a;                                                                                             \
      }                                                                                                                \
    return fold_##S(lanes);                                                                                            \
  }                                                                                                                    \
  static void row_apply_##S(T *y, const T *x, int64_t n, T mean, T rstd, const T *restrict weight,                     \
                            const T *restrict bias) {                                                                  \
    if (bias) {                                                                                                        \
      _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];          \
    } else {                                                                                                           \
      _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * rstd * weight[i];                    \
    }                                                                                                                  \
  }                                                                                                                    \
  /* With xh = (x - mean) * rstd: dw += g * xh, db += g; out: the sums of g * w and of g * w * xh. */                  \
  static void row_sums_##S(const T *restrict g, const T *restrict x, int64_t n, T mean, T rstd,                        \
                           const T *restrict weight, T *restrict dw, T *restrict db, double *out) {                    \
    T sum[LANES] = {0}, dot[LANES] = {0};                                                                              \
    for (int64_t i = 0; i < n; i += LANES) {                                                                           \
      const int64_t m = n - i < LANES ? n - i : LANES;                                                                 \
      if (m == LANES) {                                                                                                \
        for (int l = 0; l < LANES; l++) {                                                                              \
          const T xh = (x[i + l] - mean) * rstd, gw = g[i + l] * weight[i + l];                                        \
          dw[i + l] += g[i + l] * xh;                                                                                  \
          db[i + l] += g[i + l];                                                                                       \
          sum[l] += gw;                                                                                                \
          dot[l] += gw * xh;                                                                                           \
        }                                                                                                              \
      } else {                                                                                                         \
        for (int l = 0; l < m; l++) {                                                                                  \
          const T xh = (x[i + l] - mean) * rstd, gw = g[i + l] * weight[i + l];                                        \
          dw[i + l] += g[i + l] * xh;                                                                                  \
          db[i + l] += g[i + l];                                                                                       \
          sum[l] += gw;                                                                                                \
          dot[l] += gw * xh;                                                                                           \
        }                                                                                                              \
      }                                                                                                                \
    }                                                                                                                  \
    out[0] += fold_##S(sum);                                                                                           \
    out[1] += fold_##S(dot);                                                                                           \
  }                                                                                                                    \
  static void row_gradient_##S(T *y, const T *g, const T *x, int64_t n, T mean, T rstd, const T *restrict weight,      \
                               T less, T tilt) {                                                                       \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++) {                                                             \
      const T xh = (x[i] - mean) * rstd;                                                                               \
      y[i] = (g[i] * weight[i] - less - xh * tilt) * rstd;                                                             \
    }                                                                                                                  \
  }

DEFINE_ROWS(float, f32)
DEFINE_ROWS(double, f64)

/* ====== The job ====== */

typedef struct job {
  hm_row_norm_plan p;
  const hm_view *x, *g, *out; /* g: NULL forward; out: y or dx */
  int type;
  bool layer; /* else rms_norm */
  double eps;
  const hm_view *mean, *rstd; /* outputs forward, inputs backward; mean: NULL for rms_norm */
  const void *weight, *bias;  /* of `type`; bias: NULL for none */
  char *sums;                 /* [blocks][2][length]: gradients of weight and bias by block */
} job;

static bool is_backward(int op) { return op == HM_OP_LAYER_NORM_BACKWARD || op == HM_OP_RMS_NORM_BACKWARD; }

static bool is_channels(int op) {
  return op == HM_OP_BATCH_NORM || op == HM_OP_BATCH_NORM_BACKWARD || op == HM_OP_GROUP_NORM ||
         op == HM_OP_GROUP_NORM_BACKWARD;
}

/* The plan does not depend on the instruction set, so one of the three variants answers for all. */
#define HM_FIRST_baseline 1
#if HM_ISA_JOIN(HM_FIRST, HM_ISA)
int hm_cpu_normalize_workspace(const hm_kernel_call *call, size_t *bytes) {
  if (is_channels(call->op)) return hm_cpu_channel_norm_workspace(call, bytes);
  const bool backward = is_backward(call->op);
  const hm_row_norm_plan p = hm__row_norm_plan(&call->in[backward], call->attr[0].i);
  const int64_t numbers = 2 * p.length + (backward ? p.blocks * 2 * p.length : 0);
  *bytes = (size_t)numbers * (size_t)hm_dtype_size(call->compute == HM_F64 ? HM_F64 : HM_F32);
  return HM_OK;
}
#endif

/* A small vector as `type`: where it lies, or converted to `to`; ones where a weight is not given. */
static const void *read_vector(const hm_view *v, int type, int64_t n, void *to) {
  if (!(v->flags & HM_VIEW_ABSENT)) return hm_tile_in(to, type, v->data, v->dtype, n, 1);
  for (int64_t i = 0; i < n; i++) {
    if (type == HM_F64) ((double *)to)[i] = 1;
    else ((float *)to)[i] = 1;
  }
  return to;
}

/* Where row r of v begins. */
static char *row_at(const job *j, const hm_view *v, int64_t r) {
  int64_t at = 0;
  for (int d = j->p.lead - 1; d >= 0; d--) {
    at += r % v->shape[d] * v->stride[d];
    r /= v->shape[d];
  }
  return hm_at_mut(v->data, at, v->dtype);
}

/* Number i of a view of statistics, as the type computed in has it. */
static double number_of(const job *j, const hm_view *v, int64_t i) {
  double x;
  hm_cpu_isa()->convert(&x, HM_F64, hm_at(v->data, i, v->dtype), v->dtype, 1);
  return j->type == HM_F64 ? x : (double)(float)x;
}

static void put_number(const hm_view *v, int64_t i, double x) {
  hm_cpu_isa()->convert(hm_at_mut(v->data, i, v->dtype), v->dtype, &x, HM_F64, 1);
}

/* Numbers [at, at + n) of a row, in `type`: where they lie or in `tile`.  A row of one chunk is read once: *have is then it. */
static const void *chunk(const job *j, const hm_view *v, const char *row, int64_t at, int64_t n, void *tile,
                         const void **have) {
  if (*have) return *have;
  const void *x = hm_tile_in(tile, j->type, hm_at(row, at, v->dtype), v->dtype, n, 1);
  if (n == j->p.length) *have = x;
  return x;
}

static int64_t chunk_size(const job *j, int64_t at) { return j->p.length - at < CHUNK ? j->p.length - at : CHUNK; }

/* ====== Forward ====== */

static void forward_row(const job *j, int64_t r) {
  double tile[CHUNK], out[CHUNK];
  const int64_t length = j->p.length;
  const bool f64 = j->type == HM_F64, direct = j->out->dtype == j->type;
  const char *row = row_at(j, j->x, r);
  char *to = row_at(j, j->out, r);
  const void *have = NULL;
  double mean = 0, spread = 0;
  for (int64_t at = 0; j->layer && at < length; at += CHUNK) {
    const int64_t n = chunk_size(j, at);
    const void *x = chunk(j, j->x, row, at, n, tile, &have);
    mean += f64 ? hm_sum_row_f64(x, n) : (double)hm_sum_row_f32(x, n);
  }
  if (j->layer) mean /= (double)length;
  if (!f64) mean = (float)mean;
  for (int64_t at = 0; at < length; at += CHUNK) {
    const int64_t n = chunk_size(j, at);
    const void *x = chunk(j, j->x, row, at, n, tile, &have);
    spread += f64 ? row_spread_f64(x, n, mean) : row_spread_f32(x, n, (float)mean);
  }
  double rstd = 1 / sqrt(spread / (double)length + j->eps);
  if (!f64) rstd = (float)rstd;
  if (j->mean) put_number(j->mean, r, mean);
  put_number(j->rstd, r, rstd);
  for (int64_t at = 0; at < length; at += CHUNK) {
    const int64_t n = chunk_size(j, at);
    const void *x = chunk(j, j->x, row, at, n, tile, &have), *w = hm_at(j->weight, at, j->type);
    const void *b = j->bias ? hm_at(j->bias, at, j->type) : NULL;
    void *y = direct ? (void *)hm_at_mut(to, at, j->type) : out;
    if (f64) row_apply_f64(y, x, n, mean, rstd, w, b);
    else row_apply_f32(y, x, n, (float)mean, (float)rstd, w, b);
    if (!direct) hm_tile_out(hm_at_mut(to, at, j->out->dtype), j->out->dtype, 1, y, j->type, n);
  }
}

static int forward(const job *j) {
  const hm_row_norm_plan *p = &j->p;
  const int threads = hm_cpu_threads(p->rows * p->length, 8);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < p->rows; r++) forward_row(j, r);
  return HM_OK;
}

/* ====== Backward ====== */

static void backward_row(const job *j, int64_t r, char *dw, char *db) {
  double x_tile[CHUNK], g_tile[CHUNK], out[CHUNK];
  const int64_t length = j->p.length;
  const bool f64 = j->type == HM_F64, direct = j->out->dtype == j->type;
  const char *x_row = row_at(j, j->x, r), *g_row = row_at(j, j->g, r);
  char *to = row_at(j, j->out, r);
  const void *have_x = NULL, *have_g = NULL;
  const double mean = j->mean ? number_of(j, j->mean, r) : 0, rstd = number_of(j, j->rstd, r);
  double sums[2] = {0, 0};
  for (int64_t at = 0; at < length; at += CHUNK) {
    const int64_t n = chunk_size(j, at);
    const void *x = chunk(j, j->x, x_row, at, n, x_tile, &have_x), *g = chunk(j, j->g, g_row, at, n, g_tile, &have_g);
    const void *w = hm_at(j->weight, at, j->type);
    void *dws = hm_at_mut(dw, at, j->type), *dbs = hm_at_mut(db, at, j->type);
    if (f64) row_sums_f64(g, x, n, mean, rstd, w, dws, dbs, sums);
    else row_sums_f32(g, x, n, (float)mean, (float)rstd, w, dws, dbs, sums);
  }
  const double less = j->layer ? sums[0] / (double)length : 0, tilt = sums[1] / (double)length;
  for (int64_t at = 0; at < length; at += CHUNK) {
    const int64_t n = chunk_size(j, at);
    const void *x = chunk(j, j->x, x_row, at, n, x_tile, &have_x), *g = chunk(j, j->g, g_row, at, n, g_tile, &have_g);
    const void *w = hm_at(j->weight, at, j->type);
    void *y = direct ? (void *)hm_at_mut(to, at, j->type) : out;
    if (f64) row_gradient_f64(y, g, x, n, mean, rstd, w, less, tilt);
    else row_gradient_f32(y, g, x, n, (float)mean, (float)rstd, w, (float)less, (float)tilt);
    if (!direct) hm_tile_out(hm_at_mut(to, at, j->out->dtype), j->out->dtype, 1, y, j->type, n);
  }
}

static void backward_block(const job *j, int64_t block) {
  const hm_row_norm_plan *p = &j->p;
  const int64_t bytes = p->length * hm_dtype_size(j->type), from = block * p->block;
  char *dw = j->sums + block * 2 * bytes, *db = dw + bytes;
  memset(dw, 0, (size_t)(2 * bytes));
  for (int64_t r = from; r < from + p->block && r < p->rows; r++) backward_row(j, r, dw, db);
}

/* One of the two sums (which) over all blocks, columns [at, at + n), rounded into v. */
static void add_blocks(const job *j, int which, const hm_view *v, int64_t at, int64_t n) {
  double sum[CHUNK], part[CHUNK];
  memset(sum, 0, (size_t)n * sizeof(double));
  for (int64_t b = 0; b < j->p.blocks; b++) {
    const char *from = hm_at(j->sums, (b * 2 + which) * j->p.length + at, j->type);
    const double *x = hm_tile_in(part, HM_F64, from, j->type, n, 1);
    for (int64_t i = 0; i < n; i++) sum[i] += x[i];
  }
  hm_tile_out(hm_at_mut(v->data, at, v->dtype), v->dtype, 1, sum, HM_F64, n);
}

static int backward(const job *j, const hm_kernel_call *call) {
  const hm_row_norm_plan *p = &j->p;
  const int threads = hm_cpu_threads(p->rows * p->length, 12);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < p->blocks; b++) backward_block(j, b);
  for (int which = 0; which < (j->layer ? 2 : 1); which++)
    for (int64_t at = 0; at < p->length; at += CHUNK)
      add_blocks(j, which, &call->out[1 + which], at, chunk_size(j, at));
  return HM_OK;
}

/* ====== Entry ====== */

static int row_norm(const hm_kernel_call *call) {
  const bool back = is_backward(call->op);
  const hm_view *in = call->in;
  job j = {.p = hm__row_norm_plan(&in[back], call->attr[0].i),
           .x = &in[back],
           .g = back ? &in[0] : NULL,
           .out = &call->out[0],
           .type = call->compute == HM_F64 ? HM_F64 : HM_F32,
           .layer = call->op == HM_OP_LAYER_NORM || call->op == HM_OP_LAYER_NORM_BACKWARD};
  const int64_t bytes = j.p.length * hm_dtype_size(j.type);
  char *at = call->workspace;
  j.weight = read_vector(&in[back + 1], j.type, j.p.length, at);
  j.sums = at + 2 * bytes;
  if (back) {
    j.mean = j.layer ? &in[3] : NULL;
    j.rstd = &in[j.layer ? 4 : 3];
    return backward(&j, call);
  }
  if (j.layer && !(in[2].flags & HM_VIEW_ABSENT)) j.bias = read_vector(&in[2], j.type, j.p.length, at + bytes);
  j.eps = call->attr[1].f;
  j.mean = j.layer ? &call->out[1] : NULL;
  j.rstd = &call->out[j.layer ? 2 : 1];
  return forward(&j);
}

int HM_ISA_FN(hm_cpu_normalize)(const hm_kernel_call *call) {
  switch (call->op) {
  case HM_OP_LAYER_NORM:
  case HM_OP_RMS_NORM:
  case HM_OP_LAYER_NORM_BACKWARD:
  case HM_OP_RMS_NORM_BACKWARD: return row_norm(call);
  default:
    if (is_channels(call->op)) return HM_ISA_FN(hm_cpu_channel_norm)(call);
    return hm_cpu_fail(HM_ERR_UNSUPPORTED, "the cpu backend has no normalisation with op id %d", call->op);
  }
}
