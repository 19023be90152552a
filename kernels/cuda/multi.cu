/*
 * multi.cu -- the scaler's and the optimizers' passes over all parameters at once.
 *
 * Up to 40 parameters go into one launch by value; each block takes 16,384 elements of one of them, four neighbours a
 * thread at a time.  The updates' rules are the CPU's (kernels/rules.h), to the bit where both compute in the same type.
 *
 * Pass 1 leaves counts, the largest value and the sum of squares of each block in scratch memory; a second kernel
 * adds them by parameter in order. Squares are added in float32 by fours and in double from there on; a four with a
 * value that is not finite, or whose squares would leave float32's range, is done one value at a time in double.
 *
 * Late passes (kernels.h: hm_late) are the same kernels: they read the scale, the flag and the norm from device
 * memory, skip themselves, and count what they did.
 */
#include "group.h"

#include "backend.h"
#include "rules.h"

enum { ITEMS = 40, STATES = 3, CHUNK = 16384, FOUR = 4 };

/* A parameter, as kernels see it.  Launches take 4 KiB of arguments at most. */
struct entry {
  void *grad, *param, *low, *lost, *state[STATES];
  int64_t *done; /* late updates: counts those of this parameter */
  int64_t numel;
  uint64_t counter; /* of Philox; `chance` has a bit for each item that is rounded by it */
  uint32_t first;   /* block of the launch that takes its first chunk */
  int8_t grad_dtype, param_dtype, low_dtype, state_dtype;
};

/* What all kernels get.  With `late` the factors and the flag come from the device (kernels.h: hm_late). */
struct batch {
  entry item[ITEMS];
  int32_t n;
  uint64_t runs; /* a bit for each item: its memory may be taken by fours */
  uint64_t chance, seed;
  double inv_scale, grad_mul, max_norm;
  bool late;
  const hm_scale_cell *cell;
  const hm_late_found *found, *norm;
};

static_assert(sizeof(batch) + sizeof(hm_rates) < 4000, "too much for a launch");

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
  if (!t.late) return t.inv_scale;
  return t.cell ? 1.0 / t.cell->scale : 1.0;
}

/* The norm of all gradients that a check saw. */
HM_DEV double norm_of(const hm_multi_stat &s) {
  return s.nan_count > 0 ? (double)NAN : s.inf_count > 0 ? (double)INFINITY : sqrt(s.sum_sq);
}

/* The caller's factor; late: clipping by the norm that a check found.  NaN stays NaN. */
HM_DEV double gradient_factor(const batch &t) {
  if (!t.norm) return t.grad_mul;
  const double coef = t.max_norm / (norm_of(t.norm->total) + 1e-6);
  return coef > 1 ? 1.0 : coef;
}

HM_DEV bool skips(const batch &t) { return t.late && t.found && t.found->found_inf != 0; }

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

/* Where an unscaled value counts in a histogram (kernels.h: HM_HISTOGRAM); -1: it is not finite when written. */
HM_DEV int bin_of(float u, double limit) {
  const uint32_t bits = hm_f32_bits(u) & 0x7fffffffu;
  if (!((double)hm_bits_f32(bits) < limit)) return -1;
  const int exponent = (int)(bits >> 23);
  return exponent > 0 ? exponent : bits ? (int)HM_HISTOGRAM_SUBNORMALS : (int)HM_HISTOGRAM_ZEROS;
}

HM_DEV int bin_of(double u, double) {
  int exponent;
  if (!(fabs(u) <= DBL_MAX)) return -1;
  if (u == 0) return HM_HISTOGRAM_ZEROS;
  (void)frexp(u, &exponent);
  return exponent < -125 ? (int)HM_HISTOGRAM_SUBNORMALS : exponent > 128 ? 254 : exponent + 126;
}

