/*
 * reduce.cu -- sum, mean, amax, amin, any, all, bias gradients; max_dim, min_dim, argmax, argmin.
 *
 * A plan splits the input's dims into kept and reduced ones and joins what lies together.  Then one of two kernels
 * runs:
 *   rows      each result by a warp, or by a block where it has many elements; neighbours are read by neighbours
 *   columns   the innermost kept dim is dense: a block takes 32 columns, its 8 warps every eighth row each
 * Where there are too few results to fill the device, the reduced elements are cut into chunks, whose results meet in
 * the workspace and are joined by a third kernel.  All of it depends on shapes and strides only: the order of the
 * additions, and so the bits, never change.
 *
 * Accumulates in float32, float64 or int64 (modulo 2^64).  Uses its workspace, owns nothing.
 */
#include "group.h"

/* ====== What is reduced: a value and how two become one ====== */

enum { AHEAD = 4 }; /* elements that a thread reads at once */

/* A value with its place.  The first NaN wins, else the first of the best. */
template <class T> struct placed {
  T value;
  int64_t place;
};

template <class T> HM_DEV placed<T> hm_shuffle_down(placed<T> x, int by) {
  placed<T> y;
  y.value = hm_shuffle_down(x.value, by);
  y.place = hm_shuffle_down(x.place, by);
  return y;
}

template <class T> HM_DEV placed<T> hm_first_lane(placed<T> x) {
  placed<T> y;
  y.value = hm_first_lane(x.value);
  y.place = hm_first_lane(x.place);
  return y;
}

/* The type that sums of T are kept in: integers wrap. */
template <class T> struct sum_type { typedef T type; };
template <> struct sum_type<int64_t> { typedef uint64_t type; };

template <class T> struct op_sum {
  typedef typename sum_type<T>::type acc;
  HM_DEV acc identity() { return (acc)0; }
  typedef T raw;
  HM_DEV void load(const void *x, int dtype, const int64_t *at, raw *v) { hm_load_many<AHEAD>(x, dtype, at, v); }
  HM_DEV acc take(raw v, int64_t) { return (acc)v; }
  HM_DEV acc join(acc a, acc b) { return a + b; }
  HM_DEV T value(acc a) { return (T)a; }
  HM_DEV int64_t place(acc) { return 0; }
};

template <class T> HM_DEV T lowest() {
  if constexpr (sizeof(T) == 8 && (T)0.5 == (T)0) return INT64_MIN;
  else return -(T)INFINITY;
}
template <class T> HM_DEV T highest() {
  if constexpr (sizeof(T) == 8 && (T)0.5 == (T)0) return INT64_MAX;
  else return (T)INFINITY;
}

template <class T, bool LARGEST> struct op_extreme {
  typedef T acc;
  HM_DEV acc identity() { return LARGEST ? lowest<T>() : highest<T>(); }
  typedef T raw;
  HM_DEV void load(const void *x, int dtype, const int64_t *at, raw *v) { hm_load_many<AHEAD>(x, dtype, at, v); }
  HM_DEV acc take(raw v, int64_t) { return v; }
  HM_DEV acc join(acc a, acc b) { return (LARGEST ? b > a : b < a) || b != b ? b : a; }
  HM_DEV T value(acc a) { return a; }
  HM_DEV int64_t place(acc) { return 0; }
};

template <class T, bool LARGEST> struct op_find {
  typedef placed<T> acc;
  HM_DEV acc identity() {
    acc a;
    a.value = LARGEST ? lowest<T>() : highest<T>();
    a.place = INT64_MAX;
    return a;
  }
  typedef T raw;
  HM_DEV void load(const void *x, int dtype, const int64_t *at, raw *v) { hm_load_many<AHEAD>(x, dtype, at, v); }
  HM_DEV acc take(raw v, int64_t place) {
    acc a;
    a.value = v;
    a.place = place;
    return a;
  }
  HM_DEV acc join(acc a, acc b) {
    const bool nan_a = a.value != a.value, nan_b = b.value != b.value;
    const bool better = nan_a || nan_b ? nan_b && !nan_a : (LARGEST ? b.value > a.value : b.value < a.value);
    const bool same = nan_a == nan_b && (nan_a || a.value == b.value);
    return better || (same && b.place < a.place) ? b : a;
  }
  HM_DEV T value(acc a) { return a.value; }
  HM_DEV int64_t place(acc a) { return a.place; }
};

