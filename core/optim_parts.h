/*
 * optim_parts.h -- private to core/optim*.c: what an optimizer is made of.
 *
 *   optim.c        life, groups, parameters, options
 *   optim_rules.c  the table of kinds: names, states, hyperparameters, defaults
 *   optim_state.c  moments and step counts
 *   optim_batch.c  lists of gradients as one call of the backend; norms, scaling, clipping
 *   optim_step.c   the passes of a step
 */
#ifndef HM_CORE_OPTIM_PARTS_H
#define HM_CORE_OPTIM_PARTS_H

#include "optim.h"

/* ====== Batches (optim_batch.c) ====== */

/* The items of one device lie side by side: one call of its backend covers them. */
typedef struct hm_range {
  int device, begin, end;
} hm_range;

/* A list of gradients, described for the backend.  Tensors are borrowed from the parameters. */
typedef struct hm_batch {
  hm_multi_item *item;
  hm_multi_stat *stat;
  int64_t *histogram; /* HM_HISTOGRAM counts for each of cap_histogram items; NULL until somebody wants them */
  int cap_histogram;
  bool counts; /* the next run of CHECK or UNSCALE fills `histogram` */
  hm_tensor **grad;
  int32_t *param; /* index of the item's parameter in the list it came from */
  int n, cap;
  hm_range range[HM_MAX_DEVICES];
  int n_ranges;
} hm_batch;

void hm__batch_free(hm_batch *b);
/* Room for n items. */
int hm__batch_reserve(hm_batch *b, int n);
/* Is this parameter part of a pass?  An optimizer leaves frozen ones alone (wanted_only); clipping takes every
 * gradient. */
bool hm__takes_part(const hm_tensor *p, bool wanted_only);
/* Checks all gradients of a list, then makes them all dense and disjoint.  *devices: a bit for each device they lie
 * on. */
int hm__batch_check(const char *op, hm_tensor *const *params, int n, bool wanted_only, uint32_t *devices);
/* Fills the table, device by device, in the order of the list.  Allocates nothing. */
void hm__batch_fill(hm_batch *b, hm_tensor *const *params, int n, bool wanted_only, uint32_t devices);
/* One backend call per device. */
int hm__batch_run(const hm_batch *b, const char *name, hm_multi_op op, const hm_multi_group *group, double inv_scale,
                  double grad_mul);
/* A late pass over a batch that lies on one device. */
int hm__batch_late(const hm_batch *b, const char *name, hm_multi_op op, const hm_multi_group *group,
                   const hm_late *late);
/* Marks every gradient of the batch as written. */
void hm__batch_touch(const hm_batch *b);

/* Grows one array to n entries; the old one stays valid on failure. */
int hm__grow(void *array_of_pointer, size_t n, size_t entry);
/* True when t's elements fill its span without gaps or repeats, in whatever order of dims. */
bool hm__is_dense(const hm_tensor *t);
bool hm__same_shape(const hm_tensor *a, const hm_tensor *b);
/* A new tensor of p's shape and element order. */
int hm__like_param(const hm_tensor *p, int dtype, hm_tensor **out);
/* Runs copy_ or fill_ on t outside autograd and autocast. */
int hm__write_plain(int op, hm_tensor *t, hm_arg src);

/* ====== Rules (optim_rules.c) ====== */

/* One state of a kind. */
typedef struct hm_state_rule {
  const char *name;                           /* PyTorch's; NULL: the slot is free */
  bool (*used)(const hm_optim_options *o);    /* NULL: always */
  double (*start)(const hm_optim_options *o); /* what it is filled with; NULL: 0 */
} hm_state_rule;

/* The slot of what rounding took from half parameters: in the parameter's dtype, the others are f32 (f64 for f64). */
enum { HM_STATE_LOST = HM_MAX_STATE - 1 };

typedef struct hm_optim_rule {
  const char *name;
  hm_multi_op op;
  bool decoupled; /* weight decay goes into the weights */
  hm_state_rule state[HM_MAX_STATE];
  hm_optim_options defaults;
} hm_optim_rule;

const hm_optim_rule *hm__optim_rule(hm_optim_kind kind);
/* Refuses options of group number `group` (from 0) that make no sense. */
int hm__optim_check_options(hm_optim_kind kind, const hm_optim_options *options, int group);
/* The constants of an update that has `step` before it, in the backend's form. */
hm_multi_group hm__optim_constants(hm_optim_kind kind, const hm_optim_options *options, int64_t step);

/* ====== The optimizer ====== */

/* One parameter's state.  The parameter itself stands in hm_optim.tensor at the same index. */
typedef struct hm_param {
  hm_tensor *state[HM_MAX_STATE]; /* owned; NULL until the first update */
  int64_t step;                   /* updates made */
  int32_t group;
  bool fresh; /* the states were made but never updated: SGD's momentum starts as the gradient */
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
  hm_tensor *done; /* updates of each parameter on the device since the last settle (i64); owned, NULL for none */
};

/* Does parameter i's next update use the state in a slot? */
bool hm__optim_uses(const hm_optim *o, int i, int slot);
/* Makes the state tensors that the next update of parameter i will need. */
int hm__optim_make_state(hm_optim *o, int i);
static inline bool hm__is_half(int dtype) { return dtype == HM_F16 || dtype == HM_BF16; }

#endif
