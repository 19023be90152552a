/*
 * autograd.c -- the backward walk.
 *
 * Nodes are run in the reverse order of their making (highest seq first, from a heap): whatever uses a node's output was recorded after it, so
 * when a node comes up all its gradients have arrived (accumulators, seq 0, come last).  No recursion: depth is bounded by memory.  Gradients between nodes are fitted to each
 * edge's shape (summed over broadcast dims) and dtype (cast), added where several meet, and end in accumulators, which write .grad.
 *
 * Walks may nest (a hook or a custom function may call backward): each keeps its scratch in hm_visit records, stacked on the nodes.
 * The walk has its own mode: autocast off, gradients on only under create_graph.
 *
 * Some pairs of nodes run as one: see pairs.c.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "walk.h"

static walk *current; /* mutator thread only */
static uint64_t grad_clock;

bool hm__in_backward(void) { return current != NULL; }

const hm_node *hm__running_node(void) { return current ? current->running : NULL; }

const hm_node *hm__walked_node(void) { return current ? current->walked : NULL; }

/* ====== Visits and the heap ====== */

hm_visit *hm__visit_make(walk *w, hm_node *n) {
  hm_visit *v = hm__visit_of(w, n);
  if (v) return v;
  v = hm_calloc(sizeof *v + sizeof(hm_tensor *) * n->n_out);
  if (!v) return NULL;
  v->node = hm__node_retain(n);
  v->outer = n->visit;
  v->by = w;
  v->next = w->visits;
  w->visits = v;
  n->visit = v;
  return v;
}

int hm__visit_queue(walk *w, hm_visit *v) {
  if (w->heap_n == w->heap_max) {
    const int max = w->heap_max ? 2 * w->heap_max : 64;
    hm_visit **heap = hm_realloc(w->heap, sizeof *heap * (size_t)max);
    if (!heap) return HM_ERR_MEMORY;
    w->heap = heap;
    w->heap_max = max;
  }
  int i = w->heap_n++;
  for (; i > 0; i = (i - 1) / 2) {
    hm_visit *parent = w->heap[(i - 1) / 2];
    if (parent->node->seq >= v->node->seq) break;
    w->heap[i] = parent;
  }
  w->heap[i] = v;
  v->queued = true;
  return HM_OK;
}

static hm_visit *heap_pop(walk *w) {
  hm_visit *top = w->heap[0], *last = w->heap[--w->heap_n];
  int i = 0;
  for (;;) {
    int child = 2 * i + 1;
    if (child >= w->heap_n) break;
    if (child + 1 < w->heap_n && w->heap[child + 1]->node->seq > w->heap[child]->node->seq) child++;
    if (w->heap[child]->node->seq <= last->node->seq) break;
    w->heap[i] = w->heap[child];
    i = child;
  }
  w->heap[i] = last;
  return top;
}

void hm__release_temps(walk *w, int from) {
  while (w->n_temp > from) hm_tensor_release(w->temp[--w->n_temp]);
}

static void release_grads(hm_visit *v) {
  for (int i = 0; i < v->node->n_out; i++) {
    hm_tensor_release(v->grad[i]);
    v->grad[i] = NULL;
  }
  hm_tensor_release(v->relu);
  v->relu = NULL;
}

static void walk_end(walk *w) {
  hm__release_temps(w, 0);
  while (w->visits) {
    hm_visit *v = w->visits;
    w->visits = v->next;
    release_grads(v);
    v->node->visit = v->outer;
    hm__node_release(v->node);
    hm_free(v);
  }
  hm_free(w->heap);
}

/* ====== What backward functions ask (graph.h) ====== */

bool hm__wants(const hm_node *n, int in) {
  const hm_node *to = n->edge[in].node;
  if (in == 0 && current->apart == n) return false;
  return to && (!current->restricted || hm__visit_of(current, to));
}

bool hm__recording(void) { return current->create_graph; }

int hm__edge_dtype(const hm_node *n, int in) { return n->edge[in].dtype; }

void hm__edge_shape(const hm_node *n, int in, hm_attr *shape) {
  shape->n = n->edge[in].ndim;
  memcpy(shape->v, n->edge[in].shape, sizeof(int64_t) * (size_t)n->edge[in].ndim);
}

