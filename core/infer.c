/*
 * infer.c -- the shape and layout rules of each family of ops.
 *
 * A rule reads the operands of a call (op.h), checks them, completes attributes (dims wrapped to >= 0, defaults spelled out), asks for the memory
 * order that the kernel needs, and writes one hm_out_spec per output.  dtypes are already settled (autocast.c).
 * A message names the op, what was expected, what came, and what to do.
 */
#include <string.h>

#include "op.h"

#define NAME(c) ((c)->info->name)

static const hm_tensor *operand(const hm_opcall *c, int i) { return c->in[i].t; }

static const char *text_of(const hm_tensor *t, char buffer[160]) { return hm_describe(t, buffer, 160); }

static void spec_shape(hm_out_spec *s, int ndim, const int64_t *shape) {
  s->ndim = ndim;
  memcpy(s->shape, shape, sizeof(int64_t) * (size_t)ndim);
}

static int check_rank(const hm_opcall *c, int i, int ndim, const char *meaning) {
  const hm_tensor *t = operand(c, i);
  if (t->ndim == ndim) return HM_OK;
  char text[160];
  return hm_fail(HM_ERR_SHAPE, "%s: %s must have %d dims %s, got %s", NAME(c), c->info->in[i].name, ndim, meaning,
                 text_of(t, text));
}

/* ====== Elementwise ====== */

int hm_broadcast(int na, const int64_t *a, int nb, const int64_t *b, int *n, int64_t *out) {
  *n = na > nb ? na : nb;
  for (int d = 0; d < *n; d++) {
    const int ia = d - (*n - na), ib = d - (*n - nb);
    const int64_t sa = ia < 0 ? 1 : a[ia], sb = ib < 0 ? 1 : b[ib];
    if (sa != sb && sa != 1 && sb != 1) return HM_ERR_SHAPE;
    out[d] = sa == 1 ? sb : sa;
  }
  return HM_OK;
}

/* True if t fills its memory without gaps or repeats, in any order of dims. */
static bool is_dense(const hm_tensor *t) {
  int64_t expect = 1;
  uint32_t seen = 0;
  for (int k = 0; k < t->ndim; k++) {
    int best = -1;
    for (int d = 0; d < t->ndim; d++)
      if (!(seen >> d & 1) && (best < 0 || t->stride[d] < t->stride[best] ||
                               (t->stride[d] == t->stride[best] && t->shape[d] < t->shape[best])))
        best = d;
    seen |= 1u << best;
    if (t->shape[best] == 1) continue;
    if (t->stride[best] != expect) return false;
    expect *= t->shape[best];
  }
  return true;
}

static bool same_shape(const hm_tensor *t, int ndim, const int64_t *shape) {
  return t->ndim == ndim && !memcmp(t->shape, shape, sizeof(int64_t) * (size_t)ndim);
}

/* The memory order of the first operand that has the output's shape. */
static void keep_layout(const hm_opcall *c, hm_out_spec *s) {
  for (int i = 0; i < c->info->n_in; i++) {
    if (c->in[i].kind != HM_ARG_TENSOR || !same_shape(c->in[i].t, s->ndim, s->shape)) continue;
    if (!hm_is_contiguous(c->in[i].t) && is_dense(c->in[i].t)) {
      s->has_stride = true;
      memcpy(s->stride, c->in[i].t->stride, sizeof(int64_t) * (size_t)s->ndim);
    }
    return;
  }
}

static int broadcast_failed(const hm_opcall *c, int i) {
  char a[160], b[160];
  int first = 0;
  while (first < i && c->in[first].kind != HM_ARG_TENSOR) first++;
  return hm_fail(
      HM_ERR_SHAPE,
      "%s: shapes do not broadcast: %s is %s, %s is %s\n  hint: sizes must be equal or 1, counted from the last dim",
      NAME(c), c->info->in[first].name, text_of(c->in[first].t, a), c->info->in[i].name, text_of(c->in[i].t, b));
}

