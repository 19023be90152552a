/*
 * infer_norm.c -- the shape and layout rules of the normalizations: batch_norm, layer_norm, rms_norm, group_norm and their gradients.
 *
 * Memory orders.  batch_norm and group_norm work on [N, C, d...] whose memory is either row-major or has the channels innermost (N, d..., C).
 * batch_norm gives channels-last for 4 dims, as convolutions do; otherwise the output lies as x does.  The row norms take x
 * with any strides before the normalized dims, which must lie row-major, and give row-major outputs.
 *
 * Called by dispatch.c through the op table.
 */
#include <stdio.h>
#include <string.h>

#include "op.h"

#define NAME(c) ((c)->info->name)

static const hm_tensor *operand(const hm_opcall *c, int i) {
  return c->in[i].kind == HM_ARG_TENSOR ? c->in[i].t : NULL;
}

static const char *text_of(const hm_tensor *t, char buffer[160]) { return hm_describe(t, buffer, 160); }

static bool same_shape(const hm_tensor *t, int ndim, const int64_t *shape) {
  return t->ndim == ndim && !memcmp(t->shape, shape, sizeof(int64_t) * (size_t)ndim);
}

static void spec_shape(hm_out_spec *s, int ndim, const int64_t *shape) {
  s->ndim = ndim;
  memcpy(s->shape, shape, sizeof(int64_t) * (size_t)ndim);
}

/* "[3,4]" */
static const char *shape_text(int ndim, const int64_t *shape, char buffer[160]) {
  int at = 1;
  buffer[0] = '[';
  for (int d = 0; d < ndim && at < 130; d++)
    at += snprintf(buffer + at, 160 - (size_t)at, "%s%lld", d ? "," : "", (long long)shape[d]);
  snprintf(buffer + at, 160 - (size_t)at, "]");
  return buffer;
}

/* Operand i, where given, must be floating and have that shape; `why` says where the shape comes from.  It is made row-major. */
static int want_shape(hm_opcall *c, int i, int ndim, const int64_t *shape, const char *why) {
  const hm_tensor *t = operand(c, i);
  if (!t) return HM_OK;
  char a[160], b[160];
  if (!hm_dtype_is_float(t->dtype))
    return hm_fail(HM_ERR_DTYPE, "%s: %s must have a floating dtype, got %s", NAME(c), c->info->in[i].name,
                   text_of(t, a));
  if (same_shape(t, ndim, shape)) return hm__want_contiguous(c, i);
  return hm_fail(HM_ERR_SHAPE, "%s: %s must be %s, got %s\n  %s", NAME(c), c->info->in[i].name,
                 shape_text(ndim, shape, a), text_of(t, b), why);
}

/* g must have x's shape. */
static int check_gradient(const hm_opcall *c, const hm_tensor *x) {
  char a[160], b[160];
  if (same_shape(operand(c, 0), x->ndim, x->shape)) return HM_OK;
  return hm_fail(HM_ERR_SHAPE, "%s: g and x must have one shape: %s and %s", NAME(c), text_of(operand(c, 0), a),
                 text_of(x, b));
}

static int check_floating(const hm_opcall *c, const hm_tensor *x) {
  char text[160];
  if (hm_dtype_is_float(x->dtype)) return HM_OK;
  return hm_fail(HM_ERR_DTYPE, "%s: needs a floating dtype, came %s\n  hint: convert with :to(\"f32\")", NAME(c),
                 text_of(x, text));
}

static int check_eps(const hm_opcall *c, double eps) {
  return eps >= 0 ? HM_OK : hm_fail(HM_ERR_ARG, "%s: eps must not be negative, got %g", NAME(c), eps);
}

/* ====== Channels: batch_norm and group_norm ====== */

/* Strides of [N, C, d...] with the channels innermost. */
static void inner_strides(int ndim, const int64_t *shape, int64_t *stride) {
  int64_t step = 1;
  stride[1] = 1;
  step *= shape[1];
  for (int d = ndim - 1; d >= 2; d--) {
    stride[d] = step;
    step *= shape[d];
  }
  stride[0] = step;
}

static bool channels_inner(const hm_tensor *t) {
  int64_t stride[HM_MAX_NDIM];
  inner_strides(t->ndim, t->shape, stride);
  for (int d = 0; d < t->ndim; d++)
    if (t->shape[d] != 1 && t->stride[d] != stride[d]) return false;
  return true;
}

