/*
 * pool.c -- max_pool2d with its gradients, and adaptive_max_pool2d.
 *
 * Compiled once per instruction set.  Called through hm_isa.pool; what is a weighted sum goes on to resample.c.
 *
 * Work goes pixel by pixel over all channels at once: dense where memory is channels-last, else gathered into tiles.
 * Half types are compared as ordered integers, which is exact and needs no conversion.  As in PyTorch the first
 * largest value wins, a NaN wins over everything, and of several NaNs the last; padding never wins.  The index is
 * the place in the window, ky * kw + kx; adaptive_max_pool2d's is the place in the image, y * W + x.  A window whose
 * places all lie outside the image (a wide dilation can do that) gives -infinity and place 0, which is no pixel.
 *
 * The gradient is written in gather form: each input pixel adds the windows that chose it, in order, so that no two
 * threads write one element.  Windows that do not overlap need no sum: each one writes its pixels.
 * max_pool2d_relu_backward is the same of a gradient that becomes 0, as it is read, where the relu after the pool gave 0.
 */
#include "vec.h"
#include "window.h"

enum { PLACES = 256, TILE = 8192 };

/* Sizes and strides of one call.  x: the image side (input, or gradient of it); y: the window side. */
typedef struct geometry {
  int64_t n, c, h, w, oh, ow;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t reach_h, reach_w;    /* from a window's first place to behind its last */
  int64_t xs[4], ys[4], is[4]; /* strides (n, c, h, w) of image side, window side, index */
  const hm_view *relu;         /* gradient: the result of a relu that came after, or NULL */
  int64_t rs[4];               /* its strides */
} geometry;

static void strides4(const hm_view *v, int64_t *out) {
  const int skip = 4 - v->ndim;
  for (int d = 0; d < 4; d++) out[d] = d < skip ? 0 : v->stride[d - skip];
}

static int64_t size_at(const hm_view *v, int d) { return d < 4 - v->ndim ? 1 : v->shape[d - (4 - v->ndim)]; }

/* Value number i of an attribute that has one or two. */
static int64_t pick(const hm_attr *a, int i, int64_t missing) {
  return a->n == 0 ? missing : a->n == 1 ? a->v[0] : a->v[i];
}

/* attr: kernel_size, stride, padding, dilation. */
static int make_geometry(geometry *g, const hm_view *x, const hm_view *y, const hm_view *index, const hm_attr *attr) {
  *g = (geometry){.n = size_at(x, 0),
                  .c = size_at(x, 1),
                  .h = size_at(x, 2),
                  .w = size_at(x, 3),
                  .oh = size_at(y, 2),
                  .ow = size_at(y, 3)};
  g->kh = pick(&attr[0], 0, 1), g->kw = pick(&attr[0], 1, 1);
  g->sh = pick(&attr[1], 0, g->kh), g->sw = pick(&attr[1], 1, g->kw);
  g->ph = pick(&attr[2], 0, 0), g->pw = pick(&attr[2], 1, 0);
  g->dh = pick(&attr[3], 0, 1), g->dw = pick(&attr[3], 1, 1);
  g->reach_h = (g->kh - 1) * g->dh + 1, g->reach_w = (g->kw - 1) * g->dw + 1;
  strides4(x, g->xs), strides4(y, g->ys), strides4(index, g->is);
  if (g->kh < 1 || g->kw < 1 || g->kh * g->kw > PLACES)
    return hm_cpu_fail(HM_ERR_ARG, "max_pool2d: the kernel must have 1 to %d places, it is %lld x %lld", PLACES,
                       (long long)g->kh, (long long)g->kw);
  if (g->sh < 1 || g->sw < 1 || g->dh < 1 || g->dw < 1)
    return hm_cpu_fail(HM_ERR_ARG,
                       "max_pool2d: stride and dilation must be at least 1, they are %lld, %lld and %lld, %lld",
                       (long long)g->sh, (long long)g->sw, (long long)g->dh, (long long)g->dw);
  if (g->ph < 0 || g->pw < 0 || g->ph * 2 > g->kh || g->pw * 2 > g->kw)
    return hm_cpu_fail(
        HM_ERR_ARG,
        "max_pool2d: padding must be at most half the kernel: padding is %lld, %lld, the kernel %lld x %lld",
        (long long)g->ph, (long long)g->pw, (long long)g->kh, (long long)g->kw);
  if ((g->h < 1 || g->w < 1) && g->oh * g->ow > 0)
    return hm_cpu_fail(HM_ERR_SHAPE, "max_pool2d: the image is empty: %lld x %lld", (long long)g->h, (long long)g->w);
  return HM_OK;
}

static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

