/*
 * index.cu -- family index: its entry, and reading at places that a tensor names.
 *
 * gather, index_select and embedding are one: an element of the output stands at a position of x that is its own but
 * for one dim, where the id says.  Where neighbouring elements share their id (embedding), pieces of 16 bytes move.
 * select_backward is in gather form too: each element of the output looks whether the index of its position names it,
 * and takes g or 0.  So every element is written once, by one thread.
 */
#include "index.h"

/* ====== Picking ====== */

/* Operands: out, x without the dim, index. */
struct picking {
  hm_walk<3> walk;
  void *out;
  const void *x, *index;
  int32_t out_dtype, x_dtype, index_dtype, op;
  int64_t step, size, zero; /* of the dim in x, in elements of what is moved; id whose places become zeros, or -1 */
  hm_cuda_fault *fault;
};

/* The id of element i's place, or -1 where nothing is to be read. */
HM_DEV int64_t picked_id(const picking &p, int64_t at) {
  const int64_t id = hm_load<int64_t>(p.index, p.index_dtype, at);
  if (id >= 0 && id < p.size) return id == p.zero ? -1 : id;
  hm_fault(p.fault, HM_ERR_ARG, p.op, id, p.size);
  return -1;
}

HM_DEV void clear(uint4 *x) { *x = make_uint4(0, 0, 0, 0); }
template <class T> HM_DEV void clear(T *x) { *x = 0; }

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) pick_bytes(picking p) {
  for (uint32_t i = hm_global_thread(); i < p.walk.count; i += hm_global_threads()) {
    int64_t at[3];
    hm_offsets(p.walk, i, at);
    const int64_t id = picked_id(p, at[2]);
    T x;
    clear(&x);
    if (id >= 0) x = static_cast<const T *>(p.x)[at[1] + id * p.step];
    static_cast<T *>(p.out)[at[0]] = x;
  }
}

static __global__ void __launch_bounds__(HM_BLOCK, 2) pick_any(picking p) {
  for (uint32_t i = hm_global_thread(); i < p.walk.count; i += hm_global_threads()) {
    int64_t at[3];
    hm_offsets(p.walk, i, at);
    const int64_t id = picked_id(p, at[2]);
    if (id >= 0) hm_convert(p.out, p.out_dtype, at[0], p.x, p.x_dtype, at[1] + id * p.step);
    else hm_store<float>(p.out, p.out_dtype, at[0], 0.0f);
  }
}

/* Can elements that share an id move 16 bytes at a time?  Then the loop is changed to count in such pieces. */
static bool to_pieces(hm_loop *l, picking *p) {
  const int inner = l->ndim - 1, per = 16 / hm_dtype_size(p->out_dtype);
  if (l->stride[0][inner] != 1 || l->stride[1][inner] != 1 || l->stride[2][inner] != 0) return false;
  if (l->shape[inner] % per || p->step % per || ((uintptr_t)p->out | (uintptr_t)p->x) % 16) return false;
  for (int k = 0; k < 2; k++)
    for (int d = 0; d < inner; d++)
      if (l->stride[k][d] % per) return false;
  l->shape[inner] /= per;
  p->step /= per;
  for (int k = 0; k < 2; k++)
    for (int d = 0; d < inner; d++) l->stride[k][d] /= per;
  return true;
}

static int run_piece(hm_loop l, picking *p, const char *name, void *stream) {
  const bool same = p->out_dtype == p->x_dtype, pieces = same && to_pieces(&l, p);
  p->walk = hm_make_walk<3>(&l);
  const unsigned blocks = hm_blocks(p->walk.count);
  if (!same) return HM_RUN(name, pick_any, blocks, HM_BLOCK, 0, stream, *p);
  if (pieces) return HM_RUN(name, (pick_bytes<uint4>), blocks, HM_BLOCK, 0, stream, *p);
  switch (hm_dtype_size(p->out_dtype)) {
  case 1: return HM_RUN(name, (pick_bytes<uint8_t>), blocks, HM_BLOCK, 0, stream, *p);
  case 2: return HM_RUN(name, (pick_bytes<uint16_t>), blocks, HM_BLOCK, 0, stream, *p);
  case 4: return HM_RUN(name, (pick_bytes<uint32_t>), blocks, HM_BLOCK, 0, stream, *p);
  default: return HM_RUN(name, (pick_bytes<uint64_t>), blocks, HM_BLOCK, 0, stream, *p);
  }
}