/* An in-place result must fit the destination's shape and kind of dtype. */
static int check_destination(const hm_opcall *c, const hm_out_spec *s) {
  const hm_tensor *t = c->in[0].t;
  char text[160];
  if (!same_shape(t, s->ndim, s->shape))
    return hm_fail(
        HM_ERR_SHAPE,
        "%s_: the result does not fit the destination %s: operands broadcast to more\n  hint: use the form that makes a new tensor, %s",
        NAME(c), text_of(t, text), NAME(c));
  if (hm_dtype_kind(s->dtype) > hm_dtype_kind(t->dtype))
    return hm_fail(HM_ERR_DTYPE,
                   "%s_: a %s result cannot be kept in %s\n  hint: use the form that makes a new tensor, %s", NAME(c),
                   hm_dtype_name(s->dtype), text_of(t, text), NAME(c));
  return HM_OK;
}

int hm__infer_elementwise(hm_opcall *c) {
  hm_out_spec *s = &c->spec[0];
  s->ndim = 0;
  for (int i = 0; i < c->info->n_in; i++) {
    if (c->in[i].kind != HM_ARG_TENSOR) continue;
    const hm_tensor *t = c->in[i].t;
    if (s->ndim == t->ndim && !memcmp(s->shape, t->shape, sizeof(int64_t) * (size_t)t->ndim)) continue;
    int64_t shape[HM_MAX_NDIM];
    int ndim;
    if (hm_broadcast(s->ndim, s->shape, t->ndim, t->shape, &ndim, shape)) return broadcast_failed(c, i);
    spec_shape(s, ndim, shape);
  }
  if (c->inplace) return check_destination(c, s);
  keep_layout(c, s);
  return HM_OK;
}

/* ====== Reductions ====== */

/* Wraps a dims attribute, refuses repeats; returns the set as a bit mask (all dims when none is given). */
static int wrap_dims(hm_opcall *c, hm_attr *dims, int ndim, uint32_t *mask) {
  *mask = 0;
  if (dims->n == 0) {
    *mask = (1u << ndim) - 1;
    return HM_OK;
  }
  if (ndim == 0 && dims->n == 1 && (dims->v[0] == 0 || dims->v[0] == -1)) {
    dims->n = 0;
    return HM_OK;
  }
  for (int k = 0; k < dims->n; k++) {
    const int status = hm__wrap_dim(c, &dims->v[k], ndim);
    if (status) return status;
    if (*mask >> dims->v[k] & 1)
      return hm_fail(HM_ERR_ARG, "%s: dim %lld is given twice", NAME(c), (long long)dims->v[k] + 1);
    *mask |= 1u << dims->v[k];
  }
  return HM_OK;
}

static void reduced_spec(const hm_tensor *t, uint32_t mask, bool keepdim, hm_out_spec *s) {
  s->ndim = 0;
  for (int d = 0; d < t->ndim; d++) {
    if (!(mask >> d & 1)) s->shape[s->ndim++] = t->shape[d];
    else if (keepdim) s->shape[s->ndim++] = 1;
  }
}

/* Ops without a value for nothing. */
static bool needs_elements(int op) {
  return op == HM_OP_AMAX || op == HM_OP_AMIN || op == HM_OP_MAX_DIM || op == HM_OP_MIN_DIM || op == HM_OP_ARGMAX ||
         op == HM_OP_ARGMIN;
}

static int check_elements(const hm_opcall *c, const hm_tensor *t, uint32_t mask) {
  if (!needs_elements(c->op)) return HM_OK;
  for (int d = 0; d < t->ndim; d++)
    if ((mask >> d & 1) && t->shape[d] == 0) {
      char text[160];
      return hm_fail(HM_ERR_SHAPE, "%s: nothing to choose from: dim %d of %s is empty", NAME(c), d + 1,
                     text_of(t, text));
    }
  return HM_OK;
}

int hm__reduce_spec(hm_opcall *c, hm_attr *dims, bool keepdim) {
  const hm_tensor *t = operand(c, 0);
  uint32_t mask;
  int status = wrap_dims(c, dims, t->ndim, &mask);
  if (!status) status = check_elements(c, t, mask);
  if (!status) reduced_spec(t, mask, keepdim, &c->spec[0]);
  return status;
}

