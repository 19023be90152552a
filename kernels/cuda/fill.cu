/*
 * fill.cu -- constants, ranges, the identity matrix, random numbers.
 *
 * Random numbers are those of the CPU, to the bit in float32 and below and for integers: Philox4x32-10, where element
 * i in row-major order takes word i % 4 of counter offset + i / 4.  The head of kernels/cpu/fill.c has the rules.  A
 * thread makes the four elements of one counter. float64 normal numbers go through the device's log, sin and cos, and
 * may differ in the last place.
 */
#include "philox.h"
#include "view.h"

/* ====== Constants ====== */

struct constant {
  hm_walk<1> walk;
  void *out;
  uint4 pattern; /* the value repeated over 16 bytes */
};

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) fill_strided(constant c) {
  const uint64_t bits = (uint64_t)c.pattern.y << 32 | c.pattern.x;
  for (uint32_t i = hm_global_thread(); i < c.walk.count; i += hm_global_threads()) {
    int64_t at[1];
    hm_offsets(c.walk, i, at);
    static_cast<T *>(c.out)[at[0]] = (T)bits;
  }
}

/* Pieces of 16 bytes of dense memory, then the `tail` elements behind them. */
template <class T>
static __global__ void __launch_bounds__(HM_BLOCK, 2)
    fill_dense(uint4 *out, uint4 pattern, uint32_t pieces, uint32_t tail) {
  for (uint32_t i = hm_global_thread(); i < pieces; i += hm_global_threads()) hm_store16(out + i, pattern);
  const uint32_t t = hm_global_thread();
  if (t < tail) reinterpret_cast<T *>(out + pieces)[t] = (T)((uint64_t)pattern.y << 32 | pattern.x);
}

template <class T> static int fill_size(const hm_loop &l, void *out, uint4 pattern, void *stream) {
  const int64_t per = 16 / (int64_t)sizeof(T);
  if (l.ndim == 1 && l.stride[0][0] == 1 && (uintptr_t)out % 16 == 0) {
    const uint32_t pieces = (uint32_t)(l.shape[0] / per), tail = (uint32_t)(l.shape[0] % per);
    return HM_RUN("fill", (fill_dense<T>), hm_blocks(pieces), HM_BLOCK, 0, stream, static_cast<uint4 *>(out), pattern,
                  pieces, tail);
  }
  constant c;
  memset(&c, 0, sizeof c);
  c.walk = hm_make_walk<1>(&l);
  c.out = out;
  c.pattern = pattern;
  return HM_RUN("fill", (fill_strided<T>), hm_blocks(c.walk.count), HM_BLOCK, 0, stream, c);
}

/* Every element of v becomes the value whose bits are given, in v's dtype. */
static int fill_bits(const hm_view *v, uint64_t bits, void *stream) {
  const int size = hm_dtype_size(v->dtype);
  if (size == 1) bits = (bits & 255) * 0x0101010101010101u;
  if (size == 2) bits = (bits & 0xffff) * 0x0001000100010001u;
  if (size == 4) bits = (bits & 0xffffffff) * 0x0000000100000001u;
  const uint4 pattern = make_uint4((uint32_t)bits, (uint32_t)(bits >> 32), (uint32_t)bits, (uint32_t)(bits >> 32));
  hm_loop loop;
  if (hm__loop_make(&loop, v, 0, NULL) == 0) return HM_OK;
  int64_t base[1] = {0};
  return hm_each_piece(&loop, 1, base, [&](const hm_loop &l, const int64_t *at) {
    void *out = hm_element(v->data, at[0], v->dtype);
    switch (size) {
    case 1: return fill_size<uint8_t>(l, out, pattern, stream);
    case 2: return fill_size<uint16_t>(l, out, pattern, stream);
    case 4: return fill_size<uint32_t>(l, out, pattern, stream);
    default: return fill_size<uint64_t>(l, out, pattern, stream);
    }
  });
}

