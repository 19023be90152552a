/*
 * tape.c -- the tape: nodes are made here when an op has run, and freed here.
 *
 * dispatch.c calls hm__record after an op whose result wants a gradient.  A node keeps just what the derivatives of the wanted inputs read
 * (need_in, need_out of the row).  Accumulators stand for leaves: they own the leaf, the leaf only borrows its accumulator, so neither
 * outlives the graphs that use it.  autograd.c walks what is made here.
 */
#include <stdio.h>
#include <string.h>

#include "hook.h"
#include "recompute.h"
#include "tape.h"

static uint64_t next_seq = 1; /* mutator thread only */
static hm_trace_fn trace;

void hm_set_trace(hm_trace_fn fn) { trace = fn; }

/* ====== Freeing ====== */

static hm_node *dying; /* nodes with no references left, linked through `visit`; mutator thread only */
static bool draining;

/* Lets go what the node's region computed again for one of its lists. */
static void forget(const hm_node *n, const hm_saved *list, int count) {
  for (int i = 0; list && i < count; i++)
    if ((int)list[i].arg.kind == HM_ARG_LATER) hm__region_forget(n->region, (int)list[i].arg.i);
}

void hm__node_forget(hm_node *n) {
  if (!n->region || n->again) return;
  forget(n, n->in, n->n_in);
  forget(n, n->out, n->n_out);
  if (n->custom) forget(n, n->custom->saved, n->custom->n_saved);
}

static void free_saved(hm_saved *list, int n) {
  for (int i = 0; list && i < n; i++) {
    if (list[i].arg.kind == HM_ARG_TENSOR) hm_tensor_release(list[i].arg.t);
    list[i].arg.kind = HM_ARG_NONE;
  }
}

void hm__node_free_saved(hm_node *n) {
  if (n->in || n->out || n->custom) n->freed = true;
  hm__node_forget(n);
  free_saved(n->in, n->n_in);
  free_saved(n->out, n->n_out);
  if (n->custom) free_saved(n->custom->saved, n->custom->n_saved);
  hm_region_release(n->region);
  n->region = NULL;
  if (n->custom && n->custom->drop) {
    void (*drop)(void *ud) = n->custom->drop;
    n->custom->drop = NULL;
    drop(n->custom->ud);
  }
}

void hm__node_free_results(hm_node *n) {
  if (n->region && !n->again) forget(n, n->out, n->n_out);
  free_saved(n->out, n->n_out);
}

static void free_node(hm_node *n) {
  hm__node_free_saved(n);
  for (int i = 0; i < n->n_in; i++) hm__node_release(n->edge[i].node);
  if (n->hooks) hm__hooks_free(&n->hooks);
  if (n->custom) hm_free(n->custom->saved);
  hm_free(n->custom);
  hm_free(n->trace);
  if (n->leaf) {
    n->leaf->accumulator = NULL;
    hm_tensor_release(n->leaf);
  }
  hm_free(n);
}

void hm__node_release(hm_node *n) {
  if (!n || atomic_fetch_sub_explicit(&n->refs, 1, memory_order_acq_rel) != 1) return;
  n->visit = (hm_visit *)dying;
  dying = n;
  if (draining) return;
  draining = true;
  while (dying) {
    hm_node *first = dying;
    dying = (hm_node *)first->visit;
    first->visit = NULL;
    free_node(first);
  }
  draining = false;
}

hm_node *hm__node_retain(hm_node *n) {
  if (n) atomic_fetch_add_explicit(&n->refs, 1, memory_order_relaxed);
  return n;
}

/* ====== Making nodes ====== */