void hm__widen_integers(hm_opcall *c) {
  if (!hm_dtype_is_float(c->dtype) && c->out_dtype == HM_NONE) c->spec[0].dtype = HM_I64;
}

int hm__infer_reduce(hm_opcall *c) {
  const int status = hm__reduce_spec(c, &c->attr[0], c->attr[1].i);
  if (c->op == HM_OP_SUM) hm__widen_integers(c);
  return status;
}

int hm__infer_reduce_index(hm_opcall *c) {
  const hm_tensor *t = operand(c, 0);
  uint32_t mask = (1u << t->ndim) - 1;
  int status = HM_OK;
  if (c->attr[0].i != HM_NONE && t->ndim > 0) {
    status = hm__wrap_dim(c, &c->attr[0].i, t->ndim);
    mask = 1u << c->attr[0].i;
  } else if (!c->info->attr[0].optional && t->ndim == 0) {
    c->attr[0].i = 0;
  }
  if (!status) status = check_elements(c, t, mask);
  if (status) return status;
  for (int i = 0; i < c->info->n_out; i++) reduced_spec(t, mask, c->attr[1].i, &c->spec[i]);
  return HM_OK;
}

int hm__infer_linear_backward_bias(hm_opcall *c) {
  const hm_tensor *t = operand(c, 0);
  if (t->ndim < 1) return hm_fail(HM_ERR_SHAPE, "%s: g must have at least one dim", NAME(c));
  spec_shape(&c->spec[0], 1, &t->shape[t->ndim - 1]);
  return HM_OK;
}

int hm__infer_conv2d_backward_bias(hm_opcall *c) {
  const int status = check_rank(c, 0, 4, "[N, O, H, W]");
  if (status) return status;
  spec_shape(&c->spec[0], 1, &operand(c, 0)->shape[1]);
  return HM_OK;
}

int hm__infer_index(hm_opcall *c) { /* select_backward(g, index, shape, dim, keepdim) */
  const hm_tensor *g = operand(c, 0), *index = operand(c, 1);
  const int ndim = c->attr[0].n;
  if (ndim > 0) {
    const int status = hm__wrap_dim(c, &c->attr[1].i, ndim);
    if (status) return status;
  }
  if (!same_shape(g, index->ndim, index->shape)) {
    char a[160], b[160];
    return hm_fail(HM_ERR_SHAPE, "%s: g and index must have one shape: %s and %s", NAME(c), text_of(g, a),
                   text_of(index, b));
  }
  spec_shape(&c->spec[0], ndim, c->attr[0].v);
  return HM_OK;
}

/* ====== Softmax and losses ====== */

int hm__infer_norm(hm_opcall *c) {
  const hm_tensor *t = operand(c, 0);
  if (t->ndim == 0) c->attr[0].i = 0;
  else {
    const int status = hm__wrap_dim(c, &c->attr[0].i, t->ndim);
    if (status) return status;
  }
  if (c->info->n_in == 2 && !same_shape(operand(c, 1), t->ndim, t->shape)) {
    char a[160], b[160];
    return hm_fail(HM_ERR_SHAPE, "%s: g and out must have one shape: %s and %s", NAME(c), text_of(t, a),
                   text_of(operand(c, 1), b));
  }
  spec_shape(&c->spec[0], t->ndim, t->shape);
  keep_layout(c, &c->spec[0]);
  return HM_OK;
}

static int check_targets(const hm_opcall *c, const hm_tensor *x, const hm_tensor *target) {
  char a[160], b[160];
  bool fit = x->ndim >= 2 && target->ndim == x->ndim - 1 && target->shape[0] == x->shape[0];
  for (int d = 1; fit && d < target->ndim; d++) fit = target->shape[d] == x->shape[d + 1];
  if (fit) return HM_OK;
  return hm_fail(
      HM_ERR_SHAPE,
      "%s: logits must be [N, C] or [N, C, d...] and targets [N] or [N, d...]: got %s and %s\n  hint: targets are class numbers from 0, not one-hot rows",
      NAME(c), text_of(x, a), text_of(target, b));
}

