/*
 * optim.c -- optimizers: SGD, Adam and AdamW over all parameters at once.
 *
 * An optimizer retains its parameters and owns their state (momentum, moments, step counts).  One step is one
 * multi-tensor call of the backend per device: the tables that describe the parameters to it live in the optimizer and
 * are reused, so that a loop in its steady state allocates nothing here.  Gradients that lie in another element order
 * than their parameter, or over another gradient, are copied first (the copy replaces .grad).  State is float32,
 * float64 for float64 parameters, in the parameter's element order.
 *
 * A parameter whose storage carries a current low-precision shadow (made by autocast) has it refreshed by the same pass
 * over memory and stamped current, so that the next forward pass need not cast.
 *
 * Called by lua/bind through halfmoon.h, and by scaler.c through optim.h.  On the mutator thread only.
 */
#include "optim.h"

#include <math.h>
#include <string.h>

/* ====== Structures ====== */

/* The items of one device lie side by side: one call of its backend covers them. */
typedef struct hm_range {
  int device, begin, end;
} hm_range;

/* A list of gradients, described for the backend.  Tensors are borrowed from the parameters. */
typedef struct hm_batch {
  hm_multi_item *item;
  hm_multi_stat *stat;
  hm_tensor **grad;
  int32_t *param; /* index of the item's parameter in the list it came from */
  int n, cap;
  hm_range range[HM_MAX_DEVICES];
  int n_ranges;
} hm_batch;

/* One parameter's state.  The parameter itself stands in hm_optim.tensor at the same index. */
typedef struct hm_param {
  hm_tensor *state[HM_MAX_STATE]; /* owned; NULL until the first update */
  int64_t step;                   /* updates made */
  int32_t group;
  bool fresh; /* state was made but never written: SGD's momentum starts as the gradient */
} hm_param;

/* What an entry of the multi-group table was made from: parameters that agree in all three share one. */
typedef struct hm_group_key {
  int64_t step;
  int32_t group;
  bool fresh;
} hm_group_key;

/* The low-precision shadow that an item refreshes; storage NULL: none. */
typedef struct hm_low {
  hm_storage *storage; /* borrowed from the parameter's storage */
  uint64_t key;
} hm_low;

struct hm_optim {
  hm_optim_kind kind;
  hm_optim_options **group; /* owned one by one: pointers to them stay valid */
  int n_groups, cap_groups;
  hm_tensor **tensor; /* the parameters, retained */
  hm_param *param;
  int n_params, cap_params;
  /* tables of the pass in progress, as long as `param` */
  hm_batch batch;
  hm_low *low;
  hm_multi_group *multi;
  hm_group_key *key;
  int n_multi;
};

static const char *kind_name(hm_optim_kind kind) {
  static const char *const names[] = {"sgd", "adam", "adamw"};
  return names[kind];
}

/* Names of the state tensors of a kind, by slot; NULL ends the list. */
static const char *const *state_names(hm_optim_kind kind) {
  static const char *const sgd[] = {"momentum_buffer", NULL};
  static const char *const adam[] = {"exp_avg", "exp_avg_sq", NULL};
  return kind == HM_OPTIM_SGD ? sgd : adam;
}

/* Slot of a state name, or -1. */
static int state_slot(const hm_optim *o, const char *name) {
  const char *const *names = state_names(o->kind);
  for (int k = 0; names[k]; k++) {
    if (strcmp(names[k], name) == 0) return k;
  }
  return -1;
}

/* ====== Element order ====== */

