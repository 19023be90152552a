/*
 * pool.cu -- max_pool2d with its gradients, and adaptive_max_pool2d; what is a weighted sum goes on to resample.cu.
 *
 * One thread for each element of the result, in the order of the result's memory, so that neighbours read and write
 * neighbours in channels-last and in row-major alike.  As in PyTorch the first largest value wins, a NaN wins over
 * everything, and of several NaNs the last; padding never wins.  The index is the place in the window, ky * kw + kx;
 * adaptive_max_pool2d's is the place in the image, y * W + x.  A window whose places all lie outside the image (a wide dilation can
 * do that) gives -infinity and place 0, which is no pixel.
 * The gradient is in gather form: each pixel adds the windows that chose it, in their order; nothing is added
 * atomically.  max_pool2d_relu_backward is the same of a gradient that becomes 0, as it is read, where the relu after
 * the pool gave 0: the pass of relu's own gradient is saved.
 */
#include "pixel.h"
#include "window.h"

enum { PLACES = 256 };

/* Sizes and strides of one call.  x: the image side (input, or gradient of it); y: the window side; i: the index. */
struct geometry {
  int64_t n, c, h, w, oh, ow;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t reach_h, reach_w;    /* from a window's first place to behind its last */
  int64_t xs[4], ys[4], is[4]; /* strides (n, c, h, w) */
};

struct pooling {
  geometry g;
  hm_pixels pixels; /* of the result */
  void *x, *y;
  void *index;   /* uint8 places in the window; adaptive: int64 places in the image */
  void *relu;    /* gradient: the result of a relu that came after, or NULL */
  int64_t rs[4]; /* its strides */
  int32_t x_dtype, y_dtype, relu_dtype;
  bool apart; /* gradient: windows do not overlap, so that nothing is added */
};

/* ====== Kernels ====== */

/* An element of a 16-bit float as it is compared. */
struct half_f16 {
  uint16_t bits;
};
struct half_bf16 {
  uint16_t bits;
};
HM_DEV float as_number(float x) { return x; }
HM_DEV double as_number(double x) { return x; }
HM_DEV float as_number(half_f16 x) { return hm_dev_f16_to_f32(x.bits); }
HM_DEV float as_number(half_bf16 x) { return hm_dev_bf16_to_f32(x.bits); }

/* Minus infinity. */
HM_DEV float least(float) { return -INFINITY; }
HM_DEV double least(double) { return -(double)INFINITY; }
HM_DEV half_f16 least(half_f16) { return half_f16{0xfc00}; }
HM_DEV half_bf16 least(half_bf16) { return half_bf16{0xff80}; }

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) max_pool(pooling p) {
  const geometry &g = p.g;
  for (uint32_t u = hm_global_thread(); u < p.pixels.walk.count; u += hm_global_threads()) {
    int64_t at[4]; /* n, c, oy, ox */
    hm_pixel(p.pixels, u, at);
    const int64_t y0 = at[2] * g.sh - g.ph, x0 = at[3] * g.sw - g.pw;
    const T *image = static_cast<const T *>(p.x) + at[0] * g.xs[0] + at[1] * g.xs[1];
    T best = least(T());
    int place = -1;
    for (int ky = 0; ky < (int)g.kh; ky++) {
      const int64_t y = y0 + ky * g.dh;
      if (y < 0 || y >= g.h) continue;
      for (int kx = 0; kx < (int)g.kw; kx++) {
        const int64_t x = x0 + kx * g.dw;
        if (x < 0 || x >= g.w) continue;
        const T v = image[y * g.xs[2] + x * g.xs[3]];
        if (place < 0 || as_number(v) > as_number(best) || as_number(v) != as_number(v))
          best = v, place = ky * (int)g.kw + kx;
      }
    }
    static_cast<T *>(p.y)[hm_at(g.ys, at[0], at[1], at[2], at[3])] = best;
    static_cast<uint8_t *>(p.index)[hm_at(g.is, at[0], at[1], at[2], at[3])] = (uint8_t)(place < 0 ? 0 : place);
  }
}

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) max_pool_backward(pooling p) {
  const geometry &g = p.g;
  const uint8_t *index = static_cast<const uint8_t *>(p.index);
  for (uint32_t u = hm_global_thread(); u < p.pixels.walk.count; u += hm_global_threads()) {
    int64_t at[4], oy0, oy1, ox0, ox1; /* n, c, y, x */
    hm_pixel(p.pixels, u, at);
    hm_pool_windows(g.oh, g.reach_h, g.sh, g.ph, at[2], &oy0, &oy1);
    hm_pool_windows(g.ow, g.reach_w, g.sw, g.pw, at[3], &ox0, &ox1);
    T sum = (T)0;
    for (int64_t oy = oy0; oy < oy1; oy++) {
      const int64_t dy = at[2] + g.ph - oy * g.sh, ky = g.dh == 1 ? dy : hm__quotient(dy, g.dh);
      if (ky * g.dh != dy) continue; /* between two places */
      for (int64_t ox = ox0; ox < ox1; ox++) {
        const int64_t dx = at[3] + g.pw - ox * g.sw, kx = g.dw == 1 ? dx : hm__quotient(dx, g.dw);
        if (kx * g.dw != dx || index[hm_at(g.is, at[0], at[1], oy, ox)] != ky * g.kw + kx) continue;
        if (p.relu && hm_load<T>(p.relu, p.relu_dtype, hm_at(p.rs, at[0], at[1], oy, ox)) <= (T)0) continue;
        const T v = hm_load<T>(p.y, p.y_dtype, hm_at(g.ys, at[0], at[1], oy, ox));
        sum = p.apart ? v : sum + v;
      }
    }
    hm_store<T>(p.x, p.x_dtype, hm_at(g.xs, at[0], at[1], at[2], at[3]), sum);
  }
}