/* The places [from, to) of a window's `kernel` that lie inside 0 .. size-1; the window begins at `at`, places are `step` apart. */
static void inside(int64_t at, int64_t step, int64_t kernel, int64_t size, int64_t *from, int64_t *to) {
  if (step == 1) { /* nearly always: no division */
    *from = at < 0 ? -at : 0;
    *to = clamp(size - at, 0, kernel);
    return;
  }
  *from = at < 0 ? (step - 1 - at) / step : 0;
  *to = at < size ? clamp((size - at + step - 1) / step, 0, kernel) : 0;
}

/* ====== Forward ====== */

/* The largest of `n` rows of c dense channels, and which: row[i] stands for place[i]. */
typedef void (*window_fn)(void *out, uint8_t *index, const void *const *row, const uint8_t *place, int n, int64_t c);

/* Places of one vector of channels, as bytes. */
#define STORE_PLACES(from, V)                                                                                          \
  for (int l = 0; l < (V); l++) index[c + l] = (uint8_t)(from)[l]

#define DEFINE_WINDOW(T, S, I, IS)                                                                                     \
  static void window_##S(void *outs, uint8_t *restrict index, const void *const *row, const uint8_t *place, int n,     \
                         int64_t channels) {                                                                           \
    enum { V = HM_VBYTES / sizeof(T) };                                                                                \
    T *restrict out = outs;                                                                                            \
    int64_t c = 0;                                                                                                     \
    for (; c + V <= channels; c += V) {                                                                                \
      hm_v_##S best = *(const hm_u_##S *)((const T *)row[0] + c);                                                      \
      hm_v_##IS where = (hm_v_##IS){0} + (I)place[0];                                                                  \
      for (int k = 1; k < n; k++) {                                                                                    \
        const hm_v_##S x = *(const hm_u_##S *)((const T *)row[k] + c);                                                 \
        const hm_v_##IS take = (hm_v_##IS)((x > best) | (x != x)), here = (hm_v_##IS){0} + (I)place[k];                \
        best = HM_VSELECT(take, x, best);                                                                              \
        where = HM_VSELECT(take, here, where);                                                                         \
      }                                                                                                                \
      *(hm_u_##S *)(out + c) = best;                                                                                   \
      STORE_PLACES(where, V);                                                                                          \
    }                                                                                                                  \
    for (; c < channels; c++) {                                                                                        \
      T best = ((const T *)row[0])[c];                                                                                 \
      uint8_t where = place[0];                                                                                        \
      for (int k = 1; k < n; k++) {                                                                                    \
        const T x = ((const T *)row[k])[c];                                                                            \
        if (x > best || x != x) best = x, where = place[k];                                                            \
      }                                                                                                                \
      out[c] = best;                                                                                                   \
      index[c] = where;                                                                                                \
    }                                                                                                                  \
  }

DEFINE_WINDOW(float, f32, int32_t, i32)
DEFINE_WINDOW(double, f64, int64_t, i64)

/* Half types: bits become an integer that orders as the value does (both zeros are 0), NaN the largest.  INF: bits of
 * infinity. */
#define DEFINE_WINDOW_HALF(S, INF)                                                                                     \
  static inline hm_v_i16 key_##S(hm_v_i16 x) {                                                                         \
    const hm_v_i16 sign = x >> 15, nan = (hm_v_i16)((x & 0x7fff) > INF);                                               \
    const hm_v_i16 key = (x ^ (sign & 0x7fff)) - sign, top = (hm_v_i16){0} + 0x7fff;                                   \
    return HM_VSELECT(nan, top, key);                                                                                  \
  }                                                                                                                    \
  static inline int key_one_##S(int16_t x) {                                                                           \
    const int sign = x < 0 ? -1 : 0;                                                                                   \
    return (x & 0x7fff) > INF ? 0x7fff : (int16_t)(x ^ (sign & 0x7fff)) - sign;                                        \
  }                                                                                                                    \
  static void window_##S(void *outs, uint8_t *restrict index, const void *const *row, const uint8_t *place, int n,     \
                         int64_t channels) {                                                                           \
    enum { V = HM_VBYTES / 2 };                                                                                        \
    int16_t *restrict out = outs;                                                                                      \
    int64_t c = 0;                                                                                                     \
    for (; c + V <= channels; c += V) {                                                                                \
      hm_v_i16 best = *(const hm_u_i16 *)((const int16_t *)row[0] + c), key = key_##S(best);                           \
      hm_v_i16 where = (hm_v_i16){0} + (int16_t)place[0];                                                              \
      for (int k = 1; k < n; k++) {                                                                                    \
        const hm_v_i16 x = *(const hm_u_i16 *)((const int16_t *)row[k] + c), kx = key_##S(x);                          \
        const hm_v_i16 take = (hm_v_i16)((kx > key) | (kx == 0x7fff)), here = (hm_v_i16){0} + (int16_t)place[k];       \
        best = HM_VSELECT(take, x, best);                                                                              \
        key = HM_VSELECT(take, kx, key);                                                                               \
        where = HM_VSELECT(take, here, where);                                                                         \
      }                                                                                                                \
      *(hm_u_i16 *)(out + c) = best;                                                                                   \
      STORE_PLACES(where, V);                                                                                          \
    }                                                                                                                  \
    for (; c < channels; c++) {                                                                                        \
      int16_t best = ((const int16_t *)row[0])[c];                                                                     \
      int key = key_one_##S(best);                                                                                     \
      uint8_t where = place[0];                                                                                        \
      for (int k = 1; k < n; k++) {                                                                                    \
        const int16_t x = ((const int16_t *)row[k])[c];                                                                \
        const int kx = key_one_##S(x);                                                                                 \
        if (kx > key || kx == 0x7fff) best = x, key = kx, where = place[k];                                            \
      }                                                                                                                \
      out[c] = best;                                                                                                   \
      index[c] = where;                                                                                                \
    }                                                                                                                  \
  }

