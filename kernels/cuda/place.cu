/*
 * place.cu -- elements put in other places by rule: tril, triu, pad and its gradient, one_hot.
 *
 * In gather form: each element of the output finds out what belongs there.  The gradient of pad adds, to each element
 * of x, the places that show it, in the CPU's order.
 */
#include "index.h"
#include "pad.h"

/* ====== Triangles ====== */

/* Operands: out, x, and row and column (offsets that are no memory). */
struct triangle {
  hm_walk<4> walk;
  void *out;
  const void *x;
  int32_t out_dtype, x_dtype, lower;
  int64_t row, col, diagonal; /* of the piece's first element */
};

static __global__ void __launch_bounds__(HM_BLOCK, 2) keep_triangle(triangle t) {
  for (uint32_t i = hm_global_thread(); i < t.walk.count; i += hm_global_threads()) {
    int64_t at[4];
    hm_offsets(t.walk, i, at);
    const int64_t above = t.col + at[3] - (t.row + at[2]);
    if (t.lower ? above <= t.diagonal : above >= t.diagonal)
      hm_convert(t.out, t.out_dtype, at[0], t.x, t.x_dtype, at[1]);
    else hm_store<float>(t.out, t.out_dtype, at[0], 0.0f);
  }
}

/* The coordinate along dim d as a view of v's shape. */
static hm_view coordinate(const hm_view *v, int d) {
  hm_view w = *v;
  for (int k = 0; k < v->ndim; k++) w.stride[k] = k == d;
  return w;
}

static int run_triangle(const hm_kernel_call *call) {
  const hm_view *out = &call->out[0], *x = &call->in[0];
  const hm_view in[3] = {*x, coordinate(out, out->ndim - 2), coordinate(out, out->ndim - 1)};
  hm_loop loop;
  if (hm__loop_make(&loop, out, 3, in) == 0) return HM_OK;
  int64_t base[4] = {0, 0, 0, 0};
  return hm_each_piece(&loop, 4, base, [&](const hm_loop &l, const int64_t *at) {
    triangle t;
    memset(&t, 0, sizeof t);
    t.walk = hm_make_walk<4>(&l);
    t.out = hm_element(out->data, at[0], out->dtype), t.x = hm_element(x->data, at[1], x->dtype);
    t.out_dtype = out->dtype, t.x_dtype = x->dtype;
    t.row = at[2], t.col = at[3];
    t.lower = call->op == HM_OP_TRIL, t.diagonal = call->attr[0].i;
    return HM_RUN(t.lower ? "tril" : "triu", keep_triangle, hm_blocks(t.walk.count), HM_BLOCK, 0, call->stream, t);
  });
}

/* ====== pad ====== */

/* Dims from the outermost of the written side to the innermost; "shown" is the padded side, "own" the other. */
struct padding {
  int32_t ndim, mode, own_dtype, shown_dtype;
  uint32_t count;
  hm_divisor piece[HM_MAX_NDIM]; /* sizes of the piece of the written side */
  int64_t begin[HM_MAX_NDIM];    /* its first coordinates */
  int64_t left[HM_MAX_NDIM], size[HM_MAX_NDIM], places[HM_MAX_NDIM];
  int64_t own_stride[HM_MAX_NDIM], shown_stride[HM_MAX_NDIM];
  void *own, *shown;
  double value;
};

