/*
 * loss.cu -- cross entropy with softmax fused in, and its gradient.
 *
 * Logits are rows along the class dim, shared out as in norm.cu.  The forward kernel keeps each row's log of the sum
 * of exponentials (lse) and adds the losses of its block's rows in double; a second kernel adds the blocks' sums in
 * order (none is needed where one block does it all).  The gradient takes exp(x - lse) and divides by its sum, which
 * removes the rounding of lse.  For the mean it needs the number of positions that are not ignored: each block counts
 * them if they are few, else a kernel before it does.
 *
 * A target that is no class makes a fault (kernels_cuda.h) and NaN.
 */
#include "group.h"

enum { MEAN, SUM, NONE };
enum { FEW = 2048, MOST_PARTS = HM_BLOCK, SMALL = 8192 };

/* What blocks know of their rows. */
struct part {
  double loss;
  int64_t valid;
};

struct entropy {
  hm_rows<5> rows; /* forward: lse, x, target, loss (NONE), -; backward: result, x, target, lse, g */
  int32_t op, reduction;
  int64_t ignore;
  double smoothing;
  part *parts;           /* forward: one for each block */
  const int64_t *counts; /* backward: how many positions count, in `n_counts` parts; NULL: each block counts */
  int32_t n_counts;
  hm_cuda_fault *fault;
  void *loss; /* forward: where the one block writes the result; NULL: parts go to the second kernel */
  int32_t loss_dtype;
};

/* The class at offset `at`; -1: ignored; -2: none, which is reported. */
HM_DEV int64_t target_at(const entropy &e, int64_t at) {
  const int64_t t = hm_load<int64_t>(e.rows.data[2], e.rows.dtype[2], at);
  if (t == e.ignore) return -1;
  if (t >= 0 && t < e.rows.length) return t;
  hm_fault(e.fault, HM_ERR_ARG, e.op, t, e.rows.length);
  return -2;
}

/* ====== Forward ====== */

template <class T> HM_DEV double row_loss(const entropy &e, T log_sum, T picked, T shifted) {
  const double nll = (double)log_sum - (double)picked;
  if (e.smoothing == 0) return nll;
  const double classes = (double)e.rows.length, smooth = classes * (double)log_sum - (double)shifted;
  return (1 - e.smoothing) * nll + e.smoothing / classes * smooth;
}

/* What one row gives; called by one thread of those that share it. */
HM_DEV void keep_row(const entropy &e, const int64_t (&at)[5], int64_t target, double lse, double loss, part *mine) {
  if (target == -1) loss = 0;
  if (target == -2) loss = (double)NAN;
  hm_store<double>(e.rows.data[0], e.rows.dtype[0], at[0], lse);
  if (e.reduction == NONE) hm_store<double>(e.rows.data[3], e.rows.dtype[3], at[3], loss);
  mine->loss += loss;
  mine->valid += target != -1;
}

HM_DEV void store_total(const entropy &e, double loss, int64_t valid) {
  if (e.reduction == MEAN) loss = valid ? loss / (double)valid : (double)NAN;
  hm_store<double>(e.loss, e.loss_dtype, 0, loss);
}

/* The block's sums, to parts or to the result. */
HM_DEV void keep_part(const entropy &e, part mine) {
  mine.loss = hm_group_join<hm_sum, HM_BLOCK>(mine.loss);
  mine.valid = hm_group_join<hm_sum, HM_BLOCK>(mine.valid);
  if (threadIdx.x != 0 || e.reduction == NONE) return;
  if (e.loss) store_total(e, mine.loss, mine.valid);
  else e.parts[blockIdx.x] = mine;
}

