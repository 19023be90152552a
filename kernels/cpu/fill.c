/*
 * fill.c -- constants, ranges, the identity matrix, random numbers.
 *
 * Random numbers are Philox4x32-10 (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3").  Every backend makes the same ones:
 *   - the key is the seed (low word first); the counter's low 64 bits are offset + i / 4, its third word the stream, its fourth 0;
 *   - element i, counted in row-major order of the logical shape, takes word i % 4, whatever the threads and strides;
 *   - stream 0 gives 32 bits per element.  Where an element needs 64 (float64 and integers), word i % 4 of stream 1 follows as the lower half, so that
 *     a call always takes ceil(numel / 4) counters;
 *   - uniform_: the top 24 bits (float64: 53) times 2^-24 are u; the value is low + u * (high - low), in float32 (float64), then held below high as the
 *     output's dtype has it;
 *   - normal_: elements 2k and 2k+1 are r cos t and r sin t with r = sqrt(-2 log u), t = 2 pi v, where u in (0, 1] comes from the first's
 *     bits and v in [0, 1) from the second's;
 *   - random_: low + (64 bits * (high - low)) / 2^64;
 *   - bernoulli_, dropout: an element is 1, or dropped, where its 32 bits are below p * 2^32, whatever the dtype.
 *
 * Compiled once per instruction set; called through hm_isa.fill and hm_isa.random; owns no memory.
 */
#include <omp.h>

#include "../half.h"
#include "../philox.h"
#include "isa.h"
#include "layout.h"

enum {
  BLOCK = 512, /* elements made at once; a multiple of 4 */
  GRAIN = 4096 /* elements: least share of a thread */
};

/* ====== Writing logical elements in order ====== */

/* Makes n <= BLOCK values, those of elements first, first + 1, ..., in the task's dtype.  May write up to 3 more. */
typedef struct task task;
typedef void (*make_fn)(const task *t, int64_t first, int64_t n, void *values);

struct task {
  const hm_view *out;
  make_fn make;
  int dtype; /* of what make() writes: F32, F64 or I64 */
  bool row_major;
  uint64_t seed, offset;
  union {
    struct {
      double start, step;
    } f;
    struct {
      int64_t start, step;
    } i;
    struct {
      double low, range, top; /* top: the largest value of the output's dtype below high */
    } uniform;
    struct {
      double mean, std;
    } normal;
    struct {
      int64_t low;
      uint64_t range;
    } random;
    struct {
      const hm_view *x; /* dropout's input */
      bool x_row_major;
      double keep; /* what stays is multiplied by */
      uint64_t threshold;
    } chance;
  };
};

static bool is_row_major(const hm_view *v) {
  int64_t want = 1;
  for (int d = v->ndim - 1; d >= 0; d--) {
    if (v->shape[d] != 1 && v->stride[d] != want) return false;
    want *= v->shape[d];
  }
  return true;
}

static int64_t count(const hm_view *v) {
  int64_t n = 1;
  for (int d = 0; d < v->ndim; d++) n *= v->shape[d];
  return n;
}

/* n elements of `size` bytes, `step` elements apart in dst or in src; the other side is dense. */
static void move_run(char *dst, int64_t to, const char *src, int64_t from, int size, int64_t n) {
#define MOVE(T)                                                                                                        \
  for (int64_t i = 0; i < n; i++) ((T *)dst)[i * to] = ((const T *)src)[i * from];                                     \
  break
  switch (size) {
  case 1: MOVE(uint8_t);
  case 2: MOVE(uint16_t);
  case 4: MOVE(uint32_t);
  default: MOVE(uint64_t);
  }
#undef MOVE
}

/* Moves n elements at logical positions first, first + 1, ... of a view of any layout from dense memory, or to it. */
static void move_strided(const hm_view *v, int64_t first, int64_t n, char *dense, bool store) {
  const int size = hm_dtype_size(v->dtype), last = v->ndim - 1;
  const int64_t cols = last < 0 ? 1 : v->shape[last], step = last < 0 ? 1 : v->stride[last];
  for (int64_t k = 0; k < n;) {
    const int64_t col = (first + k) % cols, run = cols - col < n - k ? cols - col : n - k;
    int64_t rest = (first + k) / cols, at = col * step;
    for (int d = last - 1; d >= 0; d--) {
      at += rest % v->shape[d] * v->stride[d];
      rest /= v->shape[d];
    }
    char *const there = (char *)v->data + at * size, *const here = dense + k * size;
    if (store) move_run(there, step, here, 1, size, run);
    else move_run(here, 1, there, step, size, run);
    k += run;
  }
}

