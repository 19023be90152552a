/*
 * place.c -- elements put in other places by rule, on the CPU: flip, tril, triu, pad and its gradient, one_hot.
 *
 * The output is walked run by run along its innermost dim; a run of the input is copied, or nothing is there.  The gradient of pad adds, to each
 * element of x, the places that show it, in their order, in the dtype computed in, rounded once.
 * Compiled once; owns no memory.
 */
#include <omp.h>

#include "index.h"
#include "pad.h"

/* ====== flip ====== */

/* A copy of a view that runs backwards. */
static int run_flip(const hm_kernel_call *call) {
  hm_view x = call->in[0];
  int64_t at = 0;
  for (int k = 0; k < call->attr[0].n; k++) {
    const int64_t d = call->attr[0].v[k];
    if (x.ndim == 0) break;
    at += (x.shape[d] - 1) * x.stride[d];
    x.stride[d] = -x.stride[d];
  }
  x.data = hm__at(x.data, at, x.dtype);
  return hm__cpu_copy_or_zero(&call->out[0], &x);
}

/* ====== Triangles ====== */

static void triangle_row(const hm_kernel_call *call, int64_t row) {
  const hm_view *x = &call->in[0], *out = &call->out[0];
  const int n = out->ndim;
  const int64_t rows = out->shape[n - 2], cols = out->shape[n - 1], i = row % rows, diagonal = call->attr[0].i;
  int64_t from = 0, to = 0, rest = row;
  for (int d = n - 2; d >= 0; d--) {
    from += rest % x->shape[d] * x->stride[d];
    to += rest % x->shape[d] * out->stride[d];
    rest /= x->shape[d];
  }
  /* Columns below `edge` belong to the lower side. */
  const bool lower = call->op == HM_OP_TRIL;
  const int64_t shift = diagonal < -rows ? -rows : diagonal > cols ? cols : diagonal;
  int64_t edge = i + shift + (lower ? 1 : 0);
  edge = edge < 0 ? 0 : edge > cols ? cols : edge;
  const int64_t first = lower ? 0 : edge, end = lower ? edge : cols;
  const uint64_t nothing = 0;
  const int size = hm_dtype_size(out->dtype);
  const int64_t xs = x->stride[n - 1], os = out->stride[n - 1];
  hm__move_run(size, hm__at(out->data, to, out->dtype), os, &nothing, 0, first);
  hm__copy_run(hm__at(out->data, to + first * os, out->dtype), out->dtype, os,
               hm__at(x->data, from + first * xs, x->dtype), x->dtype, xs, end - first);
  hm__move_run(size, hm__at(out->data, to + end * os, out->dtype), os, &nothing, 0, cols - end);
}

static int run_triangle(const hm_kernel_call *call) {
  const hm_view *out = &call->out[0];
  int64_t rows = 1;
  for (int d = 0; d < out->ndim - 1; d++) rows *= out->shape[d];
  const int64_t cols = out->shape[out->ndim - 1];
  const int threads = hm_cpu_threads(rows * cols, 8);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; row++) triangle_row(call, row);
  return HM_OK;
}

/* ====== pad ====== */

/* Dims from the outermost of the written side to the innermost.  "shown" is the padded side, "own" the other. */
typedef struct padding {
  int ndim, mode;
  int64_t rows; /* of the written side, all dims but the last */
  int64_t left[HM_MAX_NDIM], size[HM_MAX_NDIM], places[HM_MAX_NDIM];
  int64_t own_stride[HM_MAX_NDIM], shown_stride[HM_MAX_NDIM];
  const hm_view *own, *shown;
  int acc;        /* of the gradient */
  uint64_t value; /* of the constant, in out's dtype */
} padding;

/* written: the side whose memory order decides (one of the two). */
static void set_padding(padding *p, const hm_view *own, const hm_view *shown, const hm_view *written,
                        const hm_attr *pad, int mode) {
  int order[HM_MAX_NDIM], n = 0;
  for (int d = 0; d < written->ndim; d++) {
    int at = n++;
    for (; at > 0 && written->stride[order[at - 1]] < written->stride[d]; at--) order[at] = order[at - 1];
    order[at] = d;
  }
  p->ndim = n > 0 ? n : 1;
  p->mode = mode;
  p->own = own;
  p->shown = shown;
  p->size[0] = p->places[0] = 1; /* 0-dim */
  p->left[0] = p->own_stride[0] = p->shown_stride[0] = 0;
  p->rows = 1;
  for (int k = 0; k < n; k++) {
    const int d = order[k], from_last = own->ndim - 1 - d;
    p->left[k] = 2 * from_last < pad->n ? pad->v[2 * from_last] : 0;
    p->size[k] = own->shape[d];
    p->places[k] = shown->shape[d];
    p->own_stride[k] = own->stride[d];
    p->shown_stride[k] = shown->stride[d];
    if (k < n - 1) p->rows *= written->shape[d];
  }
}

