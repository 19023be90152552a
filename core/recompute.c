/*
 * recompute.c -- regions of the forward that keep nothing for backward and are computed again when it comes: activation checkpointing.
 *
 * The graph is recorded as ever; only what its nodes would keep is left out.  So gradients flow by the same nodes in the same order, and are
 * the same to the last bit.  Running the region's function again records a second graph, which is thrown away: it is there because whether an
 * op keeps something depends on which of its operands want gradients.
 *
 * Regions nest: the arguments of an inner region are kept by the outer one (hm__region_keep, as an op's operands are), so that they do not
 * stay in memory either.
 *
 * Ownership: nodes and the binding own a region; a region owns its arguments, the nodes that made them, and what it has computed again.
 */
#include <string.h>

#include "recompute.h"
#include "tape.h"

typedef enum region_state { REGION_OPEN, REGION_CLOSED, REGION_AGAIN } region_state;

/* What the forward would have kept at one place. */
typedef struct mark {
  const char *op, *name;
  uint32_t version;
  int8_t dtype, ndim;
  int16_t device;
  int64_t shape[HM_MAX_NDIM];
} mark;

/* An argument of the region. */
typedef struct argument {
  hm_saved saved;
  hm_node *node; /* owned: what made it, or its accumulator; NULL if it wants no gradient */
  int32_t out_nr;
} argument;

struct hm_region {
  _Atomic int32_t refs;
  region_state state;
  hm_region_options options;
  hm_region_fn fn;
  void *ud;
  void (*drop)(void *ud);
  hm_mode mode; /* of the forward; cls points into this block */
  char cls[HM_OP_COUNT];
  struct {
    uint64_t seed, offset;
  } random[HM_MAX_DEVICES];
  hm_region *outer; /* owned: keeps the arguments that are HM_ARG_LATER */
  argument *arg;
  int n_arg;
  mark *marks;
  int n, max;
  hm_saved *kept; /* n of them, or NULL */
  int next;       /* while computed again: the next place */
  bool again;     /* made while `outer` was computed again: its arguments belong to the region that it repeats */
  bool listed;
  hm_region *filled; /* the list of regions that hold something */
};

static hm_region *filled; /* regions that walks have computed again, the last first; owned; mutator thread only */

/* ====== Life ====== */

hm_region *hm__region_retain(hm_region *r) {
  if (r) atomic_fetch_add_explicit(&r->refs, 1, memory_order_relaxed);
  return r;
}

void hm_region_release(hm_region *r) {
  if (!r || atomic_fetch_sub_explicit(&r->refs, 1, memory_order_acq_rel) != 1) return;
  hm__region_clear(r);
  for (int i = 0; i < r->n_arg; i++) {
    const hm_saved *s = &r->arg[i].saved;
    if (s->arg.kind == HM_ARG_TENSOR) hm_tensor_release(s->arg.t);
    else if ((int)s->arg.kind == HM_ARG_LATER && !r->again) hm__region_forget(r->outer, (int)s->arg.i);
    hm__node_release(r->arg[i].node);
  }
  hm_region_release(r->outer);
  hm_fp8_recipe_release(r->mode.fp8);
  if (r->drop) r->drop(r->ud);
  hm_free(r->arg);
  hm_free(r->marks);
  hm_free(r);
}

void hm_region_close(hm_region *r) {
  if (r->state == REGION_OPEN) r->state = REGION_CLOSED;
}

bool hm_region_recomputing(void) {
  const hm_region *r = hm_mode_current()->region;
  for (; r; r = r->outer)
    if (r->state == REGION_AGAIN) return true;
  return false;
}

static int keep_argument(argument *a, hm_region *outer, hm_tensor *t) {
  a->out_nr = t->node ? t->out_nr : 0;
  int status = hm__grad_target(t, &a->node);
  if (status) return status;
  a->saved.version = hm_tensor_version(t);
  if (outer) {
    int index;
    status = hm__region_keep(outer, &(hm_keepsake){"checkpoint", "an argument", t, a->saved.version}, &index);
    if (!status) a->saved.arg = (hm_arg){(hm_arg_kind)HM_ARG_LATER, {.i = index}};
    return status;
  }
  hm_tensor *alias;
  status = hm_alias(t, &alias);
  if (!status) a->saved.arg = hm_t(alias);
  return status;
}