/* in: x (stride 0 along the dim) and index, both with out's shape; step, size: of the dim in x. */
static int pick(const char *name, const hm_kernel_call *call, const hm_view *in, int64_t step, int64_t size,
                int64_t zero) {
  const hm_view *out = &call->out[0];
  hm_loop loop;
  if (hm__loop_make(&loop, out, 2, in) == 0) return HM_OK;
  int64_t base[3] = {0, 0, 0};
  return hm_each_piece(&loop, 3, base, [&](const hm_loop &l, const int64_t *at) {
    picking p;
    memset(&p, 0, sizeof p);
    p.out = hm_element(out->data, at[0], out->dtype);
    p.x = hm_element(in[0].data, at[1], in[0].dtype);
    p.index = hm_element(in[1].data, at[2], in[1].dtype);
    p.out_dtype = out->dtype, p.x_dtype = in[0].dtype, p.index_dtype = in[1].dtype, p.op = call->op;
    p.step = step, p.size = size, p.zero = zero;
    p.fault = hm_cuda_fault_word(call->stream);
    return run_piece(l, &p, name, call->stream);
  });
}

/* gather and index_select: index lies along all dims, or along the dim alone. */
static int run_pick(const hm_kernel_call *call) {
  const bool list = call->op == HM_OP_INDEX_SELECT;
  const hm_view *x = &call->in[0], *index = &call->in[1], *out = &call->out[0];
  const int dim = (int)call->attr[0].i;
  hm_view in[2] = {*x, *index};
  if (list) {
    in[1].ndim = out->ndim;
    for (int d = 0; d < out->ndim; d++) in[1].stride[d] = d == dim && index->ndim ? index->stride[0] : 0;
  }
  if (x->ndim) in[0].stride[dim] = 0;
  for (int k = 0; k < 2; k++) memcpy(in[k].shape, out->shape, sizeof in[k].shape);
  return pick(list ? "index_select" : "gather", call, in, x->ndim ? x->stride[dim] : 0, x->ndim ? x->shape[dim] : 1,
              -1);
}

static int run_embedding(const hm_kernel_call *call) {
  const hm_view *weight = &call->in[0], *index = &call->in[1], *out = &call->out[0];
  hm_view in[2] = {*out, *out};
  in[0].data = weight->data, in[0].dtype = weight->dtype;
  in[1].data = index->data, in[1].dtype = index->dtype;
  for (int d = 0; d < out->ndim; d++) {
    const bool last = d == out->ndim - 1;
    in[0].stride[d] = last ? weight->stride[1] : 0;
    in[1].stride[d] = last ? 0 : index->stride[d];
  }
  return pick("embedding", call, in, weight->stride[0], weight->shape[0], call->attr[1].i ? call->attr[0].i : -1);
}

/* A copy of a view that runs backwards. */
static int run_flip(const hm_kernel_call *call) {
  hm_view x = call->in[0];
  int64_t at = 0;
  for (int k = 0; k < call->attr[0].n && x.ndim; k++) {
    const int64_t d = call->attr[0].v[k];
    at += (x.shape[d] - 1) * x.stride[d];
    x.stride[d] = -x.stride[d];
  }
  x.data = hm_element(x.data, at, x.dtype);
  return hm_copy_or_zero(&call->out[0], &x, call->stream);
}

/* ====== select_backward ====== */

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

/* ====== The entry ====== */

extern "C" int hm_cuda_index(const hm_kernel_call *call) {
  switch (call->op) {
  case HM_OP_SELECT_BACKWARD: return run_select(call);
  case HM_OP_GATHER:
  case HM_OP_INDEX_SELECT: return run_pick(call);
  case HM_OP_EMBEDDING: return run_embedding(call);
  case HM_OP_FLIP: return run_flip(call);
  case HM_OP_GATHER_BACKWARD:
  case HM_OP_INDEX_SELECT_BACKWARD:
  case HM_OP_EMBEDDING_BACKWARD:
  case HM_OP_INDEX_ADD:
  case HM_OP_SCATTER:
  case HM_OP_SCATTER_ADD: return hm_cuda_index_add(call);
  case HM_OP_SORT:
  case HM_OP_TOPK: return hm_cuda_sort(call);
  case HM_OP_TRIL:
  case HM_OP_TRIU:
  case HM_OP_PAD:
  case HM_OP_PAD_BACKWARD:
  case HM_OP_ONE_HOT: return hm_cuda_place(call);
  default: return hm_cuda_fail(HM_ERR_UNSUPPORTED, "index: op %d is unknown to cuda", call->op);
  }
}

extern "C" int hm_cuda_index_workspace(const hm_kernel_call *call, size_t *bytes) {
  *bytes = 0;
  if (call->op == HM_OP_SORT || call->op == HM_OP_TOPK) hm_cuda_sort_workspace(call, bytes);
  else if (call->op != HM_OP_SELECT_BACKWARD) hm_cuda_index_add_workspace(call, bytes);
  return HM_OK;
}
