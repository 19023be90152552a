/*
 * scaler.h -- private to core: the gradient scaler, as scaler.c and scaler_late.c share it.
 *
 * scaler.c has the state machine and the synchronous path; scaler_late.c what a scaler with `async` does once its
 * tensors lie on a device that can work without a wait.  Nobody else includes this.
 */
#ifndef HM_CORE_SCALER_H
#define HM_CORE_SCALER_H

#include "graph.h"
#include "optim.h"

#define HM_SCALE_LOWEST 0x1p-126
#define HM_SCALE_HIGHEST 0x1p127

/* Rounds kept apart; later ones join the last. */
enum { HM_MAX_ROUNDS = 64 };

typedef enum hm_stage { HM_STAGE_READY, HM_STAGE_UNSCALED, HM_STAGE_STEPPED, HM_STAGE_SKIPPED } hm_stage;

/* What one check found. */
typedef struct hm_finding {
  int64_t inf_count, nan_count;
  double sum_sq, amax; /* of unscaled finite gradients */
  double scale;        /* the gradients were made with */
} hm_finding;

/* What else is known of a check, or of all checks of a round, where somebody wants it. */
typedef struct hm_detail {
  int64_t histogram[HM_HISTOGRAM];
  hm_param_finding *param; /* parameters are retained */
  int n, cap;
} hm_detail;

/* A culprit on its way to its place. */
typedef struct hm_suspect {
  uint64_t order; /* when its gradient arrived: earlier is nearer the loss */
  hm_culprit culprit;
} hm_suspect;

/* What is kept about one optimizer. */
typedef struct hm_checked {
  const hm_optim *optim; /* borrowed, used as a key only */
  hm_stage stage;
  int round; /* that its next check belongs to */
  hm_finding found;
  hm_detail detail;    /* filled in where wanted */
  hm_suspect *suspect; /* scratch for sorting; both arrays hold cap entries */
  hm_culprit *culprit;
  int n_culprits, cap;
  hm_promise *promise; /* late: what the last check will turn out to have found; one reference, or NULL */
} hm_checked;

/* A scale on the device: the cell that kernels read and, rounded, what losses are multiplied by. */
typedef struct hm_late_cell {
  hm_tensor *cell, *rounded; /* owned; NULL for none */
} hm_late_cell;

/* An update whose event is on its way to the host. */
typedef struct hm_waiting {
  hm_tensor *event; /* owned */
  hm_fetch *fetch;
  int64_t ticket, step;
  bool told; /* the round counts as an event */
  bool asks; /* the policy hears of it */
} hm_waiting;

/* What a scaler with `async` has beside the others. */
typedef struct hm_late_state {
  int home;                        /* the device of everything; -1 before the first tensor */
  hm_late_cell now, made;          /* made: of the gradients at hand, while `pending` */
  hm_tensor *event[HM_MAX_ROUNDS]; /* of the rounds since update(); owned */
  hm_scaler_rule rule;
  double decided;      /* the policy's last answer, clamped */
  int64_t clean;       /* for the first cell */
  int64_t ticket;      /* of the last update */
  hm_waiting *waiting; /* oldest first */
  int n_waiting, cap_waiting;
} hm_late_state;

struct hm_scaler {
  bool enabled, allow_f16_grads;
  bool async; /* wanted */
  bool late;  /* and lives on a device: `scale` and `round` then stand still */
  double scale, min_scale, max_scale;
  double made_with; /* the scale of the gradients at hand, while `pending` */
  bool pending;     /* scale() was called since the last update() that had a check */
  bool updating;    /* the policy is running */
  int64_t step;     /* events that policies have heard of, or will */
  hm_policy_fn policy;
  void *policy_ud;
  void (*policy_drop)(void *ud);
  hm_finding round[HM_MAX_ROUNDS];
  hm_detail *detail[HM_MAX_ROUNDS]; /* owned; made at the first use of a round, NULL before */
  int n_rounds;
  hm_scale_change early; /* FAULT or STOP: what came of telling the policy before update(); else HOLD */
  char why[512];         /* what the policy said when it wanted to stop; "" for nothing */
  bool want_histogram, want_params;
  hm_checked **checked; /* owned one by one: culprits that records point to stay where they are */
  int n_checked, cap_checked;
  hm_late_state l;
};

/* ====== scaler.c ====== */

/* Orders n suspects, nearest the loss first, and writes their culprits. */
void hm__scaler_rank(hm_suspect *suspect, int n, hm_culprit *culprit);
/* The bounds that every scale is held between. */
void hm__scaler_limits(const hm_scaler *s, double *low, double *high);
double hm__scaler_clamp(const hm_scaler *s, double scale);
/* Refuses float16 gradients of the last collect, unless they are allowed. */
int hm__scaler_refuse_f16(const hm_scaler *s, const hm_optim *o, int n);
/* The event that tells how the scale moved when `wanted` was asked for and `now` came of it. */
hm_scale_change hm__scaler_change(double old, double wanted, double now);
/* Asks the policy about one round.  scale: the present one.  d: NULL for none.  *wanted is what it wants; a policy
 * that fails leaves a message. */
int hm__scaler_ask(hm_scaler *s, const hm_finding *f, const hm_detail *d, int64_t step, double scale, double *wanted,
                   const char **stop);

/* ====== scaler_late.c ====== */

/* Takes note of a device that the scaler's tensors lie on (-1: several): the first one becomes its home.  what: for
 * messages. */
int hm__late_home(hm_scaler *s, int device, const char *what);
/* The rest only while s->late. */
int hm__late_scale(hm_scaler *s, hm_tensor *loss, hm_tensor **out);
/* Looks whether a step that was made turned out to be skipped; waits for the device if there was one. */
int hm__late_settle_stage(hm_checked *c);
/* CHECK or UNSCALE over the last collect, n items; joins a round. */
int hm__late_check(hm_scaler *s, hm_optim *o, hm_checked *c, hm_multi_op op, int n);
/* step() over the last collect. */
int hm__late_step(hm_scaler *s, hm_optim *o, hm_checked *c, double max_norm, int n, hm_step_record *record);
int hm__late_update(hm_scaler *s, double new_scale, hm_update_record *record);
int hm__late_set(hm_scaler *s, double scale);
/* Reads the present cell; waits. */
int hm__late_read(const hm_scaler *s, hm_scale_cell *cell);
/* Puts a cell with these values in the place of the present one. */
int hm__late_restart(hm_scaler *s, double scale, int64_t clean);
/* update() is over: no gradients are at hand any more. */
void hm__late_begin_step(hm_scaler *s);
void hm__late_free(hm_scaler *s);

#endif
