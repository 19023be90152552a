/*
 * tensor.c -- tensors and storages: their life, their geometry, data in and out, gradient fields and hooks.
 *
 * A storage owns one block of device memory and its shadows; a tensor holds a reference to a storage, and owns its
 * gradient, its hooks and a reference to the node that made it.  Structs come from free lists that belong to the
 * mutator thread; other threads use the heap.  Releasing a tensor never recurses into its gradient's gradient; graphs
 * are freed by hm__node_release, which is iterative as well.
 */
#include <stdio.h>
#include <string.h>

#include "alloc.h"
#include "graph.h"
#include "hook.h"

/* ====== Free lists of structs ====== */

typedef struct spare {
  struct spare *next;
} spare;

typedef struct spares {
  spare *first;
  int32_t n;
} spares;

/* The address sanitizer should see every struct come and go. */
#if defined(__SANITIZE_ADDRESS__)
enum { SPARES_MAX = 0 };
#else
enum { SPARES_MAX = 8192 };
#endif

static spares spare_tensors, spare_storages; /* mutator thread only */

static void *spare_take(spares *list, size_t bytes) {
  if (!list->first || !hm__is_mutator()) return hm_alloc(bytes);
  if (hm__alloc_injected()) {
    hm_fail(HM_ERR_MEMORY, "out of memory: %zu bytes of host memory were refused", bytes);
    return NULL;
  }
  spare *s = list->first;
  list->first = s->next;
  list->n--;
  return s;
}

static void spare_put(spares *list, void *p) {
  if (list->n >= SPARES_MAX || !hm__is_mutator()) {
    hm_free(p);
    return;
  }
  spare *s = p;
  s->next = list->first;
  list->first = s;
  list->n++;
}

int64_t hm__spare_structs(void) { return (int64_t)spare_tensors.n + spare_storages.n; }

/* Drops one reference; true for the last.  A sole owner needs no atomic subtraction: nobody else can be counting. */
static bool last_reference(_Atomic int32_t *refs) {
  if (atomic_load_explicit(refs, memory_order_acquire) == 1) return true;
  return atomic_fetch_sub_explicit(refs, 1, memory_order_acq_rel) == 1;
}

/* ====== Storages ====== */

int hm__storage_new(size_t bytes, int device, hm_storage **out) {
  *out = NULL;
  hm_storage *s = spare_take(&spare_storages, sizeof *s);
  if (!s) return HM_ERR_MEMORY;
  void *data;
  int status = hm__device_alloc(device, bytes, &data);
  if (status) {
    spare_put(&spare_storages, s);
    return status;
  }
  atomic_init(&s->refs, 1);
  s->device = device;
  s->version = 0;
  s->rewrites = 0;
  s->data = data;
  s->bytes = bytes;
  s->shadows = NULL;
  *out = s;
  return HM_OK;
}

void hm__storage_retain(hm_storage *s) { atomic_fetch_add_explicit(&s->refs, 1, memory_order_relaxed); }

void hm__storage_release(hm_storage *s) {
  if (!s || !last_reference(&s->refs)) return;
  if (s->shadows) hm__shadow_drop_all(s);
  hm__device_free(s->device, s->data, s->bytes);
  spare_put(&spare_storages, s);
}

/* ====== Geometry ====== */

void hm__row_major(int ndim, const int64_t *shape, int64_t *stride) {
  int64_t step = 1;
  for (int d = ndim - 1; d >= 0; d--) {
    stride[d] = step;
    step *= shape[d] > 1 ? shape[d] : 1;
  }
}

void hm__channels_last_strides(const int64_t *shape, int64_t *stride) {
  static const int8_t inner_first[] = {1, 3, 2, 0};
  int64_t step = 1;
  for (int i = 0; i < 4; i++) {
    int d = inner_first[i];
    stride[d] = step;
    step *= shape[d] > 1 ? shape[d] : 1;
  }
}

/* Do t's strides equal `want` wherever they matter? */
static bool same_strides(const hm_tensor *t, const int64_t *want) {
  if (t->numel == 0) return true;
  for (int d = 0; d < t->ndim; d++) {
    if (t->shape[d] != 1 && t->stride[d] != want[d]) return false;
  }
  return true;
}

