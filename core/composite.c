/*
 * composite.c -- ops made of other ops: what has no kernel of its own.
 *
 * Two kinds: plain functions of halfmoon.h (to, contiguous, clone, cat, stack, sum_to), recorded through the ops they call, and rows of the
 * table with family "composite", whose infer function runs other ops and leaves the result in c->out[0].
 */
#include <string.h>

#include "op.h"

/* ====== Casts and copies ====== */

static int cast(hm_tensor *t, int dtype, int64_t layout, hm_tensor **out) {
  return hm_call(HM_OP_CAST, (const hm_arg[]){hm_t(t)}, (const hm_attr[]){{.i = dtype}, {.i = layout}}, out);
}

/* ====== Between devices ====== */

/* Copies dense memory from one device to another: to or from the CPU at once, between two others by way of the host. */
static int move_bytes(void *to, int to_device, const void *from, int from_device, size_t bytes) {
  const hm_backend *a = hm_device_backend(from_device), *b = hm_device_backend(to_device);
  if (!a || !b) return HM_ERR_DEVICE;
  if (from_device == HM_CPU) return b->mem_from_host(to, from, bytes, NULL);
  if (to_device == HM_CPU) return a->mem_to_host(to, from, bytes, NULL);
  void *host = hm_alloc(bytes);
  if (!host) return HM_ERR_MEMORY;
  int status = a->mem_to_host(host, from, bytes, NULL);
  if (!status) status = b->mem_from_host(to, host, bytes, NULL);
  hm_free(host);
  return status;
}

typedef struct moved {
  int from; /* where the gradient goes back to */
} moved;

static int move_backward(void *ud, int n_out, hm_tensor *const *grad, int n_in, hm_tensor **grad_in) {
  const moved *m = ud;
  (void)n_out, (void)n_in;
  return grad[0] ? hm_to(grad[0], HM_NONE, m->from, false, &grad_in[0]) : HM_OK;
}

/* A dense tensor on another device: same dtype and strides. */
static int move_dense(hm_tensor *t, int device, hm_tensor **out) {
  hm_out_spec spec = {.dtype = t->dtype, .ndim = t->ndim, .has_stride = true};
  memcpy(spec.shape, t->shape, sizeof(int64_t) * (size_t)t->ndim);
  memcpy(spec.stride, t->stride, sizeof(int64_t) * (size_t)t->ndim);
  *out = NULL;
  hm_tensor *there;
  int status = hm__tensor_by_spec(&spec, device, &there);
  if (status) return status;
  const int from = hm_tensor_device(t);
  const size_t bytes = (size_t)t->numel * (size_t)hm_dtype_size(t->dtype);
  if (bytes) status = move_bytes(hm_tensor_data(there), device, hm_tensor_data(t), from, bytes);
  moved *m = status ? NULL : hm_alloc(sizeof *m);
  if (!status && !m) status = HM_ERR_MEMORY;
  if (!status) {
    m->from = from;
    status = hm_record_custom("to", &t, 1, &there, 1, move_backward, m, hm_free);
  }
  if (status) hm_tensor_release(there);
  else *out = there;
  return status;
}

/* t on another device; recorded, so that gradients move back. */
static int move(hm_tensor *t, int device, hm_tensor **out) {
  *out = NULL;
  if (hm_is_channels_last(t)) return move_dense(t, device, out);
  hm_tensor *dense;
  int status = hm_contiguous(t, &dense);
  if (status) return status;
  status = move_dense(dense, device, out);
  hm_tensor_release(dense);
  return status;
}

/* Changes device and dtype; the cast is made where it leaves fewer bytes to move. */
static int move_and_cast(hm_tensor *t, int dtype, int device, hm_tensor **out) {
  if (dtype == HM_NONE || dtype == t->dtype) return move(t, device, out);
  const bool cast_first = hm_dtype_size(dtype) < hm_dtype_size(t->dtype);
  hm_tensor *half_way;
  int status = cast_first ? cast(t, dtype, 0, &half_way) : move(t, device, &half_way);
  if (status) return status;
  status = cast_first ? move(half_way, device, out) : cast(half_way, dtype, 0, out);
  hm_tensor_release(half_way);
  return status;
}

int hm_to(hm_tensor *t, int dtype, int device, bool copy, hm_tensor **out) {
  *out = NULL;
  if (device >= 0 && device != hm_tensor_device(t))
    return hm_device_backend(device) ? move_and_cast(t, dtype, device, out) : HM_ERR_DEVICE;
  if (!copy && (dtype == HM_NONE || dtype == t->dtype)) {
    *out = hm_tensor_retain(t);
    return HM_OK;
  }
  return cast(t, dtype, 0, out);
}

