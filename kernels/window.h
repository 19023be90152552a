/*
 * window.h -- averages over windows and interpolation, as weighted sums: which elements one result is made of, and by what weights.
 *
 * avg_pool2d, adaptive_avg_pool2d, interpolate2d and their gradients are one thing: an element of the result is the sum of
 * weight * element over a rectangle of the other side, divided by a number.  Both dims of an image are looked at one by one.  `in`
 * is the size of the image side (x, or its gradient), `out` that of the window side.  Gradients are in gather form: a pixel asks which
 * windows it stands in, so that nothing is added from two places.
 *
 * Formulas, as PyTorch has them:
 *   pool      window o begins at o * stride - padding and ends `kernel` later; it counts up to the end of the padding, or
 *             with count_include_pad = false up to the image's edge
 *   adaptive  window o is [floor(o * in / out), ceil((o + 1) * in / out))
 *   nearest   floor(o * ratio), in float32 whatever the dtype
 *   bilinear  (o + 1/2) * ratio - 1/2, not below 0, in the type computed in; its floor and the place behind it, by the distances.
 *             align_corners: o * (in - 1) / (out - 1)
 * ratio is in / out; where a scale is given, 1 / scale.  align_corners does not look at scales.  Places past the last element are the last.
 *
 * Shared by the CPU's kernels and CUDA's, which compute the same terms in the same order.  Owns nothing.
 */
#ifndef HM_WINDOW_H
#define HM_WINDOW_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "math.h"

enum { HM_WINDOW_POOL, HM_WINDOW_ADAPTIVE, HM_WINDOW_NEAREST, HM_WINDOW_BILINEAR };

/* Sums of more terms than this keep what their additions lose. */
enum { HM_WINDOW_CAREFUL = 64 };

typedef struct hm_axis {
  int64_t in, out;
  int64_t kernel, stride, padding; /* pool */
  float ratio_f32;                 /* nearest, bilinear */
  double ratio_f64;
} hm_axis;

typedef struct hm_windows {
  int32_t kind;
  bool backward;
  bool count_padding, align_corners;
  int64_t divisor; /* 0: the count */
  hm_axis y, x;
} hm_windows;

/* ====== Setting up (host) ====== */

static inline void hm__axis_ratio(hm_axis *a, bool align, double scale) {
  if (align) {
    a->ratio_f32 = a->out > 1 ? (float)(a->in - 1) / (float)(a->out - 1) : 0;
    a->ratio_f64 = a->out > 1 ? (double)(a->in - 1) / (double)(a->out - 1) : 0;
    return;
  }
  a->ratio_f32 = scale > 0 ? (float)(1 / scale) : (float)a->in / (float)a->out;
  a->ratio_f64 = scale > 0 ? 1 / scale : (double)a->in / (double)a->out;
}

/* From the call's attributes, which the infer functions of core have checked and completed; false for an op of another kind. */
static inline bool hm_windows_make(hm_windows *w, const hm_kernel_call *call) {
  const hm_attr *attr = call->attr;
  memset(w, 0, sizeof *w);
  w->backward = call->op == HM_OP_AVG_POOL2D_BACKWARD || call->op == HM_OP_ADAPTIVE_AVG_POOL2D_BACKWARD ||
                call->op == HM_OP_INTERPOLATE2D_BACKWARD;
  switch (call->op) {
  case HM_OP_AVG_POOL2D:
  case HM_OP_AVG_POOL2D_BACKWARD: w->kind = HM_WINDOW_POOL; break;
  case HM_OP_ADAPTIVE_AVG_POOL2D:
  case HM_OP_ADAPTIVE_AVG_POOL2D_BACKWARD: w->kind = HM_WINDOW_ADAPTIVE; break;
  case HM_OP_INTERPOLATE2D:
  case HM_OP_INTERPOLATE2D_BACKWARD: w->kind = attr[1].i ? HM_WINDOW_BILINEAR : HM_WINDOW_NEAREST; break;
  default: return false;
  }
  if (w->kind == HM_WINDOW_POOL && w->backward) attr++; /* behind the shape */
  const hm_view *image = w->backward ? &call->out[0] : &call->in[0];
  const hm_view *windows = w->backward ? &call->in[0] : &call->out[0];
  w->y.in = image->shape[2], w->y.out = windows->shape[2];
  w->x.in = image->shape[3], w->x.out = windows->shape[3];
  if (w->kind == HM_WINDOW_POOL) {
    w->y.kernel = attr[0].v[0], w->y.stride = attr[1].v[0], w->y.padding = attr[2].v[0];
    w->x.kernel = attr[0].v[1], w->x.stride = attr[1].v[1], w->x.padding = attr[2].v[1];
    w->count_padding = attr[4].i != 0;
    w->divisor = attr[5].i;
  } else if (w->kind != HM_WINDOW_ADAPTIVE) {
    w->align_corners = attr[2].i != 0;
    hm__axis_ratio(&w->y, w->align_corners, attr[3].f);
    hm__axis_ratio(&w->x, w->align_corners, attr[4].f);
  }
  return true;
}

