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
  char name[];
} hm_custom;

typedef struct hm_visit hm_visit;

hm_node *hm__node_retain(hm_node *n);
/* Gives up what the node keeps for backward; a later backward through it is an error. */
void hm__node_free_saved(hm_node *n);
/* Where the gradient of t goes: a new reference to t's node, or its accumulator (made if need be); NULL if t wants none. */
int hm__grad_target(hm_tensor *t, hm_node **out);

#endif