int hm__infer_loss(hm_opcall *c) {
  const bool backward = c->op == HM_OP_CROSS_ENTROPY_BACKWARD;
  const hm_tensor *x = operand(c, backward ? 1 : 0), *target = operand(c, backward ? 2 : 1);
  int status = check_targets(c, x, target);
  if (!status) status = hm__want_contiguous(c, backward ? 2 : 1);
  if (status) return status;
  target = operand(c, backward ? 2 : 1);
  if (backward) {
    spec_shape(&c->spec[0], x->ndim, x->shape);
    return HM_OK;
  }
  c->spec[0].ndim = 0;
  if (c->attr[0].i == 2) spec_shape(&c->spec[0], target->ndim, target->shape);
  spec_shape(&c->spec[1], target->ndim, target->shape);
  return HM_OK;
}

/* ====== Matrix products ====== */

/* A matrix operand must have unit stride in one of its last two dims. */
static int want_matrix(hm_opcall *c, int i) {
  const hm_tensor *t = operand(c, i);
  const int64_t *s = &t->stride[t->ndim - 2], *n = &t->shape[t->ndim - 2];
  const bool rows = s[1] == 1 && (s[0] >= n[1] || n[0] == 1), columns = s[0] == 1 && (s[1] >= n[0] || n[1] == 1);
  return rows || columns ? HM_OK : hm__want_contiguous(c, i);
}

int hm__infer_matmul(hm_opcall *c) {
  const hm_tensor *a = operand(c, 0), *b = operand(c, 1);
  char ta[160], tb[160];
  if (a->ndim < 1 || b->ndim < 1)
    return hm_fail(HM_ERR_SHAPE,
                   "matmul: operands must have at least one dim: x is %s, y is %s\n  hint: use * for numbers",
                   text_of(a, ta), text_of(b, tb));
  const int64_t k = a->shape[a->ndim - 1];
  if (k != b->shape[b->ndim - 2])
    return hm_fail(HM_ERR_SHAPE,
                   "matmul: inner sizes differ: x is %s, y is %s\n  %lld (dim %d of x) must equal %lld (dim %d of y)",
                   text_of(a, ta), text_of(b, tb), (long long)k, a->ndim, (long long)b->shape[b->ndim - 2],
                   b->ndim - 1);
  hm_out_spec *s = &c->spec[0];
  if (hm_broadcast(a->ndim - 2, a->shape, b->ndim - 2, b->shape, &s->ndim, s->shape))
    return hm_fail(HM_ERR_SHAPE, "matmul: batch dims do not broadcast: x is %s, y is %s", text_of(a, ta),
                   text_of(b, tb));
  s->shape[s->ndim++] = a->shape[a->ndim - 2];
  s->shape[s->ndim++] = b->shape[b->ndim - 1];
  int status = want_matrix(c, 0);
  if (!status) status = want_matrix(c, 1);
  return status;
}

static int linear_mismatch(const hm_opcall *c, int64_t got, int dim_x, int64_t want, int dim_w) {
  char a[160], b[160];
  return hm_fail(HM_ERR_SHAPE,
                 "%s: sizes differ: %s is %s, %s is %s\n  %lld (dim %d of %s) must equal %lld (dim %d of %s)", NAME(c),
                 c->info->in[0].name, text_of(operand(c, 0), a), c->info->in[1].name, text_of(operand(c, 1), b),
                 (long long)got, dim_x, c->info->in[0].name, (long long)want, dim_w, c->info->in[1].name);
}

