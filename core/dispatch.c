/*
 * dispatch.c -- the way of one op call through the engine.
 *
 * hm_call -> autocast and promotion (autocast.c) -> shapes and layouts (infer.c, view.c, composite.c) -> memory -> the backend's kernel
 * -> one node on the tape (autograd.c).  Every op of the table takes this way, forward and backward; nothing else calls a kernel
 * except the optimizers' passes (optim.c, scaler.c) and plain copies of tensor.c.
 *
 * While a call is under way gradients are off for whatever it runs inside (casts, contiguous copies, composites with a derivative of their
 * own), so that the row alone is recorded.
 */
#include <math.h>
#include <string.h>

#include "fp8.h"
#include "graph.h"

extern const hm_op_info hm__ops[HM_OP_COUNT];

static hm_op_log_fn op_log;
static void *op_log_ud;

const hm_op_info *hm_op_get(int op) { return &hm__ops[op]; }

int hm_op_find(const char *name) {
  for (int i = 0; i < HM_OP_COUNT; i++)
    if (!strcmp(hm__ops[i].name, name)) return i;
  return -1;
}

void hm_set_op_log(hm_op_log_fn fn, void *ud) {
  op_log = fn;
  op_log_ud = ud;
}

/* ====== Operands ====== */

/* 8-bit floats are copied, converted and looked at, and filled with a number. */
static bool takes_f8(const hm_op_info *info) {
  return info->family == HM_FAMILY_COPY || info->family == HM_FAMILY_VIEW || info == &hm__ops[HM_OP_FILL_];
}

static int refuse_f8(const hm_opcall *c, const char *what, const char *came) {
  return hm_fail(
      HM_ERR_DTYPE,
      "%s: the 8-bit floats are for storing and converting, nothing is computed in them: %s is %s\n  hint: compute with :to(\"f32\")",
      c->info->name, what, came);
}

static int check_operand(const hm_opcall *c, int i) {
  const hm_in_info *want = &c->info->in[i];
  const hm_arg *a = &c->in[i];
  if (a->kind == HM_ARG_NONE) {
    if (want->optional) return HM_OK;
    return hm_fail(HM_ERR_ARG, "%s: %s is missing\n  %s", c->info->name, want->name, c->info->signature);
  }
  if (a->kind != HM_ARG_TENSOR) {
    const bool number = c->info->family == HM_FAMILY_ELEMENTWISE || c->info->family == HM_FAMILY_FILL ||
                        c->info->family == HM_FAMILY_COPY || c->op == HM_OP_SCATTER;
    if (number && !want->mutated) return HM_OK;
    return hm_fail(HM_ERR_ARG, "%s: %s must be a tensor, got a number", c->info->name, want->name);
  }
  char text[160];
  if (hm_dtype_is_f8(a->t->dtype) && !takes_f8(c->info))
    return refuse_f8(c, want->name, hm_describe(a->t, text, sizeof text));
  if (want->cls == 'i' && hm_dtype_kind(a->t->dtype) != HM_KIND_INT)
    return hm_fail(HM_ERR_DTYPE, "%s: %s must hold integers, got %s\n  hint: make it int64: %s:to(\"i64\")",
                   c->info->name, want->name, hm_describe(a->t, text, sizeof text), want->name);
  if (want->cls == 'b' && a->t->dtype != HM_BOOL)
    return hm_fail(HM_ERR_DTYPE, "%s: %s must be bool, got %s\n  hint: compare, for instance %s:ne(0)", c->info->name,
                   want->name, hm_describe(a->t, text, sizeof text), want->name);
  return HM_OK;
}