/* A double or an int64 as the bits of a dtype, rounded once. */
static uint64_t bits_of(int dtype, bool is_float, double f, int64_t i) {
  if (is_float) {
    switch (dtype) {
    case HM_BOOL: return f != 0;
    case HM_U8: return hm_f64_to_u8(f);
    case HM_I32: return (uint32_t)hm_f64_to_i32(f);
    case HM_I64: return (uint64_t)hm_f64_to_i64(f);
    case HM_F16: return hm_f64_to_f16(f);
    case HM_BF16: return hm_f64_to_bf16(f);
    case HM_F32: return hm_f32_bits((float)f);
    case HM_F8_E4M3: return hm_f64_to_e4m3(f);
    case HM_F8_E5M2: return hm_f64_to_e5m2(f);
    default: return hm_f64_bits(f);
    }
  }
  switch (dtype) {
  case HM_BOOL: return i != 0;
  case HM_F16: return hm_i64_to_f16(i);
  case HM_BF16: return hm_i64_to_bf16(i);
  case HM_F32: return hm_f32_bits((float)i);
  case HM_F64: return hm_f64_bits((double)i);
  case HM_F8_E4M3: return hm_i64_to_e4m3(i);
  case HM_F8_E5M2: return hm_i64_to_e5m2(i);
  default: return (uint64_t)i;
  }
}

extern "C" int hm_cuda_fill_number(const hm_view *out, double f, int64_t i, void *stream) {
  return fill_bits(out, bits_of(out->dtype, hm_dtype_is_float(out->dtype), f, i), stream);
}

extern "C" int hm_cuda_fill_scalar(const hm_view *out, const hm_view *number, void *stream) {
  const bool is_float = hm_dtype_is_float(number->dtype);
  return fill_bits(out, bits_of(out->dtype, is_float, is_float ? number->scalar.f : 0, is_float ? 0 : number->scalar.i),
                   stream);
}

/* A tensor of one element, repeated. */
static int fill_from_tensor(const hm_view *out, const hm_view *value, void *stream) {
  hm_kernel_call copy;
  memset(&copy, 0, sizeof copy);
  copy.op = HM_OP_CAST;
  copy.n_in = copy.n_out = 1;
  copy.stream = stream;
  copy.out[0] = copy.in[0] = *out;
  copy.in[0].data = value->data;
  copy.in[0].dtype = value->dtype;
  copy.in[0].flags = 0;
  for (int d = 0; d < out->ndim; d++) copy.in[0].stride[d] = 0;
  return hm_cuda_copy(&copy);
}

/* ====== Elements in row-major order ====== */

/* The output; element i of the walk is logical element i. */
struct ordered {
  hm_walk<1> walk;
  void *out;
  int32_t dtype;
  bool dense; /* row-major: offset i */
  bool runs;  /* and four floats may be stored as one run */
  int64_t count;
};

static bool set_ordered(ordered *o, const hm_view *v) {
  hm_loop l;
  memset(o, 0, sizeof *o);
  l.ndim = 0;
  o->count = 1;
  for (int d = 0; d < v->ndim; d++) {
    o->count *= v->shape[d];
    if (v->shape[d] == 1) continue;
    const int last = l.ndim - 1;
    if (last >= 0 && l.stride[0][last] == v->stride[d] * v->shape[d]) {
      l.shape[last] *= v->shape[d];
      l.stride[0][last] = v->stride[d];
    } else {
      l.shape[l.ndim] = v->shape[d];
      l.stride[0][l.ndim++] = v->stride[d];
    }
  }
  if (o->count == 0) return false;
  if (l.ndim == 0) l.ndim = 1, l.shape[0] = 1, l.stride[0][0] = 1;
  o->dense = l.ndim == 1 && l.stride[0][0] == 1;
  o->walk = hm_make_walk<1>(&l);
  o->out = v->data;
  o->dtype = v->dtype;
  o->runs = o->dense && hm_runs_take(v->dtype) && (uintptr_t)v->data % 16 == 0;
  return true;
}

static int too_large(const char *name) {
  return hm_cuda_fail(HM_ERR_UNSUPPORTED,
                      "%s: 2^31 elements or more are filled only where memory is row-major\n  hint: contiguous()",
                      name);
}