static __global__ void __launch_bounds__(HM_BLOCK, 2) pad_places(padding p) {
  for (uint32_t i = hm_global_thread(); i < p.count; i += hm_global_threads()) {
    uint32_t rest = i;
    int64_t own = 0, shown = 0;
    bool inside = true;
    for (int d = p.ndim - 1; d >= 0; d--) {
      const uint32_t q = hm_divide(rest, p.piece[d]);
      const int64_t place = p.begin[d] + (rest - q * p.piece[d].size);
      const int64_t from = hm_pad_source(p.mode, place, p.left[d], p.size[d]);
      rest = q;
      inside = inside && from >= 0;
      own += from * p.own_stride[d];
      shown += place * p.shown_stride[d];
    }
    if (inside) hm_convert(p.shown, p.shown_dtype, shown, p.own, p.own_dtype, own);
    else hm_store<double>(p.shown, p.shown_dtype, shown, p.value);
  }
}

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) unpad_places(padding p) {
  for (uint32_t i = hm_global_thread(); i < p.count; i += hm_global_threads()) {
    uint32_t rest = i;
    int64_t own = 0, q[HM_MAX_NDIM], place[HM_MAX_NDIM];
    for (int d = p.ndim - 1; d >= 0; d--) {
      const uint32_t u = hm_divide(rest, p.piece[d]);
      q[d] = p.begin[d] + (rest - u * p.piece[d].size);
      place[d] = hm_pad_next(p.mode, q[d], p.left[d], p.size[d], p.places[d], -1);
      rest = u;
      own += q[d] * p.own_stride[d];
    }
    T sum = (T)0;
    for (int d = 0; d >= 0;) {
      int64_t shown = 0;
      for (int k = 0; k < p.ndim; k++) shown += place[k] * p.shown_stride[k];
      sum += hm_load<T>(p.shown, p.shown_dtype, shown);
      for (d = p.ndim - 1; d >= 0; d--) { /* the next combination, the last dim first */
        place[d] = hm_pad_next(p.mode, q[d], p.left[d], p.size[d], p.places[d], place[d]);
        if (place[d] >= 0) break;
        place[d] = hm_pad_next(p.mode, q[d], p.left[d], p.size[d], p.places[d], -1);
      }
    }
    hm_store<T>(p.own, p.own_dtype, own, sum);
  }
}

/* written: the side whose elements are counted, one of the two. */
static padding make_padding(const hm_view *own, const hm_view *shown, const hm_view *written, const hm_attr *pad,
                            int mode, hm_loop *l) {
  int order[HM_MAX_NDIM], n = 0;
  padding p;
  memset(&p, 0, sizeof p);
  memset(l, 0, sizeof *l);
  for (int d = 0; d < written->ndim; d++) {
    int at = n++;
    for (; at > 0 && written->stride[order[at - 1]] < written->stride[d]; at--) order[at] = order[at - 1];
    order[at] = d;
  }
  p.mode = mode;
  p.ndim = l->ndim = n > 0 ? n : 1;
  p.size[0] = p.places[0] = l->shape[0] = 1; /* 0-dim */
  for (int k = 0; k < n; k++) {
    const int d = order[k], from_last = own->ndim - 1 - d;
    p.left[k] = 2 * from_last < pad->n ? pad->v[2 * from_last] : 0;
    p.size[k] = own->shape[d], p.places[k] = shown->shape[d];
    p.own_stride[k] = own->stride[d], p.shown_stride[k] = shown->stride[d];
    l->shape[k] = written->shape[d];
    l->stride[k][k] = 1; /* operand k is the coordinate along dim k */
  }
  p.own = own->data, p.own_dtype = own->dtype;
  p.shown = shown->data, p.shown_dtype = shown->dtype;
  return p;
}

/* Calls run(p) for pieces of the written side. */
template <class F> static int each_padding(padding p, hm_loop *l, F run) {
  int64_t base[HM_MAX_NDIM] = {0}, numel = 1;
  for (int d = 0; d < l->ndim; d++) numel *= l->shape[d];
  if (numel == 0) return HM_OK;
  return hm_each_piece(l, l->ndim, base, [&](const hm_loop &piece, const int64_t *at) {
    int64_t count = 1;
    for (int d = 0; d < piece.ndim; d++) {
      p.piece[d] = hm_make_divisor(piece.shape[d]);
      p.begin[d] = at[d];
      count *= piece.shape[d];
    }
    p.count = (uint32_t)count;
    return run(p);
  });
}

static int run_pad(const hm_kernel_call *call) {
  const hm_view *out = &call->out[0];
  hm_loop l;
  padding p = make_padding(&call->in[0], out, out, &call->attr[0], (int)call->attr[1].i, &l);
  p.value = call->attr[2].f;
  return each_padding(p, &l, [&](const padding &piece) {
    return HM_RUN("pad", pad_places, hm_blocks(piece.count), HM_BLOCK, 0, call->stream, piece);
  });
}