static int check_operands(hm_opcall *c) {
  c->device = -1;
  int first = -1;
  for (int i = 0; i < c->info->n_in; i++) {
    const int status = check_operand(c, i);
    if (status) return status;
    if (c->in[i].kind != HM_ARG_TENSOR) continue;
    const int device = hm_tensor_device(c->in[i].t);
    if (c->device < 0) {
      c->device = device;
      first = i;
    } else if (device != c->device) {
      char a[160], b[160];
      return hm_fail(HM_ERR_DEVICE,
                     "%s: tensors on different devices: %s is %s, %s is %s\n  hint: move one with :to(\"%s\")",
                     c->info->name, c->info->in[first].name, hm_describe(c->in[first].t, a, sizeof a),
                     c->info->in[i].name, hm_describe(c->in[i].t, b, sizeof b), hm_device_name(c->device));
    }
  }
  if (c->device < 0) return hm_fail(HM_ERR_ARG, "%s: at least one operand must be a tensor", c->info->name);
  return HM_OK;
}

int hm__wrap_dim(const hm_opcall *c, int64_t *dim, int ndim) {
  const int64_t d = *dim < 0 ? *dim + ndim : *dim;
  if (d >= 0 && d < ndim) {
    *dim = d;
    return HM_OK;
  }
  if (ndim == 0) return hm_fail(HM_ERR_SHAPE, "%s: a 0-dim tensor has no dim to choose", c->info->name);
  return hm_fail(
      HM_ERR_SHAPE,
      "%s: dim out of range: the tensor has %d dim%s, valid are 1 to %d, or -%d to -1\n  hint: dims count from 1 in Lua, got %lld",
      c->info->name, ndim, ndim == 1 ? "" : "s", ndim, ndim, (long long)(*dim < 0 ? *dim : *dim + 1));
}

void hm__replace_operand(hm_opcall *c, int i, hm_tensor *t) {
  if (c->owned & 1u << i) hm_tensor_release(c->in[i].t);
  c->in[i].t = t;
  c->owned |= 1u << i;
}

static int want_layout(hm_opcall *c, int i, int64_t layout) {
  hm_attr attr[2] = {{.i = HM_NONE}, {.i = layout}};
  hm_tensor *copy;
  const int status = hm_call(HM_OP_CAST, (const hm_arg[]){hm_t(c->in[i].t)}, attr, &copy);
  if (status) return status;
  hm__replace_operand(c, i, copy);
  return HM_OK;
}

int hm__want_contiguous(hm_opcall *c, int i) {
  if (c->in[i].kind != HM_ARG_TENSOR || hm_is_contiguous(c->in[i].t)) return HM_OK;
  return want_layout(c, i, 1);
}

int hm__want_channels_last(hm_opcall *c, int i) {
  if (c->in[i].kind != HM_ARG_TENSOR || hm_is_channels_last(c->in[i].t)) return HM_OK;
  return want_layout(c, i, 2);
}

/* ====== Running a kernel ====== */

/* Repeats a view to the shape of `to`: new leading dims and dims of size 1 get stride 0. */
static void broadcast_view(hm_view *v, const hm_view *to) {
  if (v->flags & (HM_VIEW_SCALAR | HM_VIEW_ABSENT)) return;
  const int lead = to->ndim - v->ndim;
  if (lead == 0 && !memcmp(v->shape, to->shape, sizeof(int64_t) * (size_t)v->ndim)) return;
  for (int d = to->ndim - 1; d >= 0; d--) {
    const int s = d - lead;
    const bool repeat = s < 0 || (v->shape[s] == 1 && to->shape[d] != 1);
    const int64_t stride = repeat ? 0 : v->stride[s];
    v->shape[d] = to->shape[d];
    v->stride[d] = stride;
  }
  v->ndim = to->ndim;
}

/* Repeats the batch dims (all but the last two) of a matrix operand to those of `to`. */
static void broadcast_batch(hm_view *v, const hm_view *to) {
  hm_view wide = *to;
  for (int d = 1; d <= 2; d++) wide.shape[to->ndim - d] = v->shape[v->ndim - d];
  broadcast_view(v, &wide);
}

