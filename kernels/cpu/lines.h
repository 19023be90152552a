/*
 * lines.h -- what the ops that add or write at ids have in common: their operands as lines along the dim.
 *
 * A line is what lies along the dim at one position of the other dims; ids of a line name places of that line alone.  Shared by index_add.c and
 * CUDA's index_add.cu.  Header-only; owns nothing.
 */
#ifndef HM_CPU_LINES_H
#define HM_CPU_LINES_H

#include <string.h>

#include "layout.h"

enum { HM_LINES_OUT, HM_LINES_SRC, HM_LINES_INDEX, HM_LINES_X, HM_LINES_OPERANDS };

typedef struct hm_lines {
  const char *name; /* of the op */
  hm_view view
      [HM_LINES_OPERANDS]; /* src and index of one shape; src may be a number; x: what is added to, absent for zeros */
  int64_t step[HM_LINES_OPERANDS]; /* of the dim */
  hm_loop loop;                    /* over the lines: the operands without the dim */
  int64_t count, n, size;          /* lines (0: none, then loop is undefined); ids in a line; size of the dim in out */
  int64_t skip;                    /* id that is passed over; -1: none */
  int acc;                         /* dtype of sums; HM_NONE: src is written as it is, the last of several stays */
  bool shared;                     /* all lines have the same ids */
  bool embedding;
} hm_lines;

/* A list of ids as a tensor of src's shape: it repeats along all dims but one. */
static inline hm_view hm__lines_spread(const hm_view *index, int64_t step, const hm_view *src, int dim) {
  hm_view v = *src;
  v.data = index->data;
  v.dtype = index->dtype;
  for (int d = 0; d < v.ndim; d++) v.stride[d] = d == dim ? step : 0;
  return v;
}

/* v with a dim of size 1 where the reduced dim was. */
static inline hm_view hm__lines_with_dim(const hm_view *v, int ndim, int dim) {
  hm_view w = *v;
  if (v->ndim == ndim) return w;
  w.ndim = (int16_t)ndim;
  for (int d = 0; d < ndim; d++) {
    w.shape[d] = d == dim ? 1 : v->shape[d < dim ? d : d - 1];
    w.stride[d] = d == dim ? 0 : v->stride[d < dim ? d : d - 1];
  }
  return w;
}

/* embedding_backward(g, index): both are row-major, g is seen as [n, E].  Sets src and index. */
static inline void hm__lines_embedding(hm_lines *l, const hm_view *g, const hm_view *index, int64_t width) {
  int64_t n = 1;
  for (int d = 0; d < index->ndim; d++) n *= index->shape[d];
  hm_view *src = &l->view[HM_LINES_SRC];
  *src = *g;
  src->ndim = 2;
  src->shape[0] = n;
  src->shape[1] = width;
  src->stride[0] = width;
  src->stride[1] = 1;
  l->view[HM_LINES_INDEX] = hm__lines_spread(index, 1, src, 0);
  l->embedding = true;
}

/* Sets everything that depends on the op; returns the dim. */
static inline int hm__lines_operands(hm_lines *l, const hm_kernel_call *call) {
  const hm_view *in = call->in, *out = &call->out[0];
  const int first = (int)call->attr[0].i, second = (int)call->attr[1].i; /* the dim is one of them */
  const int64_t id_step = in[1].ndim ? in[1].stride[0] : 0;
  l->view[HM_LINES_OUT] = *out;
  l->view[HM_LINES_X] = *out;
  l->view[HM_LINES_X].flags = HM_VIEW_ABSENT;
  l->view[HM_LINES_SRC] = in[0];
  l->view[HM_LINES_INDEX] = in[1];
  l->skip = -1;
  l->acc = call->compute;
  switch (call->op) {
  case HM_OP_SELECT_BACKWARD:
    l->name = "select_backward";
    l->acc = HM_NONE;
    l->view[HM_LINES_SRC] = hm__lines_with_dim(&in[0], out->ndim, second);
    l->view[HM_LINES_INDEX] = hm__lines_with_dim(&in[1], out->ndim, second);
    return second;
  case HM_OP_GATHER_BACKWARD: l->name = "gather_backward"; return second;
  case HM_OP_INDEX_SELECT_BACKWARD:
    l->name = "index_select_backward";
    l->shared = true;
    l->view[HM_LINES_INDEX] = hm__lines_spread(&in[1], id_step, &in[0], second);
    return second;
  case HM_OP_EMBEDDING_BACKWARD:
    l->name = "embedding_backward";
    l->shared = true;
    l->skip = call->attr[1].i;
    hm__lines_embedding(l, &in[0], &in[1], out->shape[1]);
    return 0;
  case HM_OP_INDEX_ADD:
    l->name = "index_add";
    l->shared = true;
    l->view[HM_LINES_X] = in[0];
    l->view[HM_LINES_SRC] = in[2];
    l->view[HM_LINES_INDEX] = hm__lines_spread(&in[1], id_step, &in[2], first);
    return first;
  default: /* scatter, scatter_add */
    l->name = call->op == HM_OP_SCATTER ? "scatter" : "scatter_add";
    if (call->op == HM_OP_SCATTER) l->acc = HM_NONE;
    l->view[HM_LINES_X] = in[0];
    l->view[HM_LINES_SRC] = in[2];
    return first;
  }
}

/* The lines of a call of select_backward, gather_backward, index_select_backward, embedding_backward, index_add, scatter or scatter_add. */
static inline void hm__lines_make(hm_lines *l, const hm_kernel_call *call) {
  memset(l, 0, sizeof *l);
  const int dim = hm__lines_operands(l, call);
  const hm_view *index = &l->view[HM_LINES_INDEX], *out = &l->view[HM_LINES_OUT];
  l->n = index->ndim ? index->shape[dim] : 1;
  l->size = out->ndim ? out->shape[dim] : 1;
  int64_t step;
  const hm_view ids = hm__without_dim(index, dim, &step);
  hm_view line[HM_LINES_OPERANDS];
  for (int k = 0; k < HM_LINES_OPERANDS; k++) {
    line[k] = l->view[k];
    if (!hm__walked(&line[k])) continue;
    line[k] = hm__without_dim(&l->view[k], dim, &l->step[k]);
    memcpy(line[k].shape, ids.shape, sizeof ids.shape);
  }
  l->count = hm__loop_make(&l->loop, &line[HM_LINES_OUT], HM_LINES_OPERANDS - 1, &line[HM_LINES_SRC]);
}

#endif