bool hm_is_contiguous(const hm_tensor *t) {
  int64_t step = 1;
  if (t->numel == 0) return true;
  for (int d = t->ndim - 1; d >= 0; d--) {
    if (t->shape[d] == 1) continue;
    if (t->stride[d] != step) return false;
    step *= t->shape[d];
  }
  return true;
}

bool hm_is_channels_last(const hm_tensor *t) {
  int64_t want[4];
  if (t->ndim != 4) return false;
  hm__channels_last_strides(t->shape, want);
  return same_strides(t, want);
}

/* Checks a shape and a dtype for a new tensor; sets the number of elements and of bytes. */
static int measure(int ndim, const int64_t *shape, int dtype, int64_t *numel, size_t *bytes) {
  if (dtype < 0 || dtype >= HM_DTYPE_COUNT)
    return hm_fail(HM_ERR_DTYPE, "new tensor: there is no dtype number %d", dtype);
  if (ndim < 0 || ndim > HM_MAX_NDIM)
    return hm_fail(HM_ERR_SHAPE, "new tensor: expected 0 to %d dims, came %d", HM_MAX_NDIM, ndim);
  int64_t n = 1, total;
  bool overflow = false, empty = false;
  for (int d = 0; d < ndim; d++) {
    if (shape[d] < 0)
      return hm_fail(HM_ERR_SHAPE, "new tensor: expected sizes of 0 or more, came %lld for dim %d", (long long)shape[d],
                     d + 1);
    if (shape[d] == 0) empty = true;
    else overflow |= __builtin_mul_overflow(n, shape[d], &n);
  }
  overflow |= __builtin_mul_overflow(n, (int64_t)hm_dtype_size(dtype), &total);
  if (overflow) return hm_fail(HM_ERR_SHAPE, "new tensor: its size in bytes does not fit 63 bits");
  *numel = empty ? 0 : n;
  *bytes = empty ? 0 : (size_t)total;
  return HM_OK;
}

/* ====== Life ====== */

/* A tensor struct with everything set but shape, stride and numel.  Takes over the reference to s. */
static hm_tensor *tensor_struct(hm_storage *s, int dtype, int ndim, int64_t offset) {
  hm_tensor *t = spare_take(&spare_tensors, sizeof *t);
  if (!t) return NULL;
  atomic_init(&t->refs, 1);
  t->dtype = (int8_t)dtype;
  t->ndim = (int8_t)ndim;
  t->requires_grad = t->is_view = t->retains_grad = t->in_lua = false;
  t->storage = s;
  t->offset = offset;
  t->node = NULL;
  t->out_nr = 0;
  t->rewrites = s->rewrites;
  t->accumulator = NULL;
  t->grad = NULL;
  t->hooks = NULL;
  t->grad_order = 0;
  return t;
}

int hm__tensor_on(hm_storage *s, int dtype, int ndim, const int64_t *shape, const int64_t *stride, int64_t offset,
                  hm_tensor **out) {
  *out = NULL;
  hm_tensor *t = tensor_struct(s, dtype, ndim, offset);
  if (!t) return HM_ERR_MEMORY;
  t->numel = 1;
  for (int d = 0; d < ndim; d++) {
    t->shape[d] = shape[d];
    t->stride[d] = stride[d];
    t->numel *= shape[d];
  }
  hm__storage_retain(s);
  *out = t;
  return HM_OK;
}

/* A new tensor with memory of its own; shape is set, strides are not. */
static int tensor_new(int ndim, const int64_t *shape, int dtype, int device, hm_tensor **out) {
  *out = NULL;
  int64_t numel;
  size_t bytes;
  hm_storage *s;
  int status = measure(ndim, shape, dtype, &numel, &bytes);
  if (status) return status;
  if ((status = hm__storage_new(bytes, device, &s))) return status;
  hm_tensor *t = tensor_struct(s, dtype, ndim, 0);
  if (!t) {
    hm__storage_release(s);
    return HM_ERR_MEMORY;
  }
  t->numel = numel;
  for (int d = 0; d < ndim; d++) t->shape[d] = shape[d];
  *out = t;
  return HM_OK;
}

int hm_empty(int ndim, const int64_t *shape, int dtype, int device, hm_tensor **out) {
  int status = tensor_new(ndim, shape, dtype, device, out);
  if (status == HM_OK) hm__row_major(ndim, shape, (*out)->stride);
  return status;
}