static int infer_linear_weight(hm_opcall *c) {
  const hm_tensor *g = operand(c, 0), *x = operand(c, 1);
  bool fit = g->ndim == x->ndim && g->ndim >= 1;
  for (int d = 0; fit && d < g->ndim - 1; d++) fit = g->shape[d] == x->shape[d];
  if (!fit) return linear_mismatch(c, g->shape[0], 1, x->shape[0], 1);
  const int64_t shape[2] = {g->shape[g->ndim - 1], x->shape[x->ndim - 1]};
  spec_shape(&c->spec[0], 2, shape);
  if (c->op == HM_OP_LINEAR_BACKWARD_PARAMS) {
    spec_shape(&c->spec[1], 1, shape);
    c->spec[1].dtype = c->spec[0].dtype;
  }
  const int status = hm__want_contiguous(c, 0);
  return status ? status : hm__want_contiguous(c, 1);
}

static bool is_linear_forward(int op) {
  return op == HM_OP_LINEAR || op == HM_OP_LINEAR_RELU || op == HM_OP_LINEAR_GELU_TANH;
}

/* The third operand: a bias, or what the layer below kept of its activation. */
static int check_linear_third(const hm_opcall *c) {
  if (c->info->n_in < 3 || c->in[2].kind != HM_ARG_TENSOR) return HM_OK;
  const hm_tensor *w = operand(c, 1), *third = operand(c, 2);
  char text[160];
  if (is_linear_forward(c->op)) {
    if (same_shape(third, 1, &w->shape[0])) return HM_OK;
    return hm_fail(HM_ERR_SHAPE, "%s: bias must be [%lld], got %s", NAME(c), (long long)w->shape[0],
                   text_of(third, text));
  }
  if (same_shape(third, c->spec[0].ndim, c->spec[0].shape)) return HM_OK;
  return hm_fail(HM_ERR_SHAPE, "%s: %s must have the shape of the result, got %s", NAME(c), c->info->in[2].name,
                 text_of(third, text));
}

/* The second output of a forward op: what linear alone gives, or as many bytes as the backend wants. */
static int infer_linear_second(hm_opcall *c) {
  if (c->op == HM_OP_LINEAR_GELU_TANH) spec_shape(&c->spec[1], c->spec[0].ndim, c->spec[0].shape);
  if (c->op != HM_OP_LINEAR_RELU) return HM_OK;
  const hm_backend *b = hm_device_backend(c->device);
  if (!b) return HM_ERR_DEVICE;
  int64_t bytes = 0;
  if (b->aux_bytes && c->grad) {
    hm_kernel_call k = {.op = c->op, .compute = c->compute, .n_in = c->info->n_in, .n_out = 1};
    for (int i = 0; i < k.n_in; i++) {
      if (c->in[i].kind == HM_ARG_TENSOR) hm__view_of(c->in[i].t, &k.in[i]);
      else k.in[i].flags = HM_VIEW_ABSENT;
    }
    hm__plain_view(NULL, c->spec[0].dtype, c->spec[0].ndim, c->spec[0].shape, &k.out[0]);
    const int status = b->aux_bytes(&k, &bytes);
    if (status) return status;
  }
  spec_shape(&c->spec[1], 1, &bytes);
  return HM_OK;
}

int hm__infer_linear(hm_opcall *c) {
  if (c->op == HM_OP_LINEAR_BACKWARD_WEIGHT || c->op == HM_OP_LINEAR_BACKWARD_PARAMS) return infer_linear_weight(c);
  const hm_tensor *x = operand(c, 0), *w = operand(c, 1);
  char text[160];
  if (x->ndim < 1)
    return hm_fail(HM_ERR_SHAPE, "%s: %s must be [..., features], got %s", NAME(c), c->info->in[0].name,
                   text_of(x, text));
  int status = check_rank(c, 1, 2, "[out, in]");
  if (status) return status;
  const int in = is_linear_forward(c->op) ? 1 : 0; /* which dim of the weight meets x's last dim */
  if (x->shape[x->ndim - 1] != w->shape[in])
    return linear_mismatch(c, x->shape[x->ndim - 1], x->ndim, w->shape[in], in + 1);
  spec_shape(&c->spec[0], x->ndim, x->shape);
  c->spec[0].shape[x->ndim - 1] = w->shape[1 - in];
  status = check_linear_third(c);
  for (int i = 0; i < c->info->n_in && !status; i++) status = hm__want_contiguous(c, i);
  return status ? status : infer_linear_second(c);
}

