/*
 * norm.cu -- softmax and log_softmax along a dim, and their gradients.
 *
 * A row of up to 1,024 elements is taken by a warp, a longer one by a block; where rows lie side by side in memory (a
 * dim that is not the innermost) each thread takes one.  Rows of up to 8 elements a thread are read once and stay in
 * registers.  A row with NaN or +inf, or of nothing but -inf, is NaN, as the formulas give it.
 */
#include "group.h"

enum { SOFTMAX, LOG_SOFTMAX, SOFTMAX_BACKWARD, LOG_SOFTMAX_BACKWARD };

typedef hm_rows<3> norm_rows; /* result; x or g; out (backward) */

/* ====== A row by a warp or a block ====== */

template <class T, int WHAT, int G, bool KEEP>
HM_DEV void forward_row(const norm_rows &r, const int64_t (&at)[3], int64_t length, int t) {
  hm_row<T, G, KEEP> x;
  x.open(r.data[1], r.dtype[1], at[1], r.step[1], length, t);
  T top = -(T)INFINITY, sum = (T)0;
  x.each([&](int64_t, T &v) { top = hm_max::join(top, v); });
  top = hm_group_join<hm_max, G>(top);
  x.each([&](int64_t, T &v) {
    const T e = hm_exp(v - top);
    if (KEEP && WHAT == SOFTMAX) v = e;
    sum += e;
  });
  sum = hm_group_join<hm_sum, G>(sum);
  const T log_sum = WHAT == LOG_SOFTMAX ? hm_log(sum) : (T)0;
  x.each([&](int64_t i, T &v) {
    const T y = WHAT == LOG_SOFTMAX ? v - top - log_sum : (KEEP ? v : hm_exp(v - top)) / sum;
    hm_store<T>(r.data[0], r.dtype[0], at[0] + i * r.step[0], y);
  });
}

template <class T, int WHAT, int G, bool KEEP>
HM_DEV void backward_row(const norm_rows &r, const int64_t (&at)[3], int64_t length, int t) {
  hm_row<T, G, KEEP> g;
  g.open(r.data[1], r.dtype[1], at[1], r.step[1], length, t);
  T sum = (T)0;
  g.each([&](int64_t i, T &v) {
    sum += WHAT == SOFTMAX_BACKWARD ? v * hm_load<T>(r.data[2], r.dtype[2], at[2] + i * r.step[2]) : v;
  });
  sum = hm_group_join<hm_sum, G>(sum);
  g.each([&](int64_t i, T &v) {
    const T out = hm_load<T>(r.data[2], r.dtype[2], at[2] + i * r.step[2]);
    hm_store<T>(r.data[0], r.dtype[0], at[0] + i * r.step[0],
                WHAT == SOFTMAX_BACKWARD ? out * (v - sum) : v - hm_exp(out) * sum);
  });
}

template <class T, int WHAT, int G, bool KEEP>
static __global__ void __launch_bounds__(HM_BLOCK, 2) norm_groups(norm_rows r) {
  const uint32_t groups = HM_BLOCK / G;
  for (uint32_t first = blockIdx.x * groups; first < r.walk.count;
       first += gridDim.x * groups) { /* the same rounds for all threads */
    const uint32_t row = first + threadIdx.x / G;
    int64_t at[3];
    hm_offsets(r.walk, row < r.walk.count ? row : 0u, at);
    const int64_t length = row < r.walk.count ? r.length : 0;
    if constexpr (WHAT == SOFTMAX || WHAT == LOG_SOFTMAX)
      forward_row<T, WHAT, G, KEEP>(r, at, length, (int)threadIdx.x % G);
    else backward_row<T, WHAT, G, KEEP>(r, at, length, (int)threadIdx.x % G);
  }
}

/* ====== A row by a thread ====== */

