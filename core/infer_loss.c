/*
 * infer_loss.c -- the shape and layout rules of nll_loss and its gradients.
 *
 * Log probabilities are [N, C] or [N, C, d...], targets [N] or [N, d...], weights one number for each class.  The loss and g are 0-dim for a
 * mean or sum, and have the targets' shape where nothing is reduced.
 *
 * Called by dispatch.c through the op table.
 */
#include <string.h>

#include "op.h"

#define NAME(c) ((c)->info->name)

enum { REDUCTION_NONE = 2 };

/* A shape, be it a tensor's or an attribute's. */
typedef struct shape {
  int ndim;
  const int64_t *size;
} shape;

static shape shape_of(const hm_tensor *t) { return (shape){t->ndim, t->shape}; }

static const char *text_of(const hm_tensor *t, char buffer[160]) { return hm_describe(t, buffer, 160); }

/* Targets must have x's shape without the classes. */
static int check_targets(const hm_opcall *c, shape x, const hm_tensor *target) {
  bool fit = x.ndim >= 2 && target->ndim == x.ndim - 1 && target->shape[0] == x.size[0];
  for (int d = 1; fit && d < target->ndim; d++) fit = target->shape[d] == x.size[d + 1];
  if (fit) return HM_OK;
  char a[160], b[160] = "of the given shape";
  if (c->in[0].kind == HM_ARG_TENSOR && c->in[0].t->shape == x.size) text_of(c->in[0].t, b);
  return hm_fail(
      HM_ERR_SHAPE,
      "%s: log probabilities must be [N, C] or [N, C, d...] and targets [N] or [N, d...]: got %s and %s\n  hint: targets are class numbers from 0, not one-hot rows",
      NAME(c), b, text_of(target, a));
}

static int check_weight(hm_opcall *c, int at, int64_t classes) {
  if (c->in[at].kind != HM_ARG_TENSOR) return HM_OK;
  const hm_tensor *w = c->in[at].t;
  char text[160];
  if (w->ndim != 1 || w->shape[0] != classes)
    return hm_fail(HM_ERR_SHAPE, "%s: weight must be [%lld], one number for each class, got %s", NAME(c),
                   (long long)classes, text_of(w, text));
  if (!hm_dtype_is_float(w->dtype))
    return hm_fail(HM_ERR_DTYPE, "%s: weight must have a floating dtype, got %s", NAME(c), text_of(w, text));
  return hm__want_contiguous(c, at);
}

/* g and the total of the weights, for nll_loss_backward. */
static int check_gradient(const hm_opcall *c, const hm_tensor *target, int64_t reduction) {
  const hm_tensor *g = c->in[0].t;
  char a[160], b[160];
  const bool none = reduction == REDUCTION_NONE;
  const bool fit = none ? g->ndim == target->ndim && !memcmp(g->shape, target->shape, sizeof(int64_t) * (size_t)g->ndim)
                        : g->numel == 1;
  if (fit) return HM_OK;
  return hm_fail(HM_ERR_SHAPE, "%s: g must have %s: g is %s, targets are %s", NAME(c),
                 none ? "the targets' shape" : "one element", text_of(g, a), text_of(target, b));
}

static int check_total(const hm_opcall *c, int at) {
  char text[160];
  if (c->in[at].t->numel == 1) return HM_OK;
  return hm_fail(HM_ERR_SHAPE, "%s: total must have one element, got %s", NAME(c), text_of(c->in[at].t, text));
}

static void loss_spec(hm_out_spec *s, const hm_tensor *target, int64_t reduction) {
  s->ndim = reduction == REDUCTION_NONE ? target->ndim : 0;
  memcpy(s->shape, target->shape, sizeof(int64_t) * (size_t)s->ndim);
}

/* nll_loss(x, target, weight?, reduction, ..), _backward(g, target, weight?, total, shape, reduction, ..), _backward_by_g(grad, target, weight?,
 * total, reduction, ..) */
int hm__infer_nll_loss(hm_opcall *c) {
  const bool backward = c->op == HM_OP_NLL_LOSS_BACKWARD;
  const shape x = backward ? (shape){c->attr[0].n, c->attr[0].v} : shape_of(c->in[0].t);
  const int64_t reduction = c->attr[backward ? 1 : 0].i;
  const hm_tensor *target = c->in[1].t;
  int status = check_targets(c, x, target);
  if (!status) status = check_weight(c, 2, x.size[1]);
  if (!status && c->op != HM_OP_NLL_LOSS) status = check_total(c, 3);
  if (!status && backward) status = check_gradient(c, target, reduction);
  if (status) return status;
  if (backward) {
    c->spec[0].ndim = x.ndim;
    memcpy(c->spec[0].shape, x.size, sizeof(int64_t) * (size_t)x.ndim);
    return HM_OK;
  }
  loss_spec(&c->spec[0], target, reduction);
  if (c->op == HM_OP_NLL_LOSS) c->spec[1].ndim = 0;
  return HM_OK;
}