template <class T, int G, bool KEEP> static __global__ void __launch_bounds__(HM_BLOCK, 2) entropy_groups(entropy e) {
  const uint32_t groups = HM_BLOCK / G, count = e.rows.walk.count;
  const int t = (int)threadIdx.x % G;
  part mine = {0.0, 0};
  for (uint32_t first = blockIdx.x * groups; first < count;
       first += gridDim.x * groups) { /* the same rounds for all threads */
    const uint32_t row = first + threadIdx.x / G;
    const bool here = row < count;
    int64_t at[5];
    hm_offsets(e.rows.walk, here ? row : 0u, at);
    hm_row<T, G, KEEP> x;
    x.open(e.rows.data[1], e.rows.dtype[1], at[1], e.rows.step[1], here ? e.rows.length : 0, t);
    T top = -(T)INFINITY, sum = (T)0, shifted = (T)0;
    x.each([&](int64_t, T &v) { top = hm_max::join(top, v); });
    top = hm_group_join<hm_max, G>(top);
    x.each([&](int64_t, T &v) {
      sum += hm_exp(v - top);
      shifted += v - top;
    });
    sum = hm_group_join<hm_sum, G>(sum);
    if (e.smoothing != 0) shifted = hm_group_join<hm_sum, G>(shifted);
    if (!here || t != 0) continue;
    const int64_t target = target_at(e, at[2]);
    const T log_sum = hm_log(sum);
    const T picked =
        target < 0 ? (T)0 : hm_load<T>(e.rows.data[1], e.rows.dtype[1], at[1] + target * e.rows.step[1]) - top;
    keep_row(e, at, target, (double)top + (double)log_sum, row_loss(e, log_sum, picked, shifted), &mine);
  }
  keep_part(e, mine);
}

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) entropy_threads(entropy e) {
  part mine = {0.0, 0};
  for (uint32_t row = hm_global_thread(); row < e.rows.walk.count; row += hm_global_threads()) {
    int64_t at[5];
    hm_offsets(e.rows.walk, row, at);
    hm_row<T, 1, false> x;
    x.open(e.rows.data[1], e.rows.dtype[1], at[1], e.rows.step[1], e.rows.length, 0);
    T top = -(T)INFINITY;
    hm_long_sum<T> sum = {(T)0, (T)0}, shifted = {(T)0, (T)0};
    x.each([&](int64_t, T &v) { top = hm_max::join(top, v); });
    x.each([&](int64_t, T &v) {
      sum.add(hm_exp(v - top));
      shifted.add(v - top);
    });
    const int64_t target = target_at(e, at[2]);
    const T log_sum = hm_log(sum.sum);
    const T picked =
        target < 0 ? (T)0 : hm_load<T>(e.rows.data[1], e.rows.dtype[1], at[1] + target * e.rows.step[1]) - top;
    keep_row(e, at, target, (double)top + (double)log_sum, row_loss(e, log_sum, picked, shifted.sum), &mine);
  }
  keep_part(e, mine);
}

/* The sum over all blocks, by one block. */
static __global__ void __launch_bounds__(HM_BLOCK, 2) entropy_total(entropy e, int n_parts) {
  part mine = {0.0, 0};
  for (int i = (int)threadIdx.x; i < n_parts; i += HM_BLOCK) {
    mine.loss += e.parts[i].loss;
    mine.valid += e.parts[i].valid;
  }
  mine.loss = hm_group_join<hm_sum, HM_BLOCK>(mine.loss);
  mine.valid = hm_group_join<hm_sum, HM_BLOCK>(mine.valid);
  if (threadIdx.x == 0) store_total(e, mine.loss, mine.valid);
}

/* ====== Backward ====== */

/* Positions of this thread, of all `threads`, that are not ignored. */
HM_DEV int64_t count_valid(const entropy &e, uint32_t from, uint32_t threads) {
  int64_t n = 0;
  for (uint32_t i = from; i < e.rows.walk.count; i += threads) {
    int64_t at[5];
    hm_offsets(e.rows.walk, i, at);
    n += hm_load<int64_t>(e.rows.data[2], e.rows.dtype[2], at[2]) != e.ignore;
  }
  return n;
}

static __global__ void __launch_bounds__(HM_BLOCK, 2) entropy_count(entropy e, int64_t *counts) {
  const int64_t n = hm_group_join<hm_sum, HM_BLOCK>(count_valid(e, hm_global_thread(), hm_global_threads()));
  if (threadIdx.x == 0) counts[blockIdx.x] = n;
}