/* bins: the block's counts, or NULL. */
template <class T>
HM_DEV hm_multi_stat check_chunk(const batch &t, int i, bool write, double limit, unsigned int *bins) {
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
    for (int j = 0; bins && j < left && j < FOUR; j++) {
      const int bin = bin_of(u[j], change ? limit : (double)INFINITY);
      if (bin >= 0) atomicAdd(&bins[bin], 1u);
    }
    if (change) store_four(e.grad, e.grad_dtype, at, left, runs(t, i), u);
  });
  return join_stat(s);
}

HM_DEV void check_block(const batch &t, int i, bool write, const limits &most, hm_multi_stat *part,
                        unsigned int *bins) {
  const int dtype = t.item[i].grad_dtype;
  const double limit = dtype == HM_F16 ? most.by_dtype[0] : dtype == HM_BF16 ? most.by_dtype[1] : most.by_dtype[2];
  const hm_multi_stat s =
      dtype == HM_F64 ? check_chunk<double>(t, i, write, limit, bins) : check_chunk<float>(t, i, write, limit, bins);
  if (threadIdx.x == 0) part[blockIdx.x] = s;
}

/* Statistics of each block into part[block]; `write`: the gradient becomes the unscaled one. */
static __global__ void __launch_bounds__(HM_BLOCK, 2)
    check_blocks(batch t, bool write, limits most, hm_multi_stat *part) {
  check_block(t, item_of(t, blockIdx.x), write, most, part, NULL);
}

/* The same, and exponents added to histogram[item]: whole numbers, so the order does not matter. */
static __global__ void __launch_bounds__(HM_BLOCK, 2)
    count_blocks(batch t, bool write, limits most, hm_multi_stat *part, unsigned long long *histogram) {
  HM_SHARED(unsigned int, bins, [HM_HISTOGRAM]);
  for (int b = (int)threadIdx.x; b < HM_HISTOGRAM; b += HM_BLOCK) bins[b] = 0;
  HM_BARRIER();
  const int i = item_of(t, blockIdx.x);
  check_block(t, i, write, most, part, bins);
  HM_BARRIER();
  for (int b = (int)threadIdx.x; b < HM_HISTOGRAM; b += HM_BLOCK)
    if (bins[b]) atomicAdd(&histogram[(int64_t)i * HM_HISTOGRAM + b], (unsigned long long)bins[b]);
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

/* Squares of all items, added one by one as the host does it: the same bits with and without a wait.  In thread 0. */
HM_DEV double sum_in_order(const hm_multi_stat *stat, int32_t n) {
  HM_SHARED(double, part, [HM_BLOCK]);
  double sum = 0;
  for (int32_t from = 0; from < n; from += HM_BLOCK) {
    const int32_t left = n - from < (int32_t)HM_BLOCK ? n - from : (int32_t)HM_BLOCK;
    if ((int32_t)threadIdx.x < left) part[threadIdx.x] = stat[from + (int32_t)threadIdx.x].sum_sq;
    HM_BARRIER();
    if (threadIdx.x == 0)
      for (int32_t j = 0; j < left; j++) sum += part[j];
    HM_BARRIER();
  }
  return sum;
}

/* All items together, by one block: into the check's record, and into the round's. */
static __global__ void __launch_bounds__(HM_BLOCK, 2)
    check_all(const hm_multi_stat *stat, int32_t n, const hm_scale_cell *cell, hm_late_found *found,
              hm_scale_event *event, bool begin, float *norm_out) {
  hm_multi_stat s = empty_stat();
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += HM_BLOCK) add_stat(&s, stat[i]);
  s = join_stat(s);
  s.sum_sq = sum_in_order(stat, n);
  if (threadIdx.x != 0) return;
  found->total = s;
  found->scale = cell ? cell->scale : 1.0;
  found->found_inf = s.inf_count + s.nan_count > 0;
  if (norm_out) *norm_out = (float)norm_of(s);
  if (!event) return;
  hm_multi_stat all = empty_stat();
  if (begin) event->scale = found->scale;
  else all = event->total;
  add_stat(&all, s);
  event->total = all;
}

/* ====== SCALE, CLAMP ====== */

