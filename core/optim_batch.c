/*
 * optim_batch.c -- lists of gradients as one multi-tensor call of the backend: their norm, scaling and clipping.
 *
 * Gradients that lie in another element order than their parameter, or over another gradient, are copied first (the
 * copy replaces .grad).  A batch owns its tables and borrows the tensors.  Called by the other optim*.c files, and by
 * lua/bind through halfmoon.h for clipping.
 */
#include "optim_parts.h"

#include <math.h>
#include <string.h>

/* ====== Element order ====== */

bool hm__is_dense(const hm_tensor *t) {
  if (t->numel == 0) return true;
  uint32_t seen = 0;
  int64_t expected = 1;
  for (int found = 0; found < t->ndim; found++) {
    int dim = -1;
    for (int d = 0; d < t->ndim && dim < 0; d++) {
      if (!(seen >> d & 1) && (t->shape[d] == 1 || t->stride[d] == expected)) dim = d;
    }
    if (dim < 0) return false;
    seen |= 1u << dim;
    expected *= t->shape[dim];
  }
  return true;
}

bool hm__same_shape(const hm_tensor *a, const hm_tensor *b) {
  return a->ndim == b->ndim && memcmp(a->shape, b->shape, (size_t)a->ndim * sizeof a->shape[0]) == 0;
}

/* The strides that p's gradient and state must have: p's own, or row-major where p is not dense. */
static void order_of(const hm_tensor *p, int64_t *stride) {
  if (hm__is_dense(p)) {
    memcpy(stride, p->stride, (size_t)p->ndim * sizeof stride[0]);
  } else {
    hm__row_major(p->ndim, p->shape, stride);
  }
}

/* Does t (of p's shape) lie in memory as `stride` says?  Dims of size 1 do not matter. */
static bool in_order(const hm_tensor *t, const int64_t *stride) {
  if (t->numel <= 1) return true;
  for (int d = 0; d < t->ndim; d++) {
    if (t->shape[d] != 1 && t->stride[d] != stride[d]) return false;
  }
  return true;
}

int hm__like_param(const hm_tensor *p, int dtype, hm_tensor **out) {
  hm_out_spec spec = {.dtype = dtype, .ndim = p->ndim, .has_stride = true};
  memcpy(spec.shape, p->shape, sizeof spec.shape);
  order_of(p, spec.stride);
  return hm__tensor_by_spec(&spec, hm_tensor_device(p), out);
}

int hm__write_plain(int op, hm_tensor *t, hm_arg src) {
  hm_mode *mode = hm_mode_current();
  hm_mode before = *mode;
  mode->grad = false;
  mode->autocast = false;
  const hm_arg in[2] = {hm_t(t), src};
  hm_tensor *out = NULL;
  int rc = hm_call(op, in, NULL, &out);
  *mode = before;
  hm_tensor_release(out);
  return rc;
}

/* ====== Batches of gradients ====== */

void hm__batch_free(hm_batch *b) {
  hm_free(b->item);
  hm_free(b->stat);
  hm_free(b->histogram);
  hm_free(b->grad);
  hm_free(b->param);
  memset(b, 0, sizeof *b);
}

int hm__grow(void *array_of_pointer, size_t n, size_t entry) {
  void **array = array_of_pointer;
  void *p = hm_realloc(*array, n * entry);
  if (!p) return HM_ERR_MEMORY;
  *array = p;
  return HM_OK;
}

int hm__batch_reserve(hm_batch *b, int n) {
  if (n <= b->cap) return HM_OK;
  int rc = hm__grow(&b->item, (size_t)n, sizeof *b->item);
  if (!rc) rc = hm__grow(&b->stat, (size_t)n, sizeof *b->stat);
  if (!rc) rc = hm__grow(&b->grad, (size_t)n, sizeof *b->grad);
  if (!rc) rc = hm__grow(&b->param, (size_t)n, sizeof *b->param);
  if (!rc) b->cap = n;
  return rc;
}

bool hm__takes_part(const hm_tensor *p, bool wanted_only) { return p->grad && (p->requires_grad || !wanted_only); }

/* Refuses a gradient that does not fit its parameter. */
static int check_grad(const char *op, const hm_tensor *p, int index) {
  const hm_tensor *g = p->grad;
  char a[128], b[128];
  if (!hm__same_shape(p, g)) {
    return hm_fail(HM_ERR_SHAPE, "%s: the gradient of parameter %d has another shape: it is %s, the parameter is %s",
                   op, index + 1, hm_describe(g, a, sizeof a), hm_describe(p, b, sizeof b));
  }
  if (!hm_dtype_is_float(g->dtype) || (g->dtype == HM_F64) != (p->dtype == HM_F64)) {
    return hm_fail(HM_ERR_DTYPE,
                   "%s: the gradient of parameter %d has a dtype that does not fit: it is %s, the parameter is %s", op,
                   index + 1, hm_describe(g, a, sizeof a), hm_describe(p, b, sizeof b));
  }
  if (hm_tensor_device(g) != hm_tensor_device(p)) {
    return hm_fail(HM_ERR_DEVICE, "%s: the gradient of parameter %d lies elsewhere: it is %s, the parameter is %s", op,
                   index + 1, hm_describe(g, a, sizeof a), hm_describe(p, b, sizeof b));
  }
  return HM_OK;
}