DEFINE_WINDOW_HALF(f16, 0x7c00)
DEFINE_WINDOW_HALF(bf16, 0x7f80)

static window_fn window_of(int dtype) {
  switch (dtype) {
  case HM_F32: return window_f32;
  case HM_F64: return window_f64;
  case HM_F16: return window_f16;
  case HM_BF16: return window_bf16;
  default: return NULL;
  }
}

/* The rows of one window: pointers to channel 0 and places; returns how many. */
static int window_rows(const geometry *g, const char *image, int size, int64_t oy, int64_t ox, const void **row,
                       uint8_t *place) {
  const int64_t y = oy * g->sh - g->ph, x = ox * g->sw - g->pw;
  int64_t ky0, ky1, kx0, kx1;
  inside(y, g->dh, g->kh, g->h, &ky0, &ky1);
  inside(x, g->dw, g->kw, g->w, &kx0, &kx1);
  int n = 0;
  for (int64_t ky = ky0; ky < ky1; ky++) {
    const char *line = image + ((y + ky * g->dh) * g->xs[2] + (x + kx0 * g->dw) * g->xs[3]) * size;
    for (int64_t kx = kx0; kx < kx1; kx++, line += g->dw * g->xs[3] * size) {
      row[n] = line;
      place[n++] = (uint8_t)(ky * g->kw + kx);
    }
  }
  return n;
}

/* One window where channels have gaps on some side: through tiles, a few channels at a time. */
static void window_strided(const geometry *g, window_fn fn, int size, const void *const *row, const uint8_t *place,
                           int n, char *out, uint8_t *index) {
  uint64_t tile[TILE], result[TILE];
  uint8_t chosen[TILE];
  const void *at[PLACES];
  const int64_t step = clamp(TILE / n, 1, g->c);
  for (int64_t c = 0; c < g->c; c += step) {
    const int64_t m = g->c - c < step ? g->c - c : step;
    for (int k = 0; k < n; k++) {
      char *to = (char *)tile + k * m * size;
      hm_gather(to, (const char *)row[k] + c * g->xs[1] * size, size, m, g->xs[1]);
      at[k] = to;
    }
    fn(result, chosen, at, place, n, m);
    hm_scatter(out + c * g->ys[1] * size, result, size, m, g->ys[1]);
    hm_scatter(index + c * g->is[1], chosen, 1, m, g->is[1]);
  }
}

/* A window without a pixel: c channels of -infinity at place 0. */
static void window_empty(const geometry *g, int dtype, char *out, uint8_t *index) {
  const int size = hm_dtype_size(dtype);
  const double infinity = -(double)INFINITY;
  uint64_t least;
  hm_cpu_isa()->convert(&least, dtype, &infinity, HM_F64, 1);
  for (int64_t c = 0; c < g->c; c++) {
    memcpy(out + c * g->ys[1] * size, &least, (size_t)size);
    index[c * g->is[1]] = 0;
  }
}

