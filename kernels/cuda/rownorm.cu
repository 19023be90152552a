/*
 * rownorm.cu -- layer_norm and rms_norm along the last dims, and their gradients.
 *
 * A row of up to 1,024 elements is taken by a warp, a longer one by a block; rows of up to 8 elements a thread are read once and stay in
 * registers.  Gradients of weight and bias: blocks of rows (cpu/normalize.h) are summed into the workspace, column by column, and added
 * in order.  The family's entry for all normalizations that are no softmax is here; batch_norm and group_norm go on to normalize.cu.
 */
#include "cpu/normalize.h"
#include "group.h"

struct row_job {
  hm_rows<3> r;              /* y or dx; x; g (backward) */
  int64_t first;             /* number of the first row of this piece */
  const void *weight, *bias; /* NULL: ones, none */
  void *mean, *rstd;         /* mean: NULL for rms_norm */
  void *dweight, *dbias;     /* dbias: NULL for rms_norm */
  void *sums;                /* T [blocks][2][length] */
  hm_row_norm_plan p;
  double eps;
  int32_t weight_dtype, bias_dtype, mean_dtype, rstd_dtype, sum_dtype;
};

template <class T> HM_DEV T weight_at(const row_job &j, int64_t i) {
  return j.weight ? hm_load<T>(j.weight, j.weight_dtype, i) : (T)1;
}

/* ====== A row by a warp or a block ====== */

template <class T, int G, bool KEEP>
HM_DEV void forward_row(const row_job &j, int64_t row, const int64_t (&at)[3], int64_t length, int t) {
  hm_row<T, G, KEEP> x;
  x.open(j.r.data[1], j.r.dtype[1], at[1], 1, length, t);
  T mean = (T)0, spread = (T)0;
  if (j.mean) {
    x.each([&](int64_t, T &v) { mean += v; });
    mean = hm_group_join<hm_sum, G>(mean) / (T)j.r.length;
  }
  x.each([&](int64_t, T &v) {
    const T d = v - mean;
    spread += d * d;
  });
  spread = hm_group_join<hm_sum, G>(spread) / (T)j.r.length;
  const T rstd = (T)(1 / sqrt((double)spread + j.eps));
  if (row >= 0 && t == 0) {
    if (j.mean) hm_store<T>(j.mean, j.mean_dtype, row, mean);
    hm_store<T>(j.rstd, j.rstd_dtype, row, rstd);
  }
  x.each([&](int64_t i, T &v) {
    const T y = (v - mean) * rstd * weight_at<T>(j, i);
    hm_store<T>(j.r.data[0], j.r.dtype[0], at[0] + i, j.bias ? y + hm_load<T>(j.bias, j.bias_dtype, i) : y);
  });
}

template <class T, int G, bool KEEP>
HM_DEV void backward_row(const row_job &j, int64_t row, const int64_t (&at)[3], int64_t length, int t) {
  hm_row<T, G, KEEP> x;
  x.open(j.r.data[1], j.r.dtype[1], at[1], 1, length, t);
  const T mean = j.mean && row >= 0 ? hm_load<T>(j.mean, j.mean_dtype, row) : (T)0;
  const T rstd = row >= 0 ? hm_load<T>(j.rstd, j.rstd_dtype, row) : (T)0;
  T sum = (T)0, dot = (T)0;
  x.each([&](int64_t i, T &v) {
    const T gw = hm_load<T>(j.r.data[2], j.r.dtype[2], at[2] + i) * weight_at<T>(j, i);
    sum += gw;
    dot += gw * ((v - mean) * rstd);
  });
  sum = hm_group_join<hm_sum, G>(sum) / (T)j.r.length;
  dot = hm_group_join<hm_sum, G>(dot) / (T)j.r.length;
  const T less = j.mean ? sum : (T)0;
  x.each([&](int64_t i, T &v) {
    const T gw = hm_load<T>(j.r.data[2], j.r.dtype[2], at[2] + i) * weight_at<T>(j, i);
    hm_store<T>(j.r.data[0], j.r.dtype[0], at[0] + i, (gw - less - (v - mean) * rstd * dot) * rstd);
  });
}

template <class T, bool BACKWARD, int G, bool KEEP>
static __global__ void __launch_bounds__(HM_BLOCK, 2) row_groups(row_job j) {
  const uint32_t groups = HM_BLOCK / G;
  for (uint32_t first = blockIdx.x * groups; first < j.r.walk.count;
       first += gridDim.x * groups) { /* the same rounds for all threads */
    const uint32_t row = first + threadIdx.x / G;
    const bool here = row < j.r.walk.count;
    int64_t at[3];
    hm_offsets(j.r.walk, here ? row : 0u, at);
    const int64_t length = here ? j.r.length : 0, number = here ? j.first + row : -1;
    if constexpr (BACKWARD) backward_row<T, G, KEEP>(j, number, at, length, (int)threadIdx.x % G);
    else forward_row<T, G, KEEP>(j, number, at, length, (int)threadIdx.x % G);
  }
}