/* Nonzero in its own dtype; NaN counts. */
HM_DEV bool is_true(const void *x, int dtype, int64_t at) {
  if (dtype == HM_F32) return static_cast<const float *>(x)[at] != 0.0f;
  if (dtype == HM_F64) return static_cast<const double *>(x)[at] != 0.0;
  if (dtype == HM_F16 || dtype == HM_BF16) return (static_cast<const uint16_t *>(x)[at] & 0x7fffu) != 0;
  if (dtype == HM_I64) return static_cast<const int64_t *>(x)[at] != 0;
  if (dtype == HM_I32) return static_cast<const int32_t *>(x)[at] != 0;
  return static_cast<const uint8_t *>(x)[at] != 0;
}

template <bool ANY> struct op_logic {
  typedef int acc;
  HM_DEV acc identity() { return ANY ? 0 : 1; }
  typedef int raw;
  HM_DEV void load(const void *x, int dtype, const int64_t *at, raw *v) {
#pragma unroll
    for (int j = 0; j < AHEAD; j++) v[j] = is_true(x, dtype, at[j]);
  }
  HM_DEV acc take(raw v, int64_t) { return v; }
  HM_DEV acc join(acc a, acc b) { return ANY ? a | b : a & b; }
  HM_DEV int64_t value(acc a) { return a; }
  HM_DEV int64_t place(acc) { return 0; }
};

/* ====== The plan ====== */

/* A divisor of 64-bit indices.  A division instruction of that width does not exist, and a call of a function
 * would cost registers: narrow indices are multiplied in integers, wide ones (to 2^52) in double and put right. */
struct divisor {
  int64_t size;
  double inverse;
  hm_divisor by;
  bool narrow; /* all indices are below 2^31 */
};

static divisor make_divisor(int64_t size, int64_t count) {
  if (size < 1) size = 1;
  const bool narrow = count < HM_CUDA_PIECE && size < HM_CUDA_PIECE;
  return {size, 1.0 / (double)size, hm_make_divisor(narrow ? size : 1), narrow};
}

HM_DEV int64_t divide(int64_t i, const divisor &d) {
  if (d.narrow) return hm_divide((uint32_t)i, d.by);
  const int64_t q = (int64_t)((double)i * d.inverse), r = i - q * d.size;
  return r < 0 ? q - 1 : r >= d.size ? q + 1 : q;
}

/* Dims of which an element is found from a flat index. */
struct flat {
  int32_t ndim;
  divisor by[HM_MAX_NDIM];
  int64_t stride[3][HM_MAX_NDIM]; /* x, and of kept dims out 0 and out 1 */
};

struct plan {
  const void *x;
  void *out[2]; /* value and place; NULL: not wanted */
  int32_t dtype, out_dtype[2];
  flat kept, reduced;
  int64_t n_keep, n_red;
  int64_t chunk, n_chunks; /* reduced elements of a chunk */
  divisor by_chunks, by_tiles;
  int64_t cols, outer;  /* columns: size of the inner kept dim, product of the others */
  bool columns, divide; /* divide: mean */
  void *partial;        /* n_chunks x n_keep accumulators, or NULL: results are written at once */
};

HM_DEV int64_t offset_of(const flat &f, int which, int64_t i) {
  int64_t at = 0;
  for (int d = f.ndim - 1; d > 0; d--) {
    const int64_t q = divide(i, f.by[d]);
    at += (i - q * f.by[d].size) * f.stride[which][d];
    i = q;
  }
  return f.ndim ? at + i * f.stride[which][0] : 0;
}