template <class T> HM_DEV void scale_chunk(const batch &t, int i, bool clamps) {
  const entry &e = t.item[i];
  const double factor = gradient_factor(t);
  const T mul = (T)factor;
  if (factor == 1.0 && !clamps) return;
  each_four(e, [&](int64_t at, int left) {
    T g[FOUR];
    load_four(e.grad, e.grad_dtype, at, left, runs(t, i), g);
#pragma unroll
    for (int j = 0; j < FOUR; j++) g[j] = !clamps ? g[j] * mul : g[j] > mul ? mul : g[j] < -mul ? -mul : g[j];
    store_four(e.grad, e.grad_dtype, at, left, runs(t, i), g);
  });
}

static __global__ void __launch_bounds__(HM_BLOCK, 2) scale_blocks(batch t, bool clamps) {
  const int i = item_of(t, blockIdx.x);
  if (t.item[i].grad_dtype == HM_F64) scale_chunk<double>(t, i, clamps);
  else scale_chunk<float>(t, i, clamps);
}

/* ====== Pass 2 ====== */

/* A rule of rules.h; `most`: states that it may have, `extra`: the first one that makes it the longer form. */
#define DEFINE_RULE(name, which, most, extra)                                                                          \
  struct name {                                                                                                        \
    static constexpr hm_multi_op op = which;                                                                           \
    static constexpr int states = most, longer = extra;                                                                \
    HM_DEV float run(const hm_rates *r, bool more, float g, float p, float *s) {                                       \
      return hm_##name##_f32(r, more, g, p, s);                                                                        \
    }                                                                                                                  \
    HM_DEV double run(const hm_rates *r, bool more, double g, double p, double *s) {                                   \
      return hm_##name##_f64(r, more, g, p, s);                                                                        \
    }                                                                                                                  \
  };
DEFINE_RULE(sgd, HM_MULTI_SGD, 1, 0)
DEFINE_RULE(adam, HM_MULTI_ADAM, 3, 2)
DEFINE_RULE(rmsprop, HM_MULTI_RMSPROP, 3, 1)
DEFINE_RULE(adagrad, HM_MULTI_ADAGRAD, 1, 1)
DEFINE_RULE(lion, HM_MULTI_LION, 1, 1)

/* Half parameters with more than their own bits: what rounding took is kept, or it goes by chance. */
HM_DEV void add_lost(const entry &e, int64_t at, int left, bool run, float *p) {
  float lost[FOUR];
  load_four(e.lost, e.param_dtype, at, left, run, lost);
#pragma unroll
  for (int j = 0; j < FOUR; j++) p[j] += lost[j];
}

HM_DEV void keep_lost(const entry &e, int64_t at, int left, bool run, const float *p) {
  float lost[FOUR];
#pragma unroll
  for (int j = 0; j < FOUR; j++)
    lost[j] = hm_lost(p[j], e.param_dtype == HM_BF16 ? hm_dev_bf16_to_f32(hm_dev_f32_to_bf16(p[j]))
                                                     : hm_dev_f16_to_f32(hm_dev_f32_to_f16(p[j])));
  store_four(e.lost, e.param_dtype, at, left, run, lost);
}

HM_DEV void round_four(const batch &t, const entry &e, int64_t at, float *p) {
  uint32_t word[FOUR];
  hm_philox_words(word, t.seed, e.counter + (uint64_t)at / FOUR, 0);
#pragma unroll
  for (int j = 0; j < FOUR; j++) p[j] = hm_round_by_chance(p[j], e.param_dtype, word[j]);
}