/* Places first .. end - 1 of one row of the output, where x has nothing at the same distance or modes repeat it. */
static void pad_edge(const padding *p, char *to, const char *from, int64_t first, int64_t end) {
  const int last = p->ndim - 1, dst = p->shown->dtype, src = p->own->dtype;
  for (int64_t i = first; i < end; i++) {
    const int64_t j = from ? hm_pad_source(p->mode, i, p->left[last], p->size[last]) : -1;
    char *d = to + i * p->shown_stride[last] * hm_dtype_size(dst);
    if (j < 0) memcpy(d, &p->value, (size_t)hm_dtype_size(dst));
    else hm__copy_run(d, dst, 1, hm__at(from, j * p->own_stride[last], src), src, 1, 1);
  }
}

static void pad_row(const padding *p, int64_t row) {
  const int last = p->ndim - 1;
  int64_t own = 0, shown = 0;
  bool inside = true;
  for (int d = last - 1; d >= 0; d--) {
    const int64_t i = row % p->places[d], j = hm_pad_source(p->mode, i, p->left[d], p->size[d]);
    row /= p->places[d];
    inside = inside && j >= 0;
    own += j * p->own_stride[d];
    shown += i * p->shown_stride[d];
  }
  const int64_t places = p->places[last], left = p->left[last];
  char *to = hm__at(p->shown->data, shown, p->shown->dtype);
  if (!inside) {
    hm__move_run(hm_dtype_size(p->shown->dtype), to, p->shown_stride[last], &p->value, 0, places);
    return;
  }
  const char *from = hm__at(p->own->data, own, p->own->dtype);
  int64_t first = left < 0 ? 0 : left < places ? left : places, end = left + p->size[last];
  if (end > places) end = places;
  if (end < first) end = first;
  pad_edge(p, to, from, 0, first);
  hm__copy_run(hm__at(to, first * p->shown_stride[last], p->shown->dtype), p->shown->dtype, p->shown_stride[last],
               hm__at(from, (first - left) * p->own_stride[last], p->own->dtype), p->own->dtype, p->own_stride[last],
               end - first);
  pad_edge(p, to, from, end, places);
}

static void pad_all(const padding *p) {
  const int threads = hm_cpu_threads(p->rows * p->places[p->ndim - 1], 8);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < p->rows; row++) pad_row(p, row);
}

static int run_pad(const hm_kernel_call *call) {
  padding p;
  const hm_view *out = &call->out[0];
  set_padding(&p, &call->in[0], out, out, &call->attr[0], (int)call->attr[1].i);
  const double value = call->attr[2].f;
  hm_cpu_isa()->convert(&p.value, out->dtype, &value, HM_F64, 1);
  pad_all(&p);
  return HM_OK;
}

/* ====== The gradient of pad ====== */

#define SUM(type)                                                                                                      \
  for (int64_t i = 0; i < n; i++) ((type *)sum)[i] += ((const type *)values)[i]

static void add_run(int acc, void *sum, const void *values, int64_t n) {
  if (acc == HM_F32) SUM(float);
  else if (acc == HM_F64) SUM(double);
  else SUM(int64_t);
}

/* Entry q of a row that several places may show. */
static void add_shown(const padding *p, char *sum, const char *from, int64_t q) {
  const int last = p->ndim - 1, dtype = p->shown->dtype;
  for (int64_t i = hm_pad_next(p->mode, q, p->left[last], p->size[last], p->places[last], -1); i >= 0;
       i = hm_pad_next(p->mode, q, p->left[last], p->size[last], p->places[last], i)) {
    uint64_t value;
    hm__copy_run(&value, p->acc, 1, hm__at(from, i * p->shown_stride[last], dtype), dtype, 1, 1);
    add_run(p->acc, sum, &value, 1);
  }
}

