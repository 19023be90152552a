/*
 * tape.h -- private to core: what tape.c (making and freeing nodes) offers autograd.c (walking them).
 */
#ifndef HM_CORE_TAPE_H
#define HM_CORE_TAPE_H

#include "graph.h"

typedef struct hm_custom {
  hm_custom_fn fn;
  void *ud;
  void (*drop)(void *ud); /* NULL once called */
  hm_saved *saved;        /* owned: n_saved tensors that the function asked to keep */
  int n_saved;
  int16_t *role; /* of each: i + 1 for input i, -1 - i for output i, 0 for another tensor; in the block of saved */
  char name[];
} hm_custom;

typedef struct hm_visit hm_visit;

hm_node *hm__node_retain(hm_node *n);
/* Gives up what the node keeps for backward; a later backward through it is an error. */
void hm__node_free_saved(hm_node *n);
/* Gives up its saved results alone: what is left of its backward reads operands only. */
void hm__node_free_results(hm_node *n);
/* Lets go what a region computed again for the node. */
void hm__node_forget(hm_node *n);
/* Under detect_anomaly: fails if one of the gradients holds what is looked for.  made: n's backward made them, else they came in to n. */
int hm__anomaly_check(hm_node *n, bool made, int count, hm_tensor *const *grad);
/* A node in whose place edges lead on to e->node, with e's dtype: for a tensor that is a cast copy of what e->node made.  New reference. */
int hm__lend(const hm_edge *e, hm_node **out);
/* Where the gradient of t goes: a new reference to t's node, or its accumulator (made if need be); NULL if t wants none. */
int hm__grad_target(hm_tensor *t, hm_node **out);

#endif
