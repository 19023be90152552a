/*
 * composite_prod.c -- the second derivatives of prod and cumprod, made of other ops.
 *
 * Gradients of the ops prod_backward and cumprod_backward, right where elements are zero, too: nothing is divided.  Along a line x_1 ... x_n,
 * L_k is the product of the elements before k and R_k that of those behind it; h is the gradient that arrives.
 *
 *   prod_backward      u_k = g * L_k * R_k
 *     by g             sum over k of h_k * L_k * R_k
 *     by x             that of L along the line, plus that of R against it; L is cumprod(x) moved by one place
 *   cumprod_backward   v_k = L_k * s_k, where s_k = g_k + x_(k+1) * s_(k+1)
 *     by g             t_k = h_k * L_k + x_k * t_(k-1)
 *     by x             that of L, plus t_(k-1) * s_k
 *
 * s and t are made in log2(n) rounds (Hillis and Steele, "Data parallel algorithms", 1986).  All ops used have derivatives, so that a third
 * derivative is found by recording them.  Computed in float32 (float64 for float64) and rounded once.
 *
 * Called by composite.c.  Temporaries belong to the terms that list them.
 */
#include "op.h"

/* Values made one after the other, released together.  After a failure nothing more is made and NULL goes on. */
enum { MOST_TERMS = 48 }; /* more than any function here makes */
typedef struct terms {
  int status, n;
  int64_t dim; /* of the lines */
  hm_tensor *t[MOST_TERMS];
} terms;

static void drop(terms *w) {
  for (int i = 0; i < w->n; i++) hm_tensor_release(w->t[i]);
  w->n = 0;
}

/* Takes over what a call made: *t is read behind the call, whatever the order of arguments. */
static hm_tensor *made(terms *w, int status, hm_tensor *const *t) {
  if (status) {
    w->status = status;
    return NULL;
  }
  return w->t[w->n++] = *t;
}

static hm_tensor *mul(terms *w, hm_tensor *a, hm_tensor *b) {
  hm_tensor *out = NULL;
  return w->status ? NULL : made(w, hm_op_mul(hm_t(a), hm_t(b), &out), &out);
}

static hm_tensor *add(terms *w, hm_tensor *a, hm_tensor *b) {
  hm_tensor *out = NULL;
  return w->status ? NULL : made(w, hm_op_add(hm_t(a), hm_t(b), &out), &out);
}

static hm_tensor *flip(terms *w, hm_tensor *x) {
  hm_tensor *out = NULL;
  return w->status ? NULL : made(w, hm_op_flip(hm_t(x), 1, &w->dim, &out), &out);
}

static hm_tensor *narrow(terms *w, hm_tensor *x, int64_t start, int64_t length) {
  hm_tensor *out = NULL;
  return w->status ? NULL : made(w, hm_op_narrow(hm_t(x), w->dim, start, length, &out), &out);
}

static hm_tensor *cat(terms *w, hm_tensor *a, hm_tensor *b) {
  hm_tensor *out = NULL;
  return w->status ? NULL : made(w, hm_cat((hm_tensor *[]){a, b}, 2, (int)w->dim, &out), &out);
}

static hm_tensor *reshape(terms *w, hm_tensor *x, int ndim, const int64_t *shape) {
  hm_tensor *out = NULL;
  return w->status ? NULL : made(w, hm_op_reshape(hm_t(x), ndim, shape, &out), &out);
}

static hm_tensor *cumprod(terms *w, hm_tensor *x) {
  hm_tensor *out = NULL;
  return w->status ? NULL : made(w, hm_op_cumprod(hm_t(x), w->dim, &out), &out);
}

static hm_tensor *cast(terms *w, hm_tensor *x, int dtype) {
  hm_tensor *out = NULL;
  return w->status ? NULL : made(w, hm_to(x, dtype, -1, false, &out), &out);
}

