/*
 * index.cu -- reading and writing at places that a tensor names.
 *
 * select_backward in gather form: each element of the output looks whether the index of its position names it, and
 * takes g or 0.  So every element is written once, by one thread.
 */
#include "view.h"

/* Operands: out, g, index, and the place along the dim (an offset that is no memory). */
struct selection {
  hm_walk<4> walk;
  void *out;
  const void *g, *index;
  int32_t out_dtype, g_dtype, index_dtype;
  int64_t first, size; /* place of the piece's first element; size of the dim */
  hm_cuda_fault *fault;
};

static __global__ void __launch_bounds__(HM_BLOCK, 2) select_backward(selection s) {
  for (uint32_t i = hm_global_thread(); i < s.walk.count; i += hm_global_threads()) {
    int64_t at[4];
    hm_offsets(s.walk, i, at);
    const int64_t place = s.first + at[3], want = hm_load<int64_t>(s.index, s.index_dtype, at[2]);
    if (want == place) hm_convert(s.out, s.out_dtype, at[0], s.g, s.g_dtype, at[1]);
    else hm_store<float>(s.out, s.out_dtype, at[0], 0.0f);
    if (place == 0 && (want < 0 || want >= s.size)) hm_fault(s.fault, HM_ERR_ARG, HM_OP_SELECT_BACKWARD, want, s.size);
  }
}

/* v with the shape of out: along `dim` it repeats. */
static hm_view line_up(const hm_view *v, const hm_view *out, int dim) {
  hm_view w = *v;
  const bool kept = v->ndim == out->ndim;
  w.ndim = out->ndim;
  for (int d = 0; d < out->ndim; d++) {
    w.shape[d] = out->shape[d];
    w.stride[d] = d == dim ? 0 : v->stride[kept || d < dim ? d : d - 1];
  }
  return w;
}

static int run_select(const hm_kernel_call *call) {
  const hm_view *out = &call->out[0];
  int dim = (int)call->attr[1].i;
  if (dim < 0) dim += out->ndim;
  hm_view in[3] = {line_up(&call->in[0], out, dim), line_up(&call->in[1], out, dim), *out};
  for (int d = 0; d < out->ndim; d++) in[2].stride[d] = d == dim;
  hm_loop loop;
  if (hm__loop_make(&loop, out, 3, in) == 0) return HM_OK;
  int64_t base[4] = {0, 0, 0, 0};
  return hm_each_piece(&loop, 4, base, [&](const hm_loop &l, const int64_t *at) {
    selection s;
    memset(&s, 0, sizeof s);
    s.walk = hm_make_walk<4>(&l);
    s.out = hm_element(out->data, at[0], out->dtype);
    s.g = hm_element(in[0].data, at[1], in[0].dtype);
    s.index = hm_element(in[1].data, at[2], in[1].dtype);
    s.out_dtype = out->dtype, s.g_dtype = in[0].dtype, s.index_dtype = in[1].dtype;
    s.first = at[3];
    s.size = out->ndim ? out->shape[dim] : 1;
    s.fault = hm_cuda_fault_word(call->stream);
    return HM_RUN("select_backward", select_backward, hm_blocks(s.walk.count), HM_BLOCK, 0, call->stream, s);
  });
}

extern "C" int hm_cuda_index(const hm_kernel_call *call) {
  if (call->op == HM_OP_SELECT_BACKWARD) return run_select(call);
  return hm_cuda_fail(HM_ERR_UNSUPPORTED, "index: op %d is unknown to cuda", call->op);
}