int64_t hm__edge_size(const hm_node *n, int in, int64_t dim) {
  return n->edge[in].shape[dim < 0 ? dim + n->edge[in].ndim : dim];
}

void hm__inverse_dims(const hm_attr *dims, hm_attr *out) {
  out->n = dims->n;
  for (int i = 0; i < dims->n; i++) out->v[dims->v[i] < 0 ? dims->v[i] + dims->n : dims->v[i]] = i;
}

double hm__reduced_count(const hm_node *n, int in, const hm_attr *dims) {
  const hm_edge *e = &n->edge[in];
  int64_t count = 1;
  if (dims->n == 0)
    for (int d = 0; d < e->ndim; d++) count *= e->shape[d];
  for (int k = 0; k < dims->n; k++) count *= e->shape[dims->v[k]];
  return (double)count;
}

const char *hm__node_name(const hm_node *n) {
  return n->op == HM_NODE_CUSTOM ? n->custom->name : n->op == HM_NODE_ACCUMULATE ? "leaf" : hm_op_get(n->op)->name;
}

const char *hm_grad_fn(const hm_tensor *t) { return t->node ? hm__node_name(t->node) : NULL; }

/* Keeps a temporary (taken over) until the running node is done. */
static hm_arg keep_temp(hm_tensor *t, int *status) {
  if (current->n_temp < MAX_TEMP) {
    current->temp[current->n_temp++] = t;
    return hm_t(t);
  }
  hm_tensor_release(t);
  *status = hm_fail(HM_ERR_UNSUPPORTED, "backward: %s reads too many saved tensors", hm__node_name(current->running));
  return hm_t(NULL);
}

static int check_saved(const hm_node *n, const hm_saved *s, const char *role, const char *name) {
  if (n->freed)
    return hm_fail(
        HM_ERR_STATE,
        "backward: the graph was freed: %s has given up its saved tensors\n  hint: pass retain_graph = true to the first backward",
        hm__node_name(n));
  if (s->arg.kind != HM_ARG_TENSOR || hm_tensor_version(s->arg.t) == s->version) return HM_OK;
  char text[160];
  return hm_fail(
      HM_ERR_STATE,
      "backward: %s %s of %s, %s, was changed in place after it was saved (version %u, expected %u)\n  hint: use the form that makes a new tensor",
      role, name, hm__node_name(n), hm_describe(s->arg.t, text, sizeof text), hm_tensor_version(s->arg.t), s->version);
}

/* Where the saved value lies: with the node, or in its region, which is computed again if need be.  The walk steps aside meanwhile. */
static const hm_saved *obtain(hm_node *n, const hm_saved *s, int *status) {
  if (n->freed || (int)s->arg.kind != HM_ARG_LATER) return s;
  const hm_saved *found = hm__region_find(n->region, (int)s->arg.i);
  if (found) return found;
  walk *w = current;
  current = NULL;
  *status = hm__region_recompute(n->region);
  current = w;
  return *status ? s : hm__region_find(n->region, (int)s->arg.i);
}

/* What the node kept, checked; a tensor of a region is held until the node is done. */
static hm_arg fetch(hm_node *n, const hm_saved *kept, const char *role, const char *name, int *status) {
  const hm_saved *s = obtain(n, kept, status);
  if (!*status) *status = check_saved(n, s, role, name);
  if (*status) return hm_t(NULL);
  return s == kept ? s->arg : keep_temp(hm_tensor_retain(s->arg.t), status);
}

/* The saved tensor as a member of the graph, where its gradient goes along edge e.  One that autocast had cast keeps the edge's dtype. */
static hm_arg with_graph(hm_tensor *t, const hm_edge *e, int *status) {
  hm_tensor *alias;
  hm_node *origin = NULL;
  *status = t->dtype == e->dtype ? HM_OK : hm__lend(e, &origin);
  if (!*status) *status = hm_alias(t, &alias);
  if (*status) {
    hm__node_release(origin);
    return hm_t(NULL);
  }
  alias->node = origin ? origin : hm__node_retain(e->node);
  alias->out_nr = origin ? 0 : e->nr;
  alias->requires_grad = true;
  return keep_temp(alias, status);
}