template <class T, class R> HM_DEV void update_chunk(const batch &t, const hm_rates &r, int i) {
  const entry &e = t.item[i];
  const T inv = (T)inverse_scale(t), mul = (T)gradient_factor(t);
  const bool scales = inv != (T)1, clips = mul != (T)1, run = runs(t, i), chance = t.chance >> i & 1u;
  bool more = false;
#pragma unroll
  for (int k = R::longer; k < R::states; k++) more = more || e.state[k];
  each_four(e, [&](int64_t at, int left) {
    T g[FOUR], p[FOUR], s[R::states][FOUR];
    load_four(e.grad, e.grad_dtype, at, left, run, g);
    load_four(e.param, e.param_dtype, at, left, run, p);
#pragma unroll
    for (int k = 0; k < R::states; k++) {
      if (e.state[k]) load_four(e.state[k], e.state_dtype, at, left, run, s[k]);
      else s[k][0] = s[k][1] = s[k][2] = s[k][3] = 0;
    }
    if constexpr (sizeof(T) == 4)
      if (e.lost) add_lost(e, at, left, run, p);
#pragma unroll
    for (int j = 0; j < FOUR; j++) {
      T mine[R::states];
      if (scales) g[j] = g[j] * inv;
      if (clips) g[j] = g[j] * mul;
#pragma unroll
      for (int k = 0; k < R::states; k++) mine[k] = s[k][j];
      p[j] = R::run(&r, more, g[j], p[j], mine);
#pragma unroll
      for (int k = 0; k < R::states; k++) s[k][j] = mine[k];
    }
    if (scales || clips) store_four(e.grad, e.grad_dtype, at, left, run, g);
    if constexpr (sizeof(T) == 4) {
      if (chance) round_four(t, e, at, p);
      if (e.lost) keep_lost(e, at, left, run, p);
    }
    store_four(e.param, e.param_dtype, at, left, run, p);
#pragma unroll
    for (int k = 0; k < R::states; k++)
      if (e.state[k]) store_four(e.state[k], e.state_dtype, at, left, run, s[k]);
    if (e.low) store_four(e.low, e.low_dtype, at, left, run, p);
  });
}

/* What a late update makes for all threads of a block. */
struct step_values {
  double root2, step, carry, keep;
};

template <class R> static __global__ void __launch_bounds__(HM_BLOCK, 2) update_blocks(batch t, hm_rates r) {
  HM_SHARED(step_values, now, );
  if (skips(t)) return; /* the same for all threads */
  const int i = item_of(t, blockIdx.x);
  if (t.late) {
    if (threadIdx.x == 0) {
      hm_rates_late(&r, R::op, *t.item[i].done);
      now.root2 = r.root2, now.step = r.step, now.carry = r.carry, now.keep = r.keep;
    }
    HM_BARRIER();
    r.root2 = now.root2, r.step = now.step, r.carry = now.carry, r.keep = now.keep;
  }
  if (t.item[i].param_dtype == HM_F64) update_chunk<double, R>(t, r, i);
  else update_chunk<float, R>(t, r, i);
}

/* After all late updates of a call. */
static __global__ void __launch_bounds__(HM_BLOCK, 2) count_done(batch t) {
  if ((int)threadIdx.x < t.n && !skips(t)) ++*t.item[threadIdx.x].done;
}

/* ====== The scale ====== */

/* PyTorch's rule, as amp/policies/dynamic.lua has it. */
HM_DEV double ruled_scale(const hm_scale_step &s, hm_scale_cell *to, bool bad) {
  if (bad) {
    to->clean = 0;
    return to->scale * s.backoff;
  }
  if (s.interval <= 0 || ++to->clean < s.interval) return to->scale;
  to->clean = 0;
  const double grown = to->scale * s.growth;
  return grown <= (double)FLT_MAX ? grown : to->scale;
}

HM_DEV double held_scale(const hm_scale_step &s, double scale) {
  return scale < s.min ? s.min : scale > s.max ? s.max : scale;
}

