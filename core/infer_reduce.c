/*
 * infer_reduce.c -- the shape and layout rules of prod, var, std, norm and of the scans along a dim.
 *
 * sum, mean and their like are in infer.c, whose rules for dims these share.  Scans keep their input's memory order, as softmax does.
 *
 * Called by dispatch.c through the op table.
 */
#include <math.h>
#include <string.h>

#include "op.h"

#define NAME(c) ((c)->info->name)

static const hm_tensor *operand(const hm_opcall *c, int i) { return c->in[i].t; }

static const char *text_of(const hm_tensor *t, char buffer[160]) { return hm_describe(t, buffer, 160); }

static bool same_shape(const hm_tensor *a, const hm_tensor *b) {
  return a->ndim == b->ndim && !memcmp(a->shape, b->shape, sizeof(int64_t) * (size_t)a->ndim);
}

/* ====== Reductions ====== */

int hm__infer_reduce_dim(hm_opcall *c) { /* prod(x, dim?, keepdim) */
  const int status = hm__infer_reduce_index(c);
  hm__widen_integers(c);
  return status;
}

int hm__infer_reduce_spread(hm_opcall *c) { /* var, std(x, dims?, correction, keepdim) */
  if (!isfinite(c->attr[1].f))
    return hm_fail(HM_ERR_ARG, "%s: correction must be a finite number, got %g", NAME(c), c->attr[1].f);
  return hm__reduce_spec(c, &c->attr[0], c->attr[2].i);
}

int hm__infer_reduce_norm(hm_opcall *c) { /* norm(x, p, dims?, keepdim) */
  const double p = c->attr[0].f;
  if (!isfinite(p) || p < 0)
    return hm_fail(
        HM_ERR_ARG,
        "%s: p must be finite and not negative, got %g\n  hint: the norm of p = inf is the amax of abs(x), that of -inf the amin",
        NAME(c), p);
  return hm__reduce_spec(c, &c->attr[1], c->attr[2].i);
}

/* ====== Gradient of prod ====== */

/* Is t what a reduction of x along dim (all dims: HM_NONE) gives? */
static bool is_reduced(const hm_tensor *t, const hm_tensor *x, int64_t dim, bool keepdim) {
  int at = 0;
  for (int d = 0; d < x->ndim; d++) {
    const bool reduced = dim == HM_NONE || d == dim;
    if (reduced && !keepdim) continue;
    if (at >= t->ndim || t->shape[at++] != (reduced ? 1 : x->shape[d])) return false;
  }
  return at == t->ndim;
}

int hm__infer_prod_backward(hm_opcall *c) { /* prod_backward(g, x, dim?, keepdim) */
  const hm_tensor *x = operand(c, 1);
  hm_attr *dim = &c->attr[0];
  int status = HM_OK;
  if (x->ndim == 0) dim->i = HM_NONE;
  if (dim->i != HM_NONE) status = hm__wrap_dim(c, &dim->i, x->ndim);
  if (status) return status;
  if (!is_reduced(operand(c, 0), x, dim->i, c->attr[1].i)) {
    char a[160], b[160];
    return hm_fail(HM_ERR_SHAPE, "%s: g must have the shape that prod gives: g is %s, x is %s", NAME(c),
                   text_of(operand(c, 0), a), text_of(x, b));
  }
  c->spec[0].ndim = x->ndim;
  memcpy(c->spec[0].shape, x->shape, sizeof(int64_t) * (size_t)x->ndim);
  return dim->i == HM_NONE ? hm__want_contiguous(c, 1) : HM_OK; /* all elements are one line */
}

/* ====== Scans ====== */

int hm__infer_scan(hm_opcall *c) {
  for (int i = 1; i < c->info->n_in; i++) { /* cumprod_backward(g, x, out, dim) */
    char a[160], b[160];
    if (!same_shape(operand(c, i), operand(c, 0)))
      return hm_fail(HM_ERR_SHAPE, "%s: g and %s must have one shape: %s and %s", NAME(c), c->info->in[i].name,
                     text_of(operand(c, 0), a), text_of(operand(c, i), b));
  }
  const int status = hm__infer_norm(c);
  hm__widen_integers(c);
  return status;
}