HM_DEV int64_t place_of(const ordered &o, int64_t i) {
  if (o.dense) return i;
  int64_t at[1];
  hm_offsets(o.walk, (uint32_t)i, at);
  return at[0];
}

HM_DEV int64_t first_of_thread(void) { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }
HM_DEV int64_t all_threads(void) { return (int64_t)gridDim.x * blockDim.x; }

/* ====== arange_, eye_ ====== */

/* T: int64_t when both numbers are whole by type, else double.  A number in device memory is read here. */
template <class T> struct range {
  ordered o;
  const void *data[2]; /* start, step; NULL: value[] holds it */
  int32_t dtype[2];
  T value[2];
};

HM_DEV int64_t range_value(int64_t start, int64_t step, int64_t i) {
  return (int64_t)((uint64_t)start + (uint64_t)i * (uint64_t)step);
}
HM_DEV double range_value(double start, double step, int64_t i) { return start + (double)i * step; }

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) fill_range(range<T> r) {
  const T start = r.data[0] ? hm_load<T>(r.data[0], r.dtype[0], 0) : r.value[0];
  const T step = r.data[1] ? hm_load<T>(r.data[1], r.dtype[1], 0) : r.value[1];
  for (int64_t i = first_of_thread(); i < r.o.count; i += all_threads())
    hm_store<T>(r.o.out, r.o.dtype, place_of(r.o, i), range_value(start, step, i));
}

template <class T> static int arange_in(const hm_view *out, const hm_view *const *number, void *stream) {
  range<T> r;
  memset(&r, 0, sizeof r);
  if (!set_ordered(&r.o, out)) return HM_OK;
  if (!r.o.dense && r.o.count >= HM_CUDA_PIECE) return too_large("arange_");
  for (int k = 0; k < 2; k++) {
    const hm_view *v = number[k];
    if (v->flags & HM_VIEW_SCALAR) r.value[k] = hm_dtype_is_float(v->dtype) ? (T)v->scalar.f : (T)v->scalar.i;
    else r.data[k] = v->data, r.dtype[k] = v->dtype;
  }
  return HM_RUN("arange_", (fill_range<T>), hm_blocks(r.o.count), HM_BLOCK, 0, stream, r);
}

static int arange(const hm_kernel_call *call) {
  const hm_view *number[2] = {&call->in[1], &call->in[2]};
  const bool floats = hm_dtype_is_float(number[0]->dtype) || hm_dtype_is_float(number[1]->dtype);
  return floats ? arange_in<double>(&call->out[0], number, call->stream)
                : arange_in<int64_t>(&call->out[0], number, call->stream);
}

template <class T>
static __global__ void __launch_bounds__(HM_BLOCK, 2)
    fill_eye(T *out, int64_t rows, int64_t cols, int64_t row, int64_t col, T one) {
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x)
    for (int64_t c = threadIdx.x; c < cols; c += HM_BLOCK) out[r * row + c * col] = r == c ? one : (T)0;
}

template <class T> static int eye_size(const hm_view *v, uint64_t one, void *stream) {
  return HM_RUN("eye_", (fill_eye<T>), hm_blocks(v->shape[0], 1), HM_BLOCK, 0, stream, static_cast<T *>(v->data),
                v->shape[0], v->shape[1], v->stride[0], v->stride[1], (T)one);
}

static int eye(const hm_view *v, void *stream) {
  if (v->ndim != 2) return hm_cuda_fail(HM_ERR_SHAPE, "eye_: a matrix is wanted, not %d dims", v->ndim);
  if (v->shape[0] == 0 || v->shape[1] == 0) return HM_OK;
  const uint64_t one = bits_of(v->dtype, false, 0, 1);
  switch (hm_dtype_size(v->dtype)) {
  case 1: return eye_size<uint8_t>(v, one, stream);
  case 2: return eye_size<uint16_t>(v, one, stream);
  case 4: return eye_size<uint32_t>(v, one, stream);
  default: return eye_size<uint64_t>(v, one, stream);
  }
}