/* Under autocast's backward = "float32": the saved value, widened. */
static hm_arg widened(const hm_node *n, hm_arg a, int *status) {
  if (*status || !n->backward_f32 || a.kind != HM_ARG_TENSOR || !hm_dtype_is_float(a.t->dtype) || a.t->dtype == HM_F32)
    return a;
  hm_tensor *wide;
  *status = hm_to(a.t, HM_F32, -1, false, &wide);
  return *status ? a : keep_temp(wide, status);
}

hm_arg hm__saved_in(hm_node *n, int in, int *status) {
  hm_arg a = fetch(n, &n->in[in], "operand", hm_op_get(n->op)->in[in].name, status);
  if (*status || a.kind != HM_ARG_TENSOR) return a;
  if (current->create_graph && n->edge[in].node) a = with_graph(a.t, &n->edge[in], status);
  return widened(n, a, status);
}

hm_arg hm__saved_out(hm_node *n, int out, int *status) {
  hm_arg a = fetch(n, &n->out[out], "result", hm_op_get(n->op)->out[out].name, status);
  if (*status || a.kind != HM_ARG_TENSOR) return a;
  if (current->create_graph && out == 0)
    a = with_graph(a.t, &(hm_edge){.node = n, .nr = out, .dtype = a.t->dtype}, status);
  return widened(n, a, status);
}

/* One tensor that a custom function kept.  New reference. */
static int custom_saved(hm_node *n, int i, hm_tensor **out) {
  const int role = n->custom->role[i], held = current->n_temp;
  char name[24];
  snprintf(name, sizeof name, "%d", i + 1);
  int status = HM_OK;
  hm_arg a = fetch(n, &n->custom->saved[i], "saved tensor", name, &status);
  if (status) return status; /* nothing was held */
  const hm_edge own = {.node = n, .nr = -1 - role, .dtype = a.t->dtype};
  const hm_edge *e = role > 0 ? &n->edge[role - 1] : &own;
  if (current->create_graph && role != 0 && e->node) a = with_graph(a.t, e, &status);
  if (!status && a.t->requires_grad) *out = hm_tensor_retain(a.t);
  else if (!status) status = hm_alias(a.t, out);
  hm__release_temps(current, held);
  return status;
}

int hm_custom_saved(int *count, hm_tensor **out) {
  hm_node *n = current ? current->running : NULL;
  if (!n || n->op != HM_NODE_CUSTOM)
    return hm_fail(HM_ERR_STATE, "saved: saved tensors can only be asked for inside the function's backward");
  *count = n->custom->n_saved;
  for (int i = 0; out && i < n->custom->n_saved; i++) {
    const int status = custom_saved(n, i, &out[i]);
    if (!status) continue;
    while (i-- > 0) hm_tensor_release(out[i]);
    return status;
  }
  return HM_OK;
}

/* ====== Gradients on their way ====== */

/* True if nobody else can see t's memory and every element is its own. */
static bool is_ours(const hm_tensor *t) {
  return atomic_load(&t->refs) == 1 && atomic_load(&t->storage->refs) == 1 && !t->requires_grad &&
         (hm_is_contiguous(t) || hm_is_channels_last(t));
}

/* Adds g (taken over) into *sum. */
static int add_gradient(hm_tensor **sum, hm_tensor *g) {
  if (!*sum) {
    *sum = g;
    return HM_OK;
  }
  int status;
  if (!current->create_graph && is_ours(*sum)) {
    status = hm_call_inplace(HM_OP_ADD, (const hm_arg[]){hm_t(*sum), hm_t(g)}, NULL);
  } else {
    hm_tensor *total;
    status = hm_op_add(hm_t(*sum), hm_t(g), &total);
    if (!status) {
      hm_tensor_release(*sum);
      *sum = total;
    }
  }
  hm_tensor_release(g);
  return status;
}

static bool shape_fits(const hm_edge *e, const hm_tensor *g) {
  return g->ndim == e->ndim && !memcmp(g->shape, e->shape, sizeof(int64_t) * (size_t)e->ndim);
}

