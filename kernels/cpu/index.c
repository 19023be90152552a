/*
 * index.c -- family index on the CPU: its entry, and picking at places that a tensor names (gather, index_select, embedding).
 *
 * The three are one: an element of the output stands at a position of x that is its own but for one dim, where the id says.  index is
 * stretched to the output's shape; along the dims where it repeats, whole runs are copied.  Ids are checked before anything is written.
 * Compiled once; owns no memory.
 */
#include <omp.h>

#include "index.h"

enum { GRAIN = 1024 }; /* elements: least share of a thread */

/* ====== For all of the family ====== */

static bool ids_fit(const int64_t *ids, int64_t n, int64_t size, int64_t *bad) {
  for (int64_t i = 0; i < n; i++)
    if (ids[i] < 0 || ids[i] >= size) {
      *bad = ids[i];
      return false;
    }
  return true;
}

int hm__cpu_check_ids(const hm_view *index, int64_t size, const char *name) {
  hm_view order = *index; /* row-major strides: the loop walks in that order */
  int64_t step = 1, ids[HM_RUN_TILE], at[2], bad;
  for (int d = index->ndim - 1; d >= 0; d--) {
    order.stride[d] = step;
    step *= index->shape[d];
  }
  hm_loop l;
  const int64_t n = hm__loop_make(&l, &order, 1, index);
  if (n == 0) return HM_OK;
  const int last = l.ndim - 1;
  for (int64_t row = 0; row < n / l.shape[last]; row++) {
    hm__loop_seek(&l, 1, row, 2, at);
    for (int64_t i = 0; i < l.shape[last]; i += HM_RUN_TILE) {
      const int64_t m = l.shape[last] - i < HM_RUN_TILE ? l.shape[last] - i : HM_RUN_TILE;
      hm__read_ids(ids, hm__at(index->data, at[1] + i * l.stride[1][last], index->dtype), index->dtype,
                   l.stride[1][last], m);
      if (!ids_fit(ids, m, size, &bad))
        return hm_cpu_fail(HM_ERR_ARG, "%s: index %lld is outside of [0, %lld)\n  hint: ids count from 0", name,
                           (long long)bad, (long long)size);
    }
  }
  return HM_OK;
}

int hm__cpu_copy_or_zero(const hm_view *out, const hm_view *x) {
  const hm_isa *isa = hm_cpu_isa();
  hm_kernel_call call = {.op = HM_OP_CAST, .n_in = 1, .n_out = 1};
  call.out[0] = *out;
  if (x) {
    call.in[0] = *x;
    return isa->copy(&call);
  }
  call.op = HM_OP_FILL_;
  call.n_in = 2;
  call.in[1] = (hm_view){.dtype = HM_I64, .flags = HM_VIEW_SCALAR};
  return isa->fill(&call);
}

/* ====== Picking ====== */

/* Operands of the loop: out, x without the dim, index. */
typedef struct picking {
  hm_loop l;
  int64_t step; /* of the dim in x */
  int64_t zero; /* id whose places become zeros; -1: none */
  const hm_view *out, *x, *index;
} picking;

/* n elements of one id. */
static void pick_run(const picking *p, const int64_t *at, int64_t n) {
  const int last = p->l.ndim - 1;
  int64_t id;
  hm__read_ids(&id, hm__at(p->index->data, at[2], p->index->dtype), p->index->dtype, 1, 1);
  char *d = hm__at(p->out->data, at[0], p->out->dtype);
  const int64_t dstep = p->l.stride[0][last];
  static const uint64_t nothing = 0; /* zero in every dtype */
  if (id == p->zero) hm__move_run(hm_dtype_size(p->out->dtype), d, dstep, &nothing, 0, n);
  else
    hm__copy_run(d, p->out->dtype, dstep, hm__at(p->x->data, at[1] + id * p->step, p->x->dtype), p->x->dtype,
                 p->l.stride[1][last], n);
}

#define PICK(type)                                                                                                     \
  for (int64_t i = 0; i < n; i++) ((type *)d)[i] = ((const type *)s)[i * sstep + ids[i] * step]

/* n elements (a tile at most), each by its own id. */
static void pick_each(const picking *p, const int64_t *at, int64_t n) {
  const int last = p->l.ndim - 1, size = hm_dtype_size(p->x->dtype);
  const int64_t sstep = p->l.stride[1][last], step = p->step;
  int64_t ids[HM_RUN_TILE];
  uint64_t d[HM_RUN_TILE];
  hm__read_ids(ids, hm__at(p->index->data, at[2], p->index->dtype), p->index->dtype, p->l.stride[2][last], n);
  const void *s = hm__at(p->x->data, at[1], p->x->dtype);
  if (size == 4) PICK(uint32_t);
  else if (size == 2) PICK(uint16_t);
  else if (size == 8) PICK(uint64_t);
  else PICK(uint8_t);
  hm__copy_run(hm__at(p->out->data, at[0], p->out->dtype), p->out->dtype, p->l.stride[0][last], d, p->x->dtype, 1, n);
}