int hm__copy_across(hm_tensor *x, hm_tensor *src, hm_tensor **out) {
  *out = NULL;
  int status = hm__check_copy(x, src);
  if (status) return status;
  /* Converted over there, or here where that leaves less to move; once in either case. */
  const int dtype = hm_dtype_size(x->dtype) < hm_dtype_size(src->dtype) ? x->dtype : HM_NONE;
  hm_tensor *here;
  status = hm_to(src, dtype, hm_tensor_device(x), false, &here);
  if (status) return status;
  status = hm_op_copy_(hm_t(x), hm_t(here), out);
  hm_tensor_release(here);
  return status;
}

int hm_contiguous(hm_tensor *t, hm_tensor **out) {
  if (!hm_is_contiguous(t)) return cast(t, HM_NONE, 1, out);
  *out = hm_tensor_retain(t);
  return HM_OK;
}

int hm_channels_last(hm_tensor *t, hm_tensor **out) {
  if (!hm_is_channels_last(t)) return cast(t, HM_NONE, 2, out);
  *out = hm_tensor_retain(t);
  return HM_OK;
}

int hm_clone(hm_tensor *t, hm_tensor **out) { return cast(t, HM_NONE, 0, out); }

/* ====== Joining ====== */

/* Shape and dtype of a concatenation; checks every part. */
static int cat_spec(hm_tensor *const *list, int n, int dim, int *dtype, int64_t *shape) {
  char a[160], b[160];
  const hm_tensor *first = list[0];
  *dtype = first->dtype;
  memcpy(shape, first->shape, sizeof(int64_t) * (size_t)first->ndim);
  for (int i = 1; i < n; i++) {
    bool fit = list[i]->ndim == first->ndim;
    for (int d = 0; fit && d < first->ndim; d++) fit = d == dim || list[i]->shape[d] == first->shape[d];
    if (!fit)
      return hm_fail(HM_ERR_SHAPE, "cat: sizes must agree in every dim but %d: tensor 1 is %s, tensor %d is %s",
                     dim + 1, hm_describe(first, a, sizeof a), i + 1, hm_describe(list[i], b, sizeof b));
    if (hm_tensor_device(list[i]) != hm_tensor_device(first))
      return hm_fail(HM_ERR_DEVICE, "cat: tensors on different devices: tensor 1 is %s, tensor %d is %s",
                     hm_describe(first, a, sizeof a), i + 1, hm_describe(list[i], b, sizeof b));
    if (list[i]->dtype != first->dtype && (hm_dtype_is_f8(list[i]->dtype) || hm_dtype_is_f8(first->dtype)))
      return hm_fail(HM_ERR_DTYPE, "cat: 8-bit floats promote to nothing: tensor 1 is %s, tensor %d is %s",
                     hm_describe(first, a, sizeof a), i + 1, hm_describe(list[i], b, sizeof b));
    *dtype = hm_promote(*dtype, list[i]->dtype);
    shape[dim] += list[i]->shape[dim];
  }
  return HM_OK;
}

static int cat_fill(hm_tensor *const *list, int n, int dim, hm_tensor *out) {
  int64_t start = 0;
  for (int i = 0; i < n; i++) {
    hm_tensor *part, *same;
    int status = hm_op_narrow(hm_t(out), dim, start, list[i]->shape[dim], &part);
    if (status) return status;
    status = hm_op_copy_(hm_t(part), hm_t(list[i]), &same);
    if (!status) hm_tensor_release(same);
    hm_tensor_release(part);
    if (status) return status;
    start += list[i]->shape[dim];
  }
  return HM_OK;
}

typedef struct cat_parts {
  int n, dim;
  int64_t size[];
} cat_parts;

/* Gradient of cat: the stretch of g that each part filled. */
static int cat_backward(void *ud, int n_out, hm_tensor *const *grad, int n_in, hm_tensor **grad_in) {
  const cat_parts *p = ud;
  int64_t start = 0;
  (void)n_out;
  for (int i = 0; i < n_in && grad[0]; i++) {
    const int status = hm_op_narrow(hm_t(grad[0]), p->dim, start, p->size[i], &grad_in[i]);
    if (status) return status;
    start += p->size[i];
  }
  return HM_OK;
}