/* One block holds a node and its arrays. */
static hm_node *new_node(int op, int n_in, int n_out, bool save_in, bool save_out, int n_attr) {
  const size_t edges = sizeof(hm_edge) * (size_t)n_in, in = save_in ? sizeof(hm_saved) * (size_t)n_in : 0;
  const size_t out = save_out ? sizeof(hm_saved) * (size_t)n_out : 0, attrs = sizeof(hm_attr) * (size_t)n_attr;
  char *p = hm_alloc(sizeof(hm_node) + edges + in + out + attrs);
  if (!p) return NULL;
  memset(p, 0, sizeof(hm_node) + edges + in + out);
  hm_node *n = (hm_node *)p;
  p += sizeof(hm_node);
  atomic_init(&n->refs, 1);
  n->op = op;
  n->n_in = (uint16_t)n_in;
  n->n_out = (uint16_t)n_out;
  n->seq = next_seq++;
  n->edge = (hm_edge *)p;
  p += edges;
  n->in = save_in ? (hm_saved *)p : NULL;
  p += in;
  n->out = save_out ? (hm_saved *)p : NULL;
  p += out;
  n->attr = n_attr ? (hm_attr *)p : NULL;
  return n;
}

/* A view of a tensor that was changed in place since: its node knows nothing of the change. */
static int refuse_stale_view(const hm_tensor *t) {
  char text[160];
  return hm_fail(
      HM_ERR_STATE,
      "autograd: the tensor that this view was taken of has been changed in place since: %s\n  hint: take the view again",
      hm_describe(t, text, sizeof text));
}

int hm__grad_target(hm_tensor *t, hm_node **out) {
  *out = NULL;
  if (!t->requires_grad) return HM_OK;
  if (t->node && t->storage && t->rewrites != t->storage->rewrites) return refuse_stale_view(t);
  hm_node *n = t->node ? t->node : t->accumulator;
  if (n) {
    *out = hm__node_retain(n);
    return HM_OK;
  }
  n = new_node(HM_NODE_ACCUMULATE, 0, 1, false, false, 0);
  if (!n) return HM_ERR_MEMORY;
  n->seq = 0; /* below every op: all gradients of a leaf arrive first */
  n->leaf = hm_tensor_retain(t);
  t->accumulator = n;
  *out = n;
  return HM_OK;
}

int hm__lend(const hm_edge *e, hm_node **out) {
  hm_node *n = new_node(HM_OP_CAST, 1, 1, false, false, 0);
  if (!n) return HM_ERR_MEMORY;
  n->lent = true;
  n->edge[0] = *e;
  hm__node_retain(e->node);
  *out = n;
  return HM_OK;
}

/* An edge to what made t; its node stays NULL if t wants no gradient, or `wanted` is false. */
static int make_edge(hm_edge *e, hm_tensor *t, bool wanted, bool f32) {
  if (t->node && t->node->lent) {
    *e = t->node->edge[0];
    e->node = wanted ? hm__node_retain(e->node) : NULL;
    return HM_OK;
  }
  e->nr = t->node ? t->out_nr : 0;
  const bool half = t->dtype == HM_F16 || t->dtype == HM_BF16;
  e->dtype = hm_dtype_is_f8(t->dtype) || (f32 && half) ? HM_F32 : t->dtype; /* no gradient is rounded to 8 bits */
  e->ndim = t->ndim;
  e->device = (int16_t)hm_tensor_device(t);
  memcpy(e->shape, t->shape, sizeof(int64_t) * (size_t)t->ndim);
  return wanted ? hm__grad_target(t, &e->node) : HM_OK;
}

/* What hm_graph_dtypes() tells of an input that wants a gradient. */
static void note_dtype(hm_node *n, const hm_edge *e, const hm_tensor *t) {
  if (e->node) n->dtypes = (uint16_t)(n->dtypes | 1u << t->dtype | e->node->dtypes);
}

uint32_t hm_graph_dtypes(const hm_tensor *t) { return 1u << t->dtype | (t->node ? t->node->dtypes : 0u); }

/* A weight as it is: it lives on anyway, so a region need not compute it again. */
static bool is_leaf_itself(const hm_arg *a, const hm_tensor *src) {
  return a->t == src && src->requires_grad && !src->node;
}

/* Leaves an operand to the region that is open. */
static int save_later(hm_node *n, hm_saved *s, const hm_keepsake *k) {
  hm_region *r = hm_mode_current()->region;
  int index;
  const int status = hm__region_keep(r, k, &index);
  if (status) return status;
  s->arg = (hm_arg){(hm_arg_kind)HM_ARG_LATER, {.i = index}};
  n->again = hm__region_again(r);
  if (!n->region) n->region = hm__region_retain(r);
  return HM_OK;
}