/* ====== Convolution ====== */

/* Channels of x, weight and groups must agree.  w: shape of the weight. */
static int check_channels(const hm_opcall *c, const hm_tensor *x, const int64_t *w, int64_t groups) {
  char text[160];
  if (groups < 1 || w[0] % groups)
    return hm_fail(HM_ERR_ARG, "%s: groups is %lld, which must divide the %lld output channels", NAME(c),
                   (long long)groups, (long long)w[0]);
  if (x->shape[1] == w[1] * groups) return HM_OK;
  return hm_fail(
      HM_ERR_SHAPE,
      "%s: channels differ: x is %s, weight is [%lld,%lld,%lld,%lld] with groups %lld\n  %lld (dim 2 of x) must equal %lld (dim 2 of weight times groups)",
      NAME(c), text_of(x, text), (long long)w[0], (long long)w[1], (long long)w[2], (long long)w[3], (long long)groups,
      (long long)x->shape[1], (long long)(w[1] * groups));
}

/* The shape that conv2d gives for x and weight; attr points at stride. */
static int conv_shape(const hm_opcall *c, const hm_tensor *x, const int64_t *w, const hm_attr *attr, int64_t *out) {
  int status = check_channels(c, x, w, attr[3].i);
  out[0] = x->shape[0];
  out[1] = w[0];
  for (int d = 0; d < 2 && !status; d++) {
    const hm_window window = {w[d + 2], attr[0].v[d], attr[1].v[d], attr[2].v[d], false};
    status = hm__window_output(c, x, d + 2, &window, &out[d + 2]);
  }
  return status;
}

static int infer_conv_forward(hm_opcall *c) {
  const hm_tensor *w = operand(c, 1);
  char text[160];
  hm_out_spec *s = &c->spec[0];
  s->ndim = 4;
  s->channels_last = true;
  int status = conv_shape(c, operand(c, 0), w->shape, &c->attr[0], s->shape);
  if (status) return status;
  if (c->in[2].kind == HM_ARG_TENSOR && !same_shape(operand(c, 2), 1, &w->shape[0]))
    return hm_fail(HM_ERR_SHAPE, "%s: bias must be [%lld], got %s", NAME(c), (long long)w->shape[0],
                   text_of(operand(c, 2), text));
  status = hm__want_channels_last(c, 0);
  if (!status) status = hm__want_contiguous(c, 1);
  return status ? status : hm__want_contiguous(c, 2);
}

/* Both gradients: the shape wanted is an attribute; g must have the shape that conv2d gives. */
static int infer_conv_backward(hm_opcall *c) {
  const bool by_input = c->op == HM_OP_CONV2D_BACKWARD_INPUT;
  const hm_tensor *g = operand(c, 0);
  hm_tensor x;
  memset(&x, 0, sizeof x);
  if (c->attr[0].n != 4) return hm_fail(HM_ERR_SHAPE, "%s: shape must have 4 sizes", NAME(c));
  if (by_input) {
    x.ndim = 4;
    memcpy(x.shape, c->attr[0].v, sizeof(int64_t) * 4);
  }
  int64_t shape[4];
  int status =
      conv_shape(c, by_input ? &x : operand(c, 1), by_input ? operand(c, 1)->shape : c->attr[0].v, &c->attr[1], shape);
  if (status) return status;
  if (!same_shape(g, 4, shape)) {
    char text[160];
    return hm_fail(HM_ERR_SHAPE, "%s: g must be [%lld,%lld,%lld,%lld], got %s", NAME(c), (long long)shape[0],
                   (long long)shape[1], (long long)shape[2], (long long)shape[3], text_of(g, text));
  }
  spec_shape(&c->spec[0], 4, c->attr[0].v);
  c->spec[0].channels_last = by_input;
  status = hm__want_channels_last(c, 0);
  if (status) return status;
  return by_input ? hm__want_contiguous(c, 1) : hm__want_channels_last(c, 1);
}

