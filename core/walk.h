/*
 * walk.h -- private to core: what autograd.c, the walk, and pairs.c, its pairs of nodes that run as one, share.
 *
 * A walk belongs to one call of backward and lives on its stack; visits belong to the walk.
 */
#ifndef HM_CORE_WALK_H
#define HM_CORE_WALK_H

#include "hook.h"
#include "recompute.h"
#include "tape.h"

/* One node met by one walk. */
struct hm_visit {
  hm_node *node;         /* owned */
  hm_visit *outer;       /* the visit of an enclosing walk, put back at the end */
  hm_visit *next;        /* all visits of this walk */
  const struct walk *by; /* the walk */
  bool queued;
  bool through;      /* grad[0] has gone through the op's activation already (pairs.c) */
  hm_tensor *relu;   /* owned; NULL, or a relu's result: its gradient is still to be applied to grad[0] (pairs.c) */
  hm_tensor *grad[]; /* node->n_out of them, owned */
};

enum { MAX_TEMP = 96 }; /* a backward function reads each operand a few times at most */

typedef struct walk {
  struct walk *outer;
  bool retain, create_graph;
  bool restricted; /* hm_autograd_grad: only visits made beforehand are run, leaves are not written */
  hm_visit *visits;
  hm_visit **heap;
  int heap_n, heap_max;
  hm_node *running;          /* whose backward function runs */
  hm_node *walked;           /* the same, and on while its gradients are handed on */
  hm_node *apart;            /* its first input's gradient is made apart: hm__wants() says no */
  hm_tensor *temp[MAX_TEMP]; /* aliases made for it */
  int n_temp;
  const hm_region *regions; /* what hm__region_filled said at the start */
  /* restricted: what to catch */
  hm_tensor *const *input;
  hm_node **input_node;
  int n_input;
  hm_tensor **caught;
} walk;

/* ---- autograd.c ---- */
/* The walk's visit of a node; NULL: it was not met yet. */
static inline hm_visit *hm__visit_of(const walk *w, const hm_node *n) {
  return n->visit && n->visit->by == w ? n->visit : NULL;
}
hm_visit *hm__visit_make(walk *w, hm_node *n); /* the same, made where there is none; NULL without memory */
int hm__visit_queue(walk *w, hm_visit *v);     /* its gradients are to be handed on in the order of nodes */
void hm__release_temps(walk *w, int from);
bool hm__is_asked_for(const walk *w, const hm_node *n); /* hm_autograd_grad was asked for what comes to this node */

/* ---- pairs.c ---- */
/* Runs v as part of a pair, or as what is left of one?  Then *status says how that went: either grad_in[] is set as a backward function sets it, or
 * (v->grad[0] is gone) v has handed its gradient on by itself. */
bool hm__run_pair(walk *w, hm_visit *v, hm_tensor **grad_in, int *status);

#endif
