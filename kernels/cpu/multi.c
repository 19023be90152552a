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
 * The exponent histogram, where one is asked for, is counted from a block while it is in cache, before anything else.
 *
 * The rules of the updates stand in kernels/rules.h.
 */
#include <float.h>
#include <math.h>

#include "../rules.h"
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

/* Counts of a block by the 8 exponent bits of float32, four neighbours apart: equal ones in a row do not wait for each
 * other.  [..][0] has zeros and subnormals, [..][255] what is not finite. */
typedef struct tally {
  uint32_t count[4][HM_HISTOGRAM];
  int64_t zeros;
} tally;

static void tally_piece_f32(tally *t, const float *g, int64_t n, float inv, double limit) {
  uint8_t bin[PIECE];
  int32_t zeros = 0;
  int64_t i = 0;
  for (int64_t k = 0; k < n; k++) {
    const float x = g[k] * inv, size = hm_abs_f32(x);
    bin[k] = (uint8_t)(hm_f32_bits(size < (float)limit ? size : INFINITY) >> 23);
    zeros += x == 0;
  }
  t->zeros += zeros;
  for (; i + 4 <= n; i += 4) {
    t->count[0][bin[i]]++;
    t->count[1][bin[i + 1]]++;
    t->count[2][bin[i + 2]]++;
    t->count[3][bin[i + 3]]++;
  }
  for (; i < n; i++) t->count[0][bin[i]]++;
}

/* The nearest value that float32 counts where g belongs. */
static void tally_piece_f64(tally *t, const double *g, int64_t n, double inv) {
  for (int64_t i = 0; i < n; i++) {
    const double u = fabs(g[i] * inv);
    int exponent;
    if (u == 0) t->zeros++;
    if (!(u <= DBL_MAX)) continue;
    (void)frexp(u, &exponent); /* u = f * 2^exponent, f from 1/2 to 1 */
    const int bin = u == 0 || exponent < -125 ? 0 : exponent > 128 ? 254 : exponent + 126;
    t->count[i & 3][bin]++;
  }
}

/* Adds a block's counts to its item's: whole numbers, so the order does not matter. */
static void add_tally(int64_t *histogram, const tally *t) {
  for (int b = 0; b < HM_HISTOGRAM; b++) {
    int64_t n = (int64_t)t->count[0][b] + t->count[1][b] + t->count[2][b] + t->count[3][b];
    if (b == 0) n -= t->zeros; /* subnormals are left */
    if (n == 0 || b == 255) continue;
#pragma omp atomic
    histogram[b == 0 ? HM_HISTOGRAM_SUBNORMALS : b] += n;
  }
  if (t->zeros == 0) return;
#pragma omp atomic
  histogram[HM_HISTOGRAM_ZEROS] += t->zeros;
}

/* The histogram of one block of gradients, before UNSCALE changes them; added to the item's. */
static void tally_block(const hm_multi_call *call, block b) {
  double tile[PIECE];
  tally t = {0};
  const hm_multi_item *item = &call->item[b.item];
  const int dtype = item->grad_dtype, type = dtype == HM_F64 ? HM_F64 : HM_F32;
  const bool write = call->op == HM_MULTI_UNSCALE && call->inv_scale != 1.0;
  const double limit = write ? limit_of(dtype) : (double)INFINITY;
  for (int64_t i = b.at; i < b.at + b.n; i += PIECE) {
    const int64_t n = b.at + b.n - i < PIECE ? b.at + b.n - i : PIECE;
    const void *g = hm_tile_in(tile, type, hm_at_mut(item->grad, i, dtype), dtype, n, 1);
    if (type == HM_F64) tally_piece_f64(&t, g, n, call->inv_scale);
    else tally_piece_f32(&t, g, n, (float)call->inv_scale, limit);
  }
  add_tally(call->histogram + (int64_t)b.item * HM_HISTOGRAM, &t);
}

/* dst = src * a */
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

#define DEFINE_CLAMP(T, S)                                                                                             \
  static void clamp_##S(T *dst, const T *src, T most, int64_t n) {                                                     \
    for (int64_t i = 0; i < n; i++) dst[i] = src[i] > most ? most : src[i] < -most ? -most : src[i];                   \
  }
DEFINE_CLAMP(float, f32)
DEFINE_CLAMP(double, f64)

