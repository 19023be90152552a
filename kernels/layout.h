/*
 * layout.h -- the common geometry of an output and its inputs, made as simple as it can be.
 *
 * Shared by the kernels of both devices that walk strided memory, and by expressions.  Header-only; owns nothing.
 */
#ifndef HM_LAYOUT_H
#define HM_LAYOUT_H

#include "kernels.h"

/* Operand 0 is the output, operand 1 + i input i.  Dims run from the outermost in the output's memory to the innermost. */
typedef struct hm_loop {
  int ndim; /* at least 1 */
  int64_t shape[HM_MAX_NDIM];
  int64_t stride[HM_MAX_IN + 1][HM_MAX_NDIM]; /* in elements */
} hm_loop;

/* True for an operand whose memory is walked: neither absent nor a number. */
static inline bool hm__walked(const hm_view *v) { return !(v->flags & (HM_VIEW_ABSENT | HM_VIEW_SCALAR)); }

/* Copies dim `from` of the views to dim `to` of the loop. */
static inline void hm__loop_take(hm_loop *l, int to, const hm_view *out, int n_in, const hm_view *in, int from) {
  l->shape[to] = out->shape[from];
  l->stride[0][to] = out->stride[from];
  for (int i = 0; i < n_in; i++) l->stride[1 + i][to] = hm__walked(&in[i]) ? in[i].stride[from] : 0;
}

/* May dim `inner` be joined to dim `outer`: for every operand one step outside is shape[inner] steps inside? */
static inline bool hm__loop_joins(const hm_loop *l, int operands, int outer, int inner) {
  for (int k = 0; k < operands; k++) {
    if (l->stride[k][outer] != l->stride[k][inner] * l->shape[inner]) return false;
  }
  return true;
}

/* Fills l from an output and n_in inputs of the same shape: drops dims of size 1, orders the others by the output's strides, joins neighbours.
 * Returns the number of elements; l is undefined when that is 0. */
static inline int64_t hm__loop_make(hm_loop *l, const hm_view *out, int n_in, const hm_view *in) {
  int order[HM_MAX_NDIM], n = 0;
  int64_t numel = 1;
  for (int d = 0; d < out->ndim; d++) {
    numel *= out->shape[d];
    if (out->shape[d] == 1) continue;
    int at = n++;
    for (; at > 0 && out->stride[order[at - 1]] < out->stride[d]; at--) order[at] = order[at - 1];
    order[at] = d;
  }
  if (numel == 0) return 0;
  l->ndim = 0;
  for (int k = 0; k < n; k++) {
    const int last = l->ndim - 1;
    hm__loop_take(l, l->ndim, out, n_in, in, order[k]);
    if (last >= 0 && hm__loop_joins(l, n_in + 1, last, last + 1)) {
      const int64_t outer = l->shape[last];
      hm__loop_take(l, last, out, n_in, in, order[k]);
      l->shape[last] *= outer;
    } else {
      l->ndim++;
    }
  }
  if (l->ndim == 0) { /* a single element */
    l->ndim = 1;
    l->shape[0] = 1;
    for (int k = 0; k <= n_in; k++) l->stride[k][0] = 1;
  }
  return numel;
}

/* A view without dim `dim`; *step: that dim's stride. */
static inline hm_view hm__without_dim(const hm_view *v, int dim, int64_t *step) {
  hm_view w = *v;
  *step = v->ndim ? v->stride[dim] : 0;
  if (v->ndim == 0) return w;
  w.ndim = 0;
  for (int d = 0; d < v->ndim; d++) {
    if (d == dim) continue;
    w.shape[w.ndim] = v->shape[d];
    w.stride[w.ndim++] = v->stride[d];
  }
  return w;
}

/* The share of thread `index` of `threads` in [0, n), in units of `grain`. */
static inline void hm__share(int64_t n, int64_t grain, int index, int threads, int64_t *first, int64_t *last) {
  const int64_t units = (n + grain - 1) / grain;
  const int64_t from = units * index / threads * grain, to = units * (index + 1) / threads * grain;
  *first = from < n ? from : n;
  *last = to < n ? to : n;
}

/* The value of a number operand in a dtype that kernels compute in (F32, F64, I64), rounded once. */
static inline void hm__scalar_value(const hm_view *v, int dtype, void *out) {
  const bool is_float = v->dtype == HM_F64;
  if (dtype == HM_F32) *(float *)out = is_float ? (float)v->scalar.f : (float)v->scalar.i;
  else if (dtype == HM_F64) *(double *)out = is_float ? v->scalar.f : (double)v->scalar.i;
  else *(int64_t *)out = is_float ? (int64_t)v->scalar.f : v->scalar.i;
}

#endif