extern "C" int hm_cuda_fill(const hm_kernel_call *call) {
  const hm_view *out = &call->out[0];
  if (call->op == HM_OP_FILL_) {
    const hm_view *value = &call->in[1];
    return value->flags & HM_VIEW_SCALAR ? hm_cuda_fill_scalar(out, value, call->stream)
                                         : fill_from_tensor(out, value, call->stream);
  }
  if (call->op == HM_OP_ARANGE_) return arange(call);
  if (call->op == HM_OP_EYE_) return eye(out, call->stream);
  return hm_cuda_fail(HM_ERR_UNSUPPORTED, "fill: op %d is unknown to cuda", call->op);
}

/* ====== Philox ====== */

enum { UNIFORM, NORMAL, INTEGERS, CHANCES };

struct draws {
  ordered o;
  uint64_t seed, offset;
  double a, b, top; /* uniform: low, range, largest; normal: mean, std */
  int64_t low;
  uint64_t range; /* chances: the threshold */
};

struct words {
  uint32_t w[4];
};

HM_DEV words philox(uint64_t seed, uint64_t counter, uint32_t stream) {
  words c;
  hm_philox_words(c.w, seed, counter, stream);
  return c;
}

HM_DEV void make_uniform(const draws &d, const uint32_t *w, const uint64_t *, float *x) {
  const float low = (float)d.a, range = (float)d.b, top = (float)d.top;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const float v = low + (float)(int32_t)(w[k] >> 8) * 5.9604645e-8f * range; /* 2^-24 */
    x[k] = v > top ? top : v;
  }
}

HM_DEV void make_uniform(const draws &d, const uint32_t *, const uint64_t *w, double *x) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const double v = d.a + (double)(int64_t)(w[k] >> 11) * 0x1p-53 * d.b;
    x[k] = v > d.top ? d.top : v;
  }
}

HM_DEV void make_normal(const draws &d, const uint32_t *w, const uint64_t *, float *x) {
  const float mean = (float)d.a, std = (float)d.b;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const float u = (float)(int32_t)(w[k] >> 1) * 4.6566129e-10f + 2.3283064e-10f; /* 2^-31, 2^-32: never 0 */
    const float angle = (float)(int32_t)(w[k + 1] >> 8) * 3.7450704e-7f;           /* 2 pi 2^-24 */
    const float r = hm_sqrt_f32(-2.0f * hm_log_f32(u));
    x[k] = mean + std * (r * hm_cos_f32(angle));
    x[k + 1] = mean + std * (r * hm_sin_f32(angle));
  }
}

HM_DEV void make_normal(const draws &d, const uint32_t *, const uint64_t *w, double *x) {
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const double u = ((double)(int64_t)(w[k] >> 11) + 1.0) * 0x1p-53;
    const double angle = (double)(int64_t)(w[k + 1] >> 11) * (6.283185307179586 * 0x1p-53);
    const double r = hm_sqrt_f64(-2.0 * hm_log_f64(u));
    x[k] = d.a + d.b * (r * hm_cos_f64(angle));
    x[k + 1] = d.a + d.b * (r * hm_sin_f64(angle));
  }
}

HM_DEV void make_integers(const draws &d, const uint64_t *w, int64_t *x) {
#pragma unroll
  for (int k = 0; k < 4; k++) x[k] = (int64_t)((uint64_t)d.low + (uint64_t)__umul64hi(w[k], d.range));
}

HM_DEV void make_chances(const draws &d, const uint32_t *w, float *x) {
#pragma unroll
  for (int k = 0; k < 4; k++) x[k] = w[k] < d.range ? 1.0f : 0.0f;
}