/* Keeps an operand, for node n.  A tensor is kept as an alias without graph: release() on the user's own tensor then leaves the graph whole,
 * and a node never owns itself through its output.  src: what the caller gave, where the operand was made of it. */
static int save(hm_node *n, hm_saved *s, const char *name, const hm_arg *a, const hm_tensor *src) {
  if (a->kind == HM_ARG_TENSOR && hm_mode_current()->region && !is_leaf_itself(a, src))
    return save_later(n, s, &(hm_keepsake){hm__node_name(n), name, a->t, hm_tensor_version(src)});
  s->arg = *a;
  if (a->kind != HM_ARG_TENSOR) return HM_OK;
  s->version = hm_tensor_version(a->t);
  const int status = hm_alias(a->t, &s->arg.t);
  if (status) s->arg.kind = HM_ARG_NONE;
  return status;
}

static bool wants_gradient(const hm_opcall *c, int i) {
  return (c->info->diff_in >> i & 1) && c->src[i].kind == HM_ARG_TENSOR && c->src[i].t->requires_grad;
}

/* Under create_graph, an op of the backward walk without a derivative is recorded all the same, as a dead end: a walk that comes there says so,
 * where leaving it out would lose its share of the gradient in silence. */
static bool is_dead_end(const hm_opcall *c) {
  if (c->info->differentiable || c->info->family >= HM_FAMILY_COUNT || !hm__in_backward() ||
      !strstr(c->info->name, "_backward"))
    return false;
  for (int i = 0; i < c->info->n_in; i++)
    if (c->src[i].kind == HM_ARG_TENSOR && c->src[i].t->requires_grad) return true;
  return false;
}

int hm__check_derivatives(const hm_opcall *c) {
  const hm_op_info *info = c->info;
  if (!hm_mode_current()->grad || !info->differentiable) return HM_OK;
  for (int i = 0; i < info->n_in; i++) {
    if ((info->diff_in >> i & 1) || info->in[i].mutated || c->src[i].kind != HM_ARG_TENSOR ||
        !c->src[i].t->requires_grad || strstr(info->name, "_backward"))
      continue;
    char text[160];
    const char *name = info->in[i].name;
    return hm_fail(HM_ERR_STATE, "%s: the %s has no derivative, and this one wants a gradient: %s\n  hint: %s:detach()",
                   info->name, name, hm_describe(c->src[i].t, text, sizeof text), name);
  }
  return HM_OK;
}

bool hm__needs_record(const hm_opcall *c) {
  if (!hm_mode_current()->grad) return false;
  if (!c->info->differentiable) return is_dead_end(c);
  for (int i = 0; i < c->info->n_in; i++)
    if (wants_gradient(c, i)) return true;
  return false;
}

/* Masks of inputs and outputs that the derivatives of this call read. */
static void needed_masks(const hm_opcall *c, uint32_t *in, uint32_t *out) {
  *in = *out = 0;
  for (int i = 0; i < c->info->n_in; i++) {
    if (!wants_gradient(c, i)) continue;
    *in |= c->info->need_in[i];
    *out |= c->info->need_out[i];
  }
}

/* An op that computed in low precision or read operands that are, in a region that asks for float32 gradients. */
static bool wants_f32_backward(const hm_opcall *c) {
  const hm_mode *mode = hm_mode_current();
  if (!mode->autocast || mode->backward_dtype != HM_F32) return false;
  bool low = c->dtype == HM_F16 || c->dtype == HM_BF16;
  for (int i = 0; i < c->info->n_in && !low; i++)
    low = c->src[i].kind == HM_ARG_TENSOR && (c->src[i].t->dtype == HM_F16 || c->src[i].t->dtype == HM_BF16);
  return low;
}

static int save_outputs(const hm_opcall *c, hm_node *n, uint32_t mask) {
  for (int i = 0; i < c->info->n_out; i++) {
    if (!(mask >> i & 1)) continue;
    const hm_arg a = hm_t(c->out[i]);
    const int status = save(n, &n->out[i], c->info->out[i].name, &a, c->out[i]);
    if (status) return status;
  }
  return HM_OK;
}