static __global__ void move_scale(hm_scale_step s) {
  const hm_scale_cell from = *s.from;
  hm_scale_cell to = from;
  hm_scale_event *const e = s.event;
  if (e && s.blank) {
    e->total.inf_count = e->total.nan_count = 0;
    e->total.sum_sq = e->total.amax = 0;
    e->scale = from.scale;
  }
  const bool bad = e && e->total.inf_count + e->total.nan_count > 0;
  if (bad) to.overflows++;
  double wanted = from.scale;
  if (s.set > 0) wanted = s.set;
  else if (e && !s.blank) wanted = ruled_scale(s, &to, bad);
  to.scale = held_scale(s, wanted);
  if (s.heard >= 0)
    for (int64_t k = s.heard; k < to.overflows; k++) to.scale = held_scale(s, to.scale * s.backoff);
  *s.to = to;
  *s.to32 = (float)to.scale;
  if (!e) return;
  e->old_scale = from.scale;
  e->wanted = wanted;
  e->new_scale = to.scale;
  e->overflows = to.overflows;
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
    e->lost = m->lost, e->state_dtype = (int8_t)m->state_dtype;
    run = run && dense_run(m->param, m->param_dtype) && dense_run(m->low, m->low_dtype) &&
          dense_run(m->lost, m->param_dtype);
    for (int k = 0; k < STATES; k++) {
      e->state[k] = m->state[k];
      run = run && dense_run(m->state[k], m->state_dtype);
    }
    e->counter = m->counter;
    if (m->by_chance) t->chance |= (uint64_t)1 << t->n;
  }
  if (run) t->runs |= (uint64_t)1 << t->n;
  t->n++;
}

/* Calls run(batch, blocks, index of its first item, group) for all items in order; `by_group`: a batch has items
 * of one group only; late: of an update, else NULL. */
