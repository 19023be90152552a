/*
 * infer_window.c -- the shape and layout rules of ops that look at images through windows: pooling and interpolation.
 *
 * Images are [N, C, H, W] with any strides; outputs are channels-last.  Sizes of windows follow PyTorch: with ceil_mode the
 * last window may reach over the edge, but it must begin inside the image or its padding on the left.
 * hm__pair and hm__window_output serve convolution too (infer.c).
 *
 * Called by dispatch.c through the op table.
 */
#include <math.h>
#include <string.h>

#include "op.h"

#define NAME(c) ((c)->info->name)

static const hm_tensor *operand(const hm_opcall *c, int i) { return c->in[i].t; }

static const char *text_of(const hm_tensor *t, char buffer[160]) { return hm_describe(t, buffer, 160); }

static bool same_shape(const hm_tensor *t, const int64_t *shape) {
  return t->ndim == 4 && !memcmp(t->shape, shape, sizeof(int64_t) * 4);
}

/* ====== Attributes ====== */

int hm__pair(const hm_opcall *c, hm_attr *a, int which, int64_t least) {
  const int64_t most = INT32_MAX;
  if (a->n == 1) {
    a->n = 2;
    a->v[1] = a->v[0];
  }
  if (a->n == 2 && a->v[0] >= least && a->v[1] >= least && a->v[0] <= most && a->v[1] <= most) return HM_OK;
  return hm_fail(HM_ERR_ARG, "%s: %s must be one number or two, each at least %lld and below 2^31", NAME(c),
                 c->info->attr[which].name, (long long)least);
}

int hm__window_output(const hm_opcall *c, const hm_tensor *x, int d, const hm_window *w, int64_t *out) {
  const int64_t size = x->shape[d], reach = w->dilation * (w->kernel - 1) + 1, room = size + 2 * w->padding - reach;
  const int64_t up = room + (w->ceil_mode ? w->stride - 1 : 0);
  if (up < 0) {
    char text[160];
    return hm_fail(HM_ERR_SHAPE, "%s: the window does not fit: it spans %lld along dim %d, x is %s with padding %lld",
                   NAME(c), (long long)reach, d + 1, text_of(x, text), (long long)w->padding);
  }
  *out = up / w->stride + 1;
  if (w->ceil_mode && (*out - 1) * w->stride >= size + w->padding) *out -= 1;
  return HM_OK;
}

/* ====== What the rules share ====== */

/* Operand i must be an image; H and W must not be empty where `sides` is set. */
static int check_image(const hm_opcall *c, int i, bool sides) {
  const hm_tensor *t = operand(c, i);
  char text[160];
  if (t->ndim != 4)
    return hm_fail(HM_ERR_SHAPE, "%s: %s must have 4 dims [N, C, H, W], got %s", NAME(c), c->info->in[i].name,
                   text_of(t, text));
  if (sides && (t->shape[2] < 1 || t->shape[3] < 1))
    return hm_fail(HM_ERR_SHAPE, "%s: the image is empty: %s is %s", NAME(c), c->info->in[i].name, text_of(t, text));
  return HM_OK;
}

/* The image that a gradient is for, from attribute 0 of the call: a tensor with nothing but a shape, borrowing the
 * operand's place. */
static int image_of(const hm_opcall *c, hm_tensor *x) {
  memset(x, 0, sizeof *x);
  const hm_attr *shape = &c->attr[0];
  if (shape->n != 4 || shape->v[0] < 0 || shape->v[1] < 0 || shape->v[2] < 1 || shape->v[3] < 1)
    return hm_fail(HM_ERR_SHAPE, "%s: shape must be 4 sizes [N, C, H, W], H and W at least 1", NAME(c));
  x->ndim = 4;
  x->dtype = operand(c, 0)->dtype;
  x->storage = operand(c, 0)->storage; /* for messages */
  memcpy(x->shape, shape->v, sizeof(int64_t) * 4);
  return HM_OK;
}