int hm__tensor_by_spec(const hm_out_spec *spec, int device, hm_tensor **out) {
  int status = tensor_new(spec->ndim, spec->shape, spec->dtype, device, out);
  if (status) return status;
  hm_tensor *t = *out;
  if (spec->has_stride) {
    for (int d = 0; d < t->ndim; d++) t->stride[d] = spec->stride[d];
  } else if (spec->channels_last && t->ndim == 4) {
    hm__channels_last_strides(t->shape, t->stride);
  } else {
    hm__row_major(t->ndim, t->shape, t->stride);
  }
  return HM_OK;
}

int hm_alias(hm_tensor *t, hm_tensor **out) {
  *out = NULL;
  return hm__tensor_on(t->storage, t->dtype, t->ndim, t->shape, t->stride, t->offset, out);
}

/* Does the geometry stay inside `room` elements? */
static bool in_bounds(int ndim, const int64_t *shape, const int64_t *stride, int64_t offset, int64_t room) {
  int64_t last = offset;
  if (offset < 0) return false;
  for (int d = 0; d < ndim; d++) {
    int64_t span;
    if (shape[d] == 0) return true;
    if (__builtin_mul_overflow(shape[d] - 1, stride[d], &span) || __builtin_add_overflow(last, span, &last))
      return false;
  }
  return last < room;
}

int hm_as_strided(hm_tensor *t, int ndim, const int64_t *shape, const int64_t *stride, int64_t offset,
                  hm_tensor **out) {
  *out = NULL;
  int64_t numel;
  size_t bytes;
  int status = measure(ndim, shape, t->dtype, &numel, &bytes);
  if (status) return status;
  for (int d = 0; d < ndim; d++) {
    if (stride[d] < 0)
      return hm_fail(HM_ERR_ARG, "as_strided: expected strides of 0 or more, came %lld for dim %d",
                     (long long)stride[d], d + 1);
  }
  int64_t room = (int64_t)(t->storage->bytes / (size_t)hm_dtype_size(t->dtype));
  if (!in_bounds(ndim, shape, stride, offset, room))
    return hm_fail(HM_ERR_ARG, "as_strided: shape, strides and offset %lld reach outside the storage of %lld elements",
                   (long long)offset, (long long)room);
  status = hm__tensor_on(t->storage, t->dtype, ndim, shape, stride, offset, out);
  if (status == HM_OK) (*out)->is_view = true;
  return status;
}

hm_tensor *hm_tensor_retain(hm_tensor *t) {
  if (t) atomic_fetch_add_explicit(&t->refs, 1, memory_order_relaxed);
  return t;
}

/* Lets go of everything a tensor holds but its gradient, which is returned.  An accumulator owns its leaf, not the
 * other way round: it is gone when the last reference goes. */
static hm_tensor *empty_out(hm_tensor *t) {
  hm_tensor *grad = t->grad;
  hm_node *node = t->node;
  hm_storage *storage = t->storage;
  t->grad = NULL;
  t->node = NULL;
  t->storage = NULL;
  if (t->hooks) hm__hooks_free(&t->hooks);
  if (node) hm__node_release(node);
  if (storage) hm__storage_release(storage);
  return grad;
}

void hm_tensor_release(hm_tensor *t) {
  while (t && last_reference(&t->refs)) {
    hm_tensor *grad = empty_out(t);
    spare_put(&spare_tensors, t);
    t = grad;
  }
}

/* ====== Reading ====== */

int hm_tensor_device(const hm_tensor *t) { return t->storage->device; }

void *hm_tensor_data(const hm_tensor *t) {
  if (!t->storage->data) return NULL;
  return (char *)t->storage->data + t->offset * hm_dtype_size(t->dtype);
}

uint32_t hm_tensor_version(const hm_tensor *t) { return t->storage->version; }

bool hm_tensor_is_leaf(const hm_tensor *t) { return t->node == NULL; }

const void *hm_tensor_storage_id(const hm_tensor *t) { return t->storage; }

void hm__touch(hm_tensor *t) { t->storage->version++; }

void hm__view_of(const hm_tensor *t, hm_view *v) {
  v->data = hm_tensor_data(t);
  v->dtype = t->dtype;
  v->ndim = t->ndim;
  v->flags = 0;
  v->scalar.i = 0;
  for (int d = 0; d < t->ndim; d++) {
    v->shape[d] = t->shape[d];
    v->stride[d] = t->stride[d];
  }
}

