/*
 * resample.c -- averages over windows, adaptive averages and interpolation, with their gradients.
 *
 * Compiled once per instruction set.  Called by pool.c, which hands on what it does not know.
 *
 * All of them are weighted sums over a rectangle of the other side (window.h).  Work goes pixel by pixel over all channels at once;
 * channels that are not dense, or of a type that is not computed in, go through tiles.  A sum of few terms runs in registers; longer
 * ones keep what their additions lose.  The order of the terms is that of the rectangle, whatever the number of threads.
 */
#include "vec.h"
#include "window.h"

enum { CHANNELS = 512, TILE = 8192 }; /* channels handled at a time; elements in a tile */
enum { FEW = HM_WINDOW_CAREFUL };     /* terms of a sum in registers */
enum { LINES = 8, COLUMNS = 16 };     /* a block of the result that looks at its columns once */

/* out = the sum of weight[k] * row[k]; the careful one adds one row, and keeps in `lost` what that loses. */
#define DEFINE_SUMS(T, S)                                                                                              \
  static void sum_##S(T *restrict out, const void *const *row, const T *restrict weight, int terms, int64_t m) {       \
    enum { V = HM_VBYTES / sizeof(T) };                                                                                \
    int64_t c = 0;                                                                                                     \
    for (; c + V <= m; c += V) {                                                                                       \
      hm_v_##S acc = weight[0] * *(const hm_u_##S *)((const T *)row[0] + c);                                           \
      for (int k = 1; k < terms; k++) acc += weight[k] * *(const hm_u_##S *)((const T *)row[k] + c);                   \
      *(hm_u_##S *)(out + c) = acc;                                                                                    \
    }                                                                                                                  \
    for (; c < m; c++) {                                                                                               \
      T acc = weight[0] * ((const T *)row[0])[c];                                                                      \
      for (int k = 1; k < terms; k++) acc += weight[k] * ((const T *)row[k])[c];                                       \
      out[c] = acc;                                                                                                    \
    }                                                                                                                  \
  }                                                                                                                    \
  static void add_careful_##S(T *restrict acc, T *restrict lost, const T *restrict x, T w, bool first, int64_t m) {    \
    for (int64_t c = 0; c < m && first; c++) acc[c] = w * x[c], lost[c] = 0;                                           \
    for (int64_t c = 0; c < m && !first; c++) {                                                                        \
      const T y = w * x[c] - lost[c], s = acc[c] + y, l = (s - acc[c]) - y;                                            \
      lost[c] = l - l == 0 ? l : 0; /* infinity and NaN lose nothing */                                                \
      acc[c] = s;                                                                                                      \
    }                                                                                                                  \
  }                                                                                                                    \
  static void divide_##S(T *acc, T by, int64_t m) {                                                                    \
    for (int64_t c = 0; c < m; c++) acc[c] /= by;                                                                      \
  }
DEFINE_SUMS(float, f32)
DEFINE_SUMS(double, f64)

/* One call. */
typedef struct job {
  hm_windows w;
  const hm_view *src, *dst;
  int type; /* computed in */
} job;

/* What one place of the result is made of along one dim: [from, to) of the other side, and the values of the first FEW
 * (exact in double, whatever the type). */
typedef struct side {
  int64_t from, to;
  double value[FEW];
} side;

static double value_of(const job *j, const hm_axis *a, int64_t i, int64_t at) {
  return j->type == HM_F64 ? hm_axis_value_f64(&j->w, a, i, at) : (double)hm_axis_value_f32(&j->w, a, i, at);
}

/* In double for either type: what floats give there rounds to what they give in float32. */
static double weight_of(const job *j, double y, double x) { return hm_windows_weight_f64(&j->w, y, x); }

static __attribute__((noinline)) void look(const job *j, const hm_axis *a, int64_t i, side *s) {
  if (j->type == HM_F64) hm_axis_span_f64(&j->w, a, i, &s->from, &s->to);
  else hm_axis_span_f32(&j->w, a, i, &s->from, &s->to);
  for (int64_t k = 0; k < s->to - s->from && k < FEW; k++) s->value[k] = value_of(j, a, i, s->from + k);
}

/* m channels from c on of element (y, x) of the other side, dense and in the type computed in: where they lie, or in `tile`. */
static __attribute__((noinline)) const void *source(const job *j, int64_t n, int64_t c, int64_t y, int64_t x, int64_t m,
                                                    void *tile) {
  const int64_t *s = j->src->stride;
  const char *at = hm_at(j->src->data, n * s[0] + c * s[1] + y * s[2] + x * s[3], j->src->dtype);
  return hm_tile_in(tile, j->type, at, j->src->dtype, m, s[1]);
}

static void *target(const job *j, int64_t n, int64_t c, int64_t y, int64_t x) {
  const int64_t *s = j->dst->stride;
  return hm_at_mut(j->dst->data, n * s[0] + c * s[1] + y * s[2] + x * s[3], j->dst->dtype);
}