static int cat_record(hm_tensor *const *list, int n, int dim, hm_tensor *out) {
  cat_parts *p = hm_alloc(sizeof *p + sizeof(int64_t) * (size_t)n);
  if (!p) return HM_ERR_MEMORY;
  p->n = n;
  p->dim = dim;
  for (int i = 0; i < n; i++) p->size[i] = list[i]->shape[dim];
  return hm_record_custom("cat", list, n, &out, 1, cat_backward, p, hm_free);
}

int hm_cat(hm_tensor *const *list, int n, int dim, hm_tensor **out) {
  *out = NULL;
  if (n < 1) return hm_fail(HM_ERR_ARG, "cat: needs at least one tensor");
  const int ndim = list[0]->ndim;
  if (dim < -ndim || dim >= ndim)
    return hm_fail(HM_ERR_SHAPE, "cat: dim out of range: the tensors have %d dims, valid are 1 to %d, or -%d to -1",
                   ndim, ndim, ndim);
  if (dim < 0) dim += ndim;
  int dtype;
  int64_t shape[HM_MAX_NDIM];
  int status = cat_spec(list, n, dim, &dtype, shape);
  hm_tensor *t = NULL;
  if (!status) status = hm_empty(ndim, shape, dtype, hm_tensor_device(list[0]), &t);
  if (status) return status;
  hm_mode *mode = hm_mode_current();
  const bool grad = mode->grad;
  mode->grad = false;
  status = cat_fill(list, n, dim, t);
  mode->grad = grad;
  if (!status) status = cat_record(list, n, dim, t);
  if (status) hm_tensor_release(t);
  else *out = t;
  return status;
}

/* Every part of a stack has the shape of the first. */
static int same_shapes(hm_tensor *const *list, int n) {
  char a[160], b[160];
  for (int i = 0; i < n; i++) {
    bool same = list[i]->ndim == list[0]->ndim;
    for (int d = 0; same && d < list[0]->ndim; d++) same = list[i]->shape[d] == list[0]->shape[d];
    if (!same)
      return hm_fail(HM_ERR_SHAPE, "stack: shapes must agree: tensor 1 is %s, tensor %d is %s",
                     hm_describe(list[0], a, sizeof a), i + 1, hm_describe(list[i], b, sizeof b));
  }
  return HM_OK;
}

int hm_stack(hm_tensor *const *list, int n, int dim, hm_tensor **out) {
  *out = NULL;
  if (n < 1) return hm_fail(HM_ERR_ARG, "stack: needs at least one tensor");
  int status = same_shapes(list, n);
  if (status) return status;
  const int ndim = list[0]->ndim + 1;
  if (dim < -ndim || dim >= ndim)
    return hm_fail(HM_ERR_SHAPE, "stack: dim out of range: the result has %d dims, valid are 1 to %d, or -%d to -1",
                   ndim, ndim, ndim);
  if (dim < 0) dim += ndim;
  hm_tensor **wide = hm_calloc(sizeof *wide * (size_t)n);
  if (!wide) return HM_ERR_MEMORY;
  for (int i = 0; i < n && !status; i++) status = hm_op_unsqueeze(hm_t(list[i]), dim, &wide[i]);
  if (!status) status = hm_cat(wide, n, dim, out);
  for (int i = 0; i < n; i++) hm_tensor_release(wide[i]);
  hm_free(wide);
  return status;
}

/* ====== Undoing a broadcast ====== */

int hm_sum_to(hm_tensor *t, int ndim, const int64_t *shape, hm_tensor **out) {
  *out = NULL;
  const int lead = t->ndim - ndim;
  hm_attr attr[2] = {{.n = 0}, {.i = true}};
  int64_t *const dims = attr[0].v;
  int n = 0;
  if (lead < 0) return hm_fail(HM_ERR_SHAPE, "sum_to: the shape has more dims than the tensor");
  for (int d = 0; d < t->ndim; d++) {
    if (d < lead) dims[n++] = d;
    else if (shape[d - lead] == 1 && t->shape[d] != 1) dims[n++] = d;
    else if (shape[d - lead] != t->shape[d])
      return hm_fail(HM_ERR_SHAPE, "sum_to: the shape does not broadcast to the tensor's");
  }
  hm_tensor *sum;
  if (n == 0) sum = hm_tensor_retain(t);
  else {
    attr[0].n = n;
    const int status = hm_call_as(HM_OP_SUM, (const hm_arg[]){hm_t(t)}, attr, t->dtype, &sum);
    if (status) return status;
  }
  const int status = hm_op_reshape(hm_t(sum), ndim, shape, out);
  hm_tensor_release(sum);
  return status;
}