/* One place of each of x's lines, filled. */
static hm_tensor *place(terms *w, hm_tensor *x, double value) {
  int64_t shape[HM_MAX_NDIM];
  if (w->status) return NULL;
  for (int d = 0; d < x->ndim; d++) shape[d] = d == w->dim ? 1 : x->shape[d];
  hm_tensor *out = NULL, *same = NULL;
  if (!made(w, hm_empty(x->ndim, shape, x->dtype, hm_tensor_device(x), &out), &out)) return NULL;
  w->status = hm_op_fill_(hm_t(out), hm_f(value), &same);
  hm_tensor_release(same);
  return out;
}

/* x moved by one place along its lines, to the right or to the left; value comes in. */
static hm_tensor *moved(terms *w, hm_tensor *x, bool right, double value) {
  if (w->status) return NULL;
  const int64_t n = x->shape[w->dim];
  hm_tensor *in = place(w, x, value), *rest = narrow(w, x, right ? 0 : 1, n - 1);
  return right ? cat(w, in, rest) : cat(w, rest, in);
}

/* The gradient by x of L = moved(cumprod(x), right, 1), from that of L.  all: cumprod(x). */
static hm_tensor *through_products(terms *w, hm_tensor *by_l, hm_tensor *x, hm_tensor *all) {
  hm_tensor *g = moved(w, by_l, false, 0), *out = NULL;
  if (w->status) return NULL;
  return made(w, hm_op_cumprod_backward(hm_t(g), hm_t(x), hm_t(all), w->dim, &out), &out);
}

/* y_k = b_k + a_k * y_(k-1) along the lines, y_0 = 0. */
static hm_tensor *recurrence(terms *w, hm_tensor *a, hm_tensor *b) {
  if (w->status) return NULL;
  const int64_t n = b->shape[w->dim];
  hm_tensor *rate = hm_tensor_retain(a), *y = hm_tensor_retain(b);
  for (int64_t far = 1; far < n && !w->status; far *= 2) {
    terms r = {.dim = w->dim};
    hm_tensor *later = narrow(&r, rate, far, n - far), *earlier = narrow(&r, rate, 0, n - far);
    hm_tensor *reach = mul(&r, later, narrow(&r, y, 0, n - far));
    hm_tensor *new_y = cat(&r, narrow(&r, y, 0, far), add(&r, narrow(&r, y, far, n - far), reach));
    hm_tensor *new_rate = cat(&r, narrow(&r, rate, 0, far), mul(&r, later, earlier));
    w->status = r.status;
    if (!r.status) {
      hm_tensor_release(y);
      hm_tensor_release(rate);
      y = hm_tensor_retain(new_y);
      rate = hm_tensor_retain(new_rate);
    }
    drop(&r);
  }
  hm_tensor_release(rate);
  return made(w, HM_OK, &y);
}

/* The results, in the dtypes that the call is to give. */
static void give(terms *w, hm_opcall *c, hm_tensor *by_g, hm_tensor *by_x) {
  if (!w->status) w->status = hm_to(by_g, c->spec[0].dtype, -1, false, &c->out[0]);
  if (!w->status) w->status = hm_to(by_x, c->spec[1].dtype, -1, false, &c->out[1]);
}

/* The dtype to compute in. */
static int wide(const hm_opcall *c) { return c->dtype == HM_F64 ? HM_F64 : HM_F32; }

/* ====== prod ====== */

/* h, g and x with lines along w->dim, g with one place for each; by_g and by_x in the same shapes. */
static void prod_lines(terms *w, hm_tensor *h, hm_tensor *g, hm_tensor *x, hm_tensor **by_g, hm_tensor **by_x) {
  hm_tensor *back = flip(w, x), *all = cumprod(w, x), *all_back = cumprod(w, back), *out = NULL;
  hm_tensor *left = moved(w, all, true, 1), *right_back = moved(w, all_back, true, 1);
  hm_tensor *right = flip(w, right_back), *weighted = mul(w, h, g);
  hm_tensor *each = mul(w, mul(w, h, left), right);
  *by_g = w->status ? NULL : made(w, hm_op_sum(hm_t(each), 1, &w->dim, true, &out), &out);
  hm_tensor *along = through_products(w, mul(w, weighted, right), x, all);
  hm_tensor *against = through_products(w, flip(w, mul(w, weighted, left)), back, all_back);
  *by_x = add(w, along, flip(w, against));
}