/* The same number in every thread of the block. */
HM_DEV int64_t valid_positions(const entropy &e) {
  if (e.reduction != MEAN) return 1;
  int64_t n = 0;
  if (!e.counts) n = count_valid(e, threadIdx.x, HM_BLOCK);
  else if ((int)threadIdx.x < e.n_counts) n = e.counts[threadIdx.x];
  return hm_group_join<hm_sum, HM_BLOCK>(n);
}

template <class T> HM_DEV T coefficient(const entropy &e, const int64_t (&at)[5], int64_t valid) {
  const double g = hm_load<double>(e.rows.data[4], e.rows.dtype[4], at[4]);
  return (T)(e.reduction == MEAN ? g / (double)valid : g);
}

/* Writes one element of the gradient. */
template <class T>
HM_DEV void put(const entropy &e, const int64_t (&at)[5], int64_t i, int64_t target, T softmax, T coef) {
  const T share = (T)(e.smoothing / (double)e.rows.length), rest = (T)(1 - e.smoothing);
  T y = softmax - share;
  if (i == target) y = y - rest;
  y = target == -1 ? (T)0 : target == -2 ? (T)NAN : y * coef;
  hm_store<T>(e.rows.data[0], e.rows.dtype[0], at[0] + i * e.rows.step[0], y);
}

template <class T, int G, bool KEEP>
static __global__ void __launch_bounds__(HM_BLOCK, 2) entropy_backward_groups(entropy e) {
  const uint32_t groups = HM_BLOCK / G, count = e.rows.walk.count;
  const int64_t valid = valid_positions(e);
  for (uint32_t first = blockIdx.x * groups; first < count; first += gridDim.x * groups) {
    const uint32_t row = first + threadIdx.x / G;
    const bool here = row < count;
    int64_t at[5];
    hm_offsets(e.rows.walk, here ? row : 0u, at);
    const T lse = hm_load<T>(e.rows.data[3], e.rows.dtype[3], at[3]), coef = coefficient<T>(e, at, valid);
    const int64_t target = here ? target_at(e, at[2]) : -1;
    hm_row<T, G, KEEP> x;
    x.open(e.rows.data[1], e.rows.dtype[1], at[1], e.rows.step[1], here ? e.rows.length : 0, (int)threadIdx.x % G);
    T sum = (T)0;
    x.each([&](int64_t, T &v) {
      const T p = hm_exp(v - lse);
      if (KEEP) v = p;
      sum += p;
    });
    sum = hm_group_join<hm_sum, G>(sum);
    x.each([&](int64_t i, T &v) { put<T>(e, at, i, target, (KEEP ? v : hm_exp(v - lse)) / sum, coef); });
  }
}

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) entropy_backward_threads(entropy e) {
  const int64_t valid = valid_positions(e);
  for (uint32_t row = hm_global_thread(); row < e.rows.walk.count; row += hm_global_threads()) {
    int64_t at[5];
    hm_offsets(e.rows.walk, row, at);
    const T lse = hm_load<T>(e.rows.data[3], e.rows.dtype[3], at[3]), coef = coefficient<T>(e, at, valid);
    const int64_t target = target_at(e, at[2]);
    hm_row<T, 1, false> x;
    x.open(e.rows.data[1], e.rows.dtype[1], at[1], e.rows.step[1], e.rows.length, 0);
    hm_long_sum<T> sum = {(T)0, (T)0};
    x.each([&](int64_t, T &v) { sum.add(hm_exp(v - lse)); });
    x.each([&](int64_t i, T &v) { put<T>(e, at, i, target, hm_exp(v - lse) / sum.sum, coef); });
  }
}

/* ====== Setting up ====== */

static const char *name_of(const hm_kernel_call *call) {
  return call->op == HM_OP_CROSS_ENTROPY ? "cross_entropy" : "cross_entropy_backward";
}

