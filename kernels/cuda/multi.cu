/*
 * multi.cu -- the scaler's and the optimizers' passes over all parameters at once.
 *
 * Up to 48 parameters go into one launch by value; each block takes 16,384 elements of one of them, four neighbours a
 * thread at a time.  The updates are the CPU's to the bit where both compute in the same type (kernels/cpu/multi.c
 * has the formulas, which are PyTorch's).
 *
 * Pass 1 leaves counts, the largest value and the sum of squares of each block in scratch memory; a second kernel
 * adds them by parameter in order. Squares are added in float32 by fours and in double from there on; a four with a
 * value that is not finite, or whose squares would leave float32's range, is done one value at a time in double.
 *
 * With a device-side scaler (kernels_cuda.h) the same kernels read the scale and the flag from device memory, and
 * skip themselves.
 */
#include "group.h"

#include "backend.h"

enum { ITEMS = 48, CHUNK = 16384, FOUR = 4 };

/* A parameter, as kernels see it. */
struct entry {
  void *grad, *param, *low, *state[2];
  int64_t numel;
  uint32_t first; /* block of the launch that takes its first chunk */
  int8_t grad_dtype, param_dtype, low_dtype, state_dtype;
};

/* What all kernels get.  Where `scaler` is set, the factor and the flag come from the device. */
struct batch {
  entry item[ITEMS];
  int32_t n;
  uint64_t runs; /* a bit for each item: its memory may be taken by fours */
  double inv_scale, grad_mul, max_norm;
  const hm_cuda_scaler *scaler;
  const hm_cuda_found *found;
};

/* The item that block b works on. */
HM_DEV int item_of(const batch &t, uint32_t b) {
  int low = 0, high = t.n - 1;
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (t.item[mid].first <= b) low = mid;
    else high = mid - 1;
  }
  return low;
}

HM_DEV bool runs(const batch &t, int i) { return t.runs >> i & 1u; }

HM_DEV double inverse_scale(const batch &t) {
  if (!t.scaler) return t.inv_scale;
  return t.found && t.found->unscaled ? 1.0 : 1.0 / t.scaler->scale;
}

/* Clipping by the norm that pass 1 found, and the caller's own factor. */
HM_DEV double gradient_factor(const batch &t) {
  if (!t.found || !(t.max_norm > 0)) return t.grad_mul;
  const double coef = t.max_norm / (sqrt(t.found->sum_sq) + 1e-6);
  return coef < 1 ? t.grad_mul * coef : t.grad_mul;
}

/* ====== Four elements ====== */

/* Elements [at, at + left) of an array, four at most; what is missing repeats the last. */
template <class T> HM_DEV void load_four(const void *data, int dtype, int64_t at, int left, bool run, T *x) {
  if constexpr (sizeof(T) == 4) {
    if (run && left >= FOUR) {
      hm_load_run<FOUR>(data, dtype, at, x);
      return;
    }
  }
  int64_t places[FOUR];
#pragma unroll
  for (int j = 0; j < FOUR; j++) places[j] = at + (j < left ? j : left - 1);
  hm_load_many<FOUR>(data, dtype, places, x);
}