/* ====== Rows of the table ====== */

/* amax_backward(g, x, out, dim, keepdim): g divided among the elements that equal the result. */
static int amax_backward(hm_opcall *c) {
  hm_tensor *const x = c->in[1].t;
  const hm_attr keep[] = {c->attr[0], {.i = true}};
  hm_attr spread[] = {{.n = x->ndim}, c->attr[0], c->attr[1]};
  memcpy(spread[0].v, x->shape, sizeof(int64_t) * (size_t)x->ndim);
  hm_tensor *g = NULL, *top = NULL, *hit = NULL, *count = NULL, *share = NULL;
  int status = hm_call(HM_OP_EXPAND_REDUCED, &c->in[0], spread, &g);
  if (!status) status = hm_call(HM_OP_EXPAND_REDUCED, &c->in[2], spread, &top);
  if (!status) status = hm_op_eq(hm_t(x), hm_t(top), &hit);
  if (!status) status = hm_call_as(HM_OP_SUM, (const hm_arg[]){hm_t(hit)}, keep, HM_F32, &count);
  if (!status) status = hm_op_div(hm_t(g), hm_t(count), &share);
  if (!status)
    status =
        hm_call_as(HM_OP_WHERE, (const hm_arg[]){hm_t(hit), hm_t(share), hm_f(0)}, NULL, c->spec[0].dtype, &c->out[0]);
  hm_tensor_release(g);
  hm_tensor_release(top);
  hm_tensor_release(hit);
  hm_tensor_release(count);
  hm_tensor_release(share);
  return status;
}

/* narrow_backward(x, shape, dim, start): zeros with x written from start along dim. */
static int narrow_backward(hm_opcall *c) {
  hm_tensor *const x = c->in[0].t;
  hm_tensor *all = NULL, *part = NULL, *same;
  int status = hm__wrap_dim(c, &c->attr[1].i, c->attr[0].n);
  if (!status) status = hm_empty(c->attr[0].n, c->attr[0].v, c->spec[0].dtype, c->device, &all);
  if (!status) status = hm_op_fill_(hm_t(all), hm_f(0), &same);
  if (!status) hm_tensor_release(same);
  if (!status) status = hm_op_narrow(hm_t(all), c->attr[1].i, c->attr[2].i, x->shape[c->attr[1].i], &part);
  if (!status) status = hm_op_copy_(hm_t(part), hm_t(x), &same);
  if (!status) hm_tensor_release(same);
  hm_tensor_release(part);
  if (status) hm_tensor_release(all);
  else c->out[0] = all;
  return status;
}

/* select_pick(x, index, dim, keepdim): gather, along a dim that index may lack. */
static int select_pick(hm_opcall *c) {
  hm_tensor *const x = c->in[0].t;
  if (x->ndim == 0) {
    c->out[0] = hm_tensor_retain(x);
    return HM_OK;
  }
  const int status = hm__wrap_dim(c, &c->attr[0].i, x->ndim);
  if (status) return status;
  const int64_t dim = c->attr[0].i;
  if (c->attr[1].i) return hm_op_gather(hm_t(x), c->in[1], dim, &c->out[0]);
  hm_tensor *wide = NULL, *picked = NULL;
  int s = hm_op_unsqueeze(c->in[1], dim, &wide);
  if (!s) s = hm_op_gather(hm_t(x), hm_t(wide), dim, &picked);
  if (!s) s = hm_op_squeeze(hm_t(picked), 1, &dim, &c->out[0]);
  hm_tensor_release(wide);
  hm_tensor_release(picked);
  return s;
}

int hm__infer_composite(hm_opcall *c) {
  switch (c->op) {
  case HM_OP_SELECT_PICK: return select_pick(c);
  case HM_OP_AMAX_BACKWARD: return amax_backward(c);
  case HM_OP_NARROW_BACKWARD: return narrow_backward(c);
  case HM_OP_CROSS_ENTROPY_BACKWARD_BY_G: return hm__cross_entropy_by_g(c);
  case HM_OP_CROSS_ENTROPY_BACKWARD_BY_X: return hm__cross_entropy_by_x(c);
  case HM_OP_PROD_BACKWARD_BACKWARD: return hm__prod_backward_backward(c);
  case HM_OP_CUMPROD_BACKWARD_BACKWARD: return hm__cumprod_backward_backward(c);
  default: return hm_fail(HM_ERR_INTERNAL, "%s: a composite without a body", c->info->name);
  }
}
