/*
 * hook.h -- private to core: gradient hooks.
 *
 * A leaf's hooks hang on the tensor, those of a non-leaf on the node that made it (node->hooks, told apart by out_nr),
 * so that they outlive the tensor struct.  A list is in order of registration; the hook behind hm_retain_grad stays
 * last.
 *
 * Owner of a list: the tensor or the node.  tensor.c adds, removes and frees; autograd.c runs.
 */
#ifndef HM_CORE_HOOK_H
#define HM_CORE_HOOK_H

#include "halfmoon.h"

struct hm_hook {
  int64_t id;
  hm_hook_fn fn; /* NULL: removed while hooks ran; skipped, and freed with the list */
  void *ud;
  void (*drop)(void *ud); /* may be NULL */
  int32_t out_nr;         /* which output of the node; 0 on a leaf */
  bool retains;           /* the hook behind hm_retain_grad: runs last */
  hm_hook *next;
  hm_hook *next_dead; /* tensor.c's: lists freed while hooks ran */
};

/* Runs the hooks of one output in order.  *grad is a reference of the caller's; a hook's replacement takes its place
 * (the old one is released).  A replacement of another shape, dtype or device is an error.  Hooks may remove hooks,
 * themselves included. */
int hm__hooks_run(hm_hook *list, int out_nr, hm_tensor **grad);
/* Frees a whole list and sets it to NULL.  Calls each drop. */
void hm__hooks_free(hm_hook **list);
/* After an in-place op gave t a new node: moves the hook of hm_retain_grad there.  Nothing to do without one. */
int hm__retain_grad_moved(hm_tensor *t);

#endif