/* Stores the elements 4 i ... that exist. */
template <class T> HM_DEV void store_four(const ordered &o, int64_t i, const T *x) {
  if constexpr (sizeof(T) == 4) {
    if (o.runs && 4 * i + 4 <= o.count) {
      hm_store_run<4>(o.out, o.dtype, 4 * i, x);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; k++)
    if (4 * i + k < o.count) hm_store<T>(o.out, o.dtype, place_of(o, 4 * i + k), x[k]);
}

template <int WHAT, class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) fill_random(draws d) {
  const int64_t counters = (d.o.count + 3) / 4;
  for (int64_t i = first_of_thread(); i < counters; i += all_threads()) {
    const words high = philox(d.seed, d.offset + (uint64_t)i, 0);
    uint64_t both[4] = {0, 0, 0, 0};
    T x[4];
    if constexpr (sizeof(T) == 8) {
      const words low = philox(d.seed, d.offset + (uint64_t)i, 1);
#pragma unroll
      for (int k = 0; k < 4; k++) both[k] = (uint64_t)high.w[k] << 32 | low.w[k];
    }
    if constexpr (WHAT == UNIFORM) make_uniform(d, high.w, both, x);
    else if constexpr (WHAT == NORMAL) make_normal(d, high.w, both, x);
    else if constexpr (WHAT == CHANCES) make_chances(d, high.w, x);
    else make_integers(d, both, x);
    store_four(d.o, i, x);
  }
}

/* ====== dropout ====== */

struct dropping {
  ordered o, x;
  uint64_t seed, offset, threshold;
  double keep; /* what stays is multiplied by */
};

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) drop(dropping d) {
  const int64_t counters = (d.o.count + 3) / 4;
  const T keep = (T)d.keep;
  for (int64_t i = first_of_thread(); i < counters; i += all_threads()) {
    const words w = philox(d.seed, d.offset + (uint64_t)i, 0);
    int64_t at[4];
    T x[4];
#pragma unroll
    for (int k = 0; k < 4; k++) at[k] = 4 * i + k < d.o.count ? place_of(d.x, 4 * i + k) : 0;
    hm_load_many<4>(d.x.out, d.x.dtype, at, x);
#pragma unroll
    for (int k = 0; k < 4; k++) x[k] = w.w[k] < d.threshold ? (T)0 : x[k] * keep;
    store_four(d.o, i, x);
  }
}

/* ====== Entry of the family random ====== */

/* The next number of a 16-bit format below a finite one. */
static uint16_t half_below(uint16_t h) {
  if ((h & 0x7fffu) == 0) return 0x8001u;
  return h & 0x8000u ? (uint16_t)(h + 1) : (uint16_t)(h - 1);
}

static double half_value(uint16_t h, int dtype) {
  return (double)(dtype == HM_F16 ? hm_f16_to_f32(h) : hm_bf16_to_f32(h));
}

/* The largest value of a dtype that is below x. */
static double largest_below(double x, int dtype) {
  if (dtype == HM_F64) return nextafter(x, -(double)INFINITY);
  if (dtype == HM_F32) {
    const float f = (float)x;
    return (double)((double)f < x ? f : nextafterf(f, -(float)INFINITY));
  }
  const uint16_t h = dtype == HM_F16 ? hm_f64_to_f16(x) : hm_f64_to_bf16(x);
  const double y = half_value(h, dtype);
  return y < x ? y : half_value(half_below(h), dtype);
}

static int uniform(draws *d, double low, double high, void *stream) {
  if (!(low <= high) || !(high - low < (double)INFINITY))
    return hm_cuda_fail(HM_ERR_ARG, "uniform_: low %g must not exceed high %g, and both be finite", low, high);
  const double top = largest_below(high, d->o.dtype);
  d->a = low;
  d->b = high - low;
  d->top = top > low ? top : low;
  if (d->o.dtype == HM_F64)
    return HM_RUN("uniform_", (fill_random<UNIFORM, double>), hm_blocks((d->o.count + 3) / 4), HM_BLOCK, 0, stream, *d);
  return HM_RUN("uniform_", (fill_random<UNIFORM, float>), hm_blocks((d->o.count + 3) / 4), HM_BLOCK, 0, stream, *d);
}

static int normal(draws *d, double mean, double std, void *stream) {
  if (!(std >= 0)) return hm_cuda_fail(HM_ERR_ARG, "normal_: std is %g, at least 0 is wanted", std);
  d->a = mean;
  d->b = std;
  if (d->o.dtype == HM_F64)
    return HM_RUN("normal_", (fill_random<NORMAL, double>), hm_blocks((d->o.count + 3) / 4), HM_BLOCK, 0, stream, *d);
  return HM_RUN("normal_", (fill_random<NORMAL, float>), hm_blocks((d->o.count + 3) / 4), HM_BLOCK, 0, stream, *d);
}