/* prod_backward_backward(grad, g, x, dim?, keepdim) -> by g, by x */
int hm__prod_backward_backward(hm_opcall *c) {
  hm_tensor *const g = c->in[1].t, *const x = c->in[2].t;
  hm_attr *dim = &c->attr[0];
  int64_t lines[HM_MAX_NDIM] = {x->numel}, ends[HM_MAX_NDIM] = {1};
  int ndim = 1;
  if (x->ndim == 0) dim->i = HM_NONE;
  if (dim->i != HM_NONE) {
    const int status = hm__wrap_dim(c, &dim->i, x->ndim);
    if (status) return status;
    ndim = x->ndim;
    for (int d = 0; d < ndim; d++) lines[d] = x->shape[d], ends[d] = d == dim->i ? 1 : x->shape[d];
  }
  terms w = {.dim = dim->i == HM_NONE ? 0 : dim->i};
  hm_tensor *h = reshape(&w, cast(&w, c->in[0].t, wide(c)), ndim, lines), *by_g = NULL, *by_x = NULL;
  hm_tensor *flat = reshape(&w, cast(&w, x, wide(c)), ndim, lines);
  hm_tensor *factor = reshape(&w, cast(&w, g, wide(c)), ndim, ends);
  if (!w.status && lines[w.dim] == 0) { /* nothing is multiplied: sums of nothing */
    hm_tensor *out = NULL;
    by_x = mul(&w, h, flat);
    by_g = w.status ? NULL : made(&w, hm_op_sum(hm_t(by_x), 1, &w.dim, true, &out), &out);
  } else {
    prod_lines(&w, h, factor, flat, &by_g, &by_x);
  }
  by_g = reshape(&w, by_g, g->ndim, g->shape);
  give(&w, c, by_g, reshape(&w, by_x, x->ndim, x->shape));
  drop(&w);
  return w.status;
}

/* ====== cumprod ====== */

static void cumprod_lines(terms *w, hm_tensor *h, hm_tensor *g, hm_tensor *x, hm_tensor **by_g, hm_tensor **by_x) {
  hm_tensor *all = cumprod(w, x), *left = moved(w, all, true, 1);
  hm_tensor *s = flip(w, recurrence(w, moved(w, flip(w, x), true, 1), flip(w, g)));
  hm_tensor *t = recurrence(w, x, mul(w, h, left));
  *by_g = t;
  *by_x = add(w, through_products(w, mul(w, h, s), x, all), mul(w, moved(w, t, true, 0), s));
}

/* cumprod_backward_backward(grad, g, x, dim) -> by g, by x */
int hm__cumprod_backward_backward(hm_opcall *c) {
  hm_tensor *const g = c->in[1].t, *const x = c->in[2].t;
  if (x->ndim > 0) {
    const int status = hm__wrap_dim(c, &c->attr[0].i, x->ndim);
    if (status) return status;
  }
  const int64_t one = 1;
  const int ndim = x->ndim ? x->ndim : 1;
  const int64_t *shape = x->ndim ? x->shape : &one;
  terms w = {.dim = x->ndim ? c->attr[0].i : 0};
  hm_tensor *h = reshape(&w, cast(&w, c->in[0].t, wide(c)), ndim, shape), *by_g = NULL, *by_x = NULL;
  hm_tensor *factor = reshape(&w, cast(&w, g, wide(c)), ndim, shape);
  hm_tensor *lines = reshape(&w, cast(&w, x, wide(c)), ndim, shape);
  if (x->numel == 0) by_g = by_x = mul(&w, mul(&w, h, factor), lines);
  else cumprod_lines(&w, h, factor, lines, &by_g, &by_x);
  by_g = reshape(&w, by_g, x->ndim, x->shape);
  give(&w, c, by_g, reshape(&w, by_x, x->ndim, x->shape));
  drop(&w);
  return w.status;
}