/* Makes *g fit an edge: sums over broadcast dims, casts. */
static int fit(const hm_node *n, const hm_edge *e, hm_tensor **g) {
  hm_tensor *fitted;
  int status = HM_OK;
  if (!shape_fits(e, *g)) {
    status = hm_sum_to(*g, e->ndim, e->shape, &fitted);
    if (status && status != HM_ERR_SHAPE) return status;
    if (status) {
      char text[160];
      return hm_fail(HM_ERR_SHAPE, "backward: %s gave a gradient of the wrong shape, %s", hm__node_name(n),
                     hm_describe(*g, text, sizeof text));
    }
    hm_tensor_release(*g);
    *g = fitted;
  }
  if ((*g)->dtype != e->dtype) {
    status = hm_to(*g, e->dtype, -1, false, &fitted);
    if (status) return status;
    hm_tensor_release(*g);
    *g = fitted;
  }
  return HM_OK;
}

/* Adds *g into a leaf's .grad; takes it over (and clears *g) where it can become the gradient itself. */
static int accumulate(hm_tensor *leaf, hm_tensor **g) {
  leaf->grad_order = ++grad_clock;
  if (leaf->grad) {
    if (!current->create_graph) return hm_call_inplace(HM_OP_ADD, (const hm_arg[]){hm_t(leaf->grad), hm_t(*g)}, NULL);
    hm_tensor *total;
    const int status = hm_op_add(hm_t(leaf->grad), hm_t(*g), &total);
    if (status) return status;
    hm_tensor_release(leaf->grad);
    leaf->grad = total;
    return HM_OK;
  }
  if (is_ours(*g) || (current->create_graph && atomic_load(&(*g)->refs) == 1)) {
    leaf->grad = *g;
    *g = NULL;
    return HM_OK;
  }
  return hm_clone(*g, &leaf->grad);
}

/* Sends g (taken over) along an edge.  A leaf without hooks has it added at once: gradients made before an error are then kept.
 * While gradients are watched: what comes, what is left of it where it is summed to fit, and the sum with what came before. */
static int deliver(walk *w, const hm_node *n, const hm_edge *e, hm_tensor *g) {
  const bool held = hm__tapped && hm__tap_wants(e);
  const int64_t numel = g->numel;
  int status = held ? hm__tap_gradient(e, g) : HM_OK;
  if (!status) status = fit(n, e, &g);
  if (!status && held && g->numel != numel) status = hm__tap_gradient(e, g);
  if (!status && e->node->op == HM_NODE_ACCUMULATE && !w->restricted && !e->node->leaf->hooks) {
    status = accumulate(e->node->leaf, &g);
    hm_tensor_release(g);
    return status;
  }
  hm_visit *v = status ? NULL : hm__visit_make(w, e->node);
  if (!v) {
    hm_tensor_release(g);
    return status ? status : HM_ERR_MEMORY;
  }
  const bool sums = v->grad[e->nr] != NULL;
  status = add_gradient(&v->grad[e->nr], g);
  if (!status && held && sums) status = hm__tap_gradient(e, v->grad[e->nr]);
  return status || v->queued ? status : hm__visit_queue(w, v);
}

/* ====== Running nodes ====== */

/* Puts aside the gradients that hm_autograd_grad was asked for. */
static void catch_inputs(walk *w, const hm_visit *v) {
  for (int k = 0; k < w->n_input; k++) {
    const int nr = w->input[k]->node ? w->input[k]->out_nr : 0;
    if (w->input_node[k] == v->node && v->grad[nr] && !w->caught[k]) w->caught[k] = hm_tensor_retain(v->grad[nr]);
  }
}

static int run_leaf(walk *w, hm_visit *v) {
  hm_tensor *leaf = v->node->leaf;
  if (leaf->hooks) {
    const int status = hm__hooks_run(leaf->hooks, 0, &v->grad[0]);
    if (status) return status;
  }
  if (w->restricted) {
    catch_inputs(w, v);
    return HM_OK;
  }
  return accumulate(leaf, &v->grad[0]);
}