static int random_integers(draws *d, int64_t low, int64_t high, void *stream) {
  if (low >= high)
    return hm_cuda_fail(HM_ERR_ARG, "random_: low %lld must be below high %lld", (long long)low, (long long)high);
  d->low = low;
  d->range = (uint64_t)high - (uint64_t)low;
  return HM_RUN("random_", (fill_random<INTEGERS, int64_t>), hm_blocks((d->o.count + 3) / 4), HM_BLOCK, 0, stream, *d);
}

static int check_chance(const char *name, double p) {
  return p >= 0 && p <= 1 ? HM_OK : hm_cuda_fail(HM_ERR_ARG, "%s: p must be from 0 to 1, got %g", name, p);
}

static int bernoulli(const hm_kernel_call *call) {
  draws d;
  memset(&d, 0, sizeof d);
  const int status = check_chance("bernoulli_", call->attr[0].f);
  if (status || !set_ordered(&d.o, &call->out[0])) return status;
  if (!d.o.dense && d.o.count >= HM_CUDA_PIECE) return too_large("bernoulli_");
  d.seed = (uint64_t)call->attr[1].v[0];
  d.offset = (uint64_t)call->attr[1].v[1];
  d.range = hm_philox_threshold(call->attr[0].f);
  return HM_RUN("bernoulli_", (fill_random<CHANCES, float>), hm_blocks((d.o.count + 3) / 4), HM_BLOCK, 0, call->stream,
                d);
}

static int dropout(const hm_kernel_call *call) {
  dropping d;
  memset(&d, 0, sizeof d);
  const double p = call->attr[0].f;
  const int status = check_chance("dropout", p);
  if (status || !set_ordered(&d.o, &call->out[0])) return status;
  set_ordered(&d.x, &call->in[0]);
  if (!(d.o.dense && d.x.dense) && d.o.count >= HM_CUDA_PIECE) return too_large("dropout");
  d.seed = (uint64_t)call->attr[1].v[0];
  d.offset = (uint64_t)call->attr[1].v[1];
  d.threshold = hm_philox_threshold(p);
  d.keep = 1 / (1 - p);
  const unsigned blocks = hm_blocks((d.o.count + 3) / 4);
  if (call->compute == HM_F64) return HM_RUN("dropout", (drop<double>), blocks, HM_BLOCK, 0, call->stream, d);
  return HM_RUN("dropout", (drop<float>), blocks, HM_BLOCK, 0, call->stream, d);
}

extern "C" int hm_cuda_random(const hm_kernel_call *call) {
  if (call->op == HM_OP_BERNOULLI_) return bernoulli(call);
  if (call->op == HM_OP_DROPOUT) return dropout(call);
  const hm_attr *const a = call->attr;
  const int dtype = call->out[0].dtype;
  draws d;
  memset(&d, 0, sizeof d);
  if (call->op != HM_OP_RANDOM_ && !hm_dtype_is_float(dtype))
    return hm_cuda_fail(HM_ERR_DTYPE, "random numbers: a floating dtype is wanted, not %s", hm_dtype_name(dtype));
  if (!set_ordered(&d.o, &call->out[0])) return HM_OK;
  if (!d.o.dense && d.o.count >= HM_CUDA_PIECE) return too_large("random numbers");
  d.seed = (uint64_t)a[2].v[0];
  d.offset = (uint64_t)a[2].v[1];
  if (call->op == HM_OP_UNIFORM_) return uniform(&d, a[0].f, a[1].f, call->stream);
  if (call->op == HM_OP_NORMAL_) return normal(&d, a[0].f, a[1].f, call->stream);
  if (call->op == HM_OP_RANDOM_) return random_integers(&d, a[0].i, a[1].i, call->stream);
  return hm_cuda_fail(HM_ERR_UNSUPPORTED, "random numbers: op %d is unknown to cuda", call->op);
}