/* The gradient of the gradient: what stands at each window's index. */
static __global__ void __launch_bounds__(HM_BLOCK, 2) max_pool_pick(pooling p) {
  const geometry &g = p.g;
  for (uint32_t u = hm_global_thread(); u < p.pixels.walk.count; u += hm_global_threads()) {
    int64_t at[4]; /* n, c, oy, ox */
    hm_pixel(p.pixels, u, at);
    const int place = static_cast<const uint8_t *>(p.index)[hm_at(g.is, at[0], at[1], at[2], at[3])];
    const int ky = place / (int)g.kw, kx = place - ky * (int)g.kw;
    const int64_t y = at[2] * g.sh - g.ph + ky * g.dh, x = at[3] * g.sw - g.pw + kx * g.dw;
    const int64_t to = hm_at(g.ys, at[0], at[1], at[2], at[3]);
    if (y < 0 || y >= g.h || x < 0 || x >= g.w) hm_store<float>(p.y, p.y_dtype, to, 0); /* chosen by nobody */
    else hm_convert(p.y, p.y_dtype, to, p.x, p.x_dtype, hm_at(g.xs, at[0], at[1], y, x));
  }
}

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) adaptive_max_pool(pooling p) {
  const geometry &g = p.g;
  for (uint32_t u = hm_global_thread(); u < p.pixels.walk.count; u += hm_global_threads()) {
    int64_t at[4], y0, y1, x0, x1; /* n, c, oy, ox */
    hm_pixel(p.pixels, u, at);
    hm_adaptive_span(g.h, g.oh, at[2], &y0, &y1);
    hm_adaptive_span(g.w, g.ow, at[3], &x0, &x1);
    const T *image = static_cast<const T *>(p.x) + at[0] * g.xs[0] + at[1] * g.xs[1];
    T best = least(T());
    int64_t place = -1;
    for (int64_t y = y0; y < y1; y++) {
      for (int64_t x = x0; x < x1; x++) {
        const T v = image[y * g.xs[2] + x * g.xs[3]];
        if (place < 0 || as_number(v) > as_number(best) || as_number(v) != as_number(v)) best = v, place = y * g.w + x;
      }
    }
    static_cast<T *>(p.y)[hm_at(g.ys, at[0], at[1], at[2], at[3])] = best;
    static_cast<int64_t *>(p.index)[hm_at(g.is, at[0], at[1], at[2], at[3])] = place;
  }
}

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) adaptive_max_pool_backward(pooling p) {
  const geometry &g = p.g;
  for (uint32_t u = hm_global_thread(); u < p.pixels.walk.count; u += hm_global_threads()) {
    int64_t at[4], oy0, oy1, ox0, ox1; /* n, c, y, x */
    hm_pixel(p.pixels, u, at);
    hm_adaptive_span(g.oh, g.h, at[2], &oy0, &oy1);
    hm_adaptive_span(g.ow, g.w, at[3], &ox0, &ox1);
    T sum = (T)0;
    for (int64_t oy = oy0; oy < oy1; oy++) {
      for (int64_t ox = ox0; ox < ox1; ox++) {
        if (static_cast<const int64_t *>(p.index)[hm_at(g.is, at[0], at[1], oy, ox)] != at[2] * g.w + at[3]) continue;
        sum += hm_load<T>(p.y, p.y_dtype, hm_at(g.ys, at[0], at[1], oy, ox));
      }
    }
    hm_store<T>(p.x, p.x_dtype, hm_at(g.xs, at[0], at[1], at[2], at[3]), sum);
  }
}