/* ====== Gradients of weight and bias ====== */

/* 32 columns of a block of rows by a block of 32 x 8 threads.  Each thread takes every eighth row. */
template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) weight_sums(row_job j) {
  HM_SHARED(T, part, [2][HM_WARPS][HM_WARP]);
  const uint32_t tiles = (uint32_t)((j.p.length + HM_WARP - 1) / HM_WARP), lane = hm_lane(), warp = hm_warp();
  for (uint32_t u = blockIdx.x; u < tiles * (uint32_t)j.p.blocks; u += gridDim.x) {
    const uint32_t block = u / tiles;
    const int64_t c = (int64_t)(u - block * tiles) * HM_WARP + lane, from = block * j.p.block;
    const int64_t end = from + j.p.block < j.p.rows ? from + j.p.block : j.p.rows;
    T dw = (T)0, db = (T)0;
    for (int64_t r = from + warp; c < j.p.length && r < end; r += HM_WARPS) {
      int64_t at[3];
      hm_offsets(j.r.walk, (uint32_t)r, at);
      const T mean = j.mean ? hm_load<T>(j.mean, j.mean_dtype, r) : (T)0, rstd = hm_load<T>(j.rstd, j.rstd_dtype, r);
      const T g = hm_load<T>(j.r.data[2], j.r.dtype[2], at[2] + c);
      dw += g * ((hm_load<T>(j.r.data[1], j.r.dtype[1], at[1] + c) - mean) * rstd);
      db += g;
    }
    part[0][warp][lane] = dw;
    part[1][warp][lane] = db;
    HM_BARRIER();
    if (warp < 2 && c < j.p.length) {
      T all = part[warp][0][lane];
      for (int w = 1; w < HM_WARPS; w++) all += part[warp][w][lane];
      static_cast<T *>(j.sums)[((int64_t)block * 2 + warp) * j.p.length + c] = all;
    }
    HM_BARRIER();
  }
}

/* The blocks of one sum, added in order. */
template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) add_blocks(row_job j) {
  for (int64_t c = hm_global_thread(); c < j.p.length; c += hm_global_threads()) {
    double dw = 0, db = 0;
    const T *at = static_cast<const T *>(j.sums) + c;
    for (int64_t b = 0; b < j.p.blocks; b++, at += 2 * j.p.length) {
      dw += (double)at[0];
      db += (double)at[j.p.length];
    }
    hm_store<double>(j.dweight, j.sum_dtype, c, dw);
    if (j.dbias) hm_store<double>(j.dbias, j.sum_dtype, c, db);
  }
}

/* ====== Launching ====== */

template <class T, bool BACKWARD> static int launch_rows(const row_job &j, const char *name, void *stream) {
  const bool warps = j.r.length <= 1024;
  const unsigned blocks = hm_blocks(j.r.walk.count, warps ? HM_WARPS : 1);
  if (j.r.length > 0 && j.r.length <= HM_WARP * HM_KEEP) /* an empty row has nothing to keep */
    return HM_RUN(name, (row_groups<T, BACKWARD, HM_WARP, true>), blocks, HM_BLOCK, 0, stream, j);
  if (warps) return HM_RUN(name, (row_groups<T, BACKWARD, HM_WARP, false>), blocks, HM_BLOCK, 0, stream, j);
  if (j.r.length <= HM_BLOCK * HM_KEEP)
    return HM_RUN(name, (row_groups<T, BACKWARD, HM_BLOCK, true>), blocks, HM_BLOCK, 0, stream, j);
  return HM_RUN(name, (row_groups<T, BACKWARD, HM_BLOCK, false>), blocks, HM_BLOCK, 0, stream, j);
}

template <class T> static int launch_weights(const row_job &j, const char *name, void *stream) {
  const int64_t units = (j.p.length + HM_WARP - 1) / HM_WARP * j.p.blocks;
  int status = HM_OK;
  if (units > 0) status = HM_RUN(name, (weight_sums<T>), hm_blocks(units, 1), HM_BLOCK, 0, stream, j);
  if (status == HM_OK && j.p.length > 0)
    status = HM_RUN(name, (add_blocks<T>), hm_blocks(j.p.length), HM_BLOCK, 0, stream, j);
  return status;
}

/* ====== Entry ====== */