/* Elements [first, last) on one thread; first is a multiple of BLOCK. */
static void write_range(const task *t, int64_t first, int64_t last) {
  _Alignas(64) char values[(BLOCK + 4) * 8], out[BLOCK * 8];
  const int64_t size = hm_dtype_size(t->out->dtype);
  for (int64_t i = first; i < last; i += BLOCK) {
    const int64_t n = last - i < BLOCK ? last - i : BLOCK;
    t->make(t, i, n, values);
    HM_ISA_FN(hm_cpu_convert)(t->row_major ? (char *)t->out->data + i * size : out, t->out->dtype, values, t->dtype, n);
    if (!t->row_major) move_strided(t->out, i, n, out, true);
  }
}

/* All elements.  cost: of one, in bytes or operations. */
static int write_all(task *t, int64_t cost) {
  const int64_t n = count(t->out);
  t->row_major = is_row_major(t->out);
  const int threads = hm_cpu_threads(n, cost);
  if (threads <= 1) {
    write_range(t, 0, n);
    return HM_OK;
  }
#pragma omp parallel num_threads(threads)
  {
    int64_t first, last;
    hm__share(n, GRAIN, omp_get_thread_num(), omp_get_num_threads(), &first, &last);
    write_range(t, first, last);
  }
  return HM_OK;
}

/* ====== fill_ ====== */

/* n elements of `size` bytes, `step` elements apart, all equal to the value. */
static void fill_run(char *dst, int size, int64_t step, int64_t n, const void *value) {
  if (size == 4) {
    uint32_t x, *d = (uint32_t *)dst;
    memcpy(&x, value, sizeof x);
    for (int64_t i = 0; i < n; i++) d[i * step] = x;
  } else if (size == 2) {
    uint16_t x, *d = (uint16_t *)dst;
    memcpy(&x, value, sizeof x);
    for (int64_t i = 0; i < n; i++) d[i * step] = x;
  } else if (size == 8) {
    uint64_t x, *d = (uint64_t *)dst;
    memcpy(&x, value, sizeof x);
    for (int64_t i = 0; i < n; i++) d[i * step] = x;
  } else {
    const uint8_t x = *(const uint8_t *)value;
    for (int64_t i = 0; i < n; i++) ((uint8_t *)dst)[i * step] = x;
  }
}

/* A run with the step known to the compiler where it is 1. */
static void fill_any(char *dst, int size, int64_t step, int64_t n, const void *value) {
  if (step == 1) fill_run(dst, size, 1, n, value);
  else fill_run(dst, size, step, n, value);
}

/* Every element of v is set to a value of v's dtype. */
static void fill_view(const hm_view *v, const void *value) {
  hm_loop l;
  const int64_t numel = hm__loop_make(&l, v, 0, NULL);
  if (numel == 0) return;
  const int size = hm_dtype_size(v->dtype), inner = l.ndim - 1;
  const int threads = hm_cpu_threads(numel, size);
  const int64_t cols = l.shape[inner], step = l.stride[0][inner];
  if (inner == 0) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      int64_t first, last;
      hm__share(cols, GRAIN, omp_get_thread_num(), omp_get_num_threads(), &first, &last);
      fill_any((char *)v->data + first * step * size, size, step, last - first, value);
    }
    return;
  }
  const int64_t rows = numel / cols;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    int64_t rest = r, at = 0;
    for (int d = inner - 1; d >= 0; d--) {
      at += rest % l.shape[d] * l.stride[0][d];
      rest /= l.shape[d];
    }
    fill_any((char *)v->data + at * size, size, step, cols, value);
  }
}

/* A number operand or the one element of a tensor, as `dtype`, rounded once. */
static void read_value(const hm_view *v, int dtype, void *value) {
  HM_ISA_FN(hm_cpu_convert)(value, dtype, v->flags & HM_VIEW_SCALAR ? (const void *)&v->scalar : v->data, v->dtype, 1);
}

static int fill_value(const hm_view *out, const hm_view *number) {
  char value[8];
  read_value(number, out->dtype, value);
  fill_view(out, value);
  return HM_OK;
}