static int widen_gradients(hm_visit *v) {
  for (int i = 0; i < v->node->n_out; i++) {
    hm_tensor *wide;
    if (!v->grad[i] || v->grad[i]->dtype == HM_F32) continue;
    const int status = hm_to(v->grad[i], HM_F32, -1, false, &wide);
    if (status) return status;
    hm_tensor_release(v->grad[i]);
    v->grad[i] = wide;
  }
  return HM_OK;
}

/* hm_autograd_grad was asked for what comes to this node. */
bool hm__is_asked_for(const walk *w, const hm_node *n) {
  for (int k = 0; k < w->n_input; k++)
    if (w->input_node[k] == n) return true;
  return false;
}

/* ====== Running ops ====== */

static int call_backward(walk *w, hm_visit *v, hm_tensor **grad_in) {
  hm_node *n = v->node;
  hm_tensor *const *grad = v->grad;
  int status;
  if (hm__run_pair(w, v, grad_in, &status)) return status;
  if (n->op == HM_NODE_CUSTOM) {
    if (n->freed) return check_saved(n, &(hm_saved){0}, "operand", "");
    return n->custom->fn(n->custom->ud, n->n_out, grad, n->n_in, grad_in);
  }
  const hm_op_info *info = hm_op_get(n->op);
  if (!info->differentiable)
    return hm_fail(HM_ERR_UNSUPPORTED,
                   "backward: %s has no derivative: this gradient cannot be differentiated once more", info->name);
  return info->backward(n, grad, grad_in);
}

static int run_op(walk *w, hm_visit *v) {
  hm_node *n = v->node;
  hm_tensor *few[HM_MAX_IN] = {NULL}, **grad_in = few;
  if (n->n_in > HM_MAX_IN) {
    grad_in = hm_calloc(sizeof *grad_in * n->n_in);
    if (!grad_in) return HM_ERR_MEMORY;
  }
  const int looked_for = hm_mode_current()->anomaly;
  const bool anomaly = looked_for == HM_ANOMALY_NAN || looked_for == HM_ANOMALY_INF;
  w->walked = n;
  int status = n->backward_f32 ? widen_gradients(v) : HM_OK;
  if (!status && anomaly) status = hm__anomaly_check(n, false, n->n_out, v->grad);
  w->running = n;
  if (!status) status = call_backward(w, v, grad_in);
  w->running = NULL;
  hm__release_temps(w, 0);
  release_grads(v);
  if (!status && anomaly) status = hm__anomaly_check(n, true, n->n_in, grad_in);
  if (w->retain) hm__node_forget(n);
  else hm__node_free_saved(n);
  for (int i = 0; i < n->n_in; i++) {
    if (!grad_in[i]) continue;
    if (status || !hm__wants(n, i)) hm_tensor_release(grad_in[i]);
    else status = deliver(w, n, &n->edge[i], grad_in[i]);
  }
  if (grad_in != few) hm_free(grad_in);
  w->walked = NULL;
  return status;
}

static int run_visit(walk *w, hm_visit *v) {
  hm_node *n = v->node;
  if (n->op == HM_NODE_ACCUMULATE) return run_leaf(w, v);
  for (int i = 0; n->hooks && i < n->n_out; i++) {
    if (!v->grad[i]) continue;
    const int status = hm__hooks_run(n->hooks, i, &v->grad[i]);
    if (status) return status;
  }
  if (w->restricted) {
    catch_inputs(w, v);
    bool deeper = false;
    for (int i = 0; i < n->n_in; i++) deeper = deeper || (n->edge[i].node && hm__wants(n, i));
    if (!deeper) return HM_OK;
  }
  return run_op(w, v);
}

/* ====== Starting a walk ====== */

/* dtype of a root's gradient; of 8-bit floats it is float32. */
static int gradient_dtype(const hm_tensor *root) { return hm_dtype_is_f8(root->dtype) ? HM_F32 : root->dtype; }