static void make_views(const hm_opcall *c, hm_kernel_call *k) {
  for (int i = 0; i < k->n_in; i++) {
    const hm_arg *a = &c->in[i];
    hm_view *v = &k->in[i];
    if (a->kind == HM_ARG_TENSOR) {
      hm__view_of(a->t, v);
      continue;
    }
    v->data = NULL;
    v->ndim = 0;
    if (a->kind == HM_ARG_NONE) {
      v->flags = HM_VIEW_ABSENT;
      v->dtype = HM_NONE;
    } else {
      v->flags = HM_VIEW_SCALAR;
      v->dtype = a->kind == HM_ARG_INT ? HM_I64 : HM_F64;
      if (a->kind == HM_ARG_INT) v->scalar.i = a->i;
      else v->scalar.f = a->f;
    }
  }
  for (int i = 0; i < k->n_out; i++) hm__view_of(c->out[i], &k->out[i]);
  if (c->info->family == HM_FAMILY_ELEMENTWISE || c->info->family == HM_FAMILY_COPY)
    for (int i = 0; i < k->n_in; i++) broadcast_view(&k->in[i], &k->out[0]);
  if (c->op == HM_OP_MATMUL)
    for (int i = 0; i < k->n_in; i++) broadcast_batch(&k->in[i], &k->out[0]);
}

/* What a kernel call holds besides its operands, given back by drop_scratch. */
typedef struct scratch {
  hm_storage *shadow; /* owned: memory pressure may drop shadows meanwhile */
  void *packed;
  size_t packed_bytes;
} scratch;

static void drop_scratch(const hm_opcall *c, hm_kernel_call *k, scratch *s) {
  if (k->workspace) hm__device_free(c->device, k->workspace, k->workspace_bytes);
  if (s->packed) hm__device_free(c->device, s->packed, s->packed_bytes);
  hm__storage_release(s->shadow);
}

/* Finds or makes the shadow of t that holds operand i packed. */
static int packed_shadow(hm_kernel_call *k, const hm_backend *b, int i, hm_tensor *t, const hm_packing *packing,
                         scratch *s) {
  hm_storage *shadow = hm__shadow_get(t->storage, packing->key);
  int status = HM_OK;
  if (!shadow) {
    status = hm__shadow_make(t->storage, packing->key, packing->bytes, &shadow);
    if (status) return status;
    status = b->pack(k, i, shadow->data);
    if (status) { /* it holds no values */
      hm__shadow_drop_all(t->storage);
      return status;
    }
  }
  hm__storage_retain(shadow);
  s->shadow = shadow;
  k->in[i].data = shadow->data;
  k->in[i].flags |= HM_VIEW_PACKED;
  return HM_OK;
}

/* Lets the backend have operand i in its own layout: a shadow of the operand's storage where it covers it, else a temporary. */
static int pack_operand(hm_opcall *c, hm_kernel_call *k, const hm_backend *b, int i, scratch *s) {
  hm_packing packing = {0, 0};
  int status = b->packing(k, i, &packing);
  if (status || !packing.key) return status;
  hm_tensor *t = c->in[i].t;
  if (t->offset == 0 && (size_t)t->numel * (size_t)hm_dtype_size(t->dtype) == t->storage->bytes)
    return packed_shadow(k, b, i, t, &packing, s);
  status = hm__device_alloc(c->device, packing.bytes, &s->packed);
  if (status) return status;
  s->packed_bytes = packing.bytes;
  status = b->pack(k, i, s->packed);
  k->in[i].data = s->packed;
  k->in[i].flags |= HM_VIEW_PACKED;
  return status;
}

/* Which operand a backend may want packed: the weight of a matrix product or convolution. */
static int packable(const hm_opcall *c) {
  if (c->info->family != HM_FAMILY_MATMUL && c->info->family != HM_FAMILY_CONV) return -1;
  return c->info->n_in > 1 && c->in[1].kind == HM_ARG_TENSOR && c->in[1].t->numel > 0 ? 1 : -1;
}