/* ====== Kernels ====== */

template <class R> HM_DEV void finish(const plan &p, int64_t k, typename R::acc a) {
  auto v = R::value(a);
  if (p.divide) v = v / (decltype(v))p.n_red;
  if (p.out[0]) hm_store(p.out[0], p.out_dtype[0], offset_of(p.kept, 1, k), v);
  if (p.out[1]) hm_store(p.out[1], p.out_dtype[1], offset_of(p.kept, 2, k), R::place(a));
}

template <class R> HM_DEV void keep_or_finish(const plan &p, int64_t k, int64_t chunk, typename R::acc a) {
  if (p.partial) static_cast<typename R::acc *>(p.partial)[chunk * p.n_keep + k] = a;
  else finish<R>(p, k, a);
}

/* What one thread gets of elements i, i + STEP, ... before `end`. */
template <class R, int STEP> HM_DEV typename R::acc thread_part(const plan &p, int64_t base, int64_t i, int64_t end) {
  typename R::acc a[AHEAD];
#pragma unroll
  for (int j = 0; j < AHEAD; j++) a[j] = R::identity();
  for (; i < end; i += AHEAD * STEP) {
    int64_t at[AHEAD];
    typename R::raw v[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) at[j] = base + offset_of(p.reduced, 0, i + j * STEP < end ? i + j * STEP : i);
    R::load(p.x, p.dtype, at, v);
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (i + j * STEP < end) a[j] = R::join(a[j], R::take(v[j], i + j * STEP));
  }
  return R::join(R::join(a[0], a[1]), R::join(a[2], a[3]));
}

/* One result (of one chunk) by G threads. */
template <class R, int G> static __global__ void __launch_bounds__(HM_BLOCK, 2) reduce_rows(plan p) {
  const int groups = HM_BLOCK / G, t = (int)threadIdx.x % G;
  const int64_t units = p.n_keep * p.n_chunks, step = (int64_t)gridDim.x * groups;
  for (int64_t first = (int64_t)blockIdx.x * groups; first < units;
       first += step) { /* the same rounds for all threads */
    const int64_t u = first + threadIdx.x / G;
    const bool here = u < units;
    const int64_t k = here ? divide(u, p.by_chunks) : 0, chunk = here ? u - k * p.n_chunks : 0;
    const int64_t begin = chunk * p.chunk, limit = begin + p.chunk,
                  end = !here             ? begin
                        : limit < p.n_red ? limit
                                          : p.n_red;
    const int64_t base = offset_of(p.kept, 0, k);
    const typename R::acc mine = thread_part<R, G>(p, base, begin + t, end);
    const typename R::acc all = hm_group_join<R, G>(mine);
    if (here && t == 0) keep_or_finish<R>(p, k, chunk, all);
  }
}

/* 32 columns of one chunk by a block of 32 x 8. */
template <class R> static __global__ void __launch_bounds__(HM_BLOCK, 2) reduce_columns(plan p) {
  HM_SHARED(typename R::acc, part, [HM_WARPS][HM_WARP]);
  const int64_t tiles = p.by_tiles.size, units = p.outer * tiles * p.n_chunks;
  const int lane = (int)threadIdx.x % HM_WARP, warp = (int)threadIdx.x / HM_WARP;
  for (int64_t u = blockIdx.x; u < units; u += gridDim.x) {
    const int64_t rest = divide(u, p.by_tiles), tile = u - rest * tiles;
    const int64_t outer = divide(rest, p.by_chunks), chunk = rest - outer * p.n_chunks;
    const int64_t c = tile * HM_WARP + lane, k = outer * p.cols + c;
    const int64_t begin = chunk * p.chunk, limit = begin + p.chunk, end = limit < p.n_red ? limit : p.n_red;
    const bool here = c < p.cols;
    const int64_t base = here ? offset_of(p.kept, 0, k) : 0;
    part[warp][lane] = thread_part<R, HM_WARPS>(p, base, here ? begin + warp : end, end);
    HM_BARRIER();
    if (warp == 0 && here) {
      typename R::acc all = part[0][lane];
      for (int w = 1; w < HM_WARPS; w++) all = R::join(all, part[w][lane]);
      keep_or_finish<R>(p, k, chunk, all);
    }
    HM_BARRIER();
  }
}