/* Elements first .. last - 1 of the loop. */
static void pick_share(const picking *p, int64_t first, int64_t end) {
  const int last = p->l.ndim - 1;
  const bool one_id = p->l.stride[2][last] == 0 && p->l.shape[last] > 1;
  while (first < end) {
    const int64_t row = first / p->l.shape[last], i = first % p->l.shape[last];
    int64_t at[3], n = p->l.shape[last] - i;
    if (n > end - first) n = end - first;
    hm__loop_seek(&p->l, 1, row, 3, at);
    for (int k = 0; k < 3; k++) at[k] += i * p->l.stride[k][last];
    first += n;
    if (one_id) {
      pick_run(p, at, n);
      continue;
    }
    for (int64_t done = 0; done < n; done += HM_RUN_TILE) {
      pick_each(p, at, n - done < HM_RUN_TILE ? n - done : HM_RUN_TILE);
      for (int k = 0; k < 3; k++) at[k] += HM_RUN_TILE * p->l.stride[k][last];
    }
  }
}

/* in: x (stride 0 along the dim) and index, both with out's shape; step: of the dim in x. */
static int pick(const hm_view *out, const hm_view *in, int64_t step, int64_t zero) {
  picking p = {.step = step, .zero = zero, .out = out, .x = &in[0], .index = &in[1]};
  const int64_t n = hm__loop_make(&p.l, out, 2, in);
  if (n == 0) return HM_OK;
  const int threads = hm_cpu_threads(n, 2 * hm_dtype_size(out->dtype));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t first, end;
    hm__share(n, GRAIN, omp_get_thread_num(), omp_get_num_threads(), &first, &end);
    pick_share(&p, first, end);
  }
  return HM_OK;
}

static int run_gather(const hm_kernel_call *call) {
  const hm_view *x = &call->in[0], *index = &call->in[1], *out = &call->out[0];
  const int dim = (int)call->attr[0].i;
  const int status = hm__cpu_check_ids(index, x->ndim ? x->shape[dim] : 1, "gather");
  if (status) return status;
  hm_view in[2] = {*x, *index};
  const int64_t step = x->ndim ? x->stride[dim] : 0;
  if (x->ndim) in[0].stride[dim] = 0;
  memcpy(in[0].shape, out->shape, sizeof in[0].shape);
  return pick(out, in, step, -1);
}

static int run_index_select(const hm_kernel_call *call) {
  const hm_view *x = &call->in[0], *index = &call->in[1], *out = &call->out[0];
  const int dim = (int)call->attr[0].i;
  const int status = hm__cpu_check_ids(index, x->ndim ? x->shape[dim] : 1, "index_select");
  if (status) return status;
  hm_view in[2] = {*x, *out};
  in[1].data = index->data;
  in[1].dtype = index->dtype;
  for (int d = 0; d < out->ndim; d++) in[1].stride[d] = d == dim && index->ndim ? index->stride[0] : 0;
  const int64_t step = x->ndim ? x->stride[dim] : 0;
  if (x->ndim) in[0].stride[dim] = 0;
  memcpy(in[0].shape, out->shape, sizeof in[0].shape);
  return pick(out, in, step, -1);
}

static int run_embedding(const hm_kernel_call *call) {
  const hm_view *weight = &call->in[0], *index = &call->in[1], *out = &call->out[0];
  const int status = hm__cpu_check_ids(index, weight->shape[0], "embedding");
  if (status) return status;
  hm_view in[2] = {*out, *out};
  in[0].data = weight->data;
  in[0].dtype = weight->dtype;
  in[1].data = index->data;
  in[1].dtype = index->dtype;
  for (int d = 0; d < out->ndim; d++) {
    const bool last = d == out->ndim - 1;
    in[0].stride[d] = last ? weight->stride[1] : 0;
    in[1].stride[d] = last ? 0 : index->stride[d];
  }
  return pick(out, in, weight->stride[0], call->attr[1].i ? call->attr[0].i : -1);
}

/* ====== The entry ====== */

int hm_cpu_index(const hm_kernel_call *call) {
  switch (call->op) {
  case HM_OP_GATHER: return run_gather(call);
  case HM_OP_INDEX_SELECT: return run_index_select(call);
  case HM_OP_EMBEDDING: return run_embedding(call);
  case HM_OP_SELECT_BACKWARD:
  case HM_OP_GATHER_BACKWARD:
  case HM_OP_INDEX_SELECT_BACKWARD:
  case HM_OP_EMBEDDING_BACKWARD:
  case HM_OP_INDEX_ADD:
  case HM_OP_SCATTER:
  case HM_OP_SCATTER_ADD: return hm__cpu_index_add(call);
  case HM_OP_SORT:
  case HM_OP_TOPK: return hm__cpu_sort(call);
  case HM_OP_FLIP:
  case HM_OP_TRIL:
  case HM_OP_TRIU:
  case HM_OP_PAD:
  case HM_OP_PAD_BACKWARD:
  case HM_OP_ONE_HOT: return hm__cpu_place(call);
  default: return hm_cpu_fail(HM_ERR_UNSUPPORTED, "index: op %d is unknown to the cpu", call->op);
  }
}

int hm_cpu_index_workspace(const hm_kernel_call *call, size_t *bytes) {
  if (call->op == HM_OP_SORT || call->op == HM_OP_TOPK) hm__cpu_sort_workspace(call, bytes);
  else hm__cpu_index_add_workspace(call, bytes);
  return HM_OK;
}