/* The gradient a root starts with: the given one, fitted, or ones for a single element.  New reference. */
static int root_gradient(hm_tensor *root, hm_tensor *given, hm_tensor **out) {
  char text[160], got[160];
  if (given) {
    if (given->ndim != root->ndim || memcmp(given->shape, root->shape, sizeof(int64_t) * (size_t)root->ndim))
      return hm_fail(HM_ERR_SHAPE, "backward: the gradient must have the tensor's shape: tensor is %s, gradient is %s",
                     hm_describe(root, text, sizeof text), hm_describe(given, got, sizeof got));
    return hm_to(given, gradient_dtype(root), -1, false, out);
  }
  if (root->numel != 1)
    return hm_fail(
        HM_ERR_SHAPE,
        "backward: a tensor of several elements needs a gradient: got %s\n  hint: reduce it (x:sum()), or pass backward(gradient)",
        hm_describe(root, text, sizeof text));
  int status = hm_empty(root->ndim, root->shape, gradient_dtype(root), hm_tensor_device(root), out);
  if (status) return status;
  hm_tensor *same;
  status = hm_op_fill_(hm_t(*out), hm_f(1), &same);
  hm_tensor_release(status ? *out : same);
  if (status) *out = NULL;
  return status;
}

static int seed(walk *w, hm_tensor *root, hm_tensor *given) {
  char text[160];
  if (!root->requires_grad)
    return hm_fail(
        HM_ERR_STATE,
        "backward: the tensor has no graph: %s\n  hint: some parameter must have requires_grad, and the forward must not run inside no_grad",
        hm_describe(root, text, sizeof text));
  hm_tensor *g;
  int status = root_gradient(root, given, &g);
  if (status) return status;
  hm_node *n;
  status = hm__grad_target(root, &n);
  if (status || (w->restricted && !hm__visit_of(w, n))) { /* no input lies below this root */
    hm_tensor_release(g);
    if (!status) hm__node_release(n);
    return status;
  }
  hm_edge e = {.node = n,
               .nr = root->node ? root->out_nr : 0,
               .dtype = (int8_t)gradient_dtype(root),
               .ndim = root->ndim};
  memcpy(e.shape, root->shape, sizeof(int64_t) * (size_t)root->ndim);
  status = deliver(w, n, &e, g);
  hm__node_release(n);
  return status;
}

static int run(walk *w, hm_tensor *const *roots, hm_tensor *const *grads, int n) {
  hm_mode mode = *hm_mode_current(), *outer = hm_mode_current();
  char cls[HM_OP_COUNT];
  mode.grad = w->create_graph;
  mode.autocast = false;
  hm_fp8_recipe_retain(mode.fp8); /* a hook may close the region that lent these */
  if (mode.cls) mode.cls = memcpy(cls, mode.cls, sizeof cls);
  w->outer = current;
  w->regions = hm__region_filled();
  current = w;
  hm_mode_switch(&mode);
  int status = HM_OK;
  for (int i = 0; i < n && !status; i++) status = seed(w, roots[i], grads ? grads[i] : NULL);
  while (!status && w->heap_n > 0) {
    hm_visit *v = heap_pop(w);
    status = run_visit(w, v);
    release_grads(v);
  }
  if (!w->retain && status) /* the graph is dead: nothing half-walked may be walked again */
    for (hm_visit *v = w->visits; v; v = v->next) hm__node_free_saved(v->node);
  hm_mode_switch(outer);
  if (outer->fp8 == mode.fp8) outer->fp8_position = mode.fp8_position; /* products of hooks count on */
  hm_fp8_recipe_release(mode.fp8);
  hm__region_clear_since(w->regions);
  walk_end(w);
  current = w->outer;
  return status;
}

int hm_backward(hm_tensor *const *roots, hm_tensor *const *grads, int n, bool retain, bool create_graph) {
  walk w = {.retain = retain || create_graph, .create_graph = create_graph};
  return run(&w, roots, grads, n);
}

/* ====== Gradients by chosen inputs ====== */

typedef struct node_list {
  hm_node **at;
  int n, max;
} node_list;

static int list_add(node_list *l, hm_node *n) {
  if (l->n == l->max) {
    const int max = l->max ? 2 * l->max : 64;
    hm_node **at = hm_realloc(l->at, sizeof *at * (size_t)max);
    if (!at) return HM_ERR_MEMORY;
    l->at = at;
    l->max = max;
  }
  l->at[l->n++] = n;
  return HM_OK;
}