/* ====== arange_, eye_ ====== */

static void make_range_i64(const task *t, int64_t first, int64_t n, void *values) {
  int64_t *const v = values;
  for (int64_t k = 0; k < n; k++) v[k] = (int64_t)((uint64_t)t->i.start + (uint64_t)(first + k) * (uint64_t)t->i.step);
}

static void make_range_f64(const task *t, int64_t first, int64_t n, void *values) {
  double *const v = values;
  for (int64_t k = 0; k < n; k++) v[k] = t->f.start + (double)(first + k) * t->f.step;
}

/* In int64 when both numbers are whole by type, else in float64. */
static int arange(const hm_view *out, const hm_view *start, const hm_view *step) {
  task t = {.out = out};
  if (hm_dtype_is_float(start->dtype) || hm_dtype_is_float(step->dtype)) {
    t.make = make_range_f64;
    t.dtype = HM_F64;
    read_value(start, HM_F64, &t.f.start);
    read_value(step, HM_F64, &t.f.step);
  } else {
    t.make = make_range_i64;
    t.dtype = HM_I64;
    read_value(start, HM_I64, &t.i.start);
    read_value(step, HM_I64, &t.i.step);
  }
  return write_all(&t, 16);
}

static int eye(const hm_view *out) {
  const int64_t number = 1;
  char zero[8] = {0}, one[8];
  if (out->ndim != 2) return hm_cpu_fail(HM_ERR_SHAPE, "eye_: a matrix is wanted, not %d dims", out->ndim);
  HM_ISA_FN(hm_cpu_convert)(one, out->dtype, &number, HM_I64, 1);
  fill_view(out, zero);
  hm_view diagonal = *out;
  diagonal.ndim = 1;
  diagonal.shape[0] = out->shape[0] < out->shape[1] ? out->shape[0] : out->shape[1];
  diagonal.stride[0] = out->stride[0] + out->stride[1];
  fill_view(&diagonal, one);
  return HM_OK;
}

int HM_ISA_FN(hm_cpu_fill)(const hm_kernel_call *call) {
  const hm_view *out = &call->out[0];
  if (call->op == HM_OP_FILL_) return fill_value(out, &call->in[1]);
  if (call->op == HM_OP_ARANGE_) return arange(out, &call->in[1], &call->in[2]);
  if (call->op == HM_OP_EYE_) return eye(out);
  return hm_cpu_fail(HM_ERR_UNSUPPORTED, "fill: op %d is unknown to the cpu", call->op);
}

/* ====== Philox ====== */

/* The words of elements first ... first + n - 1 (first a multiple of 4; rounded up to whole blocks). */
static void draw(const task *t, uint32_t stream, int64_t first, int64_t n, uint32_t *words) {
  const uint64_t counter = t->offset + (uint64_t)first / 4;
#pragma GCC ivdep
  for (int64_t j = 0; j < (n + 3) / 4; j++) hm_philox_words(words + 4 * j, t->seed, counter + (uint64_t)j, stream);
}

/* 64 bits per element. */
static void draw64(const task *t, int64_t first, int64_t n, uint64_t *words) {
  uint32_t high[BLOCK], low[BLOCK];
  draw(t, 0, first, n, high);
  draw(t, 1, first, n, low);
  for (int64_t k = 0; k < (n + 3) / 4 * 4; k++) words[k] = (uint64_t)high[k] << 32 | low[k];
}

/* ====== uniform_, normal_, random_ ====== */

static void make_uniform_f32(const task *t, int64_t first, int64_t n, void *values) {
  uint32_t words[BLOCK];
  float *const v = values;
  const float low = (float)t->uniform.low, range = (float)t->uniform.range, top = (float)t->uniform.top;
  draw(t, 0, first, n, words);
  for (int64_t k = 0; k < n; k++) {
    const float x = low + (float)(int32_t)(words[k] >> 8) * 5.9604645e-8f * range; /* 2^-24 */
    v[k] = x > top ? top : x;
  }
}

static void make_uniform_f64(const task *t, int64_t first, int64_t n, void *values) {
  uint64_t words[BLOCK];
  double *const v = values;
  draw64(t, first, n, words);
  for (int64_t k = 0; k < n; k++) {
    const double x = t->uniform.low + (double)(int64_t)(words[k] >> 11) * 0x1p-53 * t->uniform.range;
    v[k] = x > t->uniform.top ? t->uniform.top : x;
  }
}