static int run_kernel(hm_opcall *c) {
  const hm_backend *b = hm_device_backend(c->device);
  if (!b) return HM_ERR_DEVICE;
  const hm_kernel_fn kernel = b->kernel[c->info->family];
  if (!kernel) return hm_fail(HM_ERR_UNSUPPORTED, "%s: no kernel on %s yet", c->info->name, hm_device_name(c->device));
  hm_kernel_call k;
  k.op = c->op;
  k.compute = c->compute;
  k.n_in = c->info->n_in;
  k.n_out = c->info->n_out;
  k.attr = c->attr;
  k.workspace = NULL;
  k.workspace_bytes = 0;
  k.stream = NULL;
  make_views(c, &k);
  scratch held = {NULL, NULL, 0};
  int status = HM_OK;
  const int weight = packable(c);
  if (weight >= 0 && b->packing) status = pack_operand(c, &k, b, weight, &held);
  if (!status && c->info->partial && b->supports && !b->supports(&k))
    status = hm_fail(HM_ERR_UNSUPPORTED, "%s: these arguments are not supported on %s", c->info->name,
                     hm_device_name(c->device));
  if (!status && b->workspace_size) status = b->workspace_size(&k, &k.workspace_bytes);
  if (!status && k.workspace_bytes) status = hm__device_alloc(c->device, k.workspace_bytes, &k.workspace);
  if (!status) status = kernel(&k);
  drop_scratch(c, &k, &held);
  return status;
}

/* Tells the log what a finished call read, wrote and left for backward.  Views and composites compute nothing themselves. */
static void log_call(const hm_opcall *c, bool recorded) {
  if (c->info->family >= HM_FAMILY_COUNT) return;
  hm_kernel_call k;
  k.n_in = c->info->n_in;
  k.n_out = c->info->n_out;
  make_views(c, &k);
  hm_tensor *saved[HM_MAX_IN + HM_MAX_OUT];
  hm_op_event e = {.info = c->info, .backward = hm__in_backward(), .n_in = k.n_in, .n_out = k.n_out};
  e.in = k.in;
  e.out = k.out;
  e.saved = saved;
  if (recorded) e.n_saved = hm__node_saved(c->out[0]->node, saved, HM_MAX_IN + HM_MAX_OUT);
  op_log(op_log_ud, &e);
}

/* ====== Outputs ====== */

/* dtype of output i by its letter. */
static int output_dtype(const hm_opcall *c, int i) {
  if (i == 0 && c->out_dtype != HM_NONE) return c->out_dtype;
  switch (c->info->out[i].cls) {
  case 'f': return c->compute == HM_F64 ? HM_F64 : HM_F32;
  case 'i': return HM_I64;
  case 'u': return HM_U8;
  case 'b': return HM_BOOL;
  default: return c->dtype;
  }
}

static int allocate_outputs(hm_opcall *c) {
  for (int i = 0; i < c->info->n_out; i++) {
    const hm_out_info *o = &c->info->out[i];
    if (hm_dtype_is_f8(c->spec[i].dtype) && !takes_f8(c->info))
      return refuse_f8(c, "the result", hm_dtype_name(c->spec[i].dtype));
    if (o->cls == '=') c->out[i] = hm_tensor_retain(c->in[o->same].t);
    else if (c->inplace && i == 0) c->out[i] = hm_tensor_retain(c->in[0].t);
    else {
      const int status = hm__tensor_by_spec(&c->spec[i], c->device, &c->out[i]);
      if (status) return status;
    }
  }
  return HM_OK;
}

/* Random ops: hands out counters for the output. */
static void take_random(hm_opcall *c) {
  for (int i = 0; i < c->info->n_attr; i++)
    if (c->info->attr[i].type == HM_ATTR_RNG && c->attr[i].n == 0)
      hm_random_take(c->device, c->out[0]->numel, &c->attr[i]);
}