void hm__plain_view(void *data, int dtype, int ndim, const int64_t *shape, hm_view *v) {
  v->data = data;
  v->dtype = (int16_t)dtype;
  v->ndim = (int16_t)ndim;
  v->flags = 0;
  v->scalar.i = 0;
  for (int d = 0; d < ndim; d++) v->shape[d] = shape[d];
  hm__row_major(ndim, shape, v->stride);
}

const char *hm_describe(const hm_tensor *t, char *buffer, size_t size) {
  char dims[HM_MAX_NDIM * 21 + 1] = "";
  size_t n = 0;
  for (int d = 0; d < t->ndim; d++)
    n += (size_t)snprintf(dims + n, sizeof dims - n, d ? ",%lld" : "%lld", (long long)t->shape[d]);
  snprintf(buffer, size, "%s[%s] on %s", hm_dtype_short(t->dtype), dims, hm_device_name(t->storage->device));
  return buffer;
}

/* ====== Data in and out ====== */

/* The dtype that a conversion is computed in. */
static int compute_dtype(int a, int b) {
  if (a == HM_F64 || b == HM_F64) return HM_F64;
  return hm_dtype_is_float(a) || hm_dtype_is_float(b) ? HM_F32 : HM_I64;
}

int hm__copy_view(int device, const hm_view *src, const hm_view *dst) {
  const hm_backend *backend = hm_device_backend(device);
  if (!backend) return HM_ERR_DEVICE;
  for (int d = 0; d < src->ndim; d++) {
    if (src->shape[d] == 0) return HM_OK;
  }
  hm_kernel_fn kernel = backend->kernel[HM_FAMILY_COPY];
  if (!kernel) return hm_fail(HM_ERR_UNSUPPORTED, "copy: device %s has no kernel for it", hm_device_name(device));
  hm_attr attr[2] = {{.i = dst->dtype}, {.i = 0}}; /* of the row cast: dtype, layout */
  hm_kernel_call call;
  call.op = HM_OP_CAST;
  call.compute = compute_dtype(src->dtype, dst->dtype);
  call.n_in = call.n_out = 1;
  call.attr = attr;
  call.workspace = NULL;
  call.workspace_bytes = 0;
  call.stream = NULL;
  call.in[0] = *src;
  call.out[0] = *dst;
  size_t scratch = 0;
  int status = backend->workspace_size ? backend->workspace_size(&call, &scratch) : HM_OK;
  if (status) return status;
  if ((status = hm__device_alloc(device, scratch, &call.workspace))) return status;
  call.workspace_bytes = scratch;
  status = kernel(&call);
  hm__device_free(device, call.workspace, scratch);
  return status;
}

/* Fills t, which is dense row-major on another device than the CPU, from host memory. */
static int upload(hm_tensor *t, const void *data, int data_dtype) {
  const hm_backend *backend = hm_device_backend(t->storage->device);
  size_t bytes = (size_t)t->numel * (size_t)hm_dtype_size(t->dtype);
  if (data_dtype == t->dtype) return backend->mem_from_host(hm_tensor_data(t), data, bytes, NULL);
  hm_view src, dst;
  void *converted = hm_alloc(bytes);
  if (!converted) return HM_ERR_MEMORY;
  hm__plain_view((void *)data, data_dtype, 1, &t->numel, &src);
  hm__plain_view(converted, t->dtype, 1, &t->numel, &dst);
  int status = hm__copy_view(HM_CPU, &src, &dst);
  if (status == HM_OK) status = backend->mem_from_host(hm_tensor_data(t), converted, bytes, NULL);
  hm_free(converted);
  return status;
}

int hm_from_host(const void *data, int data_dtype, int ndim, const int64_t *shape, int dtype, int device,
                 hm_tensor **out) {
  *out = NULL;
  hm_tensor *t;
  int status = hm_empty(ndim, shape, dtype, device, &t);
  if (status) return status;
  if (t->numel == 0) {
    status = HM_OK;
  } else if (device == HM_CPU) {
    hm_view src, dst;
    hm__plain_view((void *)data, data_dtype, 1, &t->numel, &src);
    hm__plain_view(hm_tensor_data(t), dtype, 1, &t->numel, &dst);
    status = hm__copy_view(HM_CPU, &src, &dst);
  } else {
    status = upload(t, data, data_dtype);
  }
  if (status) {
    hm_tensor_release(t);
    return status;
  }
  *out = t;
  return HM_OK;
}