/* ====== Windows of a pool ====== */

/* a / b, rounded down; neither is negative.  The short division is much the faster one on a GPU. */
HM_FN int64_t hm__quotient(int64_t a, int64_t b) {
  return (uint64_t)(a | b) >> 32 ? a / b : (int64_t)((uint32_t)a / (uint32_t)b);
}

/* Adaptive windows: [from, to) of the `in` elements for one of `out`.  The other way round it gives the windows that an element is in. */
HM_FN void hm_adaptive_span(int64_t in, int64_t out, int64_t o, int64_t *from, int64_t *to) {
  *from = hm__quotient(o * in, out);
  *to = hm__quotient((o + 1) * in + out - 1, out);
}

/* [from, to) of the windows that reach over place i.  reach: from a window's first place to behind its last. */
HM_FN void hm_pool_windows(int64_t out, int64_t reach, int64_t stride, int64_t padding, int64_t i, int64_t *from,
                           int64_t *to) {
  const int64_t at = i + padding, end = hm__quotient(at, stride) + 1;
  *from = at < reach ? 0 : hm__quotient(at - reach, stride) + 1;
  *to = end < out ? end : out;
}

/* How many places window o counts for. */
HM_FN int64_t hm__axis_count(const hm_windows *w, const hm_axis *a, int64_t o) {
  int64_t from, to;
  if (w->kind == HM_WINDOW_ADAPTIVE) {
    hm_adaptive_span(a->in, a->out, o, &from, &to);
    return to - from;
  }
  from = o * a->stride - a->padding;
  to = from + a->kernel;
  if (to > a->in + a->padding) to = a->in + a->padding;
  if (w->count_padding) return to - from;
  return (to < a->in ? to : a->in) - (from > 0 ? from : 0);
}

/* What a window's sum is divided by. */
HM_FN int64_t hm_windows_count(const hm_windows *w, int64_t oy, int64_t ox) {
  return w->divisor ? w->divisor : hm__axis_count(w, &w->y, oy) * hm__axis_count(w, &w->x, ox);
}

/* ====== Places of an interpolation ====== */

/* place: where window o looks, 0 <= place <= in - 1.
 * span: [from, to) of the other side that place i of the result is made of.
 * value: what element j of the other side brings to place i of the result along one dim; the values of both dims give the weight. */