/* Results from those of the chunks, in order: 32 results by a block of 32 x 8. */
template <class R> static __global__ void __launch_bounds__(HM_BLOCK, 2) reduce_chunks(plan p) {
  HM_SHARED(typename R::acc, part, [HM_WARPS][HM_WARP]);
  const typename R::acc *partial = static_cast<const typename R::acc *>(p.partial);
  const int lane = (int)threadIdx.x % HM_WARP, warp = (int)threadIdx.x / HM_WARP;
  for (int64_t first = (int64_t)blockIdx.x * HM_WARP; first < p.n_keep; first += (int64_t)gridDim.x * HM_WARP) {
    const int64_t k = first + lane;
    typename R::acc a = R::identity();
    for (int64_t c = warp; c < p.n_chunks && k < p.n_keep; c += HM_WARPS) a = R::join(a, partial[c * p.n_keep + k]);
    part[warp][lane] = a;
    HM_BARRIER();
    if (warp == 0 && k < p.n_keep) {
      typename R::acc all = part[0][lane];
      for (int w = 1; w < HM_WARPS; w++) all = R::join(all, part[w][lane]);
      finish<R>(p, k, all);
    }
    HM_BARRIER();
  }
}

/* ====== Making the plan ====== */

static bool is_index_op(int op) {
  return op == HM_OP_MAX_DIM || op == HM_OP_MIN_DIM || op == HM_OP_ARGMAX || op == HM_OP_ARGMIN;
}

static bool is_bias_op(int op) { return op == HM_OP_LINEAR_BACKWARD_BIAS || op == HM_OP_CONV2D_BACKWARD_BIAS; }

/* Bit mask of the dims that the op reduces. */
static uint32_t reduced_dims(const hm_kernel_call *call) {
  const int ndim = call->in[0].ndim;
  const uint32_t everything = (1u << ndim) - 1;
  if (call->op == HM_OP_LINEAR_BACKWARD_BIAS) return everything & ~(1u << (ndim - 1));
  if (call->op == HM_OP_CONV2D_BACKWARD_BIAS) return everything & ~2u;
  if (is_index_op(call->op)) return call->attr[0].i == HM_NONE ? everything : everything & (1u << call->attr[0].i);
  uint32_t mask = 0;
  for (int i = 0; i < call->attr[0].n; i++) mask |= 1u << call->attr[0].v[i];
  return call->attr[0].n ? mask & everything : everything;
}

/* Appends a dim of x, joining it to the one before where all strides allow it. */
static void append(flat *f, int64_t size, int64_t s0, int64_t s1, int64_t s2) {
  const int64_t s[3] = {s0, s1, s2};
  bool joins = f->ndim > 0;
  for (int k = 0; k < 3; k++) joins = joins && f->stride[k][f->ndim - 1] == s[k] * size;
  const int at = joins ? f->ndim - 1 : f->ndim++;
  f->by[at].size = joins ? f->by[at].size * size : size;
  for (int k = 0; k < 3; k++) f->stride[k][at] = s[k];
}

struct dim {
  int64_t size, x, out, place;
};

/* Larger strides outside; repeated dims (stride 0) outermost. */
static void sort_dims(dim *d, int n) {
  for (int i = 1; i < n; i++) {
    const dim v = d[i];
    int j = i;
    for (; j > 0 && d[j - 1].x != 0 && (v.x == 0 || v.x > d[j - 1].x); j--) d[j] = d[j - 1];
    d[j] = v;
  }
}

static void set_flat(flat *f, const dim *d, int n, int64_t count) {
  for (int i = 0; i < n; i++) append(f, d[i].size, d[i].x, d[i].out, d[i].place);
  for (int i = 0; i < f->ndim; i++) f->by[i] = make_divisor(f->by[i].size, count);
}