/* Brings dense row-major device memory to the host, converted. */
static int download(const hm_backend *backend, const void *from, int dtype, int64_t numel, void *data, int data_dtype) {
  size_t bytes = (size_t)numel * (size_t)hm_dtype_size(dtype);
  if (dtype == data_dtype) return backend->mem_to_host(data, from, bytes, NULL);
  hm_view src, dst;
  void *raw = hm_alloc(bytes);
  if (!raw) return HM_ERR_MEMORY;
  hm__plain_view(raw, dtype, 1, &numel, &src);
  hm__plain_view(data, data_dtype, 1, &numel, &dst);
  int status = backend->mem_to_host(raw, from, bytes, NULL);
  if (status == HM_OK) status = hm__copy_view(HM_CPU, &src, &dst);
  hm_free(raw);
  return status;
}

/* hm_to_host from another device than the CPU: strided data are made dense over there first. */
static int to_host_from_device(const hm_tensor *t, void *data, int data_dtype) {
  const hm_backend *backend = hm_device_backend(t->storage->device);
  if (hm_is_contiguous(t)) return download(backend, hm_tensor_data(t), t->dtype, t->numel, data, data_dtype);
  hm_tensor *dense;
  hm_view src, dst;
  int status = hm_empty(t->ndim, t->shape, t->dtype, t->storage->device, &dense);
  if (status) return status;
  hm__view_of(t, &src);
  hm__view_of(dense, &dst);
  status = hm__copy_view(t->storage->device, &src, &dst);
  if (status == HM_OK) status = download(backend, hm_tensor_data(dense), t->dtype, t->numel, data, data_dtype);
  hm_tensor_release(dense);
  return status;
}

int hm_to_host(const hm_tensor *t, void *data, int data_dtype) {
  if (t->numel == 0) return HM_OK;
  if (t->storage->device != HM_CPU) return to_host_from_device(t, data, data_dtype);
  hm_view src, dst;
  hm__view_of(t, &src);
  hm__plain_view(data, data_dtype, t->ndim, t->shape, &dst);
  return hm__copy_view(HM_CPU, &src, &dst);
}

int hm_item(const hm_tensor *t, double *f, int64_t *i) {
  char name[256];
  if (t->numel != 1)
    return hm_fail(HM_ERR_SHAPE, "item: expected a tensor of one element, came %s\n  hint: totable() gives all of them",
                   hm_describe(t, name, sizeof name));
  bool is_float = hm_dtype_is_float(t->dtype);
  double real = 0;
  int64_t whole = 0;
  int status = hm_to_host(t, is_float ? (void *)&real : (void *)&whole, is_float ? HM_F64 : HM_I64);
  if (status) return status;
  if (is_float && f) *f = real;
  if (!is_float && i) *i = whole;
  return HM_OK;
}

/* ====== Gradient fields ====== */

int hm_set_requires_grad(hm_tensor *t, bool on) {
  char name[256];
  if (t->requires_grad == on) return HM_OK;
  if (t->node)
    return hm_fail(HM_ERR_STATE,
                   "requires_grad: expected a leaf, came the result of an op, %s\n  hint: detach() gives a tensor "
                   "outside the graph",
                   hm_describe(t, name, sizeof name));
  if (on && !hm_dtype_is_float(t->dtype))
    return hm_fail(HM_ERR_DTYPE, "requires_grad: expected a floating dtype, came %s",
                   hm_describe(t, name, sizeof name));
  if (on && hm_dtype_is_f8(t->dtype))
    return hm_fail(HM_ERR_DTYPE,
                   "requires_grad: 8-bit floats are for storing and converting, came %s\n  hint: keep the parameter "
                   "in float32 and convert copies",
                   hm_describe(t, name, sizeof name));
  t->requires_grad = on;
  return HM_OK;
}

/* Do two tensors agree in shape? */
static bool same_shape(const hm_tensor *a, const hm_tensor *b) {
  return a->ndim == b->ndim && memcmp(a->shape, b->shape, (size_t)a->ndim * sizeof a->shape[0]) == 0;
}