static bool is_backward(int op) { return op == HM_OP_LAYER_NORM_BACKWARD || op == HM_OP_RMS_NORM_BACKWARD; }
static bool is_layer(int op) { return op == HM_OP_LAYER_NORM || op == HM_OP_LAYER_NORM_BACKWARD; }
static bool is_channels(int op) {
  return op == HM_OP_BATCH_NORM || op == HM_OP_BATCH_NORM_BACKWARD || op == HM_OP_GROUP_NORM ||
         op == HM_OP_GROUP_NORM_BACKWARD;
}

extern "C" int hm_cuda_normalize_workspace(const hm_kernel_call *call, size_t *bytes) {
  if (is_channels(call->op)) return hm_cuda_channel_norm_workspace(call, bytes);
  *bytes = 0;
  if (!is_backward(call->op)) return HM_OK;
  const hm_row_norm_plan p = hm__row_norm_plan(&call->in[1], call->attr[0].i);
  *bytes = (size_t)(p.blocks * 2 * p.length) * (call->compute == HM_F64 ? 8 : 4);
  return HM_OK;
}

static const void *given(const hm_view *v, int32_t *dtype) {
  if (v->flags & HM_VIEW_ABSENT) return NULL;
  *dtype = v->dtype;
  return v->data;
}

static void fill_job(row_job *j, const hm_kernel_call *call) {
  const bool back = is_backward(call->op), layer = is_layer(call->op);
  const hm_view *in = call->in, *out = call->out;
  const hm_view *mean = !layer ? NULL
                        : back ? &in[3]
                               : &out[1],
                *rstd = back ? &in[layer ? 4 : 3] : &out[layer ? 2 : 1];
  j->p = hm__row_norm_plan(&in[back], call->attr[0].i);
  j->weight = given(&in[back + 1], &j->weight_dtype);
  if (layer && !back) j->bias = given(&in[2], &j->bias_dtype);
  if (mean) j->mean = mean->data, j->mean_dtype = mean->dtype;
  j->rstd = rstd->data, j->rstd_dtype = rstd->dtype;
  if (!back) j->eps = call->attr[1].f;
  if (back) j->dweight = out[1].data, j->sum_dtype = out[1].dtype;
  if (back && layer) j->dbias = out[2].data;
  j->sums = call->workspace;
}

/* All pieces of rows; the row's number is its place in the output, which is row-major. */
static int run_rows(row_job *j, const hm_kernel_call *call, const char *name) {
  const bool back = is_backward(call->op), f64 = call->compute == HM_F64;
  const hm_view *view[3] = {&call->out[0], &call->in[back], &call->in[0]};
  hm_view row[3];
  for (int k = 0; k < 3; k++) {
    row[k] = *view[k];
    row[k].ndim = (int16_t)j->p.lead;
    j->r.step[k] = 1;
    j->r.dtype[k] = (int8_t)view[k]->dtype;
  }
  j->r.length = j->p.length;
  hm_loop loop;
  if (hm__loop_make(&loop, &row[0], 2, &row[1]) > 0) {
    int64_t base[3] = {0, 0, 0};
    const int status = hm_each_piece(&loop, 3, base, [&](const hm_loop &l, const int64_t *at) {
      for (int k = 0; k < 3; k++) j->r.data[k] = hm_element(view[k]->data, at[k], view[k]->dtype);
      j->r.walk = hm_make_walk<3>(&l);
      j->first = j->p.length ? at[0] / j->p.length : 0;
      if (back && j->p.length == 0) return (int)HM_OK;
      if (back)
        return f64 ? launch_rows<double, true>(*j, name, call->stream)
                   : launch_rows<float, true>(*j, name, call->stream);
      return f64 ? launch_rows<double, false>(*j, name, call->stream)
                 : launch_rows<float, false>(*j, name, call->stream);
    });
    if (status || !back) return status;
    if (j->p.rows >= HM_CUDA_PIECE)
      return hm_cuda_fail(HM_ERR_UNSUPPORTED, "%s: 2^31 rows or more have no gradient on cuda", name);
    for (int k = 0; k < 3; k++) j->r.data[k] = view[k]->data;
    j->r.walk = hm_make_walk<3>(&loop);
  }
  if (!back) return HM_OK;
  return f64 ? launch_weights<double>(*j, name, call->stream) : launch_weights<float>(*j, name, call->stream);
}

extern "C" int hm_cuda_normalize(const hm_kernel_call *call) {
  if (is_channels(call->op)) return hm_cuda_channel_norm(call);
  if (!is_layer(call->op) && call->op != HM_OP_RMS_NORM && call->op != HM_OP_RMS_NORM_BACKWARD)
    return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no normalisation with op id %d", call->op);
  row_job j;
  memset(&j, 0, sizeof j);
  fill_job(&j, call);
  return run_rows(&j, call, is_layer(call->op) ? "layer_norm" : "rms_norm");
}
