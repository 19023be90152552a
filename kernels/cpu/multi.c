/*
 * multi.c -- the scaler's and the optimizers' passes over all parameters at once.
 *
 * Compiled once per instruction set.  Called through hm_isa.multi_tensor.
 *
 * All parameters are cut into blocks of 16,384 elements; blocks are handled in waves of 512, in any order by any
 * thread.  A block goes through in pieces of 512 elements that stay in L1: read in the type computed in (f32, or f64
 * for f64 parameters), updated, written back, and copied to the low dtype, all while hot.  What pass 1 finds in a
 * block is kept by block and added up in order after each wave.
 *
 * Squares are summed in f32 within a piece (in 32 lanes, see vec.h) and in double from there on.  A piece with a
 * value that is not finite, or whose squares would leave the range of f32, is gone over again, one value at a time,
 * in double.
 *
 * Formulas and the order of operations are PyTorch's: moments move by lerp, second moments by mul and addcmul,
 * parameters by addcdiv.
 */
#include <float.h>

#include "../math.h"
#include "vec.h"

enum { BLOCK = 16384, WAVE = 512, PIECE = 512 };

/* A range of elements of one parameter. */
typedef struct block {
  int32_t item;
  int32_t n;
  int64_t at;
} block;

/* ====== Pass 1: what is in the gradients ====== */

/* Largest |bits| and sum of squares of unscaled values of a piece. */
typedef struct glance {
  float amax; /* scaled; +inf or NaN if some value is */
  float sum_sq;
} glance;

static inline uint32_t top_bits(uint32_t a, uint32_t b) { return a > b ? a : b; }

static glance glance_f32(const float *g, int64_t n, float inv) {
  enum { V = HM_VBYTES / 4, P = HM_LANES / V };
  float lanes[HM_LANES] __attribute__((aligned(64)));
  int32_t tops[HM_LANES] __attribute__((aligned(64)));
  hm_v_f32 sum[P];
  hm_v_i32 top[P];
  int64_t i = 0;
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) sum[p] = (hm_v_f32){0}, top[p] = (hm_v_i32){0};
  for (; i + HM_LANES <= n; i += HM_LANES) {
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) {
      const hm_v_f32 x = *(const hm_u_f32 *)(g + i + p * V), u = x * inv;
      const hm_v_i32 bits = (hm_v_i32)x & 0x7fffffff;
      sum[p] += u * u;
      top[p] = HM_VSELECT(bits > top[p], bits, top[p]);
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) *(hm_u_f32 *)(lanes + p * V) = sum[p], *(hm_u_i32 *)(tops + p * V) = top[p];
  uint32_t most = 0;
  for (int l = 0; l < HM_LANES; l++) most = top_bits(most, (uint32_t)tops[l]);
  for (int l = 0; i < n; i++, l++) {
    const float u = g[i] * inv;
    lanes[l % HM_LANES] += u * u;
    most = top_bits(most, hm_f32_bits(g[i]) & 0x7fffffffu);
  }
  return (glance){hm_bits_f32(most), hm_sum_fold_f32(lanes)};
}

/* Counts one value; g: as it came, u: unscaled.  limit: from here on the gradient's dtype has only infinity. */
static void count_value(hm_multi_stat *s, double g, double u, double limit) {
  if (g != g) s->nan_count++;
  else if (fabs(g) > DBL_MAX) s->inf_count++;
  else if (u != u) s->nan_count++;
  else if (fabs(u) >= limit) s->inf_count++;
  else {
    s->sum_sq += u * u;
    if (fabs(u) > s->amax) s->amax = fabs(u);
  }
}

static void check_piece_f32(hm_multi_stat *s, const float *g, int64_t n, float inv, double limit) {
  const glance seen = glance_f32(g, n, inv);
  const float amax = hm_abs_f32(seen.amax * inv);
  const bool plain =
      seen.amax < INFINITY && (double)amax < limit && (seen.amax == 0 || (amax > 1e-15f && amax < 1e17f));
  if (plain) {
    s->sum_sq += (double)seen.sum_sq;
    if ((double)amax > s->amax) s->amax = (double)amax;
    return;
  }
  for (int64_t i = 0; i < n; i++) count_value(s, (double)g[i], (double)(g[i] * inv), limit);
}

static void check_piece_f64(hm_multi_stat *s, const double *g, int64_t n, double inv, double limit) {
  for (int64_t i = 0; i < n; i++) count_value(s, g[i], g[i] * inv, limit);
}