int hm_set_grad(hm_tensor *t, hm_tensor *grad) {
  char want[256], came[256];
  if (grad) {
    if (grad == t) return hm_fail(HM_ERR_ARG, "grad: a tensor cannot be its own gradient");
    bool fits = same_shape(t, grad) && t->storage->device == grad->storage->device;
    if (!hm_dtype_is_float(t->dtype) || !fits || t->dtype != grad->dtype)
      return hm_fail(fits ? HM_ERR_DTYPE : HM_ERR_SHAPE,
                     "grad: expected a tensor like its owner: floating dtype, equal shape, dtype and device\n"
                     "  the owner is %s, the gradient is %s",
                     hm_describe(t, want, sizeof want), hm_describe(grad, came, sizeof came));
  }
  hm_tensor *old = t->grad;
  t->grad = hm_tensor_retain(grad);
  hm_tensor_release(old);
  return HM_OK;
}

/* ====== Hooks ====== */

/* ---- hm_retain_grad: a hook on the node that knows the tensor weakly ---- */

/* Shared by the hook on the node and a mark in tensor->hooks; the mark's end tells the hook that the tensor is gone. */
typedef struct keeper {
  hm_tensor *t; /* borrowed; NULL when it is gone */
  int refs;
} keeper;

static void keeper_release(void *ud) {
  keeper *k = ud;
  if (--k->refs == 0) hm_free(k);
}

/* The mark itself never runs: it lies in the list of a tensor that is no leaf. */
static int keeper_mark(void *ud, hm_tensor *grad, hm_tensor **replacement) {
  (void)ud, (void)grad, (void)replacement;
  return HM_OK;
}

/* The hook: adds the gradient to the tensor's. */
static int keeper_hook(void *ud, hm_tensor *grad, hm_tensor **replacement) {
  (void)replacement;
  keeper *k = ud;
  if (!k->t) return HM_OK;
  if (!k->t->grad) {
    k->t->grad = hm_tensor_retain(grad);
    return HM_OK;
  }
  hm_tensor *sum;
  hm_arg in[2] = {hm_t(k->t->grad), hm_t(grad)};
  int status = hm_call(HM_OP_ADD, in, NULL, &sum);
  if (status) return status;
  hm_tensor_release(k->t->grad);
  k->t->grad = sum;
  return HM_OK;
}

/* ---- lists; mutator thread only ---- */

static int64_t last_hook_id;
static int hooks_running;  /* depth of hm__hooks_run: meanwhile dead hooks stay in their lists, with fn NULL */
static hm_hook *graveyard; /* lists that were freed meanwhile */

/* From now on the hook does not run. */
static void hook_kill(hm_hook *h) {
  if (h->fn == keeper_mark) ((keeper *)h->ud)->t = NULL;
  h->fn = NULL;
}

/* Frees one hook that is in no list any more. */
static void hook_free(hm_hook *h) {
  hook_kill(h);
  if (h->drop) h->drop(h->ud);
  hm_free(h);
}

void hm__hooks_free(hm_hook **list) {
  hm_hook *h = *list;
  *list = NULL;
  while (h) {
    hm_hook *next = h->next;
    if (hooks_running) {
      hook_kill(h);
      h->next_dead = graveyard;
      graveyard = h;
    } else {
      hook_free(h);
    }
    h = next;
  }
}

/* Frees what was freed while hooks ran. */
static void bury(void) {
  while (graveyard) {
    hm_hook *h = graveyard;
    graveyard = h->next_dead;
    hook_free(h);
  }
}

/* Takes the hooks out of a list that were removed while hooks ran. */
static void sweep(hm_hook **list) {
  for (hm_hook **at = list; *at;) {
    hm_hook *h = *at;
    if (h->fn) {
      at = &h->next;
      continue;
    }
    *at = h->next;
    hook_free(h);
  }
}

/* Puts a hook in its place: behind all others, but before the one that retains the gradient. */
static void insert(hm_hook **list, hm_hook *h) {
  if (!hooks_running) sweep(list);
  while (*list && (h->retains || !(*list)->retains)) list = &(*list)->next;
  h->next = *list;
  *list = h;
}