static int run_pad_backward(const hm_kernel_call *call) {
  const hm_view *g = &call->in[0], *out = &call->out[0];
  const int mode = (int)call->attr[2].i;
  hm_loop l;
  if (mode == HM_PAD_CONSTANT) { /* each place shows one entry: cut off what was added, and zeros for what was cut */
    hm_attr cut = call->attr[1];
    for (int k = 0; k < cut.n; k++) cut.v[k] = -cut.v[k];
    const padding p = make_padding(g, out, out, &cut, mode, &l);
    return each_padding(p, &l, [&](const padding &piece) {
      return HM_RUN("pad_backward", pad_places, hm_blocks(piece.count), HM_BLOCK, 0, call->stream, piece);
    });
  }
  const padding p = make_padding(out, g, out, &call->attr[1], mode, &l);
  return each_padding(p, &l, [&](const padding &piece) {
    const unsigned blocks = hm_blocks(piece.count);
    if (call->compute == HM_F32)
      return HM_RUN("pad_backward", (unpad_places<float>), blocks, HM_BLOCK, 0, call->stream, piece);
    if (call->compute == HM_F64)
      return HM_RUN("pad_backward", (unpad_places<double>), blocks, HM_BLOCK, 0, call->stream, piece);
    return HM_RUN("pad_backward", (unpad_places<int64_t>), blocks, HM_BLOCK, 0, call->stream, piece);
  });
}

/* ====== one_hot ====== */

/* Operands: out, index, and the class (an offset that is no memory). */
struct hot {
  hm_walk<3> walk;
  void *out;
  const void *index;
  int32_t out_dtype, index_dtype;
  int64_t first, classes; /* class of the piece's first element */
  hm_cuda_fault *fault;
};

static __global__ void __launch_bounds__(HM_BLOCK, 2) make_one_hot(hot h) {
  for (uint32_t i = hm_global_thread(); i < h.walk.count; i += hm_global_threads()) {
    int64_t at[3];
    hm_offsets(h.walk, i, at);
    const int64_t here = h.first + at[2], id = hm_load<int64_t>(h.index, h.index_dtype, at[1]);
    hm_store<int64_t>(h.out, h.out_dtype, at[0], id == here);
    if (here == 0 && (id < 0 || id >= h.classes)) hm_fault(h.fault, HM_ERR_ARG, HM_OP_ONE_HOT, id, h.classes);
  }
}

static int run_one_hot(const hm_kernel_call *call) {
  const hm_view *index = &call->in[0], *out = &call->out[0];
  hm_view in[2] = {*out, coordinate(out, out->ndim - 1)};
  in[0].data = index->data, in[0].dtype = index->dtype;
  for (int d = 0; d < out->ndim; d++) in[0].stride[d] = d < index->ndim ? index->stride[d] : 0;
  hm_loop loop;
  if (hm__loop_make(&loop, out, 2, in) == 0) return HM_OK;
  int64_t base[3] = {0, 0, 0};
  return hm_each_piece(&loop, 3, base, [&](const hm_loop &l, const int64_t *at) {
    hot h;
    memset(&h, 0, sizeof h);
    h.walk = hm_make_walk<3>(&l);
    h.out = hm_element(out->data, at[0], out->dtype), h.index = hm_element(index->data, at[1], index->dtype);
    h.out_dtype = out->dtype, h.index_dtype = index->dtype;
    h.first = at[2], h.classes = call->attr[0].i;
    h.fault = hm_cuda_fault_word(call->stream);
    return HM_RUN("one_hot", make_one_hot, hm_blocks(h.walk.count), HM_BLOCK, 0, call->stream, h);
  });
}

int hm_cuda_place(const hm_kernel_call *call) {
  switch (call->op) {
  case HM_OP_TRIL:
  case HM_OP_TRIU: return run_triangle(call);
  case HM_OP_PAD: return run_pad(call);
  case HM_OP_PAD_BACKWARD: return run_pad_backward(call);
  default: return run_one_hot(call);
  }
}