/* Divides m sums by what element (y, x) of an average is divided by, and puts them where they belong. */
static void finish(const job *j, int64_t n, int64_t c, int64_t y, int64_t x, void *acc, int64_t m) {
  if (!j->w.backward && j->w.kind <= HM_WINDOW_ADAPTIVE) {
    const int64_t count = hm_windows_count(&j->w, y, x);
    if (j->type == HM_F64) divide_f64(acc, (double)count, m);
    else divide_f32(acc, (float)count, m);
  }
  hm_tile_out(target(j, n, c, y, x), j->dst->dtype, m == 1 ? 1 : j->dst->stride[1], acc, j->type, m);
}

/* Element (y, x) of image n of the result, made of at most FEW terms. */
static void pixel_few(const job *j, const side *sy, const side *sx, int64_t n, int64_t y, int64_t x, double *tile) {
  double sum[CHANNELS], weight[FEW];
  float narrow[FEW];
  const void *row[FEW];
  const int64_t channels = j->dst->shape[1], height = sy->to - sy->from, width = sx->to - sx->from;
  const int terms = (int)(height * width);
  const bool direct = j->dst->dtype == j->type && (j->dst->stride[1] == 1 || channels == 1);
  for (int64_t v = 0, k = 0; v < height; v++)
    for (int64_t h = 0; h < width; h++, k++) weight[k] = weight_of(j, sy->value[v], sx->value[h]);
  for (int k = 0; k < terms; k++) narrow[k] = (float)weight[k];
  const int64_t step = terms * CHANNELS <= TILE ? CHANNELS : TILE / terms;
  for (int64_t c = 0; c < channels; c += step) {
    const int64_t m = channels - c < step ? channels - c : step;
    void *acc = direct ? target(j, n, c, y, x) : (void *)sum;
    int k = 0;
    for (int64_t v = sy->from; v < sy->to; v++)
      for (int64_t h = sx->from; h < sx->to; h++, k++)
        row[k] = source(j, n, c, v, h, m, hm_at_mut(tile, k * m, j->type));
    if (terms == 0) memset(acc, 0, (size_t)(m * hm_dtype_size(j->type)));
    else if (j->type == HM_F64) sum_f64(acc, row, weight, terms, m);
    else sum_f32(acc, row, narrow, terms, m);
    finish(j, n, c, y, x, acc, m);
  }
}

/* The same of any number of terms. */
static void pixel_many(const job *j, const side *sy, const side *sx, int64_t n, int64_t y, int64_t x, double *tile) {
  double acc[CHANNELS], lost[CHANNELS];
  const int64_t channels = j->dst->shape[1];
  for (int64_t c = 0; c < channels; c += CHANNELS) {
    const int64_t m = channels - c < CHANNELS ? channels - c : CHANNELS;
    for (int64_t v = sy->from; v < sy->to; v++) {
      const double value = value_of(j, &j->w.y, y, v);
      for (int64_t h = sx->from; h < sx->to; h++) {
        const void *row = source(j, n, c, v, h, m, tile);
        const double by = weight_of(j, value, value_of(j, &j->w.x, x, h));
        const bool first = v == sy->from && h == sx->from;
        if (j->type == HM_F64) add_careful_f64(acc, lost, row, by, first, m);
        else add_careful_f32((float *)(void *)acc, (float *)(void *)lost, row, (float)by, first, m);
      }
    }
    finish(j, n, c, y, x, acc, m);
  }
}

/* Lines [y0, y1) of image n of the result. */
static void lines(const job *j, int64_t n, int64_t y0, int64_t y1) {
  const int64_t width = j->dst->shape[3];
  double tile[TILE];
  side column[COLUMNS], line;
  for (int64_t x0 = 0; x0 < width; x0 += COLUMNS) {
    const int64_t columns = width - x0 < COLUMNS ? width - x0 : COLUMNS;
    for (int64_t k = 0; k < columns; k++) look(j, &j->w.x, x0 + k, &column[k]);
    for (int64_t y = y0; y < y1; y++) {
      look(j, &j->w.y, y, &line);
      for (int64_t k = 0; k < columns; k++) {
        const bool few = (line.to - line.from) * (column[k].to - column[k].from) <= FEW;
        (few ? pixel_few : pixel_many)(j, &line, &column[k], n, y, x0 + k, tile);
      }
    }
  }
}

int HM_ISA_FN(hm_cpu_resample)(const hm_kernel_call *call) {
  job j = {.src = &call->in[0], .dst = &call->out[0], .type = call->compute == HM_F64 ? HM_F64 : HM_F32};
  if (!hm_windows_make(&j.w, call))
    return hm_cpu_fail(HM_ERR_UNSUPPORTED, "the cpu backend has no pooling with op id %d", call->op);
  const int64_t images = j.dst->shape[0], height = j.dst->shape[2], blocks = (height + LINES - 1) / LINES;
  const int64_t from = j.src->shape[2] * j.src->shape[3], to = height * j.dst->shape[3];
  const int threads = hm_cpu_threads(images * j.dst->shape[1] * (from > to ? from : to), hm_dtype_size(j.src->dtype));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < images * blocks; u++) {
    const int64_t y = u % blocks * LINES;
    lines(&j, u / blocks, y, y + LINES < height ? y + LINES : height);
  }
  return HM_OK;
}