/* An operand that overlaps the destination of a write without matching it exactly is copied first. */
static int separate_from_destination(hm_opcall *c, const hm_tensor *dst) {
  for (int i = 0; i < c->info->n_in; i++) {
    if (c->in[i].kind != HM_ARG_TENSOR || c->in[i].t == dst || c->in[i].t->storage != dst->storage) continue;
    const hm_tensor *t = c->in[i].t;
    const bool same = t->dtype == dst->dtype && t->offset == dst->offset && t->ndim == dst->ndim &&
                      !memcmp(t->shape, dst->shape, sizeof(int64_t) * (size_t)t->ndim) &&
                      !memcmp(t->stride, dst->stride, sizeof(int64_t) * (size_t)t->ndim);
    if (same) continue;
    hm_tensor *copy;
    const int status = hm_clone(c->in[i].t, &copy);
    if (status) return status;
    hm__replace_operand(c, i, copy);
  }
  return HM_OK;
}

/* Operands that the derivatives of a recorded call read. */
static uint32_t read_by_backward(const hm_opcall *c) {
  uint32_t mask = 0;
  for (int i = 0; i < c->info->n_in; i++)
    if ((c->info->diff_in >> i & 1) && c->src[i].kind == HM_ARG_TENSOR && c->src[i].t->requires_grad)
      mask |= c->info->need_in[i];
  return mask;
}

/* A write that is recorded and whose derivative reads the old value keeps a copy of it, under whatever operand it goes (x:mul_(x)). */
static int keep_old_value(hm_opcall *c, const hm_tensor *dst) {
  const uint32_t mask = read_by_backward(c);
  for (int i = 0; i < c->info->n_in; i++) {
    if (!(mask >> i & 1) || c->in[i].kind != HM_ARG_TENSOR || c->in[i].t->storage != dst->storage) continue;
    hm_tensor *copy;
    const int status = hm_clone(c->in[i].t, &copy);
    if (status) return status;
    hm__replace_operand(c, i, copy);
  }
  return HM_OK;
}

/* The mutated operand of a call, or NULL. */
static hm_tensor *destination(const hm_opcall *c) {
  if (c->inplace) return c->src[0].t;
  return c->info->n_in > 0 && c->info->in[0].mutated ? c->src[0].t : NULL;
}

/* Writing to an expanded tensor would keep the last of several values; one number for all is fine. */
static int refuse_shared_elements(const hm_opcall *c, const hm_tensor *dst) {
  if (c->info->family == HM_FAMILY_FILL) return HM_OK;
  for (int d = 0; d < dst->ndim; d++) {
    if (dst->stride[d] != 0 || dst->shape[d] <= 1) continue;
    char text[160];
    return hm_fail(
        HM_ERR_STATE,
        "%s: elements of the tensor share memory (it is expanded along dim %d): %s\n  hint: clone() it first",
        c->info->name, d + 1, hm_describe(dst, text, sizeof text));
  }
  return HM_OK;
}

static int prepare_write(hm_opcall *c, hm_tensor *dst, bool grad, bool record) {
  int status = refuse_shared_elements(c, dst);
  if (!status && grad) status = hm__check_inplace(c, dst, record);
  if (!status) status = separate_from_destination(c, dst);
  return status;
}

/* ====== hm_call ====== */

static void init_call(hm_opcall *c, int op, const hm_arg *in, const hm_attr *attr, int out_dtype, bool inplace) {
  c->info = &hm__ops[op];
  c->op = op;
  c->owned = 0;
  c->out_dtype = out_dtype;
  c->inplace = inplace;
  c->fp8 = NULL;
  for (int i = 0; i < c->info->n_in; i++) c->src[i] = c->in[i] = in[i];
  for (int i = 0; i < c->info->n_attr; i++) c->attr[i] = attr[i];
  for (int i = 0; i < c->info->n_out; i++) {
    c->out[i] = NULL;
    c->spec[i].channels_last = c->spec[i].has_stride = false;
  }
}