static bool leads_on(const walk *w, const hm_node *n) {
  for (int i = 0; i < n->n_in; i++)
    if (n->edge[i].node && hm__visit_of(w, n->edge[i].node)) return true;
  return hm__is_asked_for(w, n);
}

/* Every node reachable from the roots, once. */
static int reachable(hm_tensor *const *roots, int n_roots, node_list *out) {
  walk seen = {.outer = NULL}; /* lends its visits as marks */
  int status = HM_OK;
  for (int i = 0; i < n_roots && !status; i++) {
    hm_node *n = roots[i]->node ? roots[i]->node : roots[i]->accumulator;
    if (!n || hm__visit_of(&seen, n)) continue;
    status = hm__visit_make(&seen, n) ? list_add(out, n) : HM_ERR_MEMORY;
  }
  for (int next = 0; next < out->n && !status; next++) {
    hm_node *n = out->at[next];
    for (int i = 0; i < n->n_in && !status; i++) {
      hm_node *to = n->edge[i].node;
      if (to && !hm__visit_of(&seen, to)) status = hm__visit_make(&seen, to) ? list_add(out, to) : HM_ERR_MEMORY;
    }
  }
  walk_end(&seen);
  return status;
}

static int by_seq(const void *a, const void *b) {
  const uint64_t x = (*(hm_node *const *)a)->seq, y = (*(hm_node *const *)b)->seq;
  return x < y ? -1 : x > y;
}

/* Makes visits of exactly those nodes through which a root reaches an input: oldest first, so that what lies below is decided. */
static int mark_needed(walk *w, hm_tensor *const *roots, int n_roots) {
  node_list all = {NULL, 0, 0};
  int status = reachable(roots, n_roots, &all);
  if (!status && all.n > 0) qsort(all.at, (size_t)all.n, sizeof *all.at, by_seq);
  for (int i = 0; i < all.n && !status; i++)
    if (leads_on(w, all.at[i]) && !hm__visit_make(w, all.at[i])) status = HM_ERR_MEMORY;
  hm_free(all.at);
  return status;
}

static int find_inputs(walk *w) {
  for (int k = 0; k < w->n_input; k++) {
    char text[160];
    if (!w->input[k]->requires_grad)
      return hm_fail(HM_ERR_STATE,
                     "grad: input %d does not want a gradient: %s\n  hint: set requires_grad before the forward", k + 1,
                     hm_describe(w->input[k], text, sizeof text));
    const int status = hm__grad_target(w->input[k], &w->input_node[k]);
    if (status) return status;
  }
  return HM_OK;
}

static int check_caught(const walk *w, bool allow_unused) {
  for (int k = 0; k < w->n_input && !allow_unused; k++)
    if (!w->caught[k])
      return hm_fail(
          HM_ERR_STATE,
          "grad: input %d was not used in the graph of the outputs\n  hint: pass allow_unused = true to get nil for it",
          k + 1);
  return HM_OK;
}

int hm_autograd_grad(hm_tensor *const *roots, hm_tensor *const *grads, int n, hm_tensor *const *inputs, int n_inputs,
                     bool retain, bool create_graph, bool allow_unused, hm_tensor **out) {
  walk w = {.retain = retain || create_graph,
            .create_graph = create_graph,
            .restricted = true,
            .input = inputs,
            .n_input = n_inputs,
            .caught = out};
  for (int k = 0; k < n_inputs; k++) out[k] = NULL;
  w.input_node = hm_calloc(sizeof *w.input_node * (size_t)(n_inputs > 0 ? n_inputs : 1));
  if (!w.input_node) return HM_ERR_MEMORY;
  for (int k = 0; k < n_inputs; k++) hm_tensor_retain(inputs[k]); /* a hook may release them */
  int status = find_inputs(&w);
  if (!status) status = mark_needed(&w, roots, n);
  if (status) walk_end(&w);
  else status = run(&w, roots, grads, n);
  if (!status) status = check_caught(&w, allow_unused);
  for (int k = 0; k < n_inputs; k++) {
    hm__node_release(w.input_node[k]);
    hm_tensor_release(inputs[k]);
    if (!status) continue;
    hm_tensor_release(out[k]);
    out[k] = NULL;
  }
  hm_free(w.input_node);
  return status;
}