/* Fills e.rows and what both directions share.  *empty: nothing to do but the total. */
static int set_entropy(entropy *e, const hm_kernel_call *call, bool *empty) {
  const bool backward = call->op == HM_OP_CROSS_ENTROPY_BACKWARD;
  const hm_view *x = &call->in[backward ? 1 : 0], *target = &call->in[backward ? 2 : 1];
  const int dim = x->ndim > 1 ? 1 : 0;
  memset(e, 0, sizeof *e);
  e->op = call->op;
  e->reduction = (int32_t)call->attr[0].i;
  e->ignore = call->attr[1].i;
  e->smoothing = call->attr[2].f;
  const hm_view *view[5] = {backward ? &call->out[0] : &call->out[1], x, target,
                            backward ? &call->in[3] : &call->out[0], backward ? &call->in[0] : target};
  hm_view row[5];
  const hm_view shape = hm_without_dim(x, dim);
  for (int k = 0; k < 5; k++) {
    const bool along = k == 1 || (backward && k == 0), one = e->reduction != NONE && (backward ? k == 4 : k == 3);
    row[k] = along ? hm_without_dim(view[k], dim) : *view[k];
    e->rows.step[k] = along && view[k]->ndim && view[k]->shape[dim] > 1 ? view[k]->stride[dim] : 1;
    e->rows.data[k] = view[k]->data;
    e->rows.dtype[k] = (int8_t)view[k]->dtype;
    if (!one) continue;
    row[k] = shape; /* one number for all rows */
    for (int d = 0; d < row[k].ndim; d++) row[k].stride[d] = 0;
  }
  e->rows.length = x->ndim ? x->shape[dim] : 1;
  hm_loop loop;
  hm_view order = row[1]; /* rows in the order of the logits' memory */
  hm_view in[5] = {row[0], row[1], row[2], row[3], row[4]};
  const int64_t count = hm__loop_make(&loop, &order, 5, in);
  *empty = count == 0;
  if (count >= HM_CUDA_PIECE) return hm_cuda_fail(HM_ERR_UNSUPPORTED, "%s: 2^31 rows or more", name_of(call));
  if (count > 0 && e->rows.length == 0)
    return hm_cuda_fail(HM_ERR_ARG, "cross_entropy: the logits have no classes (C = 0)");
  if (count == 0) return HM_OK;
  for (int k = 0; k < 5; k++) memmove(loop.stride[k], loop.stride[k + 1], sizeof loop.stride[k]);
  e->rows.walk = hm_make_walk<5>(&loop);
  e->fault = hm_cuda_fault_word(call->stream);
  return HM_OK;
}

/* Blocks of the forward kernel: one where that is enough, to save the second kernel. */
static unsigned forward_blocks(const entropy *e) {
  const int64_t work = (int64_t)e->rows.walk.count * e->rows.length;
  return work <= SMALL ? 1 : hm_row_blocks(e->rows.walk.count, hm_plan_rows(e->rows, 1));
}

template <class T> static int launch_forward(const entropy &e, unsigned blocks, const char *name, void *stream) {
  switch (hm_plan_rows(e.rows, 1)) {
  case HM_ROWS_WARP_KEEP: return HM_RUN(name, (entropy_groups<T, HM_WARP, true>), blocks, HM_BLOCK, 0, stream, e);
  case HM_ROWS_WARP: return HM_RUN(name, (entropy_groups<T, HM_WARP, false>), blocks, HM_BLOCK, 0, stream, e);
  case HM_ROWS_BLOCK_KEEP: return HM_RUN(name, (entropy_groups<T, HM_BLOCK, true>), blocks, HM_BLOCK, 0, stream, e);
  case HM_ROWS_BLOCK: return HM_RUN(name, (entropy_groups<T, HM_BLOCK, false>), blocks, HM_BLOCK, 0, stream, e);
  default: return HM_RUN(name, (entropy_threads<T>), blocks, HM_BLOCK, 0, stream, e);
  }
}