/* The stations up to the finished outputs; gradients are off meanwhile unless the op has no derivative of its own. */
static int compute(hm_opcall *c, bool grad, bool record) {
  int status = hm__autocast(c);
  if (status) return status;
  for (int i = 0; i < c->info->n_out; i++) c->spec[i].dtype = output_dtype(c, i);
  hm_tensor *dst = destination(c);
  if (dst) {
    status = prepare_write(c, dst, grad, record);
    if (status) return status;
  }
  status = c->info->infer(c);
  if (status || c->info->family >= HM_FAMILY_COUNT) return status;
  status = allocate_outputs(c);
  if (status == HM_ERR_DEVICE) return hm_fail(status, "%s: %s", c->info->name, hm_error_message());
  if (!status && dst && record) status = keep_old_value(c, dst);
  if (status) return status;
  take_random(c);
  bool empty = true;
  for (int i = 0; i < c->info->n_out; i++) empty = empty && c->out[i]->numel == 0;
  if (!empty && hm__watched) status = hm__watch_before(c);
  if (!empty && !status) status = run_kernel(c);
  if (!empty && !status && hm__watched) status = hm__watch_after(c);
  if (!status && dst) hm__touch(dst);
  for (int i = 1; i < c->info->n_in && !status; i++) /* running statistics */
    if (c->info->in[i].mutated && c->in[i].kind == HM_ARG_TENSOR) hm__touch(c->in[i].t);
  return status;
}

static void finish(hm_opcall *c, int status) {
  hm__fp8_site_release(c->fp8);
  for (int i = 0; c->owned; i++, c->owned >>= 1)
    if (c->owned & 1) hm_tensor_release(c->in[i].t);
  if (!status) return;
  for (int i = 0; i < c->info->n_out; i++) {
    hm_tensor_release(c->out[i]);
    c->out[i] = NULL;
  }
}

static int call(hm_opcall *c) {
  int status = check_operands(c);
  if (!status) status = hm__check_derivatives(c);
  if (status) return status;
  hm_mode *mode = hm_mode_current();
  const bool grad = mode->grad;
  c->grad = grad;
  const bool record = hm__needs_record(c);
  if (c->info->differentiable || c->info->family < HM_FAMILY_COUNT) mode->grad = false;
  status = compute(c, grad, record);
  mode->grad = grad;
  const bool recorded =
      !status && record && hm_dtype_is_float(c->out[0]->dtype); /* a cast to integers ends the graph */
  if (recorded) status = hm__record(c);
  hm_tensor *dst = status || !grad ? NULL : destination(c);
  if (dst) status = hm__rewritten(dst, recorded);
  if (!status && op_log) log_call(c, recorded);
  if (recorded && !status && c->fp8)
    status = hm__fp8_gradient(c); /* behind the log, which looks at the op's own node */
  if (recorded && !status && hm__tapped) status = hm__tap_forward(c);
  finish(c, status);
  return status;
}

/* matmul with one-dimensional operands: unsqueeze, multiply, squeeze (each recorded). */
static int matmul_vectors(const hm_arg *in, int out_dtype, hm_tensor **out) {
  const bool row = in[0].t->ndim == 1, column = in[1].t->ndim == 1;
  hm_tensor *a = NULL, *b = NULL, *c = NULL;
  int status = row ? hm_op_unsqueeze(in[0], 0, &a) : HM_OK;
  if (!status && column) status = hm_op_unsqueeze(in[1], -1, &b);
  const hm_arg args[] = {a ? hm_t(a) : in[0], b ? hm_t(b) : in[1]};
  if (!status) status = hm_call_as(HM_OP_MATMUL, args, NULL, out_dtype, &c);
  hm_tensor_release(a);
  hm_tensor_release(b);
  if (status) return status;
  if (column) {
    status = hm_op_squeeze(hm_t(c), 1, (const int64_t[]){-1}, out);
    hm_tensor_release(c);
    if (status || !row) return status;
    c = *out;
    *out = NULL;
  }
  status = hm_op_squeeze(hm_t(c), 1, (const int64_t[]){row && !column ? -2 : -1}, out);
  hm_tensor_release(c);
  return status;
}