/* Operand i must have that shape. */
static int check_shape(const hm_opcall *c, int i, const int64_t *shape) {
  if (same_shape(operand(c, i), shape)) return HM_OK;
  char text[160];
  return hm_fail(HM_ERR_SHAPE, "%s: %s must be [%lld,%lld,%lld,%lld], got %s", NAME(c), c->info->in[i].name,
                 (long long)shape[0], (long long)shape[1], (long long)shape[2], (long long)shape[3],
                 text_of(operand(c, i), text));
}

/* An index that another op made: of that dtype. */
static int check_index(const hm_opcall *c, int i, int dtype) {
  if (operand(c, i)->dtype == dtype) return HM_OK;
  char text[160];
  return hm_fail(HM_ERR_DTYPE, "%s: %s must be %s, got %s\n  hint: it is the second result of the pooling op", NAME(c),
                 c->info->in[i].name, hm_dtype_name(dtype), text_of(operand(c, i), text));
}

static void image_spec(hm_opcall *c, int i, const int64_t *shape) {
  hm_out_spec *s = &c->spec[i];
  s->ndim = 4;
  s->channels_last = true;
  memcpy(s->shape, shape, sizeof(int64_t) * 4);
}

/* ====== Pooling over windows of one size ====== */

/* Attributes kernel_size, stride, padding from number `first` on are completed; dilation: the next one, or NULL.  *out: the
 * shape that pooling gives for x. */
static int pool_shape(hm_opcall *c, const hm_tensor *x, int first, hm_attr *dilation, bool ceil_mode, int64_t *out) {
  hm_attr *attr = &c->attr[first];
  if (attr[1].n == 0) attr[1] = attr[0];
  int status = hm__pair(c, &attr[0], first, 1);
  if (!status) status = hm__pair(c, &attr[1], first + 1, 1);
  if (!status) status = hm__pair(c, &attr[2], first + 2, 0);
  if (!status && dilation) status = hm__pair(c, dilation, first + 3, 1);
  out[0] = x->shape[0];
  out[1] = x->shape[1];
  for (int d = 0; d < 2 && !status; d++) {
    const hm_window w = {attr[0].v[d], attr[1].v[d], attr[2].v[d], dilation ? dilation->v[d] : 1, ceil_mode};
    if (2 * w.padding > w.kernel)
      return hm_fail(HM_ERR_ARG, "%s: padding %lld is more than half the kernel size %lld", NAME(c),
                     (long long)w.padding, (long long)w.kernel);
    status = hm__window_output(c, x, d + 2, &w, &out[d + 2]);
  }
  return status;
}

/* max_pool2d and its kin: the index is the place in the window, one byte. */
int hm__infer_pool(hm_opcall *c) {
  const bool relu = c->op == HM_OP_MAX_POOL2D_RELU_BACKWARD, backward = relu || c->op == HM_OP_MAX_POOL2D_BACKWARD;
  const int first = backward ? 1 : 0;
  hm_tensor image;
  int64_t shape[4];
  int status = check_image(c, 0, !backward);
  if (!status && backward) status = image_of(c, &image);
  if (status) return status;
  const hm_tensor *x = backward ? &image : operand(c, 0);
  status = pool_shape(c, x, first, &c->attr[first + 3], c->attr[first + 4].i, shape);
  if (status) return status;
  const int64_t *kernel = c->attr[first].v;
  if (kernel[0] * kernel[1] > 256)
    return hm_fail(HM_ERR_ARG, "%s: a window of %lld places is too large; at most 256", NAME(c),
                   (long long)(kernel[0] * kernel[1]));
  if (backward) status = check_shape(c, 0, shape);
  if (!status && c->info->n_in > 1) status = check_shape(c, 1, shape);
  if (!status && c->info->n_in > 1) status = check_index(c, 1, HM_U8);
  if (!status && relu) status = check_shape(c, 2, shape);
  image_spec(c, 0, backward ? x->shape : shape);
  if (c->op == HM_OP_MAX_POOL2D) image_spec(c, 1, shape);
  return status;
}