/* True when t's elements fill its span without gaps or repeats, in whatever order of dims. */
static bool is_dense(const hm_tensor *t) {
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

static bool same_shape(const hm_tensor *a, const hm_tensor *b) {
  return a->ndim == b->ndim && memcmp(a->shape, b->shape, (size_t)a->ndim * sizeof a->shape[0]) == 0;
}

/* The strides that p's gradient and state must have: p's own, or row-major where p is not dense. */
static void order_of(const hm_tensor *p, int64_t *stride) {
  if (is_dense(p)) {
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

/* A new tensor of p's shape and element order. */
static int like_param(const hm_tensor *p, int dtype, hm_tensor **out) {
  hm_out_spec spec = {.dtype = dtype, .ndim = p->ndim, .has_stride = true};
  memcpy(spec.shape, p->shape, sizeof spec.shape);
  order_of(p, spec.stride);
  return hm__tensor_by_spec(&spec, hm_tensor_device(p), out);
}

/* Runs copy_ or fill_ on t outside autograd and autocast. */
static int write_plain(int op, hm_tensor *t, hm_arg src) {
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

static void batch_free(hm_batch *b) {
  hm_free(b->item);
  hm_free(b->stat);
  hm_free(b->grad);
  hm_free(b->param);
  memset(b, 0, sizeof *b);
}

/* Grows one array to n entries; the old one stays valid on failure. */
static int grow(void *array_of_pointer, size_t n, size_t entry) {
  void **array = array_of_pointer;
  void *p = hm_realloc(*array, n * entry);
  if (!p) return HM_ERR_MEMORY;
  *array = p;
  return HM_OK;
}

static int batch_reserve(hm_batch *b, int n) {
  if (n <= b->cap) return HM_OK;
  int rc = grow(&b->item, (size_t)n, sizeof *b->item);
  if (!rc) rc = grow(&b->stat, (size_t)n, sizeof *b->stat);
  if (!rc) rc = grow(&b->grad, (size_t)n, sizeof *b->grad);
  if (!rc) rc = grow(&b->param, (size_t)n, sizeof *b->param);
  if (!rc) b->cap = n;
  return rc;
}

/* Is this parameter part of the pass?  An optimizer leaves frozen ones alone; clipping takes every gradient. */
static bool takes_part(const hm_tensor *p, bool wanted_only) { return p->grad && (p->requires_grad || !wanted_only); }

/* Refuses a gradient that does not fit its parameter. */
static int check_grad(const char *op, const hm_tensor *p, int index) {
  const hm_tensor *g = p->grad;
  char a[128], b[128];
  if (hm_tensor_is_dropped(p)) return hm_fail(HM_ERR_ARG, "%s: parameter %d was released", op, index + 1);
  if (hm_tensor_is_dropped(g))
    return hm_fail(HM_ERR_ARG, "%s: the gradient of parameter %d was released", op, index + 1);
  if (!same_shape(p, g)) {
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
    if (!takes_part(params[i], wanted_only) || other->storage != g->storage) continue;
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
  int rc = like_param(p, p->grad->dtype, &own);
  if (!rc) rc = write_plain(HM_OP_COPY_, own, hm_t(p->grad));
  if (rc) {
    hm_tensor_release(own);
    return rc;
  }
  if (!ordered) hm__count_layout_copy(hm_tensor_device(p));
  hm_tensor_release(p->grad);
  p->grad = own;
  return HM_OK;
}

/* Checks all gradients of a list, then makes them all dense and disjoint.  *devices: a bit for each device they lie on.
 */
static int batch_check(const char *op, hm_tensor *const *params, int n, bool wanted_only, uint32_t *devices) {
  *devices = 0;
  for (int i = 0; i < n; i++) {
    if (!takes_part(params[i], wanted_only)) continue;
    int rc = check_grad(op, params[i], i);
    if (rc) return rc;
    *devices |= 1u << hm_tensor_device(params[i]);
  }
  for (int i = 0; i < n; i++) {
    if (!takes_part(params[i], wanted_only)) continue;
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

/* Fills the table, device by device, in the order of the list.  Allocates nothing. */
static void batch_fill(hm_batch *b, hm_tensor *const *params, int n, bool wanted_only, uint32_t devices) {
  b->n = 0;
  b->n_ranges = 0;
  for (int device = 0; device < HM_MAX_DEVICES; device++) {
    if (!(devices >> device & 1)) continue;
    int begin = b->n;
    for (int i = 0; i < n; i++) {
      if (takes_part(params[i], wanted_only) && hm_tensor_device(params[i]) == device) batch_add(b, params[i], i);
    }
    b->range[b->n_ranges++] = (hm_range){device, begin, b->n};
  }
}

/* One backend call per device. */
static int batch_run(const hm_batch *b, const char *name, hm_multi_op op, const hm_multi_group *group, double inv_scale,
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
    };
    int rc = backend->multi_tensor(&call);
    if (rc) return rc;
  }
  return HM_OK;
}

/* Marks every gradient of the batch as written. */
static void batch_touch(const hm_batch *b) {
  for (int i = 0; i < b->n; i++) hm__touch(b->grad[i]);
}

/* ====== Gradients of any list of tensors ====== */

/* A batch of its own over the gradients of a list. */
static int list_batch(const char *op, hm_tensor *const *params, int n, hm_batch *b) {
  memset(b, 0, sizeof *b);
  uint32_t devices = 0;
  int rc = batch_check(op, params, n, false, &devices);
  if (!rc) rc = batch_reserve(b, n);
  if (!rc) batch_fill(b, params, n, false, devices);
  return rc;
}

int hm_grad_norm(hm_tensor *const *params, int n, double *norm) {
  hm_batch b;
  int rc = list_batch("grad_norm", params, n, &b);
  if (!rc) rc = batch_run(&b, "grad_norm", HM_MULTI_CHECK, NULL, 1, 1);
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
  batch_free(&b);
  return rc;
}

int hm_grad_scale(hm_tensor *const *params, int n, double coef) {
  hm_batch b;
  int rc = list_batch("grad_scale", params, n, &b);
  if (!rc) rc = batch_run(&b, "grad_scale", HM_MULTI_SCALE, NULL, 1, coef);
  if (!rc) batch_touch(&b);
  batch_free(&b);
  return rc;
}

double hm__clip_coefficient(double norm, double max_norm) {
  double coef = max_norm / (norm + 1e-6);
  return coef > 1 ? 1 : coef;
}

/* ====== Life and groups ====== */

int hm_optim_new(hm_optim_kind kind, hm_optim **out) {
  if (kind < HM_OPTIM_SGD || kind > HM_OPTIM_ADAMW) return hm_fail(HM_ERR_ARG, "optim: unknown kind %d", (int)kind);
  hm_optim *o = hm_calloc(sizeof *o);
  if (!o) return HM_ERR_MEMORY;
  o->kind = kind;
  *out = o;
  return HM_OK;
}

void hm_optim_free(hm_optim *o) {
  if (!o) return;
  for (int i = 0; i < o->n_params; i++) {
    for (int k = 0; k < HM_MAX_STATE; k++) hm_tensor_release(o->param[i].state[k]);
    hm_tensor_release(o->tensor[i]);
  }
  for (int g = 0; g < o->n_groups; g++) hm_free(o->group[g]);
  batch_free(&o->batch);
  hm_free(o->group);
  hm_free(o->tensor);
  hm_free(o->param);
  hm_free(o->low);
  hm_free(o->multi);
  hm_free(o->key);
  hm_free(o);
}

/* Is x within [low, high)?  False for NaN. */
static bool within(double x, double low, double high) { return x >= low && x < high; }

static int bad_option(const hm_optim *o, int group, const char *name, double value, const char *expected) {
  return hm_fail(HM_ERR_ARG, "%s: %s must be %s, got %g (group %d)", kind_name(o->kind), name, expected, value,
                 group + 1);
}

/* Options may be written between steps, so they are checked at every step, not at entry alone. */
static int check_options(const hm_optim *o, const hm_optim_options *p, int group) {
  if (!within(p->lr, 0, INFINITY)) return bad_option(o, group, "lr", p->lr, "a finite number >= 0");
  if (!within(p->weight_decay, 0, INFINITY))
    return bad_option(o, group, "weight_decay", p->weight_decay, "a finite number >= 0");
  if (o->kind != HM_OPTIM_SGD) {
    if (!within(p->beta1, 0, 1)) return bad_option(o, group, "beta1", p->beta1, "in [0, 1)");
    if (!within(p->beta2, 0, 1)) return bad_option(o, group, "beta2", p->beta2, "in [0, 1)");
    if (!within(p->eps, 0, INFINITY)) return bad_option(o, group, "eps", p->eps, "a finite number >= 0");
    return HM_OK;
  }
  if (!within(p->momentum, 0, INFINITY)) return bad_option(o, group, "momentum", p->momentum, "a finite number >= 0");
  if (!isfinite(p->dampening)) return bad_option(o, group, "dampening", p->dampening, "a finite number");
  if (p->nesterov && (p->momentum <= 0 || p->dampening != 0)) {
    return hm_fail(HM_ERR_ARG,
                   "sgd: nesterov needs a momentum above 0 and dampening 0, got momentum %g, dampening %g (group %d)",
                   p->momentum, p->dampening, group + 1);
  }
  return HM_OK;
}

/* Refuses a tensor that cannot be a parameter. */
static int check_param(const hm_optim *o, hm_tensor *const *params, int index) {
  const hm_tensor *p = params[index];
  const char *name = kind_name(o->kind);
  char text[128];
  if (!p || hm_tensor_is_dropped(p))
    return hm_fail(HM_ERR_ARG, "%s: parameter %d is %s", name, index + 1, p ? "released" : "missing");
  hm_describe(p, text, sizeof text);
  if (!hm_dtype_is_float(p->dtype)) {
    return hm_fail(HM_ERR_DTYPE, "%s: parameter %d is %s: a floating dtype was expected", name, index + 1, text);
  }
  if (!hm_tensor_is_leaf(p)) {
    return hm_fail(HM_ERR_ARG,
                   "%s: parameter %d (%s) is the result of an operation: only leaf tensors can be optimized\n"
                   "  hint: detach() it, then set requires_grad",
                   name, index + 1, text);
  }
  if (!is_dense(p)) {
    return hm_fail(HM_ERR_ARG, "%s: parameter %d (%s) is a view with gaps or repeats\n  hint: contiguous()", name,
                   index + 1, text);
  }
  bool twice = false;
  for (int i = 0; i < index && !twice; i++) twice = params[i] == p;
  for (int i = 0; i < o->n_params && !twice; i++) twice = o->tensor[i] == p;
  if (twice) return hm_fail(HM_ERR_ARG, "%s: parameter %d (%s) is already in the optimizer", name, index + 1, text);
  return HM_OK;
}

/* Makes room for n parameters and one more group. */
static int reserve(hm_optim *o, int n) {
  int rc = HM_OK;
  if (o->n_groups == o->cap_groups) {
    rc = grow(&o->group, (size_t)o->cap_groups + 4, sizeof *o->group);
    if (!rc) o->cap_groups += 4;
  }
  if (rc || n <= o->cap_params) return rc;
  rc = batch_reserve(&o->batch, n);
  if (!rc) rc = grow(&o->tensor, (size_t)n, sizeof *o->tensor);
  if (!rc) rc = grow(&o->param, (size_t)n, sizeof *o->param);
  if (!rc) rc = grow(&o->low, (size_t)n, sizeof *o->low);
  if (!rc) rc = grow(&o->multi, (size_t)n, sizeof *o->multi);
  if (!rc) rc = grow(&o->key, (size_t)n, sizeof *o->key);
  if (!rc) o->cap_params = n;
  return rc;
}

int hm_optim_add_group(hm_optim *o, hm_tensor *const *params, int n, const hm_optim_options *options, int *group) {
  int rc = check_options(o, options, o->n_groups);
  for (int i = 0; i < n && !rc; i++) rc = check_param(o, params, i);
  if (!rc) rc = reserve(o, o->n_params + n);
  if (rc) return rc;
  hm_optim_options *own = hm_alloc(sizeof *own);
  if (!own) return HM_ERR_MEMORY;
  *own = *options;
  for (int i = 0; i < n; i++) {
    o->tensor[o->n_params] = hm_tensor_retain(params[i]);
    o->param[o->n_params] = (hm_param){.group = o->n_groups};
    o->n_params++;
  }
  o->group[o->n_groups] = own;
  *group = o->n_groups++;
  return HM_OK;
}

int hm_optim_group_count(const hm_optim *o) { return o->n_groups; }

hm_optim_options *hm_optim_group_options(hm_optim *o, int group) {
  return group >= 0 && group < o->n_groups ? o->group[group] : NULL;
}

int hm_optim_param_count(const hm_optim *o) { return o->n_params; }

hm_tensor *hm_optim_param(const hm_optim *o, int index) {
  return index >= 0 && index < o->n_params ? o->tensor[index] : NULL;
}

int hm_optim_param_group(const hm_optim *o, int index) {
  return index >= 0 && index < o->n_params ? o->param[index].group : -1;
}

void hm_optim_zero_grad(hm_optim *o) {
  for (int i = 0; i < o->n_params; i++) {
    hm_tensor *g = o->tensor[i]->grad;
    o->tensor[i]->grad = NULL;
    hm_tensor_release(g);
  }
}

/* ====== State ====== */

hm_tensor *hm_optim_state(const hm_optim *o, int index, const char *name) {
  int slot = state_slot(o, name);
  if (slot < 0 || index < 0 || index >= o->n_params || o->param[index].fresh) return NULL;
  return o->param[index].state[slot];
}

int hm_optim_set_state(hm_optim *o, int index, const char *name, hm_tensor *value) {
  const char *op = kind_name(o->kind);
  char a[128], b[128];
  int slot = state_slot(o, name);
  if (slot < 0) return hm_fail(HM_ERR_ARG, "%s: there is no state called \"%s\"", op, name);
  if (index < 0 || index >= o->n_params) {
    return hm_fail(HM_ERR_ARG, "%s: there is no parameter %d, only %d of them", op, index + 1, o->n_params);
  }
  hm_tensor *p = o->tensor[index], *own = NULL;
  if (value) {
    if (hm_tensor_is_dropped(value) || !hm_dtype_is_float(value->dtype) || !same_shape(p, value)) {
      return hm_fail(HM_ERR_SHAPE, "%s: %s of parameter %d does not fit: it is %s, the parameter is %s", op, name,
                     index + 1, hm_describe(value, a, sizeof a), hm_describe(p, b, sizeof b));
    }
    hm_tensor *here = NULL;
    int rc = hm_to(value, HM_NONE, hm_tensor_device(p), false, &here);
    if (!rc) rc = like_param(p, p->dtype == HM_F64 ? HM_F64 : HM_F32, &own);
    if (!rc) rc = write_plain(HM_OP_COPY_, own, hm_t(here));
    hm_tensor_release(here);
    if (rc) {
      hm_tensor_release(own);
      return rc;
    }
  }
  hm_tensor_release(o->param[index].state[slot]);
  o->param[index].state[slot] = own;
  o->param[index].fresh = false;
  return HM_OK;
}

int64_t hm_optim_param_step(const hm_optim *o, int index) {
  return index >= 0 && index < o->n_params ? o->param[index].step : 0;
}

void hm_optim_set_param_step(hm_optim *o, int index, int64_t step) {
  if (index >= 0 && index < o->n_params) o->param[index].step = step < 0 ? 0 : step;
}

int64_t hm_optim_state_bytes(const hm_optim *o) {
  int64_t bytes = 0;
  for (int i = 0; i < o->n_params; i++) {
    for (int k = 0; k < HM_MAX_STATE; k++) {
      const hm_tensor *s = o->param[i].state[k];
      if (s) bytes += s->numel * hm_dtype_size(s->dtype);
    }
  }
  return bytes;
}

/* Makes the state tensors that the next update of parameter i will need.  Moments start at zero, a momentum buffer as
 * the gradient. */
static int make_state(hm_optim *o, int i) {
  hm_param *q = &o->param[i];
  const hm_tensor *p = o->tensor[i];
  int dtype = p->dtype == HM_F64 ? HM_F64 : HM_F32;
  if (o->kind == HM_OPTIM_SGD) {
    if (q->state[0] || o->group[q->group]->momentum == 0) return HM_OK;
    int rc = like_param(p, dtype, &q->state[0]);
    if (!rc) q->fresh = true;
    return rc;
  }
  for (int k = 0; k < 2; k++) {
    if (q->state[k]) continue;
    hm_tensor *zeros = NULL;
    int rc = like_param(p, dtype, &zeros);
    if (!rc) rc = write_plain(HM_OP_FILL_, zeros, hm_f(0));
    if (rc) {
      hm_tensor_release(zeros);
      return rc;
    }
    q->state[k] = zeros;
  }
  return HM_OK;
}

/* ====== Passes ====== */

int hm__optim_collect(hm_optim *o, int *n) {
  uint32_t devices = 0;
  int rc = batch_check(kind_name(o->kind), o->tensor, o->n_params, true, &devices);
  if (rc) return rc;
  batch_fill(&o->batch, o->tensor, o->n_params, true, devices);
  *n = o->batch.n;
  return HM_OK;
}

int hm__optim_item_param(const hm_optim *o, int i) { return o->batch.param[i]; }

hm_tensor *hm__optim_item_grad(const hm_optim *o, int i) { return o->batch.grad[i]; }

int hm__optim_run(hm_optim *o, hm_multi_op op, double inv_scale, double grad_mul, const hm_multi_stat **stat) {
  int rc = batch_run(&o->batch, kind_name(o->kind), op, NULL, inv_scale, grad_mul);
  if (rc) return rc;
  if (op != HM_MULTI_CHECK) batch_touch(&o->batch);
  if (stat) *stat = o->batch.stat;
  return HM_OK;
}

/* The hyperparameters of one parameter's next update, as an entry of the multi-group table: parameters that agree share
 * it. */
static int multi_group(hm_optim *o, const hm_param *q) {
  for (int k = o->n_multi - 1; k >= 0; k--) {
    if (o->key[k].group == q->group && o->key[k].step == q->step && o->key[k].fresh == q->fresh) return k;
  }
  const hm_optim_options *p = o->group[q->group];
  double t = (double)(q->step + 1);
  bool adam = o->kind != HM_OPTIM_SGD;
  o->key[o->n_multi] = (hm_group_key){q->step, q->group, q->fresh};
  o->multi[o->n_multi] = (hm_multi_group){
      .lr = p->lr,
      .weight_decay = p->weight_decay,
      .momentum = p->momentum,
      .dampening = p->dampening,
      .beta1 = p->beta1,
      .beta2 = p->beta2,
      .eps = p->eps,
      .bias_correction1 = adam ? 1 - pow(p->beta1, t) : 1,
      .bias_correction2 = adam ? 1 - pow(p->beta2, t) : 1,
      .nesterov = p->nesterov,
      .maximize = p->maximize,
      .decoupled = o->kind == HM_OPTIM_ADAMW,
      .first = q->fresh,
  };
  return o->n_multi++;
}

/* The current low-precision shadow of a parameter that is all of its storage, element for element; storage NULL if
 * there is none. */
static hm_low find_low(const hm_tensor *p) {
  static const int dtypes[] = {HM_F16, HM_BF16};
  hm_storage *s = p->storage;
  bool whole = p->offset == 0 && hm_is_contiguous(p) && (size_t)p->numel * (size_t)hm_dtype_size(p->dtype) == s->bytes;
  if (!whole || !s->shadows) return (hm_low){NULL, 0};
  for (size_t k = 0; k < sizeof dtypes / sizeof dtypes[0]; k++) {
    uint64_t key = HM_SHADOW_DTYPE(dtypes[k]);
    hm_storage *low = hm__shadow_get(s, key);
    bool unread = low && atomic_load_explicit(&low->refs, memory_order_acquire) ==
                             1; /* no saved operand still needs the old values */
    if (unread) return (hm_low){low, key};
  }
  return (hm_low){NULL, 0};
}

/* Completes the items for pass 2: state, hyperparameters, the shadow to refresh. */
static void fill_update(hm_optim *o) {
  o->n_multi = 0;
  for (int i = 0; i < o->batch.n; i++) {
    hm_multi_item *item = &o->batch.item[i];
    const hm_param *q = &o->param[o->batch.param[i]];
    bool uses_state = o->kind != HM_OPTIM_SGD || o->group[q->group]->momentum != 0;
    for (int k = 0; k < HM_MAX_STATE; k++)
      item->state[k] = uses_state && q->state[k] ? hm_tensor_data(q->state[k]) : NULL;
    item->group = multi_group(o, q);
    o->low[i] = find_low(o->tensor[o->batch.param[i]]);
    if (o->low[i].storage) {
      item->low = o->low[i].storage->data;
      item->low_dtype = (int16_t)(o->low[i].key - 1);
    }
  }
}

/* Says that a parameter's shadow, just rewritten along with it, is current again; what was derived from the shadow
 * itself is not. */
static int stamp_low(hm_tensor *p, hm_low low) {
  hm_storage *again = NULL;
  int rc = hm__shadow_make(p->storage, low.key, low.storage->bytes, &again);
  if (rc || again != low.storage) {
    hm__shadow_drop_all(
        p->storage); /* what was written is not what the storage now holds: the next use makes a new one */
    return rc;
  }
  again->version++;
  return HM_OK;
}

/* Bookkeeping after pass 2. */
static int finish_update(hm_optim *o, bool grads_written) {
  int rc = HM_OK;
  for (int i = 0; i < o->batch.n; i++) {
    int index = o->batch.param[i];
    hm_param *q = &o->param[index];
    hm_tensor *p = o->tensor[index];
    q->step++;
    q->fresh = false;
    hm__touch(p);
    for (int k = 0; k < HM_MAX_STATE; k++) {
      if (q->state[k]) hm__touch(q->state[k]);
    }
    if (o->low[i].storage) {
      int failed = stamp_low(p, o->low[i]);
      if (!rc) rc = failed;
    }
  }
  if (grads_written) batch_touch(&o->batch);
  return rc;
}

int hm__optim_apply(hm_optim *o, double inv_scale, double grad_mul) {
  uint32_t devices = 0;
  for (int g = 0; g < o->n_groups; g++) {
    int rc = check_options(o, o->group[g], g);
    if (rc) return rc;
  }
  int rc = batch_check(kind_name(o->kind), o->tensor, o->n_params, true, &devices);
  for (int i = 0; i < o->n_params && !rc; i++) {
    if (takes_part(o->tensor[i], true)) rc = make_state(o, i);
  }
  if (rc) return rc;
  /* from here on nothing allocates, so no collector runs and no pointer in the tables can go stale */
  batch_fill(&o->batch, o->tensor, o->n_params, true, devices);
  fill_update(o);
  hm_multi_op op = o->kind == HM_OPTIM_SGD ? HM_MULTI_SGD : HM_MULTI_ADAM;
  rc = batch_run(&o->batch, kind_name(o->kind), op, o->multi, inv_scale, grad_mul);
  return rc ? rc : finish_update(o, inv_scale != 1 || grad_mul != 1);
}

int hm_optim_step(hm_optim *o) { return hm__optim_apply(o, 1, 1); }