/* SCALE, CLAMP */
static void scale_block(const hm_multi_call *call, block b) {
  double tile[PIECE];
  const hm_multi_item *item = &call->item[b.item];
  const int dtype = item->grad_dtype, type = dtype == HM_F64 ? HM_F64 : HM_F32;
  const bool clamps = call->op == HM_MULTI_CLAMP;
  for (int64_t i = b.at; i < b.at + b.n; i += PIECE) {
    const int64_t n = b.at + b.n - i < PIECE ? b.at + b.n - i : PIECE;
    char *at = hm_at_mut(item->grad, i, dtype);
    const void *g = hm_tile_in(tile, type, at, dtype, n, 1);
    if (type == HM_F64) (clamps ? clamp_f64 : times_f64)(tile, g, call->grad_mul, n);
    else (clamps ? clamp_f32 : times_f32)((float *)(void *)tile, g, (float)call->grad_mul, n);
    hm_tile_out(at, dtype, 1, tile, type, n);
  }
}

/* ====== Pass 2: the updates ====== */

/* The loop of one rule with N states, and what to tell the rule about them. */
#define DEFINE_LOOP(name, rule, more, N, T, S)                                                                         \
  static void name##_##S(hm_rates r, T *restrict p, const T *restrict g, T *restrict a, T *restrict b, T *restrict c,  \
                         int64_t n) {                                                                                  \
    for (int64_t i = 0; i < n; i++) {                                                                                  \
      T s[3] = {N > 0 ? a[i] : 0, N > 1 ? b[i] : 0, N > 2 ? c[i] : 0};                                                 \
      p[i] = hm_##rule##_##S(&r, more, g[i], p[i], s);                                                                 \
      if (N > 0) a[i] = s[0];                                                                                          \
      if (N > 1) b[i] = s[1];                                                                                          \
      if (N > 2) c[i] = s[2];                                                                                          \
    }                                                                                                                  \
  }