/* Makes n the origin of output 0 (the only one that carries a gradient). */
static int hang(hm_tensor *t, hm_node *n, int nr) {
  hm__node_release(t->node);
  t->node = hm__node_retain(n);
  t->out_nr = nr;
  t->requires_grad = true;
  return t->retains_grad ? hm__retain_grad_moved(t) : HM_OK;
}

/* Under detect_anomaly: notes where the node is recorded; in a walk, which op's backward records it. */
static void note_trace(hm_node *n) {
  if (!hm_mode_current()->anomaly) return;
  const hm_node *running = hm__running_node();
  if (!running) {
    n->trace = trace ? trace() : NULL;
    return;
  }
  const char *name = hm__node_name(running),
             *place = running->trace ? running->trace : "recorded outside detect_anomaly";
  static const char form[] = "%s\n  in the backward of %s";
  const size_t size = sizeof form + strlen(name) + strlen(place);
  n->trace = hm_alloc(size);
  if (n->trace) snprintf(n->trace, size, form, place, name);
}

int hm__record(hm_opcall *c) {
  uint32_t in, out;
  needed_masks(c, &in, &out);
  hm_node *n = new_node(c->op, c->info->n_in, c->info->n_out, in != 0, out != 0, c->info->n_attr);
  if (!n) return HM_ERR_MEMORY;
  n->backward_f32 = wants_f32_backward(c);
  note_trace(n);
  int status = HM_OK;
  for (int i = 0; i < c->info->n_in && !status; i++) {
    const bool wanted = (c->info->diff_in >> i & 1) || !c->info->differentiable; /* a dead end leads to all */
    if (c->src[i].kind == HM_ARG_TENSOR) {
      status = make_edge(&n->edge[i], c->src[i].t, wanted, n->backward_f32);
      note_dtype(n, &n->edge[i], c->src[i].t);
    }
    if (!status && (in >> i & 1)) status = save(n, &n->in[i], c->info->in[i].name, &c->in[i], c->src[i].t);
  }
  if (n->attr) memcpy(n->attr, c->attr, sizeof(hm_attr) * (size_t)c->info->n_attr);
  if (!status) status = save_outputs(c, n, out);
  if (!status) status = hang(c->out[0], n, 0);
  hm__node_release(n);
  return status;
}

int hm__check_inplace(const hm_opcall *c, hm_tensor *t, bool record) {
  char text[160];
  if (!record && !t->requires_grad) return HM_OK;
  if (t->requires_grad && !t->node)
    return hm_fail(
        HM_ERR_STATE,
        "%s: a leaf that wants a gradient cannot be changed in place: %s\n  hint: do it inside hm.no_grad, or make a new tensor",
        c->info->name, hm_describe(t, text, sizeof text));
  if (t->is_view)
    return hm_fail(
        HM_ERR_STATE,
        "%s: a view cannot be changed in place while gradients are recorded: %s\n  hint: clone() it first, or do it inside hm.no_grad",
        c->info->name, hm_describe(t, text, sizeof text));
  return HM_OK;
}

int hm__rewritten(hm_tensor *t, bool recorded) {
  if (!t->node) return HM_OK;
  t->rewrites = ++t->storage->rewrites;
  if (recorded) return HM_OK;
  hm__node_release(t->node);
  t->node = NULL;
  t->requires_grad = false;
  return t->retains_grad ? hm__retain_grad_moved(t) : HM_OK;
}

int hm__node_saved(const hm_node *n, hm_tensor **list, int max) {
  int count = 0;
  for (int i = 0; n->in && i < n->n_in && count < max; i++)
    if (n->in[i].arg.kind == HM_ARG_TENSOR) list[count++] = n->in[i].arg.t;
  for (int i = 0; n->out && i < n->n_out && count < max; i++)
    if (n->out[i].arg.kind == HM_ARG_TENSOR) list[count++] = n->out[i].arg.t;
  return count;
}

/* ====== Custom functions ====== */

static int16_t role_of(const hm_tensor *t, hm_tensor *const *in, int n_in, hm_tensor *const *out, int n_out) {
  for (int i = 0; i < n_in; i++)
    if (in[i] == t) return (int16_t)(i + 1);
  for (int i = 0; i < n_out; i++)
    if (out[i] == t) return (int16_t)(-1 - i);
  return 0;
}