int hm_region_new(hm_tensor *const *args, int n, const hm_region_options *options, hm_region_fn fn, void *ud,
                  void (*drop)(void *ud), hm_region **out) {
  *out = NULL;
  hm_region *r = hm_calloc(sizeof *r);
  argument *list = r ? hm_calloc(sizeof *list * (size_t)(n > 0 ? n : 1)) : NULL;
  if (!list) {
    hm_free(r);
    if (drop) drop(ud);
    return HM_ERR_MEMORY;
  }
  atomic_init(&r->refs, 1);
  r->options = *options;
  r->fn = fn;
  r->ud = ud;
  r->drop = drop;
  r->arg = list;
  r->mode = *hm_mode_current();
  hm_fp8_recipe_retain(r->mode.fp8);
  if (r->mode.cls) {
    memcpy(r->cls, r->mode.cls, sizeof r->cls);
    r->mode.cls = r->cls;
  }
  r->outer = hm__region_retain(r->mode.region);
  r->again = r->outer && r->outer->state == REGION_AGAIN;
  for (int device = 0; device < HM_MAX_DEVICES; device++)
    hm_random_get(device, &r->random[device].seed, &r->random[device].offset);
  int status = HM_OK;
  for (; r->n_arg < n && !status; r->n_arg++) status = keep_argument(&list[r->n_arg], r->outer, args[r->n_arg]);
  if (status) hm_region_release(r);
  else *out = r;
  return status;
}

/* ====== What ops leave here ====== */

static int add_mark(hm_region *r, const hm_keepsake *k, int *index) {
  if (r->n == r->max) {
    const int max = r->max ? 2 * r->max : 16;
    mark *marks = hm_realloc(r->marks, sizeof *marks * (size_t)max);
    if (!marks) return HM_ERR_MEMORY;
    r->marks = marks;
    r->max = max;
  }
  mark *m = &r->marks[r->n];
  *m = (mark){.op = k->op, .name = k->name, .version = k->version, .dtype = k->t->dtype, .ndim = k->t->ndim};
  m->device = (int16_t)hm_tensor_device(k->t);
  memcpy(m->shape, k->t->shape, sizeof(int64_t) * (size_t)k->t->ndim);
  *index = r->n++;
  return HM_OK;
}

/* "%s of linear, f32[2,3] on cpu" of what the forward had. */
static const char *describe_mark(const mark *m, char *text, size_t size) {
  hm_storage storage = {.device = m->device};
  hm_tensor t = {.dtype = m->dtype, .ndim = m->ndim, .storage = &storage};
  memcpy(t.shape, m->shape, sizeof(int64_t) * (size_t)m->ndim);
  return hm_describe(&t, text, size);
}

#define HINT_SAME                                                                                                      \
  "\n  hint: the function must do the same each time: the same ops on tensors of the same shapes and dtypes"

static int compare(const hm_region *r, const hm_keepsake *k) {
  if (r->next >= r->n)
    return hm_fail(
        HM_ERR_STATE,
        "checkpoint: computed again, the function runs more ops than it did in the forward (%s of %s is new)" HINT_SAME,
        k->name, k->op);
  const mark *m = &r->marks[r->next];
  char was[160], is[160];
  if (!r->options.check) return HM_OK;
  if (m->dtype != k->t->dtype || m->ndim != k->t->ndim || m->device != hm_tensor_device(k->t) ||
      memcmp(m->shape, k->t->shape, sizeof(int64_t) * (size_t)m->ndim))
    return hm_fail(HM_ERR_STATE, "checkpoint: computed again, %s of %s is %s; in the forward %s of %s was %s" HINT_SAME,
                   k->name, k->op, hm_describe(k->t, is, sizeof is), m->name, m->op, describe_mark(m, was, sizeof was));
  if (m->version != k->version)
    return hm_fail(
        HM_ERR_STATE,
        "checkpoint: %s of %s, %s, was changed in place after the forward (version %u, expected %u)\n  hint: call backward before the weights or inputs of the region change",
        k->name, k->op, hm_describe(k->t, is, sizeof is), k->version, m->version);
  return HM_OK;
}

int hm__region_keep(hm_region *r, const hm_keepsake *k, int *index) {
  if (r->state != REGION_AGAIN) return add_mark(r, k, index);
  const int status = compare(r, k);
  if (status) return status;
  hm_tensor *alias;
  const int failed = hm_alias(k->t, &alias);
  if (failed) return failed;
  hm_saved *s = &r->kept[r->next];
  if (s->arg.kind == HM_ARG_TENSOR) hm_tensor_release(s->arg.t);
  s->arg = hm_t(alias);
  s->version = hm_tensor_version(alias);
  *index = r->next++;
  return HM_OK;
}

const hm_saved *hm__region_find(const hm_region *r, int index) {
  if (!r->kept || index >= r->n || r->kept[index].arg.kind != HM_ARG_TENSOR) return NULL;
  return &r->kept[index];
}

void hm__region_forget(hm_region *r, int index) {
  if (!r->kept || index >= r->n || r->kept[index].arg.kind != HM_ARG_TENSOR) return;
  hm_tensor *t = r->kept[index].arg.t;
  r->kept[index].arg = hm_t(NULL);
  hm_tensor_release(t);
}

