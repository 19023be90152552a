/*
 * composite_loss.c -- the second derivatives of cross_entropy, made of other ops.
 *
 * Gradients of the op cross_entropy_backward, which is s * (P - q): P is the softmax of the logits along the classes (dim 2), q the smoothed
 * targets, s each row's share of g (divided by the number of valid targets for a mean; 0 for ignored rows).  q does not depend on the
 * logits, so that
 *   by the logits   s * (P * grad - P * sum(P * grad over the classes))
 *   by g            grad * cross_entropy_backward with g = 1, summed to g's shape
 * Everything is computed in float32 (float64 for float64 logits) and rounded once.
 *
 * Called by composite.c.  Temporaries belong to the call that makes them.
 */
#include "op.h"

enum { MEAN, SUM, NONE };
enum { CLASSES = 1 }; /* the dim of the classes, 0-based */

/* The dtype to compute in. */
static int wide(const hm_opcall *c) {
  return c->in[0].t->dtype == HM_F64 || c->in[1].t->dtype == HM_F64 ? HM_F64 : HM_F32;
}

static void release_all(hm_tensor **t, int n) {
  for (int i = 0; i < n; i++) hm_tensor_release(t[i]);
}

/* Sum along the classes, kept as a dim of size 1. */
static int sum_classes(hm_tensor *x, hm_tensor **out) {
  return hm_op_sum(hm_t(x), 1, (const int64_t[]){CLASSES}, true, out);
}

/* s: what each row's gradient is multiplied by, [N, 1, d...]. */
static int row_scale(hm_tensor *g, hm_tensor *target, int64_t reduction, int64_t ignore, int dtype, hm_tensor **out) {
  enum { TAKES_PART, COUNT, SHARE, CHOSEN, ROWS };
  hm_tensor *t[ROWS] = {NULL};
  hm_arg share = hm_t(g);
  *out = NULL;
  int status = hm_op_ne(hm_t(target), hm_i(ignore), &t[TAKES_PART]);
  if (!status && reduction == MEAN) {
    const hm_attr all[] = {{.n = 0}, {.i = false}};
    status = hm_call_as(HM_OP_SUM, (const hm_arg[]){hm_t(t[TAKES_PART])}, all, dtype, &t[COUNT]);
    if (!status) status = hm_call_as(HM_OP_DIV, (const hm_arg[]){hm_t(g), hm_t(t[COUNT])}, NULL, dtype, &t[SHARE]);
    share = hm_t(t[SHARE]);
  }
  if (!status)
    status = hm_call_as(HM_OP_WHERE, (const hm_arg[]){hm_t(t[TAKES_PART]), share, hm_f(0)}, NULL, dtype, &t[CHOSEN]);
  if (!status) status = hm_op_unsqueeze(hm_t(t[CHOSEN]), CLASSES, out);
  release_all(t, ROWS);
  return status;
}

/* cross_entropy_backward_by_x(grad, g, x, target, lse, reduction, ignore_index) */
int hm__cross_entropy_by_x(hm_opcall *c) {
  enum { P, WEIGHTED, TOTAL, PART, INNER, SCALE, RESULTS };
  hm_tensor *t[RESULTS] = {NULL}, *const grad = c->in[0].t, *const x = c->in[2].t;
  const int dtype = x->dtype == HM_F64 ? HM_F64 : wide(c);
  const hm_attr classes = {.i = CLASSES};
  int status = hm_call_as(HM_OP_SOFTMAX, (const hm_arg[]){hm_t(x)}, &classes, dtype, &t[P]);
  if (!status) status = hm_op_mul(hm_t(t[P]), hm_t(grad), &t[WEIGHTED]);
  if (!status) status = sum_classes(t[WEIGHTED], &t[TOTAL]);
  if (!status) status = hm_op_mul(hm_t(t[P]), hm_t(t[TOTAL]), &t[PART]);
  if (!status) status = hm_op_sub(hm_t(t[WEIGHTED]), hm_t(t[PART]), &t[INNER]);
  if (!status) status = row_scale(c->in[1].t, c->in[3].t, c->attr[0].i, c->attr[1].i, dtype, &t[SCALE]);
  if (!status)
    status =
        hm_call_as(HM_OP_MUL, (const hm_arg[]){hm_t(t[INNER]), hm_t(t[SCALE])}, NULL, c->spec[0].dtype, &c->out[0]);
  release_all(t, RESULTS);
  return status;
}

/* cross_entropy_backward_by_g(grad, x, target, lse, reduction, ignore_index, label_smoothing) */
int hm__cross_entropy_by_g(hm_opcall *c) {
  enum { ONE, UNIT, PRODUCT, RESULTS };
  hm_tensor *t[RESULTS] = {NULL}, *filled = NULL, *const target = c->in[2].t;
  const bool none = c->attr[0].i == NONE;
  const int dtype = wide(c);
  int status = hm_empty(none ? target->ndim : 0, target->shape, dtype, c->device, &t[ONE]);
  if (!status) status = hm_op_fill_(hm_t(t[ONE]), hm_f(1), &filled);
  hm_tensor_release(filled);
  if (!status)
    status = hm_call_as(HM_OP_CROSS_ENTROPY_BACKWARD, (const hm_arg[]){hm_t(t[ONE]), c->in[1], c->in[2], c->in[3]},
                        c->attr, dtype, &t[UNIT]);
  if (!status) status = hm_op_mul(hm_t(t[UNIT]), c->in[0], &t[PRODUCT]);
  const hm_attr over[] = {{.n = none ? 1 : 0, .v = {CLASSES}}, {.i = false}};
  if (!status) status = hm_call_as(HM_OP_SUM, (const hm_arg[]){hm_t(t[PRODUCT])}, over, c->spec[0].dtype, &c->out[0]);
  release_all(t, RESULTS);
  return status;
}