template <class F>
static int each_batch(const hm_multi_call *call, batch *t, const hm_late *late, bool gradient_only, bool by_group,
                      F run) {
  for (int32_t i = 0; i < call->n;) {
    const int32_t from = i;
    int64_t blocks = 0;
    t->n = 0;
    t->runs = t->chance = 0;
    while (i < call->n && t->n < ITEMS && (!by_group || call->item[i].group == call->item[from].group)) {
      if (blocks + blocks_of(&call->item[i]) > INT32_MAX) {
        if (t->n > 0) break;
        return hm_cuda_fail(HM_ERR_UNSUPPORTED, "%s: a parameter is too large", NAME);
      }
      put_item(t, &call->item[i], (uint32_t)blocks, gradient_only);
      if (late) t->item[t->n - 1].done = late->done + late->index[i];
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

/* Pass 1 into stat[] on the device; `part` has room for all blocks; histogram: zeros, on the device, or NULL. */
static int queue_check(const hm_multi_call *call, batch *t, hm_multi_stat *part, hm_multi_stat *stat,
                       unsigned long long *histogram) {
  const bool write = call->op == HM_MULTI_UNSCALE;
  const limits most = {{65520.0, 0x1.ffp127, (double)INFINITY}};
  return each_batch(call, t, NULL, true, false, [&](uint32_t blocks, int32_t from, int) {
    int status = HM_OK;
    if (blocks > 0 && histogram)
      status = HM_RUN(NAME, count_blocks, blocks, HM_BLOCK, 0, call->stream, *t, write, most, part,
                      histogram + (int64_t)from * HM_HISTOGRAM);
    else if (blocks > 0) status = HM_RUN(NAME, check_blocks, blocks, HM_BLOCK, 0, call->stream, *t, write, most, part);
    if (status == HM_OK)
      status = HM_RUN(NAME, check_items, (unsigned)t->n, HM_BLOCK, 0, call->stream, *t, part, blocks, stat + from);
    part += blocks;
    return status;
  });
}

template <class R> static int queue_rule(const hm_multi_call *call, batch *t, const hm_late *late) {
  return each_batch(call, t, late, false, true, [&](uint32_t blocks, int32_t, int group) {
    if (blocks == 0) return (int)HM_OK;
    return HM_RUN(NAME, (update_blocks<R>), blocks, HM_BLOCK, 0, call->stream, *t, hm_rates_of(&call->group[group]));
  });
}

static int queue_update(const hm_multi_call *call, batch *t, const hm_late *late) {
  t->seed = call->seed;
  switch (call->op) {
  case HM_MULTI_SGD: return queue_rule<sgd>(call, t, late);
  case HM_MULTI_ADAM: return queue_rule<adam>(call, t, late);
  case HM_MULTI_RMSPROP: return queue_rule<rmsprop>(call, t, late);
  case HM_MULTI_ADAGRAD: return queue_rule<adagrad>(call, t, late);
  case HM_MULTI_LION: return queue_rule<lion>(call, t, late);
  default: return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no multi-tensor op %d", (int)call->op);
  }
}

/* SCALE, CLAMP */
static int queue_scale(const hm_multi_call *call, batch *t) {
  return each_batch(call, t, NULL, true, false, [&](uint32_t blocks, int32_t, int) {
    if (blocks == 0) return (int)HM_OK;
    return HM_RUN(NAME, scale_blocks, blocks, HM_BLOCK, 0, call->stream, *t, call->op == HM_MULTI_CLAMP);
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
  const size_t counts = call->histogram ? (size_t)call->n * HM_HISTOGRAM * sizeof *call->histogram : 0;
  int status = take_scratch(&s, counts + stats + (size_t)all_blocks(call) * sizeof(hm_multi_stat), call->stream);
  if (status != HM_OK) return status;
  unsigned long long *const histogram = counts ? static_cast<unsigned long long *>(s.data) : NULL;
  hm_multi_stat *const stat = reinterpret_cast<hm_multi_stat *>(static_cast<char *>(s.data) + counts);
  if (histogram) status = hm_cuda_status(cudaMemsetAsync(histogram, 0, counts, (cudaStream_t)call->stream), NAME);
  if (status == HM_OK) status = queue_check(call, &t, stat + call->n, stat, histogram);
  if (status == HM_OK) status = hm_cuda_mem_to_host(call->stat, stat, stats, call->stream);
  if (status == HM_OK && histogram) status = hm_cuda_mem_to_host(call->histogram, histogram, counts, call->stream);
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
    return queue_scale(call, &t);
  case HM_MULTI_CLAMP: return queue_scale(call, &t);
  default: return queue_update(call, &t, NULL);
  }
}

/* CHECK and UNSCALE with the result on the device. */
static int late_check(const hm_multi_call *call, const hm_late *late, batch *t) {
  scratch s;
  const size_t parts = (size_t)all_blocks(call) + 1;
  const int status = take_scratch(&s, parts * sizeof(hm_multi_stat), call->stream);
  if (status != HM_OK) return status;
  hm_multi_stat *const stat = reinterpret_cast<hm_multi_stat *>(late->found + 1);
  int result = queue_check(call, t, static_cast<hm_multi_stat *>(s.data), stat, NULL);
  if (result == HM_OK)
    result = HM_RUN(NAME, check_all, 1, HM_BLOCK, 0, call->stream, stat, call->n, late->cell, late->found, late->event,
                    late->begin, late->norm_out);
  return give_scratch(&s, call->stream, result);
}

/* The updates, then their count. */
static int late_update(const hm_multi_call *call, const hm_late *late, batch *t) {
  const int status = queue_update(call, t, late);
  if (status != HM_OK) return status;
  return each_batch(call, t, late, true, false,
                    [&](uint32_t, int32_t, int) { return HM_RUN(NAME, count_done, 1, HM_BLOCK, 0, call->stream, *t); });
}

extern "C" int hm_cuda_late_tensor(const hm_multi_call *call, const hm_late *late) {
  batch t;
  memset(&t, 0, sizeof t);
  t.late = true;
  t.grad_mul = 1;
  t.cell = late->cell;
  t.found = late->found;
  t.norm = late->norm;
  t.max_norm = late->max_norm;
  switch (call->op) {
  case HM_MULTI_CHECK:
  case HM_MULTI_UNSCALE: return late_check(call, late, &t);
  case HM_MULTI_SCALE: return queue_scale(call, &t);
  default: return late_update(call, late, &t);
  }
}

extern "C" int hm_cuda_late_scale(const hm_scale_step *step, void *stream) {
  return HM_RUN("the scale's step", move_scale, 1, 1, 0, stream, *step);
}