static int save_custom(hm_node *n, hm_custom *custom, const hm_custom_options *o, hm_tensor *const *in,
                       hm_tensor *const *out) {
  if (o->n_save == 0) return HM_OK;
  custom->saved = hm_calloc((sizeof *custom->saved + sizeof *custom->role) * (size_t)o->n_save);
  if (!custom->saved) return HM_ERR_MEMORY;
  custom->role = (int16_t *)(custom->saved + o->n_save);
  for (; custom->n_saved < o->n_save; custom->n_saved++) {
    const int i = custom->n_saved;
    const hm_arg a = hm_t(o->save[i]);
    int16_t role = role_of(o->save[i], in, n->n_in, out, n->n_out);
    if (role < 0 && ((o->plain && o->plain[-1 - role]) || !hm_dtype_is_float(o->save[i]->dtype))) role = 0;
    custom->role[i] = role;
    const int status = save(n, &custom->saved[i], "a saved tensor", &a, o->save[i]);
    if (status) return status;
  }
  return HM_OK;
}

static int record_custom(hm_node *n, hm_tensor *const *in, hm_tensor *const *out, const hm_custom_options *o) {
  const char *name = n->custom->name;
  int status = HM_OK;
  for (int i = 0; i < n->n_in && !status; i++) {
    status = make_edge(&n->edge[i], in[i], true, false);
    note_dtype(n, &n->edge[i], in[i]);
  }
  for (int i = 0; i < n->n_out && !status; i++) {
    if (out[i]->node || out[i]->requires_grad)
      status = hm_fail(HM_ERR_STATE, "%s: output %d already has a graph\n  hint: compute outputs inside hm.no_grad",
                       name, i + 1);
  }
  if (!status) status = save_custom(n, n->custom, o, in, out);
  for (int i = 0; i < n->n_out && !status; i++)
    if (hm_dtype_is_float(out[i]->dtype) && !(o->plain && o->plain[i])) status = hang(out[i], n, i);
  return status;
}

static int new_custom(const char *name, int n_in, int n_out, hm_node **out) {
  enum { MOST = INT16_MAX / 2 }; /* role_of() numbers them all */
  if (n_in > MOST || n_out > MOST)
    return hm_fail(HM_ERR_ARG, "%s: a function takes at most %d tensors and returns at most as many", name, (int)MOST);
  const size_t length = strlen(name) + 1;
  hm_node *n = new_node(HM_NODE_CUSTOM, n_in, n_out, false, false, 0);
  hm_custom *custom = n ? hm_calloc(sizeof *custom + length) : NULL;
  if (!custom) {
    hm_free(n);
    return HM_ERR_MEMORY;
  }
  memcpy(custom->name, name, length);
  n->custom = custom;
  note_trace(n);
  *out = n;
  return HM_OK;
}

int hm_record_custom_with(const char *name, hm_tensor *const *in, int n_in, hm_tensor *const *out, int n_out,
                          const hm_custom_options *options, hm_custom_fn fn, void *ud, void (*drop)(void *ud)) {
  bool wanted = false;
  for (int i = 0; i < n_in; i++) wanted = wanted || in[i]->requires_grad;
  hm_node *n = NULL;
  int status = HM_OK;
  if (wanted && hm_mode_current()->grad) status = new_custom(name, n_in, n_out, &n);
  if (n) {
    n->custom->fn = fn;
    n->custom->ud = ud;
    status = record_custom(n, in, out, options);
    if (!status) n->custom->drop = drop;
    else n->freed = true; /* ud goes now */
    hm__node_release(n);  /* the outputs hold it */
    if (!status) return HM_OK;
  }
  if (drop) drop(ud);
  return status;
}

int hm_record_custom(const char *name, hm_tensor *const *in, int n_in, hm_tensor *const *out, int n_out,
                     hm_custom_fn fn, void *ud, void (*drop)(void *ud)) {
  return hm_record_custom_with(name, in, n_in, out, n_out, &(hm_custom_options){0}, fn, ud, drop);
}
