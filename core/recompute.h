/*
 * recompute.h -- private to core: what recompute.c (regions that are computed again for backward) offers tape.c and autograd.c.
 *
 * While a region's forward runs (hm_mode.region), nodes leave what they would keep with the region: it remembers only what each was, and its
 * place in the order.  The first walk that asks for one runs the region's function again, in the forward's modes and random state; ops then
 * come by in the same order, and their operands are kept until the nodes have used them.
 */
#ifndef HM_CORE_RECOMPUTE_H
#define HM_CORE_RECOMPUTE_H

#include "graph.h"

/* A tensor on its way into a node: whose it is, for messages, and the version of what it was made of. */
typedef struct hm_keepsake {
  const char *op, *name; /* static, or as long-lived as the call */
  hm_tensor *t;
  uint32_t version;
} hm_keepsake;

/* Forward: notes it.  While the region is computed again: keeps it, and compares it with what was noted.  *index: its place. */
int hm__region_keep(hm_region *r, const hm_keepsake *k, int *index);
/* What was kept at a place (borrowed), or NULL while it must be computed again. */
const hm_saved *hm__region_find(const hm_region *r, int index);
/* Computes the region again: afterwards hm__region_find finds everything, until the walk that asked ends. */
int hm__region_recompute(hm_region *r);
/* Lets one place go, or all. */
void hm__region_forget(hm_region *r, int index);
void hm__region_clear(hm_region *r);
/* Is it being computed again?  Nodes made meanwhile only stand for those of the forward. */
bool hm__region_again(const hm_region *r);
/* At the start of a walk: a mark; at its end: clears what was computed since. */
hm_region *hm__region_filled(void);
void hm__region_clear_since(const hm_region *start);
hm_region *hm__region_retain(hm_region *r);

#endif