template <class T, int WHAT> static __global__ void __launch_bounds__(HM_BLOCK, 2) norm_threads(norm_rows r) {
  for (uint32_t row = hm_global_thread(); row < r.walk.count; row += hm_global_threads()) {
    int64_t at[3];
    hm_offsets(r.walk, row, at);
    hm_row<T, 1, false> a;
    a.open(r.data[1], r.dtype[1], at[1], r.step[1], r.length, 0);
    hm_long_sum<T> sum = {(T)0, (T)0};
    if constexpr (WHAT == SOFTMAX || WHAT == LOG_SOFTMAX) {
      T top = -(T)INFINITY;
      a.each([&](int64_t, T &v) { top = hm_max::join(top, v); });
      a.each([&](int64_t, T &v) { sum.add(hm_exp(v - top)); });
      const T s = sum.sum, log_sum = hm_log(s);
      a.each([&](int64_t i, T &v) {
        hm_store<T>(r.data[0], r.dtype[0], at[0] + i * r.step[0],
                    WHAT == LOG_SOFTMAX ? v - top - log_sum : hm_exp(v - top) / s);
      });
    } else {
      a.each([&](int64_t i, T &v) {
        sum.add(WHAT == SOFTMAX_BACKWARD ? v * hm_load<T>(r.data[2], r.dtype[2], at[2] + i * r.step[2]) : v);
      });
      const T s = sum.sum;
      a.each([&](int64_t i, T &v) {
        const T out = hm_load<T>(r.data[2], r.dtype[2], at[2] + i * r.step[2]);
        hm_store<T>(r.data[0], r.dtype[0], at[0] + i * r.step[0],
                    WHAT == SOFTMAX_BACKWARD ? out * (v - s) : v - hm_exp(out) * s);
      });
    }
  }
}

/* ====== Entry ====== */

template <class T, int WHAT> static int launch(const norm_rows &r, const char *name, void *stream) {
  const hm_row_plan plan = hm_plan_rows(r, 1);
  const unsigned blocks = hm_row_blocks(r.walk.count, plan);
  switch (plan) {
  case HM_ROWS_WARP_KEEP: return HM_RUN(name, (norm_groups<T, WHAT, HM_WARP, true>), blocks, HM_BLOCK, 0, stream, r);
  case HM_ROWS_WARP: return HM_RUN(name, (norm_groups<T, WHAT, HM_WARP, false>), blocks, HM_BLOCK, 0, stream, r);
  case HM_ROWS_BLOCK_KEEP: return HM_RUN(name, (norm_groups<T, WHAT, HM_BLOCK, true>), blocks, HM_BLOCK, 0, stream, r);
  case HM_ROWS_BLOCK: return HM_RUN(name, (norm_groups<T, WHAT, HM_BLOCK, false>), blocks, HM_BLOCK, 0, stream, r);
  default: return HM_RUN(name, (norm_threads<T, WHAT>), blocks, HM_BLOCK, 0, stream, r);
  }
}

template <class T> static int launch_op(int op, const norm_rows &r, void *stream) {
  switch (op) {
  case HM_OP_SOFTMAX: return launch<T, SOFTMAX>(r, "softmax", stream);
  case HM_OP_LOG_SOFTMAX: return launch<T, LOG_SOFTMAX>(r, "log_softmax", stream);
  case HM_OP_SOFTMAX_BACKWARD: return launch<T, SOFTMAX_BACKWARD>(r, "softmax_backward", stream);
  case HM_OP_LOG_SOFTMAX_BACKWARD: return launch<T, LOG_SOFTMAX_BACKWARD>(r, "log_softmax_backward", stream);
  default: return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no normalisation with op id %d", op);
  }
}

extern "C" int hm_cuda_norm(const hm_kernel_call *call) {
  const bool backward = call->op == HM_OP_SOFTMAX_BACKWARD || call->op == HM_OP_LOG_SOFTMAX_BACKWARD;
  if (!backward && call->op != HM_OP_SOFTMAX && call->op != HM_OP_LOG_SOFTMAX) return hm_cuda_normalize(call);
  const hm_view *view[3] = {&call->out[0], &call->in[0], backward ? &call->in[1] : &call->in[0]};
  const int dim = (int)call->attr[0].i;
  norm_rows r;
  memset(&r, 0, sizeof r);
  r.length = view[0]->ndim ? view[0]->shape[dim] : 1;
  hm_view row[3];
  for (int k = 0; k < 3; k++) {
    row[k] = hm_without_dim(view[k], dim);
    r.step[k] = view[k]->ndim && r.length > 1 ? view[k]->stride[dim] : 1;
    r.dtype[k] = (int8_t)view[k]->dtype;
  }
  hm_loop loop;
  if (hm__loop_make(&loop, &row[0], 2, &row[1]) == 0 || r.length == 0) return HM_OK;
  int64_t base[3] = {0, 0, 0};
  return hm_each_piece(&loop, 3, base, [&](const hm_loop &l, const int64_t *at) {
    for (int k = 0; k < 3; k++) r.data[k] = hm_element(view[k]->data, at[k], view[k]->dtype);
    r.walk = hm_make_walk<3>(&l);
    return call->compute == HM_F64 ? launch_op<double>(call->op, r, call->stream)
                                   : launch_op<float>(call->op, r, call->stream);
  });
}