static int check_channels(const hm_opcall *c, const hm_tensor *x) {
  char text[160];
  if (x->ndim >= 2) return check_floating(c, x);
  return hm_fail(HM_ERR_SHAPE, "%s: x must be [N, C] or [N, C, d...], got %s", NAME(c), text_of(x, text));
}

/* Brings x (and g, operand 0 of gradients) into one of the two memory orders and the output with them. */
static int settle_channels(hm_opcall *c, int x, int g, bool channels_last) {
  hm_out_spec *s = &c->spec[0];
  const int ndim = c->in[x].t->ndim;
  spec_shape(s, ndim, c->in[x].t->shape);
  if (ndim == 4 && (channels_last || hm_is_channels_last(c->in[x].t)) &&
      !(!channels_last && hm_is_contiguous(c->in[x].t))) {
    s->channels_last = true;
    const int status = hm__want_channels_last(c, x);
    return status || g < 0 ? status : hm__want_channels_last(c, g);
  }
  const bool inner = channels_inner(c->in[x].t) && (g < 0 || channels_inner(c->in[g].t));
  if (inner && !hm_is_contiguous(c->in[x].t)) {
    s->has_stride = true;
    inner_strides(ndim, s->shape, s->stride);
    return HM_OK;
  }
  const int status = hm__want_contiguous(c, x);
  return status || g < 0 ? status : hm__want_contiguous(c, g);
}

/* Running statistics are written in place: they must lie as the kernel writes them. */
static int check_running(hm_opcall *c, int i, int64_t channels) {
  const hm_tensor *t = operand(c, i);
  char text[160];
  if (!t) return HM_OK;
  if (t->ndim == 1 && t->shape[0] == channels && hm_is_contiguous(t) && (t->dtype == HM_F32 || t->dtype == HM_F64))
    return HM_OK;
  return hm_fail(HM_ERR_SHAPE, "%s: %s must be float32, contiguous and [%lld], one number for each channel, got %s",
                 NAME(c), c->info->in[i].name, (long long)channels, text_of(t, text));
}

static int check_statistics(hm_opcall *c, const hm_tensor *x) {
  const hm_tensor *mean = operand(c, 3), *var = operand(c, 4);
  char text[160];
  if (!mean != !var)
    return hm_fail(HM_ERR_ARG, "%s: running_mean and running_var go together: one is missing", NAME(c));
  if (!c->attr[0].i && !mean)
    return hm_fail(HM_ERR_ARG,
                   "%s: training = false needs running_mean and running_var\n  hint: give both, or normalize by the "
                   "batch with training = true",
                   NAME(c));
  if (c->attr[0].i && x->shape[1] > 0 && x->numel == x->shape[1])
    return hm_fail(HM_ERR_SHAPE,
                   "%s: Expected more than 1 value per channel when training, got %s\n  hint: a batch of one has no "
                   "variance; use a larger one, or training = false",
                   NAME(c), text_of(x, text));
  const int status = check_running(c, 3, x->shape[1]);
  return status ? status : check_running(c, 4, x->shape[1]);
}

static int infer_batch_norm_backward(hm_opcall *c) {
  const hm_tensor *x = operand(c, 1);
  int status = check_channels(c, x);
  if (!status) status = check_gradient(c, x);
  const int64_t channels[1] = {status ? 0 : x->shape[1]};
  for (int i = 2; i < 6 && !status; i++) status = want_shape(c, i, 1, channels, "one number for each channel of x");
  if (status) return status;
  spec_shape(&c->spec[1], 1, channels);
  spec_shape(&c->spec[2], 1, channels);
  return settle_channels(c, 1, 0, true);
}

int hm__infer_batch_norm(hm_opcall *c) {
  if (c->op == HM_OP_BATCH_NORM_BACKWARD) return infer_batch_norm_backward(c);
  const hm_tensor *x = operand(c, 0);
  int status = check_channels(c, x);
  if (!status) status = check_eps(c, c->attr[2].f);
  const int64_t channels[1] = {status ? 0 : x->shape[1]};
  for (int i = 1; i < 3 && !status; i++) status = want_shape(c, i, 1, channels, "one number for each channel of x");
  if (!status) status = check_statistics(c, x);
  if (status) return status;
  spec_shape(&c->spec[1], 1, channels);
  spec_shape(&c->spec[2], 1, channels);
  return settle_channels(c, 0, -1, true);
}