static int forward(const hm_kernel_call *call) {
  const hm_view *x = &call->in[0], *y = &call->out[0], *index = &call->out[1];
  geometry g;
  const int status = make_geometry(&g, x, y, index, call->attr);
  if (status != HM_OK) return status;
  const window_fn fn = window_of(x->dtype);
  if (!fn) return hm_cpu_fail(HM_ERR_DTYPE, "max_pool2d: expected a floating dtype, got %s", hm_dtype_name(x->dtype));
  const int size = hm_dtype_size(x->dtype);
  const bool dense = g.c == 1 || (g.xs[1] == 1 && g.ys[1] == 1 && g.is[1] == 1);
  const int threads = hm_cpu_threads(g.n * g.c * g.h * g.w, size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < g.n * g.oh; u++) {
    const void *row[PLACES];
    uint8_t place[PLACES];
    const int64_t n = u / g.oh, oy = u % g.oh;
    const char *image = (const char *)x->data + n * g.xs[0] * size;
    for (int64_t ox = 0; ox < g.ow; ox++) {
      const int rows = window_rows(&g, image, size, oy, ox, row, place);
      char *out = (char *)y->data + (n * g.ys[0] + oy * g.ys[2] + ox * g.ys[3]) * size;
      uint8_t *to = (uint8_t *)index->data + n * g.is[0] + oy * g.is[2] + ox * g.is[3];
      if (rows == 0) window_empty(&g, x->dtype, out, to);
      else if (dense) fn(out, to, row, place, rows, g.c);
      else window_strided(&g, fn, size, row, place, rows, out, to);
    }
  }
  return HM_OK;
}

/* ====== Backward ====== */

enum { CHANNELS = 1024 }; /* handled at a time */

typedef int16_t any_i16 __attribute__((may_alias));
typedef int32_t any_i32 __attribute__((may_alias));
typedef int64_t any_i64 __attribute__((may_alias));

/* What relu's gradient lets through: all ones where its result is above 0 or NaN, else 0. */
static void relu_keeps(const geometry *g, int64_t at, int64_t m, uint8_t *restrict keep) {
  double tile[CHANNELS];
  const int dtype = g->relu->dtype;
  const void *out = hm_tile_in(tile, dtype, hm_at(g->relu->data, at, dtype), dtype, m, g->rs[1]);
  if (dtype == HM_F64) {
    const double *x = out;
    for (int64_t c = 0; c < m; c++) keep[c] = x[c] <= 0 ? 0 : 0xff;
  } else if (dtype == HM_F32) {
    const float *x = out;
    for (int64_t c = 0; c < m; c++) keep[c] = x[c] <= 0 ? 0 : 0xff;
  } else { /* by the bits: a sign or 0, and no NaN */
    const uint16_t *x = out, lowest = dtype == HM_F16 ? 0xfc00 : 0xff80;
    for (int64_t c = 0; c < m; c++) keep[c] = (int16_t)x[c] <= 0 && x[c] <= lowest ? 0 : 0xff;
  }
}

/* dst[c] = keep[c] ? src[c] : 0; dst may be src. */
#define DEFINE_LET_THROUGH(T)                                                                                          \
  static void let_through_##T(any_##T *dst, const any_##T *src, const uint8_t *restrict keep, int64_t m) {             \
    for (int64_t c = 0; c < m; c++) dst[c] = (any_##T)(src[c] & (any_##T)(int8_t)keep[c]);                             \
  }
DEFINE_LET_THROUGH(i16)
DEFINE_LET_THROUGH(i32)
DEFINE_LET_THROUGH(i64)

/* m channels of the gradient and the index at one window position, dense and in `type`. */
static __attribute__((noinline)) const void *window_grad(const geometry *g, const hm_view *grad, int64_t n, int64_t oy,
                                                         int64_t ox, int64_t c, int64_t m, void *tile, int type) {
  const int64_t at = n * g->ys[0] + c * g->ys[1] + oy * g->ys[2] + ox * g->ys[3];
  const void *dense = hm_tile_in(tile, type, hm_at(grad->data, at, grad->dtype), grad->dtype, m, g->ys[1]);
  if (!g->relu) return dense;
  uint8_t keep[CHANNELS];
  relu_keeps(g, n * g->rs[0] + c * g->rs[1] + oy * g->rs[2] + ox * g->rs[3], m, keep);
  const int size = hm_dtype_size(type);
  if (size == 2) let_through_i16(tile, dense, keep, m);
  else if (size == 4) let_through_i32(tile, dense, keep, m);
  else let_through_i64(tile, dense, keep, m);
  return tile;
}

static __attribute__((noinline)) const uint8_t *window_index(const geometry *g, const hm_view *index, int64_t n,
                                                             int64_t oy, int64_t ox, int64_t c, int64_t m, void *tile) {
  const int64_t at = n * g->is[0] + c * g->is[1] + oy * g->is[2] + ox * g->is[3];
  return hm_tile_in(tile, HM_U8, (const uint8_t *)index->data + at, HM_U8, m, g->is[1]);
}

