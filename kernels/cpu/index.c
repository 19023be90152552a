/*
 * index.c -- reading and writing at places that a tensor names.
 *
 * select_backward: the gradient of a maximum along a dim goes to the place where the maximum stood, all else is zero.
 * Compiled once per instruction set; called through hm_isa.index; owns no memory.
 */
#include "isa.h"

/* What select_backward walks: the positions of g, with the strides of g, index and out beside each other. */
typedef struct walk {
  int ndim;
  int64_t shape[HM_MAX_NDIM], g[HM_MAX_NDIM], index[HM_MAX_NDIM], out[HM_MAX_NDIM];
} walk;

/* Lines up the dims of out (without `dim`) and of g and index, where `dim` has size 1 (keepdim) or is missing. */
static void line_up(walk *w, const hm_view *g, const hm_view *index, const hm_view *out, int dim) {
  const bool kept = g->ndim == out->ndim;
  w->ndim = 0;
  for (int d = 0; d < out->ndim; d++) {
    if (d == dim) continue;
    const int from = kept || d < dim ? d : d - 1;
    w->shape[w->ndim] = out->shape[d];
    w->g[w->ndim] = g->stride[from];
    w->index[w->ndim] = index->stride[from];
    w->out[w->ndim++] = out->stride[d];
  }
}

static int zero(const hm_view *out) {
  hm_kernel_call fill = {.op = HM_OP_FILL_, .n_in = 2, .n_out = 1};
  fill.in[1] = (hm_view){.dtype = HM_I64, .flags = HM_VIEW_SCALAR};
  fill.out[0] = *out;
  return HM_ISA_FN(hm_cpu_fill)(&fill);
}

/* Writes g at its places; out holds zeros. */
static int scatter(const walk *w, const hm_view *g, const hm_view *index, const hm_view *out, int64_t size,
                   int64_t step) {
  const int g_bytes = hm_dtype_size(g->dtype), out_bytes = hm_dtype_size(out->dtype);
  int64_t n = 1;
  for (int d = 0; d < w->ndim; d++) n *= w->shape[d];
  for (int64_t k = 0; k < n; k++) {
    int64_t rest = k, at_g = 0, at_index = 0, at = 0;
    for (int d = w->ndim - 1; d >= 0; d--) {
      const int64_t i = rest % w->shape[d];
      rest /= w->shape[d];
      at_g += i * w->g[d];
      at_index += i * w->index[d];
      at += i * w->out[d];
    }
    int64_t place;
    HM_ISA_FN(hm_cpu_convert)
    (&place, HM_I64, (const char *)index->data + at_index * hm_dtype_size(index->dtype), index->dtype, 1);
    if (place < 0 || place >= size)
      return hm_cpu_fail(HM_ERR_ARG, "select_backward: index %lld is outside of [0, %lld)", (long long)place,
                         (long long)size);
    HM_ISA_FN(hm_cpu_convert)
    ((char *)out->data + (at + place * step) * out_bytes, out->dtype, (const char *)g->data + at_g * g_bytes, g->dtype,
     1);
  }
  return HM_OK;
}

static int select_backward(const hm_kernel_call *call) {
  const hm_view *g = &call->in[0], *index = &call->in[1], *out = &call->out[0];
  int dim = (int)call->attr[1].i;
  if (dim < 0) dim += out->ndim;
  const int status = zero(out);
  if (status) return status;
  walk w;
  line_up(&w, g, index, out, dim);
  return scatter(&w, g, index, out, out->ndim ? out->shape[dim] : 1, out->ndim ? out->stride[dim] : 0);
}

int HM_ISA_FN(hm_cpu_index)(const hm_kernel_call *call) {
  if (call->op == HM_OP_SELECT_BACKWARD) return select_backward(call);
  return hm_cpu_fail(HM_ERR_UNSUPPORTED, "index: op %d is unknown to the cpu", call->op);
}