enum { ROOM = 512, MOST_CHUNKS = 256, LONG_ROW = 512 };

/* Cuts the reduced elements where there are too few results for the device. */
static void set_chunks(plan *p) {
  p->columns = p->kept.ndim > 0 && p->kept.stride[0][p->kept.ndim - 1] == 1 &&
               !(p->reduced.ndim > 0 && p->reduced.stride[0][p->reduced.ndim - 1] == 1);
  p->cols = p->columns ? p->kept.by[p->kept.ndim - 1].size : 1;
  p->outer = p->n_keep / p->cols;
  const int64_t tiles = (p->cols + HM_WARP - 1) / HM_WARP, units = p->columns ? p->outer * tiles : p->n_keep;
  const int64_t least = p->columns ? 128 : 8192; /* reduced elements that are worth a chunk */
  int64_t chunks = ROOM / units;
  if (chunks > p->n_red / least) chunks = p->n_red / least;
  if (chunks > MOST_CHUNKS) chunks = MOST_CHUNKS;
  if (chunks < 1) chunks = 1;
  p->chunk = (p->n_red + chunks - 1) / chunks;
  p->n_chunks = (p->n_red + p->chunk - 1) / p->chunk;
  p->by_chunks = make_divisor(p->n_chunks, units * p->n_chunks);
  p->by_tiles = make_divisor(tiles, units * p->n_chunks);
}

static void make_plan(plan *p, const hm_kernel_call *call) {
  const hm_view *x = &call->in[0], *out = &call->out[0];
  const uint32_t mask = reduced_dims(call);
  const bool keep = !is_bias_op(call->op) && call->attr[1].i != 0;
  const bool both = call->op == HM_OP_MAX_DIM || call->op == HM_OP_MIN_DIM;
  const hm_view *place = both ? &call->out[1] : out;
  dim kept[HM_MAX_NDIM], red[HM_MAX_NDIM];
  int nk = 0, nr = 0, at = 0;
  memset(p, 0, sizeof *p);
  p->x = x->data, p->dtype = x->dtype;
  p->n_keep = p->n_red = 1;
  for (int d = 0; d < x->ndim; d++) {
    const bool reduced = mask >> d & 1;
    const int64_t n = x->shape[d];
    const int to = keep ? d : at;
    if (reduced) p->n_red *= n;
    else p->n_keep *= n, at++;
    if (n == 1) continue;
    if (reduced) red[nr++] = {n, x->stride[d], 0, 0};
    else kept[nk++] = {n, x->stride[d], out->stride[to], place->stride[to]};
  }
  sort_dims(kept, nk);
  if (!is_index_op(call->op)) sort_dims(red, nr);
  set_flat(&p->kept, kept, nk, p->n_keep);
  set_flat(&p->reduced, red, nr, p->n_red);
  if (!is_index_op(call->op) || both) p->out[0] = out->data, p->out_dtype[0] = out->dtype;
  if (is_index_op(call->op)) p->out[1] = place->data, p->out_dtype[1] = place->dtype;
  p->divide = call->op == HM_OP_MEAN;
  if (p->n_keep > 0 && p->n_red > 0) set_chunks(p);
}

/* ====== Entry ====== */

template <class R> static int launch(const plan *p, const char *name, void *stream) {
  int status;
  if (p->columns) {
    const int64_t units = p->outer * p->by_tiles.size * p->n_chunks;
    status = HM_RUN(name, (reduce_columns<R>), hm_blocks(units, 1), HM_BLOCK, 0, stream, *p);
  } else if (p->chunk < LONG_ROW) {
    status =
        HM_RUN(name, (reduce_rows<R, HM_WARP>), hm_blocks(p->n_keep * p->n_chunks, HM_WARPS), HM_BLOCK, 0, stream, *p);
  } else {
    status = HM_RUN(name, (reduce_rows<R, HM_BLOCK>), hm_blocks(p->n_keep * p->n_chunks, 1), HM_BLOCK, 0, stream, *p);
  }
  if (status != HM_OK || !p->partial) return status;
  return HM_RUN(name, (reduce_chunks<R>), hm_blocks(p->n_keep, HM_WARP), HM_BLOCK, 0, stream, *p);
}