static int check_groups(const hm_opcall *c, const hm_tensor *x, int64_t groups) {
  char text[160];
  if (groups >= 1 && x->shape[1] % groups == 0) return HM_OK;
  return hm_fail(HM_ERR_ARG,
                 "%s: %lld groups do not divide %lld channels: x is %s\n  hint: groups must divide dim 2 of x", NAME(c),
                 (long long)groups, (long long)x->shape[1], text_of(x, text));
}

int hm__infer_group_norm(hm_opcall *c) {
  const bool backward = c->op == HM_OP_GROUP_NORM_BACKWARD;
  const hm_tensor *x = operand(c, backward ? 1 : 0);
  int status = check_channels(c, x);
  if (!status && backward) status = check_gradient(c, x);
  if (!status && !backward) status = check_eps(c, c->attr[1].f);
  if (!status) status = check_groups(c, x, c->attr[0].i);
  if (status) return status;
  const int64_t channels[1] = {x->shape[1]}, groups[2] = {x->shape[0], c->attr[0].i};
  status = want_shape(c, backward ? 2 : 1, 1, channels, "one number for each channel of x");
  if (!status && !backward) status = want_shape(c, 2, 1, channels, "one number for each channel of x");
  for (int i = 3; i < 5 && backward && !status; i++)
    status = want_shape(c, i, 2, groups, "one number for each group of each sample");
  if (status) return status;
  for (int i = 1; i < 3; i++) spec_shape(&c->spec[i], backward ? 1 : 2, backward ? channels : groups);
  return settle_channels(c, backward ? 1 : 0, backward ? 0 : -1, false);
}

/* ====== Rows: layer_norm and rms_norm ====== */

/* The last `dims` dims must lie row-major, so that a row is one piece of memory; else operand i is copied. */
static int want_rows(hm_opcall *c, int i, int64_t dims) {
  const hm_tensor *t = operand(c, i);
  int64_t step = 1;
  for (int d = t->ndim - 1; d >= t->ndim - dims; d--) {
    if (t->shape[d] != 1 && t->stride[d] != step) return hm__want_contiguous(c, i);
    step *= t->shape[d];
  }
  return HM_OK;
}

static int check_dims(const hm_opcall *c, const hm_tensor *x, int64_t dims) {
  char text[160];
  if (dims >= 1 && dims <= x->ndim) return check_floating(c, x);
  return hm_fail(HM_ERR_ARG, "%s: dims must be from 1 to the number of x's dims, %d: got %lld for %s", NAME(c), x->ndim,
                 (long long)dims, text_of(x, text));
}

/* Weight and bias have the shape of the normalized dims, statistics that of the dims before. */
int hm__infer_row_norm(hm_opcall *c) {
  const bool backward = c->op == HM_OP_LAYER_NORM_BACKWARD || c->op == HM_OP_RMS_NORM_BACKWARD;
  const bool layer = c->op == HM_OP_LAYER_NORM || c->op == HM_OP_LAYER_NORM_BACKWARD;
  const int at = backward ? 1 : 0; /* x */
  const hm_tensor *x = operand(c, at);
  const int64_t dims = c->attr[0].i;
  int status = check_dims(c, x, dims);
  if (!status && backward) status = check_gradient(c, x);
  if (!status && !backward) status = check_eps(c, c->attr[1].f);
  if (status) return status;
  int64_t shape[HM_MAX_NDIM];
  const int lead = x->ndim - (int)dims, n_weights = layer && !backward ? 2 : 1;
  memcpy(shape, x->shape, sizeof shape);
  for (int i = at + 1; i <= at + n_weights && !status; i++)
    status = want_shape(c, i, (int)dims, shape + lead, "the shape of x's normalized dims");
  for (int i = at + 2; backward && i < c->info->n_in && !status; i++)
    status = want_shape(c, i, lead, shape, "the shape of x before its normalized dims");
  if (!status) status = want_rows(c, at, dims);
  if (!status && backward) status = want_rows(c, 0, dims);
  if (status) return status;
  spec_shape(&c->spec[0], lead + (int)dims, shape);
  for (int i = 1; i < c->info->n_out; i++)
    spec_shape(&c->spec[i], backward ? (int)dims : lead, backward ? shape + lead : shape);
  return HM_OK;
}