/* All loops of a type; s: the states, `has` tells which of them the item brought. */
#define DEFINE_UPDATES(T, S)                                                                                           \
  DEFINE_LOOP(sgd, sgd, false, 0, T, S)                                                                                \
  DEFINE_LOOP(sgd_momentum, sgd, true, 1, T, S)                                                                        \
  DEFINE_LOOP(adam, adam, false, 2, T, S)                                                                              \
  DEFINE_LOOP(amsgrad, adam, true, 3, T, S)                                                                            \
  DEFINE_LOOP(rmsprop, rmsprop, false, 1, T, S)                                                                        \
  DEFINE_LOOP(rmsprop_more, rmsprop, true, 3, T, S)                                                                    \
  DEFINE_LOOP(adagrad, adagrad, false, 1, T, S)                                                                        \
  DEFINE_LOOP(lion, lion, false, 1, T, S)                                                                              \
  static void update_##S(hm_multi_op op, const hm_rates *r, void *const *has, T *p, const T *g, void *const *s,        \
                         int64_t n) {                                                                                  \
    switch (op) {                                                                                                      \
    case HM_MULTI_SGD: (has[0] ? sgd_momentum_##S : sgd_##S)(*r, p, g, s[0], s[1], s[2], n); break;                    \
    case HM_MULTI_ADAM: (has[2] ? amsgrad_##S : adam_##S)(*r, p, g, s[0], s[1], s[2], n); break;                       \
    case HM_MULTI_RMSPROP: (has[1] || has[2] ? rmsprop_more_##S : rmsprop_##S)(*r, p, g, s[0], s[1], s[2], n); break;  \
    case HM_MULTI_ADAGRAD: adagrad_##S(*r, p, g, s[0], s[1], s[2], n); break;                                          \
    default: lion_##S(*r, p, g, s[0], s[1], s[2], n); break;                                                           \
    }                                                                                                                  \
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

/* Adds what rounding took from a piece of half parameters to their values in p. */
static void add_lost(const hm_multi_item *item, int64_t i, int64_t n, float *p) {
  float lost[PIECE];
  hm_tile_fill(lost, HM_F32, hm_at(item->lost, i, item->param_dtype), item->param_dtype, n, 1);
  for (int64_t k = 0; k < n; k++) p[k] += lost[k];
}

/* Keeps what the stored values, just rounded, lost of p. */
static void keep_lost(const hm_multi_item *item, int64_t i, int64_t n, float *p) {
  float stored[PIECE];
  hm_tile_fill(stored, HM_F32, hm_at(item->param, i, item->param_dtype), item->param_dtype, n, 1);
  for (int64_t k = 0; k < n; k++) p[k] = hm_lost(p[k], stored[k]);
  hm_tile_out(hm_at_mut(item->lost, i, item->param_dtype), item->param_dtype, 1, p, HM_F32, n);
}

/* Makes p values of its half dtype, by chance. */
static void round_piece(const hm_multi_call *call, const hm_multi_item *item, int64_t i, int64_t n, float *p) {
  uint32_t word[PIECE];
#pragma GCC ivdep
  for (int64_t k = 0; k < (n + 3) / 4; k++)
    hm_philox_words(word + 4 * k, call->seed, item->counter + (uint64_t)i / 4 + (uint64_t)k, 0);
  for (int64_t k = 0; k < n; k++) p[k] = hm_round_by_chance(p[k], item->param_dtype, word[k]);
}

/* How many states the loop of an op goes over. */
static int loop_states(hm_multi_op op, void *const *has) {
  switch (op) {
  case HM_MULTI_SGD: return has[0] ? 1 : 0;
  case HM_MULTI_ADAM: return has[2] ? 3 : 2;
  case HM_MULTI_RMSPROP: return has[1] || has[2] ? 3 : 1;
  default: return 1;
  }
}

/* The states of a piece in `type`: where they lie, or converted in a tile.  Where an item lacks one that the loop goes
 * over, it gets zeros. */
static void piece_states(hm_multi_op op, const hm_multi_item *item, int type, int64_t i, int64_t n,
                         double tile[3][PIECE], void **state) {
  for (int s = loop_states(op, item->state) - 1; s >= 0; s--) {
    state[s] = tile[s];
    if (!item->state[s]) {
      memset(tile[s], 0, sizeof tile[s]);
      continue;
    }
    char *at = hm_at_mut(item->state[s], i, item->state_dtype);
    if (item->state_dtype == type) state[s] = at;
    else hm_tile_fill(state[s], type, at, item->state_dtype, n, 1);
  }
}

static void update_piece(const hm_multi_call *call, const hm_multi_item *item, const hm_rates *r, int64_t i,
                         int64_t n) {
  double p_tile[PIECE], g_tile[PIECE], s_tile[3][PIECE];
  const int type = item->param_dtype == HM_F64 ? HM_F64 : HM_F32;
  void *state[3] = {NULL, NULL, NULL};
  char *param = hm_at_mut(item->param, i, item->param_dtype);
  const void *g = piece_grad(call, item, i, n, g_tile, type);
  const bool direct = item->param_dtype == type;
  void *p = direct ? (void *)param : p_tile;
  if (!direct) hm_tile_fill(p, type, param, item->param_dtype, n, 1);
  piece_states(call->op, item, type, i, n, s_tile, state);
  if (item->lost) add_lost(item, i, n, p);
  if (type == HM_F64) update_f64(call->op, r, item->state, p, g, state, n);
  else update_f32(call->op, r, item->state, p, g, state, n);
  for (int s = 0; s < 3; s++)
    if (item->state[s] && state[s] == s_tile[s])
      hm_tile_out(hm_at_mut(item->state[s], i, item->state_dtype), item->state_dtype, 1, state[s], type, n);
  if (item->by_chance) round_piece(call, item, i, n, p);
  if (!direct) hm_tile_out(param, item->param_dtype, 1, p, type, n);
  if (item->low) hm_tile_out(hm_at_mut(item->low, i, item->low_dtype), item->low_dtype, 1, p, type, n);
  if (item->lost) keep_lost(item, i, n, p);
}

static void update_block(const hm_multi_call *call, block b) {
  const hm_multi_item *item = &call->item[b.item];
  const hm_rates r = hm_rates_of(&call->group[item->group]);
  for (int64_t i = b.at; i < b.at + b.n; i += PIECE)
    update_piece(call, item, &r, i, b.at + b.n - i < PIECE ? b.at + b.n - i : PIECE);
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
  case HM_MULTI_UNSCALE:
    if (call->histogram) tally_block(call, b);
    check_block(call, b, stat);
    break;
  case HM_MULTI_SCALE:
  case HM_MULTI_CLAMP: scale_block(call, b); break;
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
  if (call->op < HM_MULTI_CHECK || call->op > HM_MULTI_LION)
    return hm_cpu_fail(HM_ERR_UNSUPPORTED, "the cpu backend has no multi-tensor op %d", (int)call->op);
  if (call->op == HM_MULTI_SCALE && call->grad_mul == 1.0) return HM_OK;
  for (int32_t i = 0; with_stat && i < call->n; i++) call->stat[i] = (hm_multi_stat){0};
  if (with_stat && call->histogram)
    memset(call->histogram, 0, (size_t)call->n * HM_HISTOGRAM * sizeof *call->histogram);
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