void hm__region_clear(hm_region *r) {
  if (!r->kept || r->state == REGION_AGAIN) return;
  for (int i = 0; i < r->n; i++) hm__region_forget(r, i);
  hm_free(r->kept);
  r->kept = NULL;
}

/* ====== Computing it again ====== */

/* The tensor that stands for an argument: a leaf itself, else an alias with its place in the graph.  New reference. */
static int make_argument(hm_region *r, argument *a, hm_tensor **out) {
  const hm_saved *s = &a->saved;
  const bool later = (int)s->arg.kind == HM_ARG_LATER;
  if (later) {
    s = hm__region_find(r->outer, (int)a->saved.arg.i);
    const int status = s ? HM_OK : hm__region_recompute(r->outer);
    if (status) return status;
    s = hm__region_find(r->outer, (int)a->saved.arg.i);
  }
  const uint32_t version = hm_tensor_version(s->arg.t);
  if (r->options.check && version != s->version) {
    char text[160];
    return hm_fail(
        HM_ERR_STATE,
        "checkpoint: an argument, %s, was changed in place after the forward (version %u, expected %u)\n  hint: use the form that makes a new tensor",
        hm_describe(s->arg.t, text, sizeof text), version, s->version);
  }
  if (a->node && a->node->leaf) {
    *out = hm_tensor_retain(a->node->leaf);
  } else {
    const int status = hm_alias(s->arg.t, out);
    if (status) return status;
    if (a->node) {
      (*out)->node = hm__node_retain(a->node);
      (*out)->out_nr = a->out_nr;
      (*out)->requires_grad = true;
    }
  }
  if (later) hm__region_forget(r->outer, (int)a->saved.arg.i);
  return HM_OK;
}

static int run_again(hm_region *r, hm_tensor *const *args) {
  hm_mode *outer = hm_mode_current(), mode = r->mode;
  mode.grad = true;
  mode.anomaly = outer->anomaly;
  mode.region = r;
  uint64_t seed[HM_MAX_DEVICES], offset[HM_MAX_DEVICES];
  for (int device = 0; r->options.random && device < HM_MAX_DEVICES; device++) {
    hm_random_get(device, &seed[device], &offset[device]);
    hm_random_set(device, r->random[device].seed, r->random[device].offset);
  }
  r->state = REGION_AGAIN;
  r->next = 0;
  hm_mode_switch(&mode);
  int status = r->fn(r->ud, r->n_arg, args);
  hm_mode_switch(outer);
  r->state = REGION_CLOSED;
  for (int device = 0; r->options.random && device < HM_MAX_DEVICES; device++)
    hm_random_set(device, seed[device], offset[device]);
  if (!status && r->next < r->n)
    status = hm_fail(
        HM_ERR_STATE,
        "checkpoint: computed again, the function runs fewer ops than it did in the forward (%s of %s is missing)" HINT_SAME,
        r->marks[r->next].name, r->marks[r->next].op);
  return status;
}

bool hm__region_again(const hm_region *r) { return r->state == REGION_AGAIN; }

hm_region *hm__region_filled(void) { return filled; }

void hm__region_clear_since(const hm_region *start) {
  while (filled != start) {
    hm_region *r = filled;
    filled = r->filled;
    r->listed = false;
    hm__region_clear(r);
    hm_region_release(r);
  }
}

/* Enters r in the list of regions that hold something. */
static void enlist(hm_region *r) {
  if (r->listed) return;
  r->listed = true;
  r->filled = filled;
  filled = hm__region_retain(r);
}

int hm__region_recompute(hm_region *r) {
  if (r->state == REGION_AGAIN)
    return hm_fail(HM_ERR_STATE,
                   "checkpoint: backward inside the function reached the graph that is being computed again");
  if (r->state == REGION_OPEN)
    return hm_fail(
        HM_ERR_STATE,
        "checkpoint: backward inside the function reached the function's own ops\n  hint: call backward outside");
  if (!r->kept) r->kept = hm_calloc(sizeof *r->kept * (size_t)(r->n > 0 ? r->n : 1));
  hm_tensor **args = r->kept ? hm_calloc(sizeof *args * (size_t)(r->n_arg > 0 ? r->n_arg : 1)) : NULL;
  if (!args) return HM_ERR_MEMORY;
  enlist(r);
  int status = HM_OK;
  for (int i = 0; i < r->n_arg && !status; i++) status = make_argument(r, &r->arg[i], &args[i]);
  if (!status) status = run_again(r, args);
  for (int i = 0; i < r->n_arg; i++) hm_tensor_release(args[i]);
  hm_free(args);
  if (status) hm__region_clear(r);
  return status;
}