static void make_normal_f32(const task *t, int64_t first, int64_t n, void *values) {
  uint32_t words[BLOCK];
  float *const v = values;
  const float mean = (float)t->normal.mean, std = (float)t->normal.std;
  draw(t, 0, first, n, words);
#pragma GCC ivdep
  for (int64_t k = 0; k < (n + 1) / 2; k++) {
    const float u = (float)(int32_t)(words[2 * k] >> 1) * 4.6566129e-10f + 2.3283064e-10f; /* 2^-31, 2^-32: never 0 */
    const float angle = (float)(int32_t)(words[2 * k + 1] >> 8) * 3.7450704e-7f;           /* 2 pi 2^-24 */
    const float r = hm_sqrt_f32(-2.0f * hm_log_f32(u));
    v[2 * k] = mean + std * (r * hm_cos_f32(angle));
    v[2 * k + 1] = mean + std * (r * hm_sin_f32(angle));
  }
}

static void make_normal_f64(const task *t, int64_t first, int64_t n, void *values) {
  uint64_t words[BLOCK];
  double *const v = values;
  draw64(t, first, n, words);
  for (int64_t k = 0; k < (n + 1) / 2; k++) {
    const double u = ((double)(int64_t)(words[2 * k] >> 11) + 1.0) * 0x1p-53;
    const double angle = (double)(int64_t)(words[2 * k + 1] >> 11) * (6.283185307179586 * 0x1p-53);
    const double r = hm_sqrt_f64(-2.0 * hm_log_f64(u));
    v[2 * k] = t->normal.mean + t->normal.std * (r * hm_cos_f64(angle));
    v[2 * k + 1] = t->normal.mean + t->normal.std * (r * hm_sin_f64(angle));
  }
}

static void make_random(const task *t, int64_t first, int64_t n, void *values) {
  uint64_t words[BLOCK];
  int64_t *const v = values;
  draw64(t, first, n, words);
  for (int64_t k = 0; k < n; k++) {
    const uint64_t share = (uint64_t)((unsigned __int128)words[k] * t->random.range >> 64);
    v[k] = (int64_t)((uint64_t)t->random.low + share);
  }
}

/* ====== bernoulli_, dropout ====== */

static void make_bernoulli(const task *t, int64_t first, int64_t n, void *values) {
  uint32_t words[BLOCK];
  float *const v = values;
  const uint64_t threshold = t->chance.threshold;
  draw(t, 0, first, n, words);
  for (int64_t k = 0; k < n; k++) v[k] = words[k] < threshold ? 1.0f : 0.0f;
}

/* Elements of dropout's input, in the type that is computed in. */
static void read_input(const task *t, int64_t first, int64_t n, void *values) {
  _Alignas(64) char raw[BLOCK * 8];
  const hm_view *x = t->chance.x;
  const char *from = raw;
  if (t->chance.x_row_major) from = (const char *)x->data + first * hm_dtype_size(x->dtype);
  else move_strided(x, first, n, raw, false);
  HM_ISA_FN(hm_cpu_convert)(values, t->dtype, from, x->dtype, n);
}

static void make_dropout_f32(const task *t, int64_t first, int64_t n, void *values) {
  uint32_t words[BLOCK];
  float *const v = values;
  const float keep = (float)t->chance.keep;
  const uint64_t threshold = t->chance.threshold;
  read_input(t, first, n, values);
  draw(t, 0, first, n, words);
  for (int64_t k = 0; k < n; k++) {
    const float kept = v[k] * keep;
    v[k] = words[k] < threshold ? 0.0f : kept;
  }
}

static void make_dropout_f64(const task *t, int64_t first, int64_t n, void *values) {
  uint32_t words[BLOCK];
  double *const v = values;
  read_input(t, first, n, values);
  draw(t, 0, first, n, words);
  for (int64_t k = 0; k < n; k++) v[k] = words[k] < t->chance.threshold ? 0.0 : v[k] * t->chance.keep;
}

/* The next number of a 16-bit format below a finite one. */
static uint16_t half_below(uint16_t h) {
  if ((h & 0x7fffu) == 0) return 0x8001u;
  return h & 0x8000u ? (uint16_t)(h + 1) : (uint16_t)(h - 1);
}