/* m results of that type from channel c on at (y, x) of an output with strides s, rounded once. */
static __attribute__((noinline)) void put(const hm_view *out, const int64_t *s, int64_t n, int64_t c, int64_t y,
                                          int64_t x, const void *result, int type, int64_t m) {
  const int64_t at = n * s[0] + c * s[1] + y * s[2] + x * s[3];
  hm_tile_out(hm_at_mut(out->data, at, out->dtype), out->dtype, m == 1 ? 1 : s[1], result, type, m);
}

/* dst[c] = wide[c] == place ? grad[c] : 0, by element size; wide: indices as integers of that size. */
#define DEFINE_CHOOSE(T, S)                                                                                            \
  static void choose_##S(T *restrict dst, const T *restrict grad, const T *restrict wide, T place, int64_t m) {        \
    enum { V = HM_VBYTES / sizeof(T) };                                                                                \
    const hm_v_##S at = (hm_v_##S){0} + place;                                                                         \
    int64_t c = 0;                                                                                                     \
    for (; c + V <= m; c += V)                                                                                         \
      *(hm_u_##S *)(dst + c) = (*(const hm_u_##S *)(wide + c) == at) & *(const hm_u_##S *)(grad + c);                  \
    for (; c < m; c++) dst[c] = wide[c] == place ? grad[c] : 0;                                                        \
  }                                                                                                                    \
  static void widen_##S(T *restrict wide, const uint8_t *restrict index, int64_t m) {                                  \
    for (int64_t c = 0; c < m; c++) wide[c] = (T)index[c];                                                             \
  }
DEFINE_CHOOSE(any_i16, i16)
DEFINE_CHOOSE(any_i32, i32)
DEFINE_CHOOSE(any_i64, i64)

static void widen(void *wide, const uint8_t *index, int size, int64_t m) {
  if (size == 2) widen_i16(wide, index, m);
  else if (size == 4) widen_i32(wide, index, m);
  else widen_i64(wide, index, m);
}

static void choose(void *dst, const void *grad, const void *wide, int place, int size, int64_t m) {
  if (size == 2) choose_i16(dst, grad, wide, (int16_t)place, m);
  else if (size == 4) choose_i32(dst, grad, wide, place, m);
  else choose_i64(dst, grad, wide, place, m);
}

/* Zeros in m channels of the image side from element `at` on. */
static void clear(const geometry *g, const hm_view *out, int64_t at, int64_t m) {
  const int size = hm_dtype_size(out->dtype);
  char *dst = hm_at_mut(out->data, at, out->dtype);
  if (g->xs[1] == 1) {
    memset(dst, 0, (size_t)(m * size));
    return;
  }
  for (int64_t c = 0; c < m; c++) memset(dst + c * g->xs[1] * size, 0, (size_t)size);
}

/* One window that shares no pixel with another: m channels from c on. */
static void spread_window(const geometry *g, const hm_kernel_call *call, int64_t n, int64_t oy, int64_t ox, int64_t c,
                          int64_t m) {
  uint64_t g_tile[CHANNELS], wide[CHANNELS], result[CHANNELS];
  uint8_t i_tile[CHANNELS];
  const hm_view *out = &call->out[0];
  const int size = hm_dtype_size(out->dtype);
  const void *grad = window_grad(g, &call->in[0], n, oy, ox, c, m, g_tile, out->dtype);
  widen(wide, window_index(g, &call->in[1], n, oy, ox, c, m, i_tile), size, m);
  const int64_t y = oy * g->sh - g->ph, x = ox * g->sw - g->pw;
  int64_t ky0, ky1, kx0, kx1;
  inside(y, g->dh, g->kh, g->h, &ky0, &ky1);
  inside(x, g->dw, g->kw, g->w, &kx0, &kx1);
  for (int64_t ky = ky0; ky < ky1; ky++) {
    for (int64_t kx = kx0; kx < kx1; kx++) {
      char *dst =
          hm_at_mut(out->data, n * g->xs[0] + c * g->xs[1] + (y + ky * g->dh) * g->xs[2] + (x + kx * g->dw) * g->xs[3],
                    out->dtype);
      const int place = (int)(ky * g->kw + kx);
      if (g->xs[1] == 1 || m == 1) {
        choose(dst, grad, wide, place, size, m);
      } else {
        choose(result, grad, wide, place, size, m);
        hm_scatter(dst, result, size, m, g->xs[1]);
      }
    }
  }
}

/* Windows that do not overlap: row oy of windows of image n writes its band of image rows. */
static void spread_band(const geometry *g, const hm_kernel_call *call, int64_t n, int64_t oy, bool covered) {
  const int64_t y0 = oy == 0 ? 0 : oy * g->sh - g->ph,
                y1 = oy == g->oh - 1 ? g->h : clamp((oy + 1) * g->sh - g->ph, 0, g->h);
  for (int64_t y = y0; y < y1 && !covered; y++)
    for (int64_t x = 0; x < g->w; x++) clear(g, &call->out[0], n * g->xs[0] + y * g->xs[2] + x * g->xs[3], g->c);
  for (int64_t ox = 0; ox < g->ow; ox++)
    for (int64_t c = 0; c < g->c; c += CHANNELS)
      spread_window(g, call, n, oy, ox, c, g->c - c < CHANNELS ? g->c - c : CHANNELS);
}