/* Does p's gradient lie over that of an earlier parameter?  Two leaves may get one tensor (a + b, under create_graph);
 * writing to it twice would be wrong.  Looked at only where somebody else holds the gradient too. */
static bool shares_grad(hm_tensor *const *params, int index, bool wanted_only) {
  const hm_tensor *g = params[index]->grad;
  if (atomic_load_explicit(&g->refs, memory_order_relaxed) == 1 &&
      atomic_load_explicit(&g->storage->refs, memory_order_relaxed) == 1) {
    return false;
  }
  for (int i = 0; i < index; i++) {
    const hm_tensor *other = params[i]->grad;
    if (!hm__takes_part(params[i], wanted_only) || other->storage != g->storage) continue;
    if (other->offset < g->offset + g->numel && g->offset < other->offset + other->numel) return true;
  }
  return false;
}

/* Gives a parameter a gradient of its own that is dense in its element order, by copying where it is not so already. */
static int own_grad(hm_tensor *const *params, int index, bool wanted_only) {
  hm_tensor *p = params[index];
  int64_t stride[HM_MAX_NDIM];
  order_of(p, stride);
  bool ordered = in_order(p->grad, stride);
  if (ordered && !shares_grad(params, index, wanted_only)) return HM_OK;
  hm_tensor *own = NULL;
  int rc = hm__like_param(p, p->grad->dtype, &own);
  if (!rc) rc = hm__write_plain(HM_OP_COPY_, own, hm_t(p->grad));
  if (rc) {
    hm_tensor_release(own);
    return rc;
  }
  if (!ordered) hm__count_layout_copy(hm_tensor_device(p));
  hm_tensor_release(p->grad);
  p->grad = own;
  return HM_OK;
}

int hm__batch_check(const char *op, hm_tensor *const *params, int n, bool wanted_only, uint32_t *devices) {
  *devices = 0;
  for (int i = 0; i < n; i++) {
    if (!hm__takes_part(params[i], wanted_only)) continue;
    int rc = check_grad(op, params[i], i);
    if (rc) return rc;
    *devices |= 1u << hm_tensor_device(params[i]);
  }
  for (int i = 0; i < n; i++) {
    if (!hm__takes_part(params[i], wanted_only)) continue;
    int rc = own_grad(params, i, wanted_only);
    if (rc) return rc;
  }
  return HM_OK;
}

/* Describes one parameter's gradient as the next item. */
static void batch_add(hm_batch *b, hm_tensor *p, int index) {
  b->item[b->n] = (hm_multi_item){
      .numel = p->numel,
      .param = hm_tensor_data(p),
      .grad = hm_tensor_data(p->grad),
      .param_dtype = p->dtype,
      .grad_dtype = p->grad->dtype,
      .low_dtype = HM_NONE,
      .state_dtype = p->dtype == HM_F64 ? HM_F64 : HM_F32,
  };
  b->grad[b->n] = p->grad;
  b->param[b->n] = index;
  b->n++;
}

void hm__batch_fill(hm_batch *b, hm_tensor *const *params, int n, bool wanted_only, uint32_t devices) {
  b->n = 0;
  b->n_ranges = 0;
  for (int device = 0; device < HM_MAX_DEVICES; device++) {
    if (!(devices >> device & 1)) continue;
    int begin = b->n;
    for (int i = 0; i < n; i++) {
      if (hm__takes_part(params[i], wanted_only) && hm_tensor_device(params[i]) == device) batch_add(b, params[i], i);
    }
    b->range[b->n_ranges++] = (hm_range){device, begin, b->n};
  }
}

/* The seed of a device's random numbers. */
static uint64_t seed_of(int device) {
  uint64_t seed, offset;
  hm_random_get(device, &seed, &offset);
  return seed;
}

int hm__batch_late(const hm_batch *b, const char *name, hm_multi_op op, const hm_multi_group *group,
                   const hm_late *late) {
  const hm_range *range = &b->range[0];
  const hm_backend *backend = hm_device_backend(range->device);
  if (!backend) return HM_ERR_DEVICE;
  if (b->n_ranges != 1 || !backend->late_tensor) {
    return hm_fail(HM_ERR_UNSUPPORTED, "%s: device %s cannot do it without a wait", name,
                   hm_device_name(range->device));
  }
  const hm_multi_call call = {
      .op = op,
      .n = range->end - range->begin,
      .item = b->item + range->begin,
      .group = group,
      .seed = seed_of(range->device),
  };
  return backend->late_tensor(&call, late);
}

