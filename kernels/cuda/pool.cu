/*
 * pool.cu -- max_pool2d and its gradient.
 *
 * One thread for each element of the result, in the order of the result's memory, so that neighbours read and write
 * neighbours in channels-last and in row-major alike.  As in PyTorch the first largest value wins, a NaN wins over
 * everything, and of several NaNs the last; padding never wins.  The index is the place in the window, ky * kw + kx.
 * The gradient is in gather form: each pixel adds the windows that chose it, in their order; nothing is added
 * atomically.
 */
#include "view.h"

enum { PLACES = 256 };

/* Sizes and strides of one call.  x: the image side (input, or gradient of it); y: the window side; i: the index. */
struct geometry {
  int64_t n, c, h, w, oh, ow;
  int64_t kh, kw, sh, sw, ph, pw;
  int64_t xs[4], ys[4], is[4]; /* strides (n, c, h, w) */
};

struct pooling {
  geometry g;
  hm_walk<4> walk; /* over the result; offsets are the coordinates n, c, y, x */
  int64_t first[4];
  void *x, *y;
  uint8_t *index;
  int32_t x_dtype, y_dtype;
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

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) max_pool(pooling p) {
  const geometry &g = p.g;
  for (uint32_t u = hm_global_thread(); u < p.walk.count; u += hm_global_threads()) {
    int64_t at[4]; /* n, c, oy, ox */
    hm_offsets(p.walk, u, at);
    for (int k = 0; k < 4; k++) at[k] += p.first[k];
    const int64_t y0 = at[2] * g.sh - g.ph, x0 = at[3] * g.sw - g.pw;
    const T *image = static_cast<const T *>(p.x) + at[0] * g.xs[0] + at[1] * g.xs[1];
    T best = T();
    int place = -1;
    for (int ky = 0; ky < (int)g.kh; ky++) {
      const int64_t y = y0 + ky;
      if (y < 0 || y >= g.h) continue;
      for (int kx = 0; kx < (int)g.kw; kx++) {
        const int64_t x = x0 + kx;
        if (x < 0 || x >= g.w) continue;
        const T v = image[y * g.xs[2] + x * g.xs[3]];
        if (place < 0 || as_number(v) > as_number(best) || as_number(v) != as_number(v))
          best = v, place = ky * (int)g.kw + kx;
      }
    }
    if (place < 0) continue; /* a window of padding alone: refused on the host */
    static_cast<T *>(p.y)[at[0] * g.ys[0] + at[1] * g.ys[1] + at[2] * g.ys[2] + at[3] * g.ys[3]] = best;
    p.index[at[0] * g.is[0] + at[1] * g.is[1] + at[2] * g.is[2] + at[3] * g.is[3]] = (uint8_t)place;
  }
}