/* The largest value of a dtype that is below x. */
static double largest_below(double x, int dtype) {
  if (dtype == HM_F64) return nextafter(x, -INFINITY);
  if (dtype == HM_F32) {
    const float f = (float)x;
    return (double)((double)f < x ? f : nextafterf(f, -INFINITY));
  }
  uint16_t h = dtype == HM_F16 ? hm_f64_to_f16(x) : hm_f64_to_bf16(x);
  double y = (double)(dtype == HM_F16 ? hm_f16_to_f32(h) : hm_bf16_to_f32(h));
  if (y < x) return y;
  h = half_below(h);
  y = (double)(dtype == HM_F16 ? hm_f16_to_f32(h) : hm_bf16_to_f32(h));
  return y;
}

static int uniform(task *t, double low, double high) {
  if (!(low <= high) || !(high - low < INFINITY))
    return hm_cpu_fail(HM_ERR_ARG, "uniform_: low %g must not exceed high %g, and both be finite", low, high);
  const double top = largest_below(high, t->out->dtype);
  t->uniform.low = low;
  t->uniform.range = high - low;
  t->uniform.top = top > low ? top : low;
  t->make = t->dtype == HM_F64 ? make_uniform_f64 : make_uniform_f32;
  return write_all(t, 16);
}

static int normal(task *t, double mean, double std) {
  if (!(std >= 0)) return hm_cpu_fail(HM_ERR_ARG, "normal_: std is %g, at least 0 is wanted", std);
  t->normal.mean = mean;
  t->normal.std = std;
  t->make = t->dtype == HM_F64 ? make_normal_f64 : make_normal_f32;
  return write_all(t, 64);
}

static int random_integers(task *t, int64_t low, int64_t high) {
  if (low >= high)
    return hm_cpu_fail(HM_ERR_ARG, "random_: low %lld must be below high %lld", (long long)low, (long long)high);
  t->random.low = low;
  t->random.range = (uint64_t)high - (uint64_t)low;
  t->dtype = HM_I64;
  t->make = make_random;
  return write_all(t, 32);
}

static int chance(task *t, const char *name, double p, const hm_view *x) {
  if (!(p >= 0 && p <= 1)) return hm_cpu_fail(HM_ERR_ARG, "%s: p must be from 0 to 1, got %g", name, p);
  t->chance.threshold = hm_philox_threshold(p);
  t->chance.keep = 1 / (1 - p);
  t->chance.x = x;
  t->chance.x_row_major = x && is_row_major(x);
  if (x) t->make = t->dtype == HM_F64 ? make_dropout_f64 : make_dropout_f32;
  else t->make = make_bernoulli;
  return write_all(t, 16);
}

/* Rows whose rng is their second attribute. */
static int draw_chances(task *t, const hm_kernel_call *call) {
  t->seed = (uint64_t)call->attr[1].v[0];
  t->offset = (uint64_t)call->attr[1].v[1];
  if (call->op == HM_OP_DROPOUT) {
    t->dtype = call->compute == HM_F64 ? HM_F64 : HM_F32;
    return chance(t, "dropout", call->attr[0].f, &call->in[0]);
  }
  t->dtype = HM_F32;
  return chance(t, "bernoulli_", call->attr[0].f, NULL);
}

int HM_ISA_FN(hm_cpu_random)(const hm_kernel_call *call) {
  task t = {.out = &call->out[0], .dtype = call->out[0].dtype == HM_F64 ? HM_F64 : HM_F32};
  if (call->op == HM_OP_DROPOUT || call->op == HM_OP_BERNOULLI_) return draw_chances(&t, call);
  t.seed = (uint64_t)call->attr[2].v[0];
  t.offset = (uint64_t)call->attr[2].v[1];
  const hm_attr *const a = call->attr;
  if (call->op == HM_OP_RANDOM_) return random_integers(&t, a[0].i, a[1].i);
  if (!hm_dtype_is_float(t.out->dtype))
    return hm_cpu_fail(HM_ERR_DTYPE, "random numbers: a floating dtype is wanted, not %s", hm_dtype_name(t.out->dtype));
  if (call->op == HM_OP_UNIFORM_) return uniform(&t, a[0].f, a[1].f);
  if (call->op == HM_OP_NORMAL_) return normal(&t, a[0].f, a[1].f);
  return hm_cpu_fail(HM_ERR_UNSUPPORTED, "random numbers: op %d is unknown to the cpu", call->op);
}