int hm__infer_conv(hm_opcall *c) {
  const bool forward = c->op == HM_OP_CONV2D;
  hm_attr *attr = &c->attr[forward ? 0 : 1];
  const int first = forward ? 0 : 1;
  int status = check_rank(c, 0, 4, forward ? "[N, C, H, W]" : "[N, O, H, W]");
  if (!status)
    status = check_rank(c, 1, 4, c->op == HM_OP_CONV2D_BACKWARD_WEIGHT ? "[N, C, H, W]" : "[O, C/groups, kH, kW]");
  if (!status) status = hm__pair(c, &attr[0], first, 1);
  if (!status) status = hm__pair(c, &attr[1], first + 1, 0);
  if (!status) status = hm__pair(c, &attr[2], first + 2, 1);
  if (status) return status;
  return forward ? infer_conv_forward(c) : infer_conv_backward(c);
}

/* ====== Copies, fills, random numbers ====== */

int hm__check_copy(const hm_tensor *x, const hm_tensor *src) {
  int ndim;
  int64_t shape[HM_MAX_NDIM];
  if (!hm_broadcast(x->ndim, x->shape, src->ndim, src->shape, &ndim, shape) && same_shape(x, ndim, shape)) return HM_OK;
  char a[160], b[160];
  return hm_fail(HM_ERR_SHAPE, "copy_: the source does not broadcast to the destination: x is %s, src is %s",
                 text_of(x, a), text_of(src, b));
}

int hm__infer_copy(hm_opcall *c) {
  if (c->op == HM_OP_COPY_) return c->in[1].kind == HM_ARG_TENSOR ? hm__check_copy(operand(c, 0), c->in[1].t) : HM_OK;
  const hm_tensor *t = operand(c, 0);
  hm_out_spec *s = &c->spec[0];
  s->dtype = c->out_dtype != HM_NONE ? c->out_dtype : c->attr[0].i != HM_NONE ? (int32_t)c->attr[0].i : t->dtype;
  spec_shape(s, t->ndim, t->shape);
  const int64_t layout = c->attr[1].i;
  if (layout == 0) keep_layout(c, s);
  if (layout == 2 && t->ndim != 4) return check_rank(c, 0, 4, "[N, C, H, W] to be channels-last");
  s->channels_last = layout == 2;
  if (layout != 0 && !(layout == 1 ? hm_is_contiguous(t) : hm_is_channels_last(t))) hm__count_layout_copy(c->device);
  return HM_OK;
}

int hm__infer_fill(hm_opcall *c) {
  if (c->op == HM_OP_EYE_) return check_rank(c, 0, 2, "(a matrix)");
  for (int i = 1; i < c->info->n_in; i++)
    if (c->in[i].kind == HM_ARG_TENSOR)
      return hm_fail(HM_ERR_ARG, "%s: %s must be a number, got a tensor\n  hint: copy_ takes tensors", NAME(c),
                     c->info->in[i].name);
  return HM_OK;
}

int hm__infer_random(hm_opcall *c) {
  const hm_tensor *t = operand(c, 0);
  if (c->op == HM_OP_RANDOM_) {
    if (c->attr[0].i >= c->attr[1].i)
      return hm_fail(HM_ERR_ARG, "random_: low %lld must be less than high %lld", (long long)c->attr[0].i,
                     (long long)c->attr[1].i);
    return HM_OK;
  }
  if (c->op == HM_OP_BERNOULLI_) return hm__check_chance(c, c->attr[0].f);
  if (!hm_dtype_is_float(t->dtype)) {
    char text[160];
    return hm_fail(HM_ERR_DTYPE, "%s: needs a floating dtype, came %s", NAME(c), hm_describe(t, text, sizeof text));
  }
  if (c->op == HM_OP_NORMAL_ && !(c->attr[1].f >= 0))
    return hm_fail(HM_ERR_ARG, "normal_: std must not be negative, got %g", c->attr[1].f);
  return HM_OK;
}