/* acc[c] += index[c] == place ? grad[c] : 0 */
#define DEFINE_ADD(T, S)                                                                                               \
  static void add_chosen_##S(T *restrict acc, const T *restrict grad, const uint8_t *restrict index, int place,        \
                             int64_t m) {                                                                              \
    for (int64_t c = 0; c < m; c++) acc[c] += (int)index[c] == place ? grad[c] : 0;                                    \
  }
DEFINE_ADD(float, f32)
DEFINE_ADD(double, f64)

/* One pixel of the image side, m channels from c on: the sum over the windows that chose it. */
static void gather_pixel(const geometry *g, const hm_kernel_call *call, int64_t n, int64_t y, int64_t x, int64_t c,
                         int64_t m) {
  double acc[CHANNELS], g_tile[CHANNELS];
  uint8_t i_tile[CHANNELS];
  const hm_view *out = &call->out[0];
  const int type = call->compute == HM_F64 ? HM_F64 : HM_F32;
  const bool dilated = g->dh > 1 || g->dw > 1;
  int64_t oy0, oy1, ox0, ox1;
  hm_pool_windows(g->oh, g->reach_h, g->sh, g->ph, y, &oy0, &oy1);
  hm_pool_windows(g->ow, g->reach_w, g->sw, g->pw, x, &ox0, &ox1);
  memset(acc, 0, (size_t)(m * hm_dtype_size(type)));
  for (int64_t oy = oy0; oy < oy1; oy++) {
    for (int64_t ox = ox0; ox < ox1; ox++) {
      const int64_t dy = y + g->ph - oy * g->sh, dx = x + g->pw - ox * g->sw;
      int64_t place = dy * g->kw + dx;
      if (dilated) {
        if (dy % g->dh || dx % g->dw) continue; /* between two places */
        place = dy / g->dh * g->kw + dx / g->dw;
      }
      const void *grad = window_grad(g, &call->in[0], n, oy, ox, c, m, g_tile, type);
      const uint8_t *index = window_index(g, &call->in[1], n, oy, ox, c, m, i_tile);
      if (type == HM_F64) add_chosen_f64(acc, grad, index, (int)place, m);
      else add_chosen_f32((float *)(void *)acc, grad, index, (int)place, m);
    }
  }
  put(out, g->xs, n, c, y, x, acc, type, m);
}

static int backward(const hm_kernel_call *call) {
  const hm_view *out = &call->out[0];
  geometry g;
  const int status = make_geometry(&g, out, &call->in[0], &call->in[1], call->attr + 1);
  if (status != HM_OK) return status;
  if (call->op == HM_OP_MAX_POOL2D_RELU_BACKWARD) {
    g.relu = &call->in[2];
    strides4(g.relu, g.rs);
  }
  const bool apart = g.sh >= g.reach_h && g.sw >= g.reach_w && g.oh > 0 && g.ow > 0;
  const bool covered = g.dh == 1 && g.dw == 1 && g.kh == g.sh && g.kw == g.sw && g.ph == 0 && g.pw == 0 &&
                       g.oh * g.sh == g.h && g.ow * g.sw == g.w;
  const int threads = hm_cpu_threads(g.n * g.c * g.h * g.w, hm_dtype_size(out->dtype));
  const int64_t units = apart ? g.n * g.oh : g.n * g.h;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    if (apart) {
      spread_band(&g, call, u / g.oh, u % g.oh, covered);
      continue;
    }
    for (int64_t x = 0; x < g.w; x++)
      for (int64_t c = 0; c < g.c; c += CHANNELS)
        gather_pixel(&g, call, u / g.h, u % g.h, x, c, g.c - c < CHANNELS ? g.c - c : CHANNELS);
  }
  return HM_OK;
}

/* ====== The gradient of the gradient: what stands at each window's index ====== */