/* copy_ is the one op whose operands may lie on different devices. */
static bool crosses_devices(int op, const hm_arg *in) {
  return op == HM_OP_COPY_ && in[0].kind == HM_ARG_TENSOR && in[1].kind == HM_ARG_TENSOR &&
         hm_tensor_device(in[0].t) != hm_tensor_device(in[1].t);
}

int hm_call_as(int op, const hm_arg *in, const hm_attr *attr, int out_dtype, hm_tensor **out) {
  if (crosses_devices(op, in)) return hm__copy_across(in[0].t, in[1].t, out);
  if (op == HM_OP_MATMUL && in[0].kind == HM_ARG_TENSOR && in[1].kind == HM_ARG_TENSOR && in[0].t->ndim > 0 &&
      in[1].t->ndim > 0 && (in[0].t->ndim == 1 || in[1].t->ndim == 1))
    return matmul_vectors(in, out_dtype, out);
  hm_opcall c;
  init_call(&c, op, in, attr, out_dtype, false);
  const int status = call(&c);
  for (int i = 0; i < c.info->n_out; i++) out[i] = c.out[i];
  return status;
}

int hm_call(int op, const hm_arg *in, const hm_attr *attr, hm_tensor **out) {
  return hm_call_as(op, in, attr, HM_NONE, out);
}

int hm_call_inplace(int op, const hm_arg *in, const hm_attr *attr) {
  const hm_op_info *info = &hm__ops[op];
  if (info->family != HM_FAMILY_ELEMENTWISE || info->n_in < 1)
    return hm_fail(HM_ERR_UNSUPPORTED, "%s: has no in-place form", info->name);
  if (in[0].kind != HM_ARG_TENSOR) return hm_fail(HM_ERR_ARG, "%s_: the destination must be a tensor", info->name);
  hm_opcall c;
  init_call(&c, op, in, attr, HM_NONE, true);
  const int status = call(&c);
  for (int i = 0; i < info->n_out; i++) hm_tensor_release(c.out[i]);
  return status;
}

/* ====== Elementwise calls of no row ====== */

static int run_with(hm_opcall *c, hm_run_fn run, void *ud) {
  int status = hm__autocast(c);
  if (status) return status;
  c->spec[0].dtype = output_dtype(c, 0);
  status = c->info->infer(c);
  if (!status) status = allocate_outputs(c);
  if (status || c->out[0]->numel == 0) return status;
  hm_kernel_call k = {
      .op = -1, .compute = c->compute, .n_in = c->info->n_in, .n_out = 1, .attr = c->attr, .workspace = NULL};
  make_views(c, &k);
  if (hm__watched) status = hm__watch_before(c);
  if (!status) status = run(ud, c, &k);
  if (!status && hm__watched) status = hm__watch_after(c);
  return status;
}

int hm__call_with(const hm_op_info *info, const hm_arg *in, hm_run_fn run, void *ud, hm_tensor **out) {
  hm_opcall c = {.info = info, .op = -1, .out_dtype = HM_NONE};
  *out = NULL;
  for (int i = 0; i < info->n_in; i++) c.src[i] = c.in[i] = in[i];
  int status = check_operands(&c);
  if (status) return status;
  hm_mode *mode = hm_mode_current();
  const bool grad = mode->grad;
  const char *cls = mode->cls;
  mode->grad = false;
  mode->cls = NULL; /* overrides name rows */
  status = run_with(&c, run, ud);
  mode->grad = grad;
  mode->cls = cls;
  if (!status && op_log) log_call(&c, false);
  finish(&c, status);
  *out = c.out[0];
  return status;
}