#define HM_DEFINE_WINDOWS(T, S)                                                                                        \
  HM_FN T hm__axis_place_##S(const hm_windows *w, const hm_axis *a, int64_t o) {                                       \
    const T last = (T)(a->in - 1);                                                                                     \
    if (w->kind == HM_WINDOW_NEAREST) {                                                                                \
      const float at = a->ratio_f32 * (float)o;                                                                        \
      return at < (float)a->in ? (T)(int64_t)at : last;                                                                \
    }                                                                                                                  \
    const T at = w->align_corners ? a->ratio_##S * (T)o : a->ratio_##S * ((T)o + (T)0.5) - (T)0.5;                     \
    return at > last ? last : at > 0 ? at : (T)0;                                                                      \
  }                                                                                                                    \
  /* The first and the last pixel that window o looks at. */                                                           \
  HM_FN int64_t hm__axis_first_##S(const hm_windows *w, const hm_axis *a, int64_t o) {                                 \
    const int64_t at = (int64_t)hm__axis_place_##S(w, a, o);                                                           \
    return at < a->in ? at : a->in - 1;                                                                                \
  }                                                                                                                    \
  HM_FN int64_t hm__axis_last_##S(const hm_windows *w, const hm_axis *a, int64_t o) {                                  \
    const int64_t at = hm__axis_first_##S(w, a, o);                                                                    \
    return w->kind == HM_WINDOW_BILINEAR && at < a->in - 1 ? at + 1 : at;                                              \
  }                                                                                                                    \
  /* A guess, put right: first and last never fall as o grows. */                                                      \
  HM_FN void hm__axis_windows_##S(const hm_windows *w, const hm_axis *a, int64_t i, int64_t *from, int64_t *to) {      \
    const float r = a->ratio_f32, out = (float)a->out;                                                                 \
    float low = r > 0 ? (float)(i - 1) / r : 0, high = r > 0 ? (float)(i + 1) / r : out;                               \
    int64_t f = low < 0 ? 0 : low < out ? (int64_t)low : a->out;                                                       \
    int64_t t = i == a->in - 1 || !(high < out) ? a->out : (int64_t)high;                                              \
    while (f > 0 && hm__axis_last_##S(w, a, f - 1) >= i) f--;                                                          \
    while (f < a->out && hm__axis_last_##S(w, a, f) < i) f++;                                                          \
    while (t > 0 && hm__axis_first_##S(w, a, t - 1) > i) t--;                                                          \
    while (t < a->out && hm__axis_first_##S(w, a, t) <= i) t++;                                                        \
    *from = f;                                                                                                         \
    *to = t;                                                                                                           \
  }                                                                                                                    \
  HM_FN void hm_axis_span_##S(const hm_windows *w, const hm_axis *a, int64_t i, int64_t *from, int64_t *to) {          \
    if (w->kind == HM_WINDOW_POOL) {                                                                                   \
      if (w->backward) {                                                                                               \
        hm_pool_windows(a->out, a->kernel, a->stride, a->padding, i, from, to);                                        \
        return;                                                                                                        \
      }                                                                                                                \
      const int64_t at = i * a->stride - a->padding;                                                                   \
      *from = at > 0 ? at : 0;                                                                                         \
      *to = at + a->kernel < a->in ? at + a->kernel : a->in;                                                           \
    } else if (w->kind == HM_WINDOW_ADAPTIVE) {                                                                        \
      hm_adaptive_span(w->backward ? a->out : a->in, w->backward ? a->in : a->out, i, from, to);                       \
    } else if (w->backward) {                                                                                          \
      hm__axis_windows_##S(w, a, i, from, to);                                                                         \
    } else {                                                                                                           \
      *from = hm__axis_first_##S(w, a, i);                                                                             \
      *to = hm__axis_last_##S(w, a, i) + 1;                                                                            \
    }                                                                                                                  \
  }                                                                                                                    \
  HM_FN T hm_axis_value_##S(const hm_windows *w, const hm_axis *a, int64_t i, int64_t j) {                             \
    const int64_t o = w->backward ? j : i, pixel = w->backward ? i : j;                                                \
    if (w->kind == HM_WINDOW_BILINEAR) {                                                                               \
      const T at = hm__axis_place_##S(w, a, o), behind = at - (T)(int64_t)at;                                          \
      return hm__axis_first_##S(w, a, o) == pixel ? 1 - behind : behind;                                               \
    }                                                                                                                  \
    return w->backward && w->kind != HM_WINDOW_NEAREST && !w->divisor ? (T)hm__axis_count(w, a, o) : 1;                \
  }                                                                                                                    \
  HM_FN T hm_windows_weight_##S(const hm_windows *w, T y, T x) {                                                       \
    if (!w->backward || w->kind > HM_WINDOW_ADAPTIVE) return y * x;                                                    \
    return 1 / (w->divisor ? (T)w->divisor : y * x);                                                                   \
  }

HM_DEFINE_WINDOWS(float, f32)
HM_DEFINE_WINDOWS(double, f64)

#endif