/* m channels from c on at window (oy, ox). */
static void pick_pixel(const geometry *g, const hm_kernel_call *call, int64_t n, int64_t oy, int64_t ox, int64_t c,
                       int64_t m) {
  uint64_t raw[CHANNELS];
  uint8_t i_tile[CHANNELS];
  const hm_view *x = &call->in[0], *out = &call->out[0];
  const int size = hm_dtype_size(x->dtype);
  const uint8_t *index = window_index(g, &call->in[1], n, oy, ox, c, m, i_tile);
  memset(raw, 0, (size_t)(m * size));
  for (int64_t k = 0; k < m; k++) {
    const int64_t iy = oy * g->sh - g->ph + index[k] / g->kw * g->dh,
                  ix = ox * g->sw - g->pw + index[k] % g->kw * g->dw;
    if (iy < 0 || iy >= g->h || ix < 0 || ix >= g->w) continue; /* chosen by nobody: 0 */
    const int64_t at = n * g->xs[0] + (c + k) * g->xs[1] + iy * g->xs[2] + ix * g->xs[3];
    memcpy((char *)raw + k * size, hm_at(x->data, at, x->dtype), (size_t)size);
  }
  put(out, g->ys, n, c, oy, ox, raw, x->dtype, m);
}

static int pick_chosen(const hm_kernel_call *call) {
  geometry g;
  const int status = make_geometry(&g, &call->in[0], &call->out[0], &call->in[1], call->attr);
  if (status != HM_OK) return status;
  const int threads = hm_cpu_threads(g.n * g.c * g.oh * g.ow, 4 * hm_dtype_size(call->in[0].dtype));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < g.n * g.oh; u++)
    for (int64_t ox = 0; ox < g.ow; ox++)
      for (int64_t c = 0; c < g.c; c += CHANNELS)
        pick_pixel(&g, call, u / g.oh, u % g.oh, ox, c, g.c - c < CHANNELS ? g.c - c : CHANNELS);
  return HM_OK;
}

/* ====== adaptive_max_pool2d ====== */

/* Sizes and strides alone; the index has int64 elements. */
static void make_adaptive(geometry *g, const hm_view *x, const hm_view *y, const hm_view *index) {
  *g = (geometry){
      .n = x->shape[0], .c = x->shape[1], .h = x->shape[2], .w = x->shape[3], .oh = y->shape[2], .ow = y->shape[3]};
  strides4(x, g->xs), strides4(y, g->ys), strides4(index, g->is);
}

/* The largest of a window so far, m channels: its bits and where it stood. */
typedef struct champion {
  uint64_t value[CHANNELS];
  int64_t place[CHANNELS];
} champion;

/* `rows` more rows of the window, which stand at at[]; begun: best holds the largest of those before. */
static void contend(champion *best, bool begun, window_fn fn, int size, const void *const *row, const int64_t *at,
                    int rows, int64_t m) {
  uint64_t value[CHANNELS], joined[CHANNELS];
  uint8_t number[PLACES], chosen[CHANNELS], which[CHANNELS];
  for (int k = 0; k < rows; k++) number[k] = (uint8_t)k;
  fn(value, chosen, row, number, rows, m);
  if (!begun) {
    memcpy(best->value, value, (size_t)(m * size));
    for (int64_t c = 0; c < m; c++) best->place[c] = at[chosen[c]];
    return;
  }
  const void *const two[2] = {best->value, value};
  fn(joined, which, two, number, 2, m);
  memcpy(best->value, joined, (size_t)(m * size));
  for (int64_t c = 0; c < m; c++)
    if (which[c]) best->place[c] = at[chosen[c]];
}

/* m channels of one window, whose pixels are [y0, y1) x [x0, x1); image: channel c of the image. */
static void adaptive_window(champion *best, const geometry *g, window_fn fn, int size, const char *image,
                            const int64_t span[4], int64_t m) {
  uint64_t tile[TILE];
  const void *row[PLACES];
  int64_t at[PLACES];
  const bool dense = g->xs[1] == 1 || m == 1;
  const int most = dense ? PLACES : (int)clamp(TILE / m, 1, PLACES);
  int rows = 0;
  bool begun = false;
  for (int64_t y = span[0]; y < span[1]; y++) {
    for (int64_t x = span[2]; x < span[3]; x++) {
      const char *from = image + (y * g->xs[2] + x * g->xs[3]) * size;
      char *packed = (char *)tile + rows * m * size;
      if (!dense) hm_gather(packed, from, size, m, g->xs[1]);
      row[rows] = dense ? from : packed;
      at[rows++] = y * g->w + x;
      if (rows < most && !(y == span[1] - 1 && x == span[3] - 1)) continue;
      contend(best, begun, fn, size, row, at, rows, m);
      begun = true, rows = 0;
    }
  }
}