template <class T> HM_DEV void store_four(void *data, int dtype, int64_t at, int left, bool run, const T *x) {
  if constexpr (sizeof(T) == 4) {
    if (run && left >= FOUR) {
      hm_store_run<FOUR>(data, dtype, at, x);
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < FOUR; j++)
    if (j < left) hm_store<T>(data, dtype, at + j, x[j]);
}

/* Calls f(at, left) for the fours of this thread in the block's chunk of an item. */
template <class F> HM_DEV void each_four(const entry &e, F f) {
  const int64_t begin = (int64_t)(blockIdx.x - e.first) * CHUNK, limit = begin + CHUNK,
                end = limit < e.numel ? limit : e.numel;
  for (int64_t i = begin + (int64_t)threadIdx.x * FOUR; i < end; i += HM_BLOCK * FOUR)
    f(i, (int)(end - i < FOUR ? end - i : (int64_t)FOUR));
}

/* ====== Pass 1 ====== */

struct limits {
  double by_dtype[3]; /* smallest magnitude that f16, bf16 and the others round to infinity when written */
};

/* Counts one value; g: as it came, u: unscaled. */
HM_DEV void count_value(hm_multi_stat *s, double g, double u, double limit) {
  if (g != g) s->nan_count++;
  else if (fabs(g) > DBL_MAX) s->inf_count++;
  else if (u != u) s->nan_count++;
  else if (fabs(u) >= limit) s->inf_count++;
  else {
    s->sum_sq += u * u;
    if (fabs(u) > s->amax) s->amax = fabs(u);
  }
}

HM_DEV void count_four(hm_multi_stat *s, const float *g, const float *u, float inv, int left, double limit) {
  uint32_t top = 0;
#pragma unroll
  for (int j = 0; j < FOUR; j++) {
    const uint32_t bits = hm_f32_bits(g[j]) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  const float gmax = hm_bits_f32(top), most = hm_abs_f32(gmax * inv);
  if (left == FOUR && gmax < INFINITY && (double)most < limit && (top == 0 || (most > 1e-15f && most < 1e17f))) {
    s->sum_sq += (double)((u[0] * u[0] + u[1] * u[1]) + (u[2] * u[2] + u[3] * u[3]));
    if ((double)most > s->amax) s->amax = (double)most;
    return;
  }
  for (int j = 0; j < FOUR; j++)
    if (j < left) count_value(s, (double)g[j], (double)u[j], limit);
}

HM_DEV void count_four(hm_multi_stat *s, const double *g, const double *u, double, int left, double limit) {
#pragma unroll
  for (int j = 0; j < FOUR; j++)
    if (j < left) count_value(s, g[j], u[j], limit);
}

struct largest {
  HM_DEV double join(double a, double b) { return b > a ? b : a; }
};

/* The same in every thread of the block. */
HM_DEV hm_multi_stat join_stat(hm_multi_stat s) {
  s.inf_count = hm_group_join<hm_sum, HM_BLOCK>(s.inf_count);
  s.nan_count = hm_group_join<hm_sum, HM_BLOCK>(s.nan_count);
  s.sum_sq = hm_group_join<hm_sum, HM_BLOCK>(s.sum_sq);
  s.amax = hm_group_join<largest, HM_BLOCK>(s.amax);
  return s;
}

HM_DEV hm_multi_stat empty_stat(void) {
  hm_multi_stat s;
  s.inf_count = s.nan_count = 0;
  s.sum_sq = s.amax = 0;
  return s;
}

template <class T> HM_DEV hm_multi_stat check_chunk(const batch &t, int i, bool write, double limit) {
  const entry &e = t.item[i];
  const T inv = (T)inverse_scale(t);
  const bool change = write && inv != (T)1;
  hm_multi_stat s = empty_stat();
  each_four(e, [&](int64_t at, int left) {
    T g[FOUR], u[FOUR];
    load_four(e.grad, e.grad_dtype, at, left, runs(t, i), g);
#pragma unroll
    for (int j = 0; j < FOUR; j++) u[j] = g[j] * inv;
    count_four(&s, g, u, inv, left, change ? limit : (double)INFINITY);
    if (change) store_four(e.grad, e.grad_dtype, at, left, runs(t, i), u);
  });
  return join_stat(s);
}

/* Statistics of each block into part[block]; `write`: the gradient becomes the unscaled one. */
static __global__ void __launch_bounds__(HM_BLOCK, 2)
    check_blocks(batch t, bool write, limits most, hm_multi_stat *part) {
  const int i = item_of(t, blockIdx.x), dtype = t.item[i].grad_dtype;
  const double limit = dtype == HM_F16 ? most.by_dtype[0] : dtype == HM_BF16 ? most.by_dtype[1] : most.by_dtype[2];
  const hm_multi_stat s =
      dtype == HM_F64 ? check_chunk<double>(t, i, write, limit) : check_chunk<float>(t, i, write, limit);
  if (threadIdx.x == 0) part[blockIdx.x] = s;
}

HM_DEV void add_stat(hm_multi_stat *total, const hm_multi_stat &s) {
  total->inf_count += s.inf_count;
  total->nan_count += s.nan_count;
  total->sum_sq += s.sum_sq;
  if (s.amax > total->amax) total->amax = s.amax;
}

/* stat[item] from the parts of its blocks, one item a block. */
static __global__ void __launch_bounds__(HM_BLOCK, 2)
    check_items(batch t, const hm_multi_stat *part, uint32_t blocks, hm_multi_stat *stat) {
  const int i = (int)blockIdx.x;
  const uint32_t end = t.item[i].numel == 0 ? t.item[i].first : i + 1 < t.n ? t.item[i + 1].first : blocks;
  hm_multi_stat s = empty_stat();
  for (uint32_t b = t.item[i].first + threadIdx.x; b < end; b += HM_BLOCK) add_stat(&s, part[b]);
  s = join_stat(s);
  if (threadIdx.x == 0) stat[i] = s;
}

/* All items into the optimizer's record, by one block. */
static __global__ void __launch_bounds__(HM_BLOCK, 2)
    check_all(const hm_multi_stat *stat, int32_t n, hm_cuda_scaler *scaler, hm_cuda_found *found, bool unscaled) {
  hm_multi_stat s = empty_stat();
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += HM_BLOCK) add_stat(&s, stat[i]);
  s = join_stat(s);
  if (threadIdx.x != 0) return;
  const bool bad = s.inf_count + s.nan_count > 0;
  found->found_inf = bad;
  found->inf_count = s.inf_count;
  found->nan_count = s.nan_count;
  found->sum_sq = s.sum_sq;
  found->amax = s.amax;
  if (unscaled) found->unscaled = 1;
  if (bad) scaler->found_inf = 1;
}

/* ====== SCALE ====== */

template <class T> HM_DEV void scale_chunk(const batch &t, int i) {
  const entry &e = t.item[i];
  const T mul = (T)t.grad_mul;
  each_four(e, [&](int64_t at, int left) {
    T g[FOUR];
    load_four(e.grad, e.grad_dtype, at, left, runs(t, i), g);
#pragma unroll
    for (int j = 0; j < FOUR; j++) g[j] = g[j] * mul;
    store_four(e.grad, e.grad_dtype, at, left, runs(t, i), g);
  });
}

static __global__ void __launch_bounds__(HM_BLOCK, 2) scale_blocks(batch t) {
  const int i = item_of(t, blockIdx.x);
  if (t.item[i].grad_dtype == HM_F64) scale_chunk<double>(t, i);
  else scale_chunk<float>(t, i);
}

/* ====== Pass 2 ====== */

/* Constants of one group, in double; kernels round them once.  For a device-side step the last four are made on
 * the device. */
struct rates {
  double weight_decay, momentum, keep, minus_lr;       /* SGD */
  double shrink, weight, beta1, beta2, rest2, eps, lr; /* Adam */
  double root2, step;                                  /* of the bias corrections */
  int64_t attempt;                                     /* device-side step: number of step() calls; else 0 */
  bool decay, nesterov, maximize, decoupled, near, first;
};

/* d = g + wd p */
template <class T> HM_DEV T decayed(T g, T p, T wd, bool decay, bool maximize) {
  const T d = maximize ? -g : g;
  return decay ? d + wd * p : d;
}

template <class T> HM_DEV void sgd_four(const rates &r, bool first, bool has_buffer, const T *g, T *p, T *buf) {
  const T lr = (T)r.minus_lr, wd = (T)r.weight_decay, momentum = (T)r.momentum, keep = (T)r.keep;
#pragma unroll
  for (int j = 0; j < FOUR; j++) {
    const T d = decayed(g[j], p[j], wd, r.decay, r.maximize);
    if (!has_buffer) {
      p[j] = p[j] + lr * d;
      continue;
    }
    const T b = first ? d : buf[j] * momentum + keep * d;
    buf[j] = b;
    p[j] = p[j] + lr * (r.nesterov ? d + momentum * b : b);
  }
}

template <class T> HM_DEV void adam_four(const rates &r, double root, double steps, const T *g, T *p, T *m, T *v) {
  const T shrink = (T)r.shrink, wd = (T)r.weight_decay, weight = (T)r.weight, beta2 = (T)r.beta2, rest2 = (T)r.rest2,
          eps = (T)r.eps;
  const T root2 = (T)root, step = (T)steps;
  const bool shrinks = r.decoupled && r.decay, adds = r.decay && !r.decoupled;
#pragma unroll
  for (int j = 0; j < FOUR; j++) {
    const T w = shrinks ? p[j] * shrink : p[j];
    const T d = decayed(g[j], w, wd, adds, r.maximize);
    const T m1 = r.near ? m[j] + weight * (d - m[j]) : d - (d - m[j]) * ((T)1 - weight);
    const T v1 = v[j] * beta2 + rest2 * d * d;
    m[j] = m1;
    v[j] = v1;
    p[j] = w + step * m1 / ((sizeof(T) == 4 ? (T)sqrtf((float)v1) : (T)sqrt((double)v1)) / root2 + eps);
  }
}

/* What a device-side step makes for all threads of a block. */
struct step_values {
  double root2, step;
  int first;
};

HM_DEV step_values step_of(const batch &t, const rates &r, bool adam) {
  step_values s = {r.root2, r.step, r.first};
  if (!t.found || r.attempt == 0) return s;
  const double n = (double)(r.attempt - t.found->skipped);
  s.first = n <= 1;
  if (adam) {
    s.root2 = sqrt(1 - pow(r.beta2, n));
    s.step = -(r.lr / (1 - pow(r.beta1, n)));
  }
  return s;
}

template <class T, bool ADAM> HM_DEV void update_chunk(const batch &t, const rates &r, const step_values &now, int i) {
  const entry &e = t.item[i];
  const T inv = (T)inverse_scale(t), mul = (T)gradient_factor(t);
  const bool scales = inv != (T)1, clips = mul != (T)1, run = runs(t, i);
  const bool has_buffer = ADAM || e.state[0] != nullptr;
  each_four(e, [&](int64_t at, int left) {
    T g[FOUR], p[FOUR], s0[FOUR], s1[FOUR];
    load_four(e.grad, e.grad_dtype, at, left, run, g);
    load_four(e.param, e.param_dtype, at, left, run, p);
    if (has_buffer && (ADAM || !now.first)) load_four(e.state[0], e.state_dtype, at, left, run, s0);
    if (ADAM) load_four(e.state[1], e.state_dtype, at, left, run, s1);
#pragma unroll
    for (int j = 0; j < FOUR; j++) {
      if (scales) g[j] = g[j] * inv;
      if (clips) g[j] = g[j] * mul;
    }
    if (scales || clips) store_four(e.grad, e.grad_dtype, at, left, run, g);
    if constexpr (ADAM) adam_four(r, now.root2, now.step, g, p, s0, s1);
    else sgd_four(r, now.first != 0, has_buffer, g, p, s0);
    store_four(e.param, e.param_dtype, at, left, run, p);
    if (has_buffer) store_four(e.state[0], e.state_dtype, at, left, run, s0);
    if (ADAM) store_four(e.state[1], e.state_dtype, at, left, run, s1);
    if (e.low) store_four(e.low, e.low_dtype, at, left, run, p);
  });
}

template <bool ADAM> static __global__ void __launch_bounds__(HM_BLOCK, 2) update_blocks(batch t, rates r) {
  HM_SHARED(step_values, now, );
  if (t.found && t.found->found_inf) return; /* the same for all threads */
  if (threadIdx.x == 0) now = step_of(t, r, ADAM);
  HM_BARRIER();
  const int i = item_of(t, blockIdx.x);
  if (t.item[i].param_dtype == HM_F64) update_chunk<double, ADAM>(t, r, now, i);
  else update_chunk<float, ADAM>(t, r, now, i);
}

/* After all updates of a device-side step. */
static __global__ void end_step(hm_cuda_found *found) {
  if (found->found_inf) found->skipped++;
  found->unscaled = 0;
}

static __global__ void update_scaler(hm_cuda_scaler *s, double growth, double backoff, int32_t interval, double low,
                                     double high) {
  double scale = s->scale;
  s->updates++;
  if (s->found_inf) {
    scale = scale * backoff;
    s->clean = 0;
    s->overflows++;
  } else if (++s->clean >= interval) {
    const double grown = scale * growth;
    if (grown <= (double)FLT_MAX) scale = grown;
    s->clean = 0;
  }
  if (low > 0 && scale < low) scale = low;
  if (high > 0 && scale > high) scale = high;
  s->scale = (double)(float)scale;
  s->found_inf = 0;
}

/* ====== Scratch memory ====== */

/* Device memory for one call, in the order of the stream where the device has pools. */
struct scratch {
  void *data;
  bool pooled;
};

static int take_scratch(scratch *s, size_t bytes, void *stream) {
  s->data = NULL;
  s->pooled = true;
  cudaError_t e = cudaMallocAsync(&s->data, bytes, (cudaStream_t)stream);
  if (e == cudaErrorNotSupported) {
    (void)cudaGetLastError();
    s->pooled = false;
    e = cudaMalloc(&s->data, bytes);
  }
  if (e == cudaSuccess) return HM_OK;
  if (e != cudaErrorMemoryAllocation) return hm_cuda_status(e, "multi-tensor pass");
  (void)cudaGetLastError();
  return hm_cuda_fail(HM_ERR_MEMORY, "out of memory: %zu bytes of scratch for the check of gradients", bytes);
}

static int give_scratch(const scratch *s, void *stream, int status) {
  const cudaError_t e = s->pooled ? cudaFreeAsync(s->data, (cudaStream_t)stream) : cudaFree(s->data);
  return status != HM_OK ? status : hm_cuda_status(e, "multi-tensor pass");
}

/* ====== Batches ====== */

static const char *const NAME = "multi-tensor pass";

static bool dense_run(const void *data, int dtype) {
  return !data || ((dtype == HM_F32 || dtype == HM_F16 || dtype == HM_BF16) && hm_runs_align(data, dtype, FOUR));
}

static int64_t blocks_of(const hm_multi_item *m) { return (m->numel + CHUNK - 1) / CHUNK; }

/* Puts an item into the batch; `gradient_only`: the passes that touch nothing else. */
static void put_item(batch *t, const hm_multi_item *m, uint32_t first, bool gradient_only) {
  entry *e = &t->item[t->n];
  memset(e, 0, sizeof *e);
  e->grad = m->grad, e->grad_dtype = (int8_t)m->grad_dtype;
  e->numel = m->numel;
  e->first = first;
  bool run = dense_run(m->grad, m->grad_dtype);
  if (!gradient_only) {
    e->param = m->param, e->param_dtype = (int8_t)m->param_dtype;
    e->low = m->low, e->low_dtype = (int8_t)m->low_dtype;
    e->state[0] = m->state[0], e->state[1] = m->state[1], e->state_dtype = (int8_t)m->state_dtype;
    run = run && dense_run(m->param, m->param_dtype) && dense_run(m->low, m->low_dtype) &&
          dense_run(m->state[0], m->state_dtype) && dense_run(m->state[1], m->state_dtype);
  }
  if (run) t->runs |= (uint64_t)1 << t->n;
  t->n++;
}

/* Calls run(batch, blocks, index of its first item, group) for all items in order; `by_group`: a batch has items
 * of one group only. */
template <class F>
static int each_batch(const hm_multi_call *call, batch *t, bool gradient_only, bool by_group, F run) {
  for (int32_t i = 0; i < call->n;) {
    const int32_t from = i;
    int64_t blocks = 0;
    t->n = 0;
    t->runs = 0;
    while (i < call->n && t->n < ITEMS && (!by_group || call->item[i].group == call->item[from].group)) {
      if (blocks + blocks_of(&call->item[i]) > INT32_MAX) {
        if (t->n > 0) break;
        return hm_cuda_fail(HM_ERR_UNSUPPORTED, "%s: a parameter is too large", NAME);
      }
      put_item(t, &call->item[i], (uint32_t)blocks, gradient_only);
      blocks += blocks_of(&call->item[i++]);
    }
    const int status = run((uint32_t)blocks, from, call->item[from].group);
    if (status != HM_OK) return status;
  }
  return HM_OK;
}

static int64_t all_blocks(const hm_multi_call *call) {
  int64_t blocks = 0;
  for (int32_t i = 0; i < call->n; i++) blocks += blocks_of(&call->item[i]);
  return blocks;
}

/* Pass 1 into stat[] on the device; `part` has room for all blocks. */
static int queue_check(const hm_multi_call *call, batch *t, hm_multi_stat *part, hm_multi_stat *stat) {
  const bool write = call->op == HM_MULTI_UNSCALE;
  const limits most = {{65520.0, 0x1.ffp127, (double)INFINITY}};
  return each_batch(call, t, true, false, [&](uint32_t blocks, int32_t from, int) {
    int status = HM_OK;
    if (blocks > 0) status = HM_RUN(NAME, check_blocks, blocks, HM_BLOCK, 0, call->stream, *t, write, most, part);
    if (status == HM_OK)
      status = HM_RUN(NAME, check_items, (unsigned)t->n, HM_BLOCK, 0, call->stream, *t, part, blocks, stat + from);
    part += blocks;
    return status;
  });
}

/* The constants of a group; attempt: 0, or which step() call this is by the host's count (the device then makes
 * the bias corrections). */
static rates rates_of(const hm_multi_group *h, int64_t attempt) {
  rates r;
  memset(&r, 0, sizeof r);
  r.weight_decay = h->weight_decay, r.momentum = h->momentum, r.keep = 1 - h->dampening, r.minus_lr = -h->lr;
  r.shrink = 1 - h->lr * h->weight_decay, r.weight = 1 - h->beta1, r.beta1 = h->beta1, r.beta2 = h->beta2,
  r.rest2 = 1 - h->beta2;
  r.eps = h->eps, r.lr = h->lr;
  r.decay = h->weight_decay != 0;
  r.nesterov = h->nesterov, r.maximize = h->maximize, r.decoupled = h->decoupled, r.first = h->first;
  r.near = 1 - h->beta1 < 0.5;
  r.attempt = attempt;
  if (attempt == 0) {
    r.root2 = sqrt(h->bias_correction2);
    r.step = -(h->lr / h->bias_correction1);
  }
  return r;
}

static int queue_update(const hm_multi_call *call, batch *t, const int64_t *attempt) {
  return each_batch(call, t, false, true, [&](uint32_t blocks, int32_t, int group) {
    if (blocks == 0) return (int)HM_OK;
    const rates r = rates_of(&call->group[group], attempt ? attempt[group] : 0);
    if (call->op == HM_MULTI_ADAM) return HM_RUN(NAME, (update_blocks<true>), blocks, HM_BLOCK, 0, call->stream, *t, r);
    return HM_RUN(NAME, (update_blocks<false>), blocks, HM_BLOCK, 0, call->stream, *t, r);
  });
}

static void start_batch(batch *t, const hm_multi_call *call) {
  memset(t, 0, sizeof *t);
  t->inv_scale = call->inv_scale;
  t->grad_mul = call->grad_mul;
}

/* ====== Entries ====== */

/* CHECK and UNSCALE with the result on the host. */
static int check_and_wait(const hm_multi_call *call) {
  if (call->n == 0) return HM_OK;
  batch t;
  scratch s;
  start_batch(&t, call);
  const size_t stats = (size_t)call->n * sizeof(hm_multi_stat);
  int status = take_scratch(&s, stats + (size_t)all_blocks(call) * sizeof(hm_multi_stat), call->stream);
  if (status != HM_OK) return status;
  hm_multi_stat *const stat = static_cast<hm_multi_stat *>(s.data);
  status = queue_check(call, &t, stat + call->n, stat);
  if (status == HM_OK) status = hm_cuda_mem_to_host(call->stat, stat, stats, call->stream);
  return give_scratch(&s, call->stream, status);
}

extern "C" int hm_cuda_multi_tensor(const hm_multi_call *call) {
  batch t;
  start_batch(&t, call);
  switch (call->op) {
  case HM_MULTI_CHECK:
  case HM_MULTI_UNSCALE: return check_and_wait(call);
  case HM_MULTI_SCALE:
    if (call->grad_mul == 1.0) return HM_OK;
    return each_batch(call, &t, true, false, [&](uint32_t blocks, int32_t, int) {
      return blocks ? HM_RUN(NAME, scale_blocks, blocks, HM_BLOCK, 0, call->stream, t) : (int)HM_OK;
    });
  case HM_MULTI_SGD:
  case HM_MULTI_ADAM: return queue_update(call, &t, NULL);
  default: return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no multi-tensor op %d", (int)call->op);
  }
}

extern "C" int hm_cuda_check_async(const hm_multi_call *call, const hm_cuda_async *a) {
  if (call->op != HM_MULTI_CHECK && call->op != HM_MULTI_UNSCALE)
    return hm_cuda_fail(HM_ERR_ARG, "%s: the check is CHECK or UNSCALE, not op %d", NAME, (int)call->op);
  batch t;
  scratch s;
  start_batch(&t, call);
  t.scaler = a->scaler;
  t.found = a->found;
  const size_t stats = a->stat ? 0 : (size_t)call->n;
  int status = take_scratch(&s, (stats + (size_t)all_blocks(call) + 1) * sizeof(hm_multi_stat), call->stream);
  if (status != HM_OK) return status;
  hm_multi_stat *const room = static_cast<hm_multi_stat *>(s.data), *const stat = a->stat ? a->stat : room;
  status = queue_check(call, &t, room + stats, stat);
  if (status == HM_OK)
    status = HM_RUN(NAME, check_all, 1, HM_BLOCK, 0, call->stream, stat, call->n, a->scaler, a->found,
                    call->op == HM_MULTI_UNSCALE);
  return give_scratch(&s, call->stream, status);
}

extern "C" int hm_cuda_update_async(const hm_multi_call *call, const hm_cuda_async *a) {
  if (call->op != HM_MULTI_SGD && call->op != HM_MULTI_ADAM)
    return hm_cuda_fail(HM_ERR_ARG, "%s: the update is SGD or ADAM, not op %d", NAME, (int)call->op);
  batch t;
  start_batch(&t, call);
  t.scaler = a->scaler;
  t.found = a->found;
  t.max_norm = a->max_norm;
  const int status = queue_update(call, &t, a->attempt);
  return status != HM_OK ? status : HM_RUN(NAME, end_step, 1, 1, 0, call->stream, a->found);
}

extern "C" int hm_cuda_scaler_update(hm_cuda_scaler *scaler, double growth_factor, double backoff_factor,
                                     int32_t growth_interval, double min_scale, double max_scale, void *stream) {
  return HM_RUN("scale update", update_scaler, 1, 1, 0, stream, scaler, growth_factor, backoff_factor, growth_interval,
                min_scale, max_scale);
}