/* Smallest magnitude that the dtype rounds to infinity; a value already in the type computed in cannot lie between. */
static double limit_of(int dtype) {
  switch (dtype) {
  case HM_F16: return 65520.0;
  case HM_BF16: return 0x1.ffp127;
  default: return (double)INFINITY;
  }
}

/* dst = src * a, or -(src * a) */
#define DEFINE_TIMES(T, S)                                                                                             \
  static void times_##S(T *dst, const T *src, T a, int64_t n) {                                                        \
    for (int64_t i = 0; i < n; i++) dst[i] = src[i] * a;                                                               \
  }
DEFINE_TIMES(float, f32)
DEFINE_TIMES(double, f64)

/* CHECK, UNSCALE: statistics of one block, and for UNSCALE the gradient times inv_scale in place. */
static void check_block(const hm_multi_call *call, block b, hm_multi_stat *stat) {
  double tile[PIECE], scaled[PIECE];
  const hm_multi_item *item = &call->item[b.item];
  const int dtype = item->grad_dtype, type = dtype == HM_F64 ? HM_F64 : HM_F32;
  const bool write = call->op == HM_MULTI_UNSCALE && call->inv_scale != 1.0;
  const double limit = write ? limit_of(dtype) : (double)INFINITY;
  *stat = (hm_multi_stat){0};
  for (int64_t i = b.at; i < b.at + b.n; i += PIECE) {
    const int64_t n = b.at + b.n - i < PIECE ? b.at + b.n - i : PIECE;
    char *at = hm_at_mut(item->grad, i, dtype);
    const void *g = hm_tile_in(tile, type, at, dtype, n, 1);
    if (type == HM_F64) check_piece_f64(stat, g, n, call->inv_scale, limit);
    else check_piece_f32(stat, g, n, (float)call->inv_scale, limit);
    if (!write) continue;
    if (type == HM_F64) times_f64(scaled, g, call->inv_scale, n);
    else times_f32((float *)(void *)scaled, g, (float)call->inv_scale, n);
    hm_tile_out(at, dtype, 1, scaled, type, n);
  }
}

static void scale_block(const hm_multi_call *call, block b) {
  double tile[PIECE];
  const hm_multi_item *item = &call->item[b.item];
  const int dtype = item->grad_dtype, type = dtype == HM_F64 ? HM_F64 : HM_F32;
  for (int64_t i = b.at; i < b.at + b.n; i += PIECE) {
    const int64_t n = b.at + b.n - i < PIECE ? b.at + b.n - i : PIECE;
    char *at = hm_at_mut(item->grad, i, dtype);
    const void *g = hm_tile_in(tile, type, at, dtype, n, 1);
    if (type == HM_F64) times_f64(tile, g, call->grad_mul, n);
    else times_f32((float *)(void *)tile, g, (float)call->grad_mul, n);
    hm_tile_out(at, dtype, 1, tile, type, n);
  }
}

/* ====== Pass 2: the updates ====== */