/* First and last window that covers position x along one dim: kernel k, stride s, padding p, `count` windows. */
HM_DEV int windows_from(int64_t x, int64_t k, int64_t s, int64_t p) {
  return x + p < k ? 0 : (int)((int)(x + p - k) / (int)s + 1);
}
HM_DEV int windows_to(int64_t x, int64_t s, int64_t p, int64_t count) {
  const int last = (int)(x + p) / (int)s;
  return last < (int)count - 1 ? last : (int)count - 1;
}

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) max_pool_backward(pooling p) {
  const geometry &g = p.g;
  for (uint32_t u = hm_global_thread(); u < p.walk.count; u += hm_global_threads()) {
    int64_t at[4]; /* n, c, y, x */
    hm_offsets(p.walk, u, at);
    for (int k = 0; k < 4; k++) at[k] += p.first[k];
    const int oy0 = windows_from(at[2], g.kh, g.sh, g.ph), oy1 = windows_to(at[2], g.sh, g.ph, g.oh);
    const int ox0 = windows_from(at[3], g.kw, g.sw, g.pw), ox1 = windows_to(at[3], g.sw, g.pw, g.ow);
    const int64_t base_y = at[0] * g.ys[0] + at[1] * g.ys[1], base_i = at[0] * g.is[0] + at[1] * g.is[1];
    T sum = (T)0;
    for (int oy = oy0; oy <= oy1; oy++) {
      for (int ox = ox0; ox <= ox1; ox++) {
        const int64_t place = (at[2] + g.ph - oy * g.sh) * g.kw + (at[3] + g.pw - ox * g.sw);
        if (p.index[base_i + oy * g.is[2] + ox * g.is[3]] != place) continue;
        const T v = hm_load<T>(p.y, p.y_dtype, base_y + oy * g.ys[2] + ox * g.ys[3]);
        sum = p.apart ? v : sum + v;
      }
    }
    hm_store<T>(p.x, p.x_dtype, at[0] * g.xs[0] + at[1] * g.xs[1] + at[2] * g.xs[2] + at[3] * g.xs[3], sum);
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

/* attr: kernel_size, stride, padding. */
static int make_geometry(geometry *g, const hm_view *x, const hm_view *y, const hm_view *index, const hm_attr *attr) {
  memset(g, 0, sizeof *g);
  g->n = size_at(x, 0), g->c = size_at(x, 1), g->h = size_at(x, 2), g->w = size_at(x, 3);
  g->oh = size_at(y, 2), g->ow = size_at(y, 3);
  g->kh = pick(&attr[0], 0, 1), g->kw = pick(&attr[0], 1, 1);
  g->sh = pick(&attr[1], 0, g->kh), g->sw = pick(&attr[1], 1, g->kw);
  g->ph = pick(&attr[2], 0, 0), g->pw = pick(&attr[2], 1, 0);
  strides4(x, g->xs), strides4(y, g->ys), strides4(index, g->is);
  if (g->kh < 1 || g->kw < 1 || g->kh * g->kw > PLACES)
    return hm_cuda_fail(HM_ERR_ARG, "max_pool2d: the kernel must have 1 to %d places, it is %lld x %lld", PLACES,
                        (long long)g->kh, (long long)g->kw);
  if (g->sh < 1 || g->sw < 1)
    return hm_cuda_fail(HM_ERR_ARG, "max_pool2d: stride must be at least 1, it is %lld, %lld", (long long)g->sh,
                        (long long)g->sw);
  if (g->ph < 0 || g->pw < 0 || g->ph * 2 > g->kh || g->pw * 2 > g->kw)
    return hm_cuda_fail(
        HM_ERR_ARG,
        "max_pool2d: padding must be at most half the kernel: padding is %lld, %lld, the kernel %lld x %lld",
        (long long)g->ph, (long long)g->pw, (long long)g->kh, (long long)g->kw);
  if ((g->h < 1 || g->w < 1) && g->oh * g->ow > 0)
    return hm_cuda_fail(HM_ERR_SHAPE, "max_pool2d: the image is empty: %lld x %lld", (long long)g->h, (long long)g->w);
  if (g->h + g->ph >= INT32_MAX || g->w + g->pw >= INT32_MAX || g->sh >= INT32_MAX || g->sw >= INT32_MAX)
    return hm_cuda_fail(HM_ERR_UNSUPPORTED, "max_pool2d: a side of the image or a stride has 2^31 or more");
  return HM_OK;
}

/* Calls run(p) with p->walk over the result (strides `s`, sizes as given) in the order of its memory. */
template <class F> static int each_result(pooling *p, int64_t h, int64_t w, const int64_t *s, F run) {
  hm_view out, in[4];
  memset(&out, 0, sizeof out);
  out.ndim = 4;
  const int64_t shape[4] = {p->g.n, p->g.c, h, w};
  for (int d = 0; d < 4; d++) out.shape[d] = shape[d], out.stride[d] = s[d];
  for (int k = 0; k < 4; k++) { /* the coordinate along dim k as if it were memory */
    in[k] = out;
    for (int d = 0; d < 4; d++) in[k].stride[d] = d == k;
  }
  hm_loop loop;
  if (hm__loop_make(&loop, &out, 4, in) == 0) return HM_OK;
  int64_t base[5] = {0};
  return hm_each_piece(&loop, 5, base, [&](const hm_loop &l, const int64_t *at) {
    hm_loop coordinates = l;
    for (int k = 0; k < 4; k++)
      memcpy(coordinates.stride[k], l.stride[k + 1], sizeof l.stride[k]), p->first[k] = at[k + 1];
    p->walk = hm_make_walk<4>(&coordinates);
    return run();
  });
}

static int forward(const hm_kernel_call *call) {
  const hm_view *x = &call->in[0], *y = &call->out[0];
  pooling p;
  memset(&p, 0, sizeof p);
  const int status = make_geometry(&p.g, x, y, &call->out[1], call->attr);
  if (status != HM_OK) return status;
  p.x = x->data, p.y = y->data, p.index = static_cast<uint8_t *>(call->out[1].data);
  return each_result(&p, p.g.oh, p.g.ow, p.g.ys, [&]() {
    const unsigned blocks = hm_blocks(p.walk.count);
    switch (x->dtype) {
    case HM_F32: return HM_RUN("max_pool2d", (max_pool<float>), blocks, HM_BLOCK, 0, call->stream, p);
    case HM_F64: return HM_RUN("max_pool2d", (max_pool<double>), blocks, HM_BLOCK, 0, call->stream, p);
    case HM_F16: return HM_RUN("max_pool2d", (max_pool<half_f16>), blocks, HM_BLOCK, 0, call->stream, p);
    case HM_BF16: return HM_RUN("max_pool2d", (max_pool<half_bf16>), blocks, HM_BLOCK, 0, call->stream, p);
    default:
      return hm_cuda_fail(HM_ERR_DTYPE, "max_pool2d: expected a floating dtype, got %s", hm_dtype_name(x->dtype));
    }
  });
}

static int backward(const hm_kernel_call *call) {
  const hm_view *x = &call->out[0], *y = &call->in[0];
  pooling p;
  memset(&p, 0, sizeof p);
  const int status = make_geometry(&p.g, x, y, &call->in[1], call->attr + 1);
  if (status != HM_OK) return status;
  p.x = x->data, p.y = y->data, p.index = static_cast<uint8_t *>(call->in[1].data);
  p.x_dtype = x->dtype, p.y_dtype = y->dtype;
  p.apart = p.g.sh >= p.g.kh && p.g.sw >= p.g.kw;
  return each_result(&p, p.g.h, p.g.w, p.g.xs, [&]() {
    const unsigned blocks = hm_blocks(p.walk.count);
    if (call->compute == HM_F64)
      return HM_RUN("max_pool2d_backward", (max_pool_backward<double>), blocks, HM_BLOCK, 0, call->stream, p);
    return HM_RUN("max_pool2d_backward", (max_pool_backward<float>), blocks, HM_BLOCK, 0, call->stream, p);
  });
}

extern "C" int hm_cuda_pool(const hm_kernel_call *call) {
  if (call->op == HM_OP_MAX_POOL2D) return forward(call);
  if (call->op == HM_OP_MAX_POOL2D_BACKWARD) return backward(call);
  return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no pooling with op id %d", call->op);
}