template <class T> static int launch_typed(int op, const plan *p, const char *name, void *stream) {
  switch (op) {
  case HM_OP_AMAX: return launch<op_extreme<T, true>>(p, name, stream);
  case HM_OP_AMIN: return launch<op_extreme<T, false>>(p, name, stream);
  case HM_OP_MAX_DIM:
  case HM_OP_ARGMAX: return launch<op_find<T, true>>(p, name, stream);
  case HM_OP_MIN_DIM:
  case HM_OP_ARGMIN: return launch<op_find<T, false>>(p, name, stream);
  default: return launch<op_sum<T>>(p, name, stream);
  }
}

static const char *name_of(int op) {
  switch (op) {
  case HM_OP_SUM: return "sum";
  case HM_OP_MEAN: return "mean";
  case HM_OP_AMAX: return "amax";
  case HM_OP_AMIN: return "amin";
  case HM_OP_MAX_DIM: return "max_dim";
  case HM_OP_MIN_DIM: return "min_dim";
  case HM_OP_ARGMAX: return "argmax";
  case HM_OP_ARGMIN: return "argmin";
  case HM_OP_ANY: return "any";
  case HM_OP_ALL: return "all";
  case HM_OP_LINEAR_BACKWARD_BIAS: return "linear_backward_bias";
  case HM_OP_CONV2D_BACKWARD_BIAS: return "conv2d_backward_bias";
  default: return NULL;
  }
}

/* Outputs exist but nothing is reduced into them: sums are 0, means NaN, any false, all true. */
static int reduce_nothing(const hm_kernel_call *call, const char *name) {
  const int op = call->op;
  if (is_index_op(op) || op == HM_OP_AMAX || op == HM_OP_AMIN)
    return hm_cuda_fail(HM_ERR_ARG, "%s: a largest or smallest value of no elements does not exist", name);
  const bool one = op == HM_OP_ALL;
  return hm_cuda_fill_number(&call->out[0], op == HM_OP_MEAN ? (double)NAN : (double)one, one, call->stream);
}

/* Bytes of one partial result. */
static size_t partial_bytes(int op) { return is_index_op(op) ? sizeof(placed<double>) : sizeof(double); }

extern "C" int hm_cuda_reduce_workspace(const hm_kernel_call *call, size_t *bytes) {
  plan p;
  make_plan(&p, call);
  *bytes = p.n_chunks > 1 ? (size_t)(p.n_chunks * p.n_keep) * partial_bytes(call->op) : 0;
  return HM_OK;
}

extern "C" int hm_cuda_reduce(const hm_kernel_call *call) {
  plan p;
  const char *name = name_of(call->op);
  if (!name) return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no reduction with op id %d", call->op);
  make_plan(&p, call);
  if (p.n_keep == 0) return HM_OK;
  if (p.n_red == 0) return reduce_nothing(call, name);
  if (p.n_chunks > 1) {
    if (call->workspace_bytes < (size_t)(p.n_chunks * p.n_keep) * partial_bytes(call->op))
      return hm_cuda_fail(HM_ERR_INTERNAL, "%s: the workspace is too small", name);
    p.partial = call->workspace;
  }
  if (call->op == HM_OP_ANY) return launch<op_logic<true>>(&p, name, call->stream);
  if (call->op == HM_OP_ALL) return launch<op_logic<false>>(&p, name, call->stream);
  if (call->compute == HM_F32) return launch_typed<float>(call->op, &p, name, call->stream);
  if (call->compute == HM_F64) return launch_typed<double>(call->op, &p, name, call->stream);
  return launch_typed<int64_t>(call->op, &p, name, call->stream);
}