/* Constants of one group, rounded once from double to the type computed in. */
#define DEFINE_UPDATES(T, S)                                                                                           \
  typedef struct sgd_##S {                                                                                             \
    T lr, wd, momentum, keep;                                                                                          \
    bool decay, first, nesterov, maximize;                                                                             \
  } sgd_##S;                                                                                                           \
  static sgd_##S sgd_of_##S(const hm_multi_group *h) {                                                                 \
    return (sgd_##S){(T)-h->lr, (T)h->weight_decay, (T)h->momentum, (T)(1 - h->dampening), h->weight_decay != 0,       \
                     h->first,  h->nesterov,        h->maximize};                                                      \
  }                                                                                                                    \
  /* d = g + wd p */                                                                                                   \
  static inline T decayed_##S(T g, T p, T wd, bool decay, bool maximize) {                                             \
    const T d = maximize ? -g : g;                                                                                     \
    return decay ? d + wd * p : d;                                                                                     \
  }                                                                                                                    \
  static void sgd_plain_##S(T *restrict p, const T *restrict g, int64_t n, sgd_##S c) {                                \
    for (int64_t i = 0; i < n; i++) p[i] = p[i] + c.lr * decayed_##S(g[i], p[i], c.wd, c.decay, c.maximize);           \
  }                                                                                                                    \
  static void sgd_momentum_##S(T *restrict p, const T *restrict g, T *restrict buf, int64_t n, sgd_##S c) {            \
    for (int64_t i = 0; i < n; i++) {                                                                                  \
      const T d = decayed_##S(g[i], p[i], c.wd, c.decay, c.maximize);                                                  \
      const T b = c.first ? d : buf[i] * c.momentum + c.keep * d;                                                      \
      buf[i] = b;                                                                                                      \
      p[i] = p[i] + c.lr * (c.nesterov ? d + c.momentum * b : b);                                                      \
    }                                                                                                                  \
  }                                                                                                                    \
  static void sgd_update_##S(const hm_multi_group *h, void *p, const void *g, void *const *state, int64_t n) {         \
    const sgd_##S c = sgd_of_##S(h);                                                                                   \
    if (state[0]) sgd_momentum_##S(p, g, state[0], n, c);                                                              \
    else sgd_plain_##S(p, g, n, c);                                                                                    \
  }                                                                                                                    \
  typedef struct adam_##S {                                                                                            \
    T shrink, wd, weight, beta2, rest2, root2, eps, step;                                                              \
    bool decay, decoupled, maximize, near;                                                                             \
  } adam_##S;                                                                                                          \
  static adam_##S adam_of_##S(const hm_multi_group *h) {                                                               \
    return (adam_##S){(T)(1 - h->lr * h->weight_decay),                                                                \
                      (T)h->weight_decay,                                                                              \
                      (T)(1 - h->beta1),                                                                               \
                      (T)h->beta2,                                                                                     \
                      (T)(1 - h->beta2),                                                                               \
                      (T)sqrt(h->bias_correction2),                                                                    \
                      (T)h->eps,                                                                                       \
                      (T) - (h->lr / h->bias_correction1),                                                             \
                      h->weight_decay != 0,                                                                            \
                      h->decoupled,                                                                                    \
                      h->maximize,                                                                                     \
                      1 - h->beta1 < 0.5};                                                                             \
  }                                                                                                                    \
  static inline void adam_loop_##S(T *restrict p, const T *restrict g, T *restrict m, T *restrict v, int64_t n,        \
                                   adam_##S c, bool decoupled) {                                                       \
    for (int64_t i = 0; i < n; i++) {                                                                                  \
      const T w = decoupled ? p[i] * c.shrink : p[i];                                                                  \
      const T d = decayed_##S(g[i], w, c.wd, c.decay && !decoupled, c.maximize);                                       \
      const T m1 = c.near ? m[i] + c.weight * (d - m[i]) : d - (d - m[i]) * (1 - c.weight);                            \
      const T v1 = v[i] * c.beta2 + c.rest2 * d * d;                                                                   \
      m[i] = m1;                                                                                                       \
      v[i] = v1;                                                                                                       \
      p[i] = w + c.step * m1 / (hm_sqrt_##S(v1) / c.root2 + c.eps);                                                    \
    }                                                                                                                  \
  }                                                                                                                    \
  static void adam_update_##S(const hm_multi_group *h, void *p, const void *g, void *const *state, int64_t n) {        \
    const adam_##S c = adam_of_##S(h);                                                                                 \
    if (c.decoupled && c.decay) adam_loop_##S(p, g, state[0], state[1], n, c, true);                                   \
    else adam_loop_##S(p, g, state[0], state[1], n, c, false);                                                         \
  }                                                                                                                    \
  /* g = grad * inv * mul, each factor left out where it is 1; false: g is grad as it was */                           \
  static bool unscaled_##S(T *dst, const T *g, const hm_multi_call *call, int64_t n) {                                 \
    const bool first = call->inv_scale != 1.0, second = call->grad_mul != 1.0;                                         \
    if (first) times_##S(dst, g, (T)call->inv_scale, n);                                                               \
    if (second) times_##S(dst, first ? dst : g, (T)call->grad_mul, n);                                                 \
    return first || second;                                                                                            \
  }

DEFINE_UPDATES(float, f32)
DEFINE_UPDATES(double, f64)

/* The gradient of a piece, unscaled and clipped, in `type`; written back where that changed it. */
static const void *piece_grad(const hm_multi_call *call, const hm_multi_item *item, int64_t i, int64_t n, void *tile,
                              int type) {
  const int dtype = item->grad_dtype;
  char *at = hm_at_mut(item->grad, i, dtype);
  const void *g = hm_tile_in(tile, type, at, dtype, n, 1);
  const bool changed = type == HM_F64 ? unscaled_f64(tile, g, call, n) : unscaled_f32(tile, g, call, n);
  if (!changed) return g;
  hm_tile_out(at, dtype, 1, tile, type, n);
  return tile;
}