static int adaptive_forward(const hm_kernel_call *call) {
  const hm_view *x = &call->in[0], *y = &call->out[0], *index = &call->out[1];
  geometry g;
  make_adaptive(&g, x, y, index);
  const window_fn fn = window_of(x->dtype);
  if (!fn)
    return hm_cpu_fail(HM_ERR_DTYPE, "adaptive_max_pool2d: expected a floating dtype, got %s", hm_dtype_name(x->dtype));
  const int size = hm_dtype_size(x->dtype), threads = hm_cpu_threads(g.n * g.c * g.h * g.w, size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < g.n * g.oh * g.ow; u++) {
    champion best;
    const int64_t ox = u % g.ow, oy = u / g.ow % g.oh, n = u / g.ow / g.oh;
    int64_t span[4];
    hm_adaptive_span(g.h, g.oh, oy, &span[0], &span[1]);
    hm_adaptive_span(g.w, g.ow, ox, &span[2], &span[3]);
    for (int64_t c = 0; c < g.c; c += CHANNELS) {
      const int64_t m = g.c - c < CHANNELS ? g.c - c : CHANNELS;
      adaptive_window(&best, &g, fn, size, (const char *)x->data + (n * g.xs[0] + c * g.xs[1]) * size, span, m);
      char *out = (char *)y->data + (n * g.ys[0] + c * g.ys[1] + oy * g.ys[2] + ox * g.ys[3]) * size;
      hm_scatter(out, best.value, size, m, g.ys[1]);
      hm_scatter((int64_t *)index->data + n * g.is[0] + c * g.is[1] + oy * g.is[2] + ox * g.is[3], best.place, 8, m,
                 g.is[1]);
    }
  }
  return HM_OK;
}

/* acc[c] += place[c] == at ? grad[c] : 0 */
#define DEFINE_ADD_AT(T, S)                                                                                            \
  static void add_at_##S(T *restrict acc, const T *restrict grad, const int64_t *restrict place, int64_t at,           \
                         int64_t m) {                                                                                  \
    for (int64_t c = 0; c < m; c++) acc[c] += place[c] == at ? grad[c] : 0;                                            \
  }
DEFINE_ADD_AT(float, f32)
DEFINE_ADD_AT(double, f64)

/* m channels from c on of pixel (y, x): the sum over the windows that chose it. */
static void adaptive_pixel(const geometry *g, const hm_kernel_call *call, int64_t n, int64_t y, int64_t x, int64_t c,
                           int64_t m) {
  double acc[CHANNELS], g_tile[CHANNELS];
  int64_t i_tile[CHANNELS], oy0, oy1, ox0, ox1;
  const hm_view *out = &call->out[0], *index = &call->in[1];
  const int type = call->compute == HM_F64 ? HM_F64 : HM_F32;
  hm_adaptive_span(g->oh, g->h, y, &oy0, &oy1);
  hm_adaptive_span(g->ow, g->w, x, &ox0, &ox1);
  memset(acc, 0, (size_t)(m * hm_dtype_size(type)));
  for (int64_t oy = oy0; oy < oy1; oy++) {
    for (int64_t ox = ox0; ox < ox1; ox++) {
      const void *grad = window_grad(g, &call->in[0], n, oy, ox, c, m, g_tile, type);
      const int64_t at = n * g->is[0] + c * g->is[1] + oy * g->is[2] + ox * g->is[3];
      const int64_t *place = hm_tile_in(i_tile, HM_I64, (const int64_t *)index->data + at, HM_I64, m, g->is[1]);
      if (type == HM_F64) add_at_f64(acc, grad, place, y * g->w + x, m);
      else add_at_f32((float *)(void *)acc, grad, place, y * g->w + x, m);
    }
  }
  put(out, g->xs, n, c, y, x, acc, type, m);
}

static int adaptive_backward(const hm_kernel_call *call) {
  geometry g;
  make_adaptive(&g, &call->out[0], &call->in[0], &call->in[1]);
  const int threads = hm_cpu_threads(g.n * g.c * g.h * g.w, 8);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < g.n * g.h; u++)
    for (int64_t x = 0; x < g.w; x++)
      for (int64_t c = 0; c < g.c; c += CHANNELS)
        adaptive_pixel(&g, call, u / g.h, u % g.h, x, c, g.c - c < CHANNELS ? g.c - c : CHANNELS);
  return HM_OK;
}

int HM_ISA_FN(hm_cpu_pool)(const hm_kernel_call *call) {
  switch (call->op) {
  case HM_OP_MAX_POOL2D: return forward(call);
  case HM_OP_MAX_POOL2D_BACKWARD:
  case HM_OP_MAX_POOL2D_RELU_BACKWARD: return backward(call);
  case HM_OP_MAX_POOL2D_PICK: return pick_chosen(call);
  case HM_OP_ADAPTIVE_MAX_POOL2D: return adaptive_forward(call);
  case HM_OP_ADAPTIVE_MAX_POOL2D_BACKWARD: return adaptive_backward(call);
  default: return HM_ISA_FN(hm_cpu_resample)(call);
  }
}