/* Adds a hook to a list.  On failure ud is the caller's still. */
static int hook_add(hm_hook **list, hm_hook hook) {
  hm_hook *h = hm_alloc(sizeof *h);
  if (!h) return HM_ERR_MEMORY;
  *h = hook;
  insert(list, h);
  return HM_OK;
}

/* Removes a hook by id; true if it was there. */
static bool hook_remove(hm_hook **list, int64_t id) {
  for (; *list; list = &(*list)->next) {
    hm_hook *h = *list;
    if (h->id != id) continue;
    if (hooks_running) {
      hook_kill(h);
    } else {
      *list = h->next;
      hook_free(h);
    }
    return true;
  }
  return false;
}

/* Replaces *grad by what a hook gave, if it fits. */
static int replace_grad(hm_tensor **grad, hm_tensor *replacement) {
  char want[256], came[256];
  hm_tensor *old = *grad;
  if (!same_shape(old, replacement) || old->dtype != replacement->dtype ||
      hm_tensor_device(old) != hm_tensor_device(replacement)) {
    int status =
        hm_fail(HM_ERR_SHAPE, "register_hook: expected a gradient like the one that came, %s; the hook gave %s",
                hm_describe(old, want, sizeof want), hm_describe(replacement, came, sizeof came));
    hm_tensor_release(replacement);
    return status;
  }
  *grad = replacement;
  hm_tensor_release(old);
  return HM_OK;
}

int hm__hooks_run(hm_hook *list, int out_nr, hm_tensor **grad) {
  int status = HM_OK;
  hooks_running++;
  for (hm_hook *h = list; h && status == HM_OK; h = h->next) {
    if (!h->fn || h->out_nr != out_nr) continue;
    hm_tensor *replacement = NULL;
    status = h->fn(h->ud, *grad, &replacement);
    if (status) hm_tensor_release(replacement);
    else if (replacement) status = replace_grad(grad, replacement);
  }
  if (--hooks_running == 0) bury();
  return status;
}

int hm_add_hook(hm_tensor *t, hm_hook_fn fn, void *ud, void (*drop)(void *ud), int64_t *id) {
  char name[256];
  if (!t->requires_grad)
    return hm_fail(HM_ERR_STATE, "register_hook: expected a tensor that requires a gradient, came %s",
                   hm_describe(t, name, sizeof name));
  hm_hook hook = {.id = last_hook_id + 1, .fn = fn, .ud = ud, .drop = drop, .out_nr = t->node ? t->out_nr : 0};
  int status = hook_add(t->node ? &t->node->hooks : &t->hooks, hook);
  if (status) return status;
  *id = ++last_hook_id;
  return HM_OK;
}

void hm_remove_hook(hm_tensor *t, int64_t id) {
  if (!hook_remove(&t->hooks, id) && t->node) hook_remove(&t->node->hooks, id);
}

int hm_retain_grad(hm_tensor *t) {
  char name[256];
  if (!t->requires_grad)
    return hm_fail(HM_ERR_STATE, "retain_grad: expected a tensor that requires a gradient, came %s",
                   hm_describe(t, name, sizeof name));
  if (!t->node || t->retains_grad) return HM_OK;
  keeper *k = hm_alloc(sizeof *k);
  if (!k) return HM_ERR_MEMORY;
  *k = (keeper){.t = t, .refs = 2};
  int64_t id = last_hook_id + 1;
  hm_hook mark = {.id = id, .fn = keeper_mark, .ud = k, .drop = keeper_release, .retains = true};
  hm_hook hook = {
      .id = id + 1, .fn = keeper_hook, .ud = k, .drop = keeper_release, .out_nr = t->out_nr, .retains = true};
  int status = hook_add(&t->hooks, mark);
  if (status) {
    hm_free(k);
    return status;
  }
  if ((status = hook_add(&t->node->hooks, hook))) {
    k->refs = 1;
    hook_remove(&t->hooks, id);
    return status;
  }
  last_hook_id += 2;
  t->retains_grad = true;
  return HM_OK;
}

int hm__retain_grad_moved(hm_tensor *t) {
  if (!t->retains_grad) return HM_OK;
  for (hm_hook *h = t->hooks; h; h = h->next) {
    if (!h->retains) continue;
    hook_remove(&t->hooks, h->id);
    break;
  }
  t->retains_grad = false;
  return t->node ? hm_retain_grad(t) : HM_OK;
}