static void update_piece(const hm_multi_call *call, const hm_multi_item *item, int64_t i, int64_t n) {
  double p_tile[PIECE], g_tile[PIECE], s_tile[2][PIECE];
  const int type = item->param_dtype == HM_F64 ? HM_F64 : HM_F32;
  const hm_multi_group *h = &call->group[item->group];
  const int states = call->op == HM_MULTI_ADAM ? 2 : item->state[0] ? 1 : 0;
  void *state[HM_MAX_STATE] = {NULL};
  char *param = hm_at_mut(item->param, i, item->param_dtype);
  const void *g = piece_grad(call, item, i, n, g_tile, type);
  const bool direct = item->param_dtype == type;
  void *p = direct ? (void *)param : p_tile;
  if (!direct) hm_tile_fill(p, type, param, item->param_dtype, n, 1);
  for (int s = 0; s < states; s++) {
    char *at = hm_at_mut(item->state[s], i, item->state_dtype);
    state[s] = item->state_dtype == type ? (void *)at : s_tile[s];
    if (state[s] == s_tile[s]) hm_tile_fill(state[s], type, at, item->state_dtype, n, 1);
  }
  if (call->op == HM_MULTI_ADAM && type == HM_F64) adam_update_f64(h, p, g, state, n);
  else if (call->op == HM_MULTI_ADAM) adam_update_f32(h, p, g, state, n);
  else if (type == HM_F64) sgd_update_f64(h, p, g, state, n);
  else sgd_update_f32(h, p, g, state, n);
  for (int s = 0; s < states; s++)
    if (state[s] == s_tile[s])
      hm_tile_out(hm_at_mut(item->state[s], i, item->state_dtype), item->state_dtype, 1, state[s], type, n);
  if (!direct) hm_tile_out(param, item->param_dtype, 1, p, type, n);
  if (item->low) hm_tile_out(hm_at_mut(item->low, i, item->low_dtype), item->low_dtype, 1, p, type, n);
}

static void update_block(const hm_multi_call *call, block b) {
  for (int64_t i = b.at; i < b.at + b.n; i += PIECE)
    update_piece(call, &call->item[b.item], i, b.at + b.n - i < PIECE ? b.at + b.n - i : PIECE);
}

/* ====== Waves ====== */

/* Where the walk over all elements stands. */
typedef struct cursor {
  int32_t item;
  int64_t at;
} cursor;

/* The next blocks, at most WAVE; returns how many, and their elements in *elements. */
static int next_wave(const hm_multi_call *call, cursor *c, block *wave, int64_t *elements) {
  int n = 0;
  *elements = 0;
  while (n < WAVE && c->item < call->n) {
    const int64_t left = call->item[c->item].numel - c->at;
    if (left <= 0) {
      *c = (cursor){c->item + 1, 0};
      continue;
    }
    const int32_t take = left < BLOCK ? (int32_t)left : BLOCK;
    wave[n++] = (block){c->item, take, c->at};
    *elements += take;
    c->at += take;
  }
  return n;
}

static void run_block(const hm_multi_call *call, block b, hm_multi_stat *stat) {
  switch (call->op) {
  case HM_MULTI_CHECK:
  case HM_MULTI_UNSCALE: check_block(call, b, stat); break;
  case HM_MULTI_SCALE: scale_block(call, b); break;
  default: update_block(call, b); break;
  }
}

static void add_stat(hm_multi_stat *total, const hm_multi_stat *part) {
  total->inf_count += part->inf_count;
  total->nan_count += part->nan_count;
  total->sum_sq += part->sum_sq;
  if (part->amax > total->amax) total->amax = part->amax;
}

int HM_ISA_FN(hm_cpu_multi_tensor)(const hm_multi_call *call) {
  const bool with_stat = call->op == HM_MULTI_CHECK || call->op == HM_MULTI_UNSCALE;
  if (call->op < HM_MULTI_CHECK || call->op > HM_MULTI_ADAM)
    return hm_cpu_fail(HM_ERR_UNSUPPORTED, "the cpu backend has no multi-tensor op %d", (int)call->op);
  if (call->op == HM_MULTI_SCALE && call->grad_mul == 1.0) return HM_OK;
  for (int32_t i = 0; with_stat && i < call->n; i++) call->stat[i] = (hm_multi_stat){0};
  block wave[WAVE];
  hm_multi_stat stat[WAVE];
  cursor at = {0, 0};
  int64_t elements;
  for (int n; (n = next_wave(call, &at, wave, &elements)) > 0;) {
    const int threads = hm_cpu_threads(elements, with_stat ? 4 : 16);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int b = 0; b < n; b++) run_block(call, wave[b], &stat[b]);
    for (int b = 0; with_stat && b < n; b++) add_stat(&call->stat[wave[b].item], &stat[b]);
  }
  return HM_OK;
}