/* Adds one row of g to entries first .. first + n - 1. */
static void add_row(const padding *p, char *sum, const char *from, int64_t first, int64_t n) {
  const int last = p->ndim - 1, dtype = p->shown->dtype, bytes = hm_dtype_size(p->acc);
  const int64_t left = p->left[last], size = p->size[last], right = p->places[last] - size - left;
  /* Entries low .. high - 1 are shown once, whatever the mode. */
  int64_t low = left + 1 > right ? left + 1 : right, high = size - 1 - (left > right ? left : right);
  if (low < first) low = first;
  if (low > first + n) low = first + n;
  if (high > first + n) high = first + n;
  if (high < low) high = low;
  uint64_t values[HM_RUN_TILE];
  for (int64_t q = first; q < low; q++) add_shown(p, sum + (q - first) * bytes, from, q);
  hm__copy_run(values, p->acc, 1, hm__at(from, (low + left) * p->shown_stride[last], dtype), dtype,
               p->shown_stride[last], high - low);
  add_run(p->acc, sum + (low - first) * bytes, values, high - low);
  for (int64_t q = high; q < first + n; q++) add_shown(p, sum + (q - first) * bytes, from, q);
}

/* Adds, for every place of the outer dims from d on that shows the row q[], its row. */
static void add_rows(const padding *p, char *sum, const char *from, const int64_t *q, int d, int64_t first, int64_t n) {
  if (d == p->ndim - 1) {
    add_row(p, sum, from, first, n);
    return;
  }
  for (int64_t i = hm_pad_next(p->mode, q[d], p->left[d], p->size[d], p->places[d], -1); i >= 0;
       i = hm_pad_next(p->mode, q[d], p->left[d], p->size[d], p->places[d], i))
    add_rows(p, sum, hm__at(from, i * p->shown_stride[d], p->shown->dtype), q, d + 1, first, n);
}

static void unpad_row(const padding *p, int64_t row) {
  const int last = p->ndim - 1;
  int64_t q[HM_MAX_NDIM], own = 0;
  for (int d = last - 1; d >= 0; d--) {
    q[d] = row % p->size[d];
    row /= p->size[d];
    own += q[d] * p->own_stride[d];
  }
  for (int64_t first = 0; first < p->size[last]; first += HM_RUN_TILE) {
    const int64_t n = p->size[last] - first < HM_RUN_TILE ? p->size[last] - first : HM_RUN_TILE;
    uint64_t sum[HM_RUN_TILE] = {0};
    add_rows(p, (char *)sum, p->shown->data, q, 0, first, n);
    hm__copy_run(hm__at(p->own->data, own + first * p->own_stride[last], p->own->dtype), p->own->dtype,
                 p->own_stride[last], sum, p->acc, 1, n);
  }
}

static int run_pad_backward(const hm_kernel_call *call) {
  padding p;
  const hm_view *g = &call->in[0], *out = &call->out[0];
  const int mode = (int)call->attr[2].i;
  if (mode == HM_PAD_CONSTANT) { /* each place shows one entry: cut off what was added, and zeros for what was cut */
    hm_attr cut = call->attr[1];
    for (int k = 0; k < cut.n; k++) cut.v[k] = -cut.v[k];
    set_padding(&p, g, out, out, &cut, mode);
    p.value = 0;
    pad_all(&p);
    return HM_OK;
  }
  set_padding(&p, out, g, out, &call->attr[1], mode);
  p.acc = call->compute;
  const int threads = hm_cpu_threads(p.rows * p.size[p.ndim - 1], 16);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < p.rows; row++) unpad_row(&p, row);
  return HM_OK;
}

/* ====== one_hot ====== */

static int run_one_hot(const hm_kernel_call *call) {
  const hm_view *index = &call->in[0], *out = &call->out[0];
  const int64_t classes = call->attr[0].i, one = 1;
  int status = hm__cpu_check_ids(index, classes, "one_hot");
  if (!status) status = hm__cpu_copy_or_zero(out, NULL);
  if (status) return status;
  hm_view places = *out; /* without the classes */
  places.ndim--;
  hm_loop l;
  const int64_t n = hm__loop_make(&l, &places, 1, index);
  for (int64_t i = 0; i < n; i++) {
    int64_t at[2], id;
    hm__loop_seek(&l, 0, i, 2, at);
    hm__read_ids(&id, hm__at(index->data, at[1], index->dtype), index->dtype, 1, 1);
    hm__copy_run(hm__at(out->data, at[0] + id * out->stride[out->ndim - 1], out->dtype), out->dtype, 1, &one, HM_I64, 1,
                 1);
  }
  return HM_OK;
}

int hm__cpu_place(const hm_kernel_call *call) {
  switch (call->op) {
  case HM_OP_FLIP: return run_flip(call);
  case HM_OP_TRIL:
  case HM_OP_TRIU: return run_triangle(call);
  case HM_OP_PAD: return run_pad(call);
  case HM_OP_PAD_BACKWARD: return run_pad_backward(call);
  default: return run_one_hot(call);
  }
}