int hm__batch_run(const hm_batch *b, const char *name, hm_multi_op op, const hm_multi_group *group, double inv_scale,
                  double grad_mul) {
  for (int r = 0; r < b->n_ranges; r++) {
    const hm_range *range = &b->range[r];
    const hm_backend *backend = hm_device_backend(range->device);
    if (!backend) return HM_ERR_DEVICE;
    if (!backend->multi_tensor) {
      return hm_fail(HM_ERR_UNSUPPORTED, "%s: device %s cannot do it", name, hm_device_name(range->device));
    }
    hm_multi_call call = {
        .op = op,
        .n = range->end - range->begin,
        .item = b->item + range->begin,
        .group = group,
        .stat = b->stat + range->begin,
        .inv_scale = inv_scale,
        .grad_mul = grad_mul,
        .seed = seed_of(range->device),
        .histogram = b->counts ? b->histogram + (size_t)range->begin * HM_HISTOGRAM : NULL,
    };
    int rc = backend->multi_tensor(&call);
    if (rc) return rc;
  }
  return HM_OK;
}

void hm__batch_touch(const hm_batch *b) {
  for (int i = 0; i < b->n; i++) hm__touch(b->grad[i]);
}

/* ====== Gradients of any list of tensors ====== */

/* A batch of its own over the gradients of a list. */
static int list_batch(const char *op, hm_tensor *const *params, int n, hm_batch *b) {
  memset(b, 0, sizeof *b);
  uint32_t devices = 0;
  int rc = hm__batch_check(op, params, n, false, &devices);
  if (!rc) rc = hm__batch_reserve(b, n);
  if (!rc) hm__batch_fill(b, params, n, false, devices);
  return rc;
}

int hm_grad_norm(hm_tensor *const *params, int n, double *norm) {
  hm_batch b;
  int rc = list_batch("grad_norm", params, n, &b);
  if (!rc) rc = hm__batch_run(&b, "grad_norm", HM_MULTI_CHECK, NULL, 1, 1);
  if (!rc) {
    double sum = 0;
    int64_t infs = 0, nans = 0;
    for (int i = 0; i < b.n; i++) {
      sum += b.stat[i].sum_sq;
      infs += b.stat[i].inf_count;
      nans += b.stat[i].nan_count;
    }
    *norm = nans ? NAN : infs ? INFINITY : sqrt(sum);
  }
  hm__batch_free(&b);
  return rc;
}

int hm_grad_scale(hm_tensor *const *params, int n, double coef) {
  hm_batch b;
  int rc = list_batch("grad_scale", params, n, &b);
  if (!rc) rc = hm__batch_run(&b, "grad_scale", HM_MULTI_SCALE, NULL, 1, coef);
  if (!rc) hm__batch_touch(&b);
  hm__batch_free(&b);
  return rc;
}

int hm_grad_clamp(hm_tensor *const *params, int n, double limit) {
  hm_batch b;
  int rc = list_batch("clip_grad_value_", params, n, &b);
  if (!rc) rc = hm__batch_run(&b, "clip_grad_value_", HM_MULTI_CLAMP, NULL, 1, limit);
  if (!rc) hm__batch_touch(&b);
  hm__batch_free(&b);
  return rc;
}

/* The norm of a batch on one device, and the gradients scaled by it, all on the device. */
static int clip_late(hm_batch *b, double max_norm, hm_tensor **norm) {
  const int64_t bytes = (int64_t)(sizeof(hm_late_found) + (size_t)b->n * sizeof(hm_multi_stat));
  hm_tensor *found = NULL, *out = NULL;
  int rc = hm_empty(1, &bytes, HM_U8, b->range[0].device, &found);
  if (!rc) rc = hm_empty(0, NULL, HM_F32, b->range[0].device, &out);
  if (!rc) {
    const hm_late check = {.found = hm_tensor_data(found), .norm_out = hm_tensor_data(out)};
    const hm_late scale = {.norm = hm_tensor_data(found), .max_norm = max_norm};
    rc = hm__batch_late(b, "clip_grad_norm_", HM_MULTI_CHECK, NULL, &check);
    if (!rc) rc = hm__batch_late(b, "clip_grad_norm_", HM_MULTI_SCALE, NULL, &scale);
  }
  if (!rc) hm__batch_touch(b);
  hm_tensor_release(found);
  if (rc) hm_tensor_release(out);
  else *norm = out;
  return rc;
}

int hm_grad_clip(hm_tensor *const *params, int n, double max_norm, hm_tensor **norm) {
  hm_batch b;
  *norm = NULL;
  int rc = list_batch("clip_grad_norm_", params, n, &b);
  if (!rc && b.n && b.n_ranges == 1) {
    const hm_backend *backend = hm_device_backend(b.range[0].device);
    if (backend && backend->late_tensor) rc = clip_late(&b, max_norm, norm);
  }
  hm__batch_free(&b);
  return rc;
}

double hm__clip_coefficient(double norm, double max_norm) {
  double coef = max_norm / (norm + 1e-6);
  return coef > 1 ? 1 : coef;
}