template <class T> static int launch_backward(const entropy &e, const char *name, void *stream) {
  const hm_row_plan plan = hm_plan_rows(e.rows, 1);
  const unsigned blocks = hm_row_blocks(e.rows.walk.count, plan);
  switch (plan) {
  case HM_ROWS_WARP_KEEP:
    return HM_RUN(name, (entropy_backward_groups<T, HM_WARP, true>), blocks, HM_BLOCK, 0, stream, e);
  case HM_ROWS_WARP: return HM_RUN(name, (entropy_backward_groups<T, HM_WARP, false>), blocks, HM_BLOCK, 0, stream, e);
  case HM_ROWS_BLOCK_KEEP:
    return HM_RUN(name, (entropy_backward_groups<T, HM_BLOCK, true>), blocks, HM_BLOCK, 0, stream, e);
  case HM_ROWS_BLOCK:
    return HM_RUN(name, (entropy_backward_groups<T, HM_BLOCK, false>), blocks, HM_BLOCK, 0, stream, e);
  default: return HM_RUN(name, (entropy_backward_threads<T>), blocks, HM_BLOCK, 0, stream, e);
  }
}

/* The larger of the two needs, whatever the call: parts of all blocks, or counts. */
extern "C" int hm_cuda_loss_workspace(const hm_kernel_call *call, size_t *bytes) {
  (void)call;
  *bytes = HM_MAX_BLOCKS * sizeof(part);
  return HM_OK;
}

static int forward(const hm_kernel_call *call) {
  const char *name = name_of(call);
  const hm_view *loss = &call->out[0];
  entropy e;
  bool empty;
  int status = set_entropy(&e, call, &empty);
  if (status != HM_OK) return status;
  if (empty)
    return e.reduction == NONE ? HM_OK
                               : hm_cuda_fill_number(loss, e.reduction == MEAN ? (double)NAN : 0.0, 0, call->stream);
  const unsigned blocks = forward_blocks(&e);
  if (blocks > 1 && call->workspace_bytes < blocks * sizeof(part))
    return hm_cuda_fail(HM_ERR_INTERNAL, "%s: the workspace is too small", name);
  e.parts = static_cast<part *>(call->workspace);
  e.loss = blocks == 1 ? loss->data : nullptr;
  e.loss_dtype = loss->dtype;
  status = call->compute == HM_F64 ? launch_forward<double>(e, blocks, name, call->stream)
                                   : launch_forward<float>(e, blocks, name, call->stream);
  if (status != HM_OK || blocks == 1 || e.reduction == NONE) return status;
  e.loss = loss->data;
  return HM_RUN(name, entropy_total, 1, HM_BLOCK, 0, call->stream, e, (int)blocks);
}

static int backward(const hm_kernel_call *call) {
  const char *name = name_of(call);
  entropy e;
  bool empty;
  int status = set_entropy(&e, call, &empty);
  if (status != HM_OK || empty) return status;
  if (e.reduction == MEAN && e.rows.walk.count > FEW) {
    int64_t *counts = static_cast<int64_t *>(call->workspace);
    unsigned parts = hm_blocks(e.rows.walk.count, FEW);
    if (parts > MOST_PARTS) parts = MOST_PARTS;
    if (call->workspace_bytes < parts * sizeof *counts)
      return hm_cuda_fail(HM_ERR_INTERNAL, "%s: the workspace is too small", name);
    status = HM_RUN(name, entropy_count, parts, HM_BLOCK, 0, call->stream, e, counts);
    if (status != HM_OK) return status;
    e.counts = counts;
    e.n_counts = (int32_t)parts;
  }
  return call->compute == HM_F64 ? launch_backward<double>(e, name, call->stream)
                                 : launch_backward<float>(e, name, call->stream);
}

extern "C" int hm_cuda_loss(const hm_kernel_call *call) {
  if (call->op == HM_OP_CROSS_ENTROPY) return forward(call);
  if (call->op == HM_OP_CROSS_ENTROPY_BACKWARD) return backward(call);
  return hm_cuda_nll(call);
}