/* ====== Setting up ====== */

static void strides4(const hm_view *v, int64_t *out) {
  const int skip = 4 - v->ndim;
  for (int d = 0; d < 4; d++) out[d] = d < skip ? 0 : v->stride[d - skip];
}

static int64_t size_at(const hm_view *v, int d) { return d < 4 - v->ndim ? 1 : v->shape[d - (4 - v->ndim)]; }

/* Value number i of an attribute that has one or two. */
static int64_t pick(const hm_attr *a, int i, int64_t missing) {
  return a->n == 0 ? missing : a->n == 1 ? a->v[0] : a->v[i];
}

/* Sizes and strides alone. */
static void make_sizes(geometry *g, const hm_view *x, const hm_view *y, const hm_view *index) {
  memset(g, 0, sizeof *g);
  g->n = size_at(x, 0), g->c = size_at(x, 1), g->h = size_at(x, 2), g->w = size_at(x, 3);
  g->oh = size_at(y, 2), g->ow = size_at(y, 3);
  strides4(x, g->xs), strides4(y, g->ys), strides4(index, g->is);
}

/* attr: kernel_size, stride, padding, dilation. */
static int make_geometry(geometry *g, const hm_view *x, const hm_view *y, const hm_view *index, const hm_attr *attr) {
  make_sizes(g, x, y, index);
  g->kh = pick(&attr[0], 0, 1), g->kw = pick(&attr[0], 1, 1);
  g->sh = pick(&attr[1], 0, g->kh), g->sw = pick(&attr[1], 1, g->kw);
  g->ph = pick(&attr[2], 0, 0), g->pw = pick(&attr[2], 1, 0);
  g->dh = pick(&attr[3], 0, 1), g->dw = pick(&attr[3], 1, 1);
  g->reach_h = (g->kh - 1) * g->dh + 1, g->reach_w = (g->kw - 1) * g->dw + 1;
  if (g->kh < 1 || g->kw < 1 || g->kh * g->kw > PLACES)
    return hm_cuda_fail(HM_ERR_ARG, "max_pool2d: the kernel must have 1 to %d places, it is %lld x %lld", PLACES,
                        (long long)g->kh, (long long)g->kw);
  if (g->sh < 1 || g->sw < 1 || g->dh < 1 || g->dw < 1)
    return hm_cuda_fail(HM_ERR_ARG,
                        "max_pool2d: stride and dilation must be at least 1, they are %lld, %lld and %lld, %lld",
                        (long long)g->sh, (long long)g->sw, (long long)g->dh, (long long)g->dw);
  if (g->ph < 0 || g->pw < 0 || g->ph * 2 > g->kh || g->pw * 2 > g->kw)
    return hm_cuda_fail(
        HM_ERR_ARG,
        "max_pool2d: padding must be at most half the kernel: padding is %lld, %lld, the kernel %lld x %lld",
        (long long)g->ph, (long long)g->pw, (long long)g->kh, (long long)g->kw);
  if ((g->h < 1 || g->w < 1) && g->oh * g->ow > 0)
    return hm_cuda_fail(HM_ERR_SHAPE, "max_pool2d: the image is empty: %lld x %lld", (long long)g->h, (long long)g->w);
  return HM_OK;
}

/* Launches `kernel` for each piece of `result`, by the type that it holds. */
#define RUN_BY_TYPE(name, kernel, result, type)                                                                        \
  hm_each_pixels((result), &p.pixels, [&]() {                                                                          \
    const unsigned blocks = hm_blocks(p.pixels.walk.count);                                                            \
    switch (type) {                                                                                                    \
    case HM_F32: return HM_RUN(name, (kernel<float>), blocks, HM_BLOCK, 0, call->stream, p);                           \
    case HM_F64: return HM_RUN(name, (kernel<double>), blocks, HM_BLOCK, 0, call->stream, p);                          \
    case HM_F16: return HM_RUN(name, (kernel<half_f16>), blocks, HM_BLOCK, 0, call->stream, p);                        \
    case HM_BF16: return HM_RUN(name, (kernel<half_bf16>), blocks, HM_BLOCK, 0, call->stream, p);                      \
    default: return hm_cuda_fail(HM_ERR_DTYPE, name ": expected a floating dtype, got %s", hm_dtype_name(type));       \
    }                                                                                                                  \
  })

