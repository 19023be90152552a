/*
 * attention.h -- what attention's kernels know of a call, for the CPU and CUDA: sizes, strides, the mask, dropout.
 *
 * Header-only; owns nothing.  Included by cpu/attention.c and cuda/attention.cu.
 */
#ifndef HM_CPU_ATTENTION_H
#define HM_CPU_ATTENTION_H

#include "../philox.h"
#include "layout.h"

/* Rows of one operand: element (b, h, row, d) lies at data + b * batch + h * head + row * step + d. */
typedef struct hm_att_rows {
  void *data;
  int64_t batch, head, step;
  int32_t dtype;
} hm_att_rows;

typedef struct hm_att_plan {
  int64_t b, h, g, t, s, d, e; /* as the row has them */
  hm_att_rows q, k, v;
  hm_att_rows out, lse; /* lse: step 1, without a last dim */
  hm_att_rows grad, dq, dk, dv;
  const void *mask;       /* NULL: none */
  int64_t mask_stride[4]; /* of b, h, t, s */
  int32_t mask_dtype;
  bool causal, drops;
  double scale, keep; /* keep: 1 / (1 - p) */
  uint64_t seed, offset, threshold;
} hm_att_plan;

static inline hm_att_rows hm__att_rows(const hm_view *v) {
  hm_att_rows r = {v->data, v->stride[0], v->stride[1], v->stride[2], v->dtype};
  return r;
}

static inline void hm__att_mask(hm_att_plan *p, const hm_view *mask) {
  if (mask->flags & HM_VIEW_ABSENT) return;
  p->mask = mask->data;
  p->mask_dtype = mask->dtype;
  const int lead = 4 - mask->ndim;
  for (int d = lead; d < 4; d++) p->mask_stride[d] = mask->shape[d - lead] == 1 ? 0 : mask->stride[d - lead];
}

/* attention and attention_backward; infer_attention.c has completed the attributes. */
static inline hm_att_plan hm__att_plan(const hm_kernel_call *call) {
  const bool back = call->op == HM_OP_ATTENTION_BACKWARD;
  const hm_view *in = call->in + back, *out = call->out;
  const hm_view *y = back ? &call->in[5] : &out[0], *lse = back ? &call->in[6] : &out[1];
  hm_att_plan p;
  memset(&p, 0, sizeof p);
  p.b = in[0].shape[0], p.h = in[0].shape[1], p.t = in[0].shape[2], p.d = in[0].shape[3];
  p.g = in[1].shape[1], p.s = in[1].shape[2], p.e = in[2].shape[3];
  p.q = hm__att_rows(&in[0]), p.k = hm__att_rows(&in[1]), p.v = hm__att_rows(&in[2]);
  hm__att_mask(&p, &in[3]);
  p.out = hm__att_rows(y), p.lse = hm__att_rows(lse);
  if (back) {
    p.grad = hm__att_rows(&call->in[0]);
    p.dq = hm__att_rows(&out[0]), p.dk = hm__att_rows(&out[1]), p.dv = hm__att_rows(&out[2]);
  }
  p.causal = call->attr[0].i != 0;
  p.scale = call->attr[1].f;
  p.drops = call->attr[2].f > 0;
  p.keep = 1 / (1 - call->attr[2].f);
  p.threshold = hm_philox_threshold(call->attr[2].f);
  p.seed = (uint64_t)call->attr[3].v[0];
  p.offset = (uint64_t)call->attr[3].v[1];
  return p;
}

/* Heads of q that share a head of k and v. */
HM_FN int64_t hm__att_group(const hm_att_plan *p) { return p->g ? p->h / p->g : 1; }

#endif