int hm__infer_average_pool(hm_opcall *c) {
  const bool backward = c->op == HM_OP_AVG_POOL2D_BACKWARD;
  const int first = backward ? 1 : 0;
  hm_tensor image;
  int64_t shape[4];
  int status = check_image(c, 0, !backward);
  if (!status && backward) status = image_of(c, &image);
  if (status) return status;
  const hm_tensor *x = backward ? &image : operand(c, 0);
  status = pool_shape(c, x, first, NULL, c->attr[first + 3].i, shape);
  if (!status && backward) status = check_shape(c, 0, shape);
  image_spec(c, 0, backward ? x->shape : shape);
  return status;
}

/* ====== Pooling over windows that divide the image ====== */

static int infer_adaptive_backward(hm_opcall *c) {
  hm_tensor x;
  int status = image_of(c, &x);
  if (status) return status;
  const hm_tensor *g = operand(c, 0);
  const int64_t shape[4] = {x.shape[0], x.shape[1], g->shape[2], g->shape[3]};
  status = check_shape(c, 0, shape);
  if (!status && c->info->n_in == 2) status = check_shape(c, 1, shape);
  if (!status && c->info->n_in == 2) status = check_index(c, 1, HM_I64);
  image_spec(c, 0, x.shape);
  return status;
}

int hm__infer_adaptive_pool(hm_opcall *c) {
  const bool backward = c->op == HM_OP_ADAPTIVE_AVG_POOL2D_BACKWARD || c->op == HM_OP_ADAPTIVE_MAX_POOL2D_BACKWARD;
  int status = check_image(c, 0, !backward);
  if (status) return status;
  if (backward) return infer_adaptive_backward(c);
  status = hm__pair(c, &c->attr[0], 0, 0);
  const int64_t shape[4] = {operand(c, 0)->shape[0], operand(c, 0)->shape[1], c->attr[0].v[0], c->attr[0].v[1]};
  for (int i = 0; i < c->info->n_out && !status; i++) image_spec(c, i, shape);
  return status;
}

/* ====== Interpolation ====== */

/* attr: mode, align_corners, scale_h, scale_w.  A scale is output size by input size; 0: as the sizes have it. */
static int check_sampling(const hm_opcall *c, const hm_attr *attr, int first) {
  if (attr[0].i == 0 && attr[1].i)
    return hm_fail(HM_ERR_ARG, "%s: align_corners goes with mode bilinear, mode is nearest", NAME(c));
  for (int d = 2; d < 4; d++) {
    const double scale = attr[d].f;
    if (scale == 0 || (scale > 0 && !isinf(scale) && !isinf((float)(1 / scale)))) continue;
    return hm_fail(HM_ERR_ARG, "%s: %s must be a finite positive number, or 0 for size / input size; got %g", NAME(c),
                   c->info->attr[first + d].name, scale);
  }
  return HM_OK;
}

int hm__infer_interpolate(hm_opcall *c) {
  const bool backward = c->op == HM_OP_INTERPOLATE2D_BACKWARD;
  int status = check_image(c, 0, true);
  if (!status) status = check_sampling(c, &c->attr[1], 1);
  if (status) return status;
  const hm_tensor *t = operand(c, 0);
  if (backward) {
    hm_tensor x;
    status = image_of(c, &x);
    const int64_t shape[4] = {x.shape[0], x.shape[1], t->shape[2], t->shape[3]};
    if (!status) status = check_shape(c, 0, shape);
    image_spec(c, 0, x.shape);
    return status;
  }
  status = hm__pair(c, &c->attr[0], 0, 1);
  const int64_t shape[4] = {t->shape[0], t->shape[1], c->attr[0].v[0], c->attr[0].v[1]};
  image_spec(c, 0, shape);
  return status;
}