/* The same by what is computed in. */
#define RUN_COMPUTED(name, kernel, result)                                                                             \
  hm_each_pixels((result), &p.pixels, [&]() {                                                                          \
    const unsigned blocks = hm_blocks(p.pixels.walk.count);                                                            \
    if (call->compute == HM_F64) return HM_RUN(name, (kernel<double>), blocks, HM_BLOCK, 0, call->stream, p);          \
    return HM_RUN(name, (kernel<float>), blocks, HM_BLOCK, 0, call->stream, p);                                        \
  })

static void set_operands(pooling *p, const hm_view *x, const hm_view *y, const hm_view *index) {
  p->x = x->data, p->y = y->data, p->index = index->data;
  p->x_dtype = x->dtype, p->y_dtype = y->dtype;
}

static int forward(const hm_kernel_call *call) {
  const hm_view *x = &call->in[0], *y = &call->out[0], *index = &call->out[1];
  pooling p;
  memset(&p, 0, sizeof p);
  const int status = make_geometry(&p.g, x, y, index, call->attr);
  if (status != HM_OK) return status;
  set_operands(&p, x, y, index);
  return RUN_BY_TYPE("max_pool2d", max_pool, y, x->dtype);
}

static int backward(const hm_kernel_call *call) {
  const hm_view *x = &call->out[0], *y = &call->in[0], *index = &call->in[1];
  pooling p;
  memset(&p, 0, sizeof p);
  const int status = make_geometry(&p.g, x, y, index, call->attr + 1);
  if (status != HM_OK) return status;
  set_operands(&p, x, y, index);
  p.apart = p.g.sh >= p.g.reach_h && p.g.sw >= p.g.reach_w;
  if (call->op == HM_OP_MAX_POOL2D_RELU_BACKWARD) {
    p.relu = call->in[2].data, p.relu_dtype = call->in[2].dtype;
    strides4(&call->in[2], p.rs);
  }
  return RUN_COMPUTED("max_pool2d_backward", max_pool_backward, x);
}

static int pick_chosen(const hm_kernel_call *call) {
  const hm_view *x = &call->in[0], *y = &call->out[0], *index = &call->in[1];
  pooling p;
  memset(&p, 0, sizeof p);
  const int status = make_geometry(&p.g, x, y, index, call->attr);
  if (status != HM_OK) return status;
  set_operands(&p, x, y, index);
  return hm_each_pixels(y, &p.pixels, [&]() {
    return HM_RUN("max_pool2d_pick", max_pool_pick, hm_blocks(p.pixels.walk.count), HM_BLOCK, 0, call->stream, p);
  });
}

static int adaptive_forward(const hm_kernel_call *call) {
  const hm_view *x = &call->in[0], *y = &call->out[0], *index = &call->out[1];
  pooling p;
  memset(&p, 0, sizeof p);
  make_sizes(&p.g, x, y, index);
  set_operands(&p, x, y, index);
  return RUN_BY_TYPE("adaptive_max_pool2d", adaptive_max_pool, y, x->dtype);
}

static int adaptive_backward(const hm_kernel_call *call) {
  const hm_view *x = &call->out[0], *y = &call->in[0], *index = &call->in[1];
  pooling p;
  memset(&p, 0, sizeof p);
  make_sizes(&p.g, x, y, index);
  set_operands(&p, x, y, index);
  return RUN_COMPUTED("adaptive_max_pool2d_backward", adaptive_max_pool_backward, x);
}

extern "C" int hm_cuda_pool(const hm_kernel_call *call) {
  switch (call->op) {
  case HM_OP_MAX_POOL2D: return forward(call);
  case HM_OP_MAX_POOL2D_BACKWARD:
  case HM_OP_MAX_POOL2D_RELU_BACKWARD: return backward(call);
  case HM_OP_MAX_POOL2D_PICK: return pick_chosen(call);
  case HM_OP_ADAPTIVE_MAX_POOL2D: return adaptive_forward(call);
  case HM_OP_ADAPTIVE_MAX_POOL2D_BACKWARD: return adaptive_backward(call);
  default: return hm_cuda_resample(call);
  }
}
