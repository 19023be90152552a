/*
 * scan.cu -- running sums and products along a dim, and the gradients of prod and cumprod.
 *
 * A line is what lies along the dim at one position of the others.  A thread takes a line where lines lie side by side in memory, else a warp or a
 * block does; its threads take four neighbours each, join their parts in a fixed order, and go on to the next tile with what was carried.
 * Where there are too few lines for the device, running sums are cut into chunks: one kernel adds each chunk, one adds up what comes before each,
 * and the third starts from there.  All of it depends on shapes and strides only.  Everything is float64 (int64 for integers), rounded once.
 * A product that overflows float64 within a tile stays infinite, even where a zero came before it.
 *
 * Gradients need no division (kernels/cpu/scan.c has the formulas).  The product of what lies before each tile is kept in the workspace, then
 * tiles are taken from the last to the first.
 *
 * Owns nothing.
 */
#include "group.h"

enum { EACH = 4, CHAIN = 8 }; /* elements of a thread in a tile; the same for cumprod's gradient */
enum { X, OUT, GRAD, VIEWS }; /* views of the lines */
enum { ROOM = 512, MOST_CHUNKS = 1024 };

struct scan {
  hm_rows<VIEWS> rows;
  int64_t chunk, n_chunks; /* steps of a chunk */
  hm_divisor by_chunks;
  void
      *carry; /* 8 bytes for each chunk of each line (NULL: chunks begin from nothing), or for each tile of each line */
  bool only;  /* only the chunks' totals, to carry */
  bool reverse; /* from the end */
};

/* ====== Groups ====== */

struct add {
  template <class T> HM_DEV T identity() { return (T)0; }
  template <class T> HM_DEV T join(T a, T b) { return a + b; }
};
struct times {
  template <class T> HM_DEV T identity() { return (T)1; }
  template <class T> HM_DEV T join(T a, T b) { return a * b; }
};

/* From a lane that is `by` lanes before, or behind. */
template <bool BEHIND> HM_DEV double from_lane(double x, int by) {
  return BEHIND ? __shfl_down_sync(0xffffffffu, x, by) : __shfl_up_sync(0xffffffffu, x, by);
}
template <bool BEHIND> HM_DEV uint64_t from_lane(uint64_t x, int by) {
  const unsigned long long v = x;
  return (uint64_t)(BEHIND ? __shfl_down_sync(0xffffffffu, v, by) : __shfl_up_sync(0xffffffffu, v, by));
}

/* What the threads before (BEHIND: behind) this one in its group of G have together; *all: what all have.  Every thread of the group must come, of
 * a block every thread. */
template <class J, int G, bool BEHIND, class T> HM_DEV T others(T x, T *all) {
  if constexpr (G == 1) {
    *all = x;
    return J::template identity<T>();
  } else {
    const int lane = (int)hm_lane(), rank = BEHIND ? HM_WARP - 1 - lane : lane;
    T sum = x;
    for (int by = 1; by < HM_WARP; by *= 2) {
      const T y = from_lane<BEHIND>(sum, by);
      if (rank >= by) sum = BEHIND ? J::join(sum, y) : J::join(y, sum);
    }
    T mine = from_lane<BEHIND>(sum, 1);
    if (rank == 0) mine = J::template identity<T>();
    if constexpr (G == HM_WARP) {
      *all = BEHIND ? hm_first_lane(sum) : hm_first_lane(from_lane<true>(sum, HM_WARP - 1));
      return mine;
    } else {
      HM_SHARED(T, part, [HM_WARPS]);
      const int warp = (int)hm_warp();
      if (rank == HM_WARP - 1) part[warp] = sum;
      HM_BARRIER();
      T outside = J::template identity<T>(), total = J::template identity<T>();
      for (int k = 0; k < HM_WARPS; k++) {
        const int w = BEHIND ? HM_WARPS - 1 - k : k;
        if (BEHIND ? w > warp : w < warp) outside = BEHIND ? J::join(part[w], outside) : J::join(outside, part[w]);
        total = BEHIND ? J::join(part[w], total) : J::join(total, part[w]);
      }
      HM_BARRIER(); /* part may be used again */
      *all = total;
      return BEHIND ? J::join(mine, outside) : J::join(outside, mine);
    }
  }
}

/* Threads of the group see what others of it wrote to memory. */
template <int G> HM_DEV void settle(void) {
  if constexpr (G == HM_BLOCK) HM_BARRIER();
  else if constexpr (G == HM_WARP) __syncwarp();
}

/* ====== Running sums and products ====== */

/* Place of step i of a line. */
HM_DEV int64_t step_at(const scan &s, const int64_t (&at)[VIEWS], int view, int64_t i) {
  return at[view] + (s.reverse ? s.rows.length - 1 - i : i) * s.rows.step[view];
}

/* Step i of a line as T; integers are read as int64. */
template <class T> HM_DEV T read(const scan &s, const int64_t (&at)[VIEWS], int view, int64_t i) {
  const int64_t from = step_at(s, at, view, i);
  if constexpr (sizeof(T) == 8 && (T)0.5 == (T)0)
    return (T)hm_load<int64_t>(s.rows.data[view], s.rows.dtype[view], from);
  else return hm_load<T>(s.rows.data[view], s.rows.dtype[view], from);
}
HM_DEV void write(const scan &s, int64_t at, double x) { hm_store<double>(s.rows.data[OUT], s.rows.dtype[OUT], at, x); }
HM_DEV void write(const scan &s, int64_t at, uint64_t x) {
  hm_store<int64_t>(s.rows.data[OUT], s.rows.dtype[OUT], at, (int64_t)x);
}

/* Steps [begin, end) of a line by a group; t: thread in it. */
template <class J, class T, int G>
HM_DEV T scan_range(const scan &s, const int64_t (&at)[VIEWS], int64_t begin, int64_t end, int t, T carry) {
  for (int64_t base = begin; base < end; base += (int64_t)G * EACH) {
    const int64_t first = base + (int64_t)t * EACH;
    T v[EACH], all;
#pragma unroll
    for (int j = 0; j < EACH; j++) v[j] = first + j < end ? read<T>(s, at, X, first + j) : J::template identity<T>();
#pragma unroll
    for (int j = 1; j < EACH; j++) v[j] = J::join(v[j - 1], v[j]);
    const T before = J::join(carry, others<J, G, false>(v[EACH - 1], &all));
#pragma unroll
    for (int j = 0; j < EACH; j++)
      if (!s.only && first + j < end) write(s, step_at(s, at, OUT, first + j), J::join(before, v[j]));
    carry = J::join(carry, all);
  }
  return carry;
}

template <class J, class T, int G> static __global__ void __launch_bounds__(HM_BLOCK, 2) scan_lines(scan s) {
  const uint32_t groups = HM_BLOCK / G, units = s.rows.walk.count * (uint32_t)s.n_chunks;
  const int t = (int)threadIdx.x % G;
  T *const carry = static_cast<T *>(s.carry);
  for (uint32_t u = blockIdx.x * groups + threadIdx.x / G; u < units; u += gridDim.x * groups) {
    const uint32_t line = hm_divide(u, s.by_chunks), chunk = u - line * (uint32_t)s.n_chunks;
    const int64_t begin = chunk * s.chunk, limit = begin + s.chunk, end = limit < s.rows.length ? limit : s.rows.length;
    int64_t at[VIEWS];
    hm_offsets(s.rows.walk, line, at);
    const T from = carry && !s.only ? carry[u] : J::template identity<T>();
    const T total = scan_range<J, T, G>(s, at, begin, end, t, from);
    if (s.only && t == 0) carry[u] = total;
  }
}

/* From totals of the chunks to what comes before each. */
template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) scan_carry(scan s) {
  for (uint32_t line = hm_global_thread(); line < s.rows.walk.count; line += hm_global_threads()) {
    T *const own = static_cast<T *>(s.carry) + line * s.n_chunks;
    T sum = (T)0;
    for (int64_t c = 0; c < s.n_chunks; c++) {
      const T x = own[c];
      own[c] = sum;
      sum = sum + x;
    }
  }
}

/* ====== Gradients ====== */

/* prod: g times the product of the others. */
template <int G> static __global__ void __launch_bounds__(HM_BLOCK, 2) prod_gradient(scan s) {
  const uint32_t groups = HM_BLOCK / G;
  const int t = (int)threadIdx.x % G;
  const int64_t tile = (int64_t)G * EACH, tiles = (s.rows.length + tile - 1) / tile;
  for (uint32_t line = blockIdx.x * groups + threadIdx.x / G; line < s.rows.walk.count; line += gridDim.x * groups) {
    int64_t at[VIEWS];
    hm_offsets(s.rows.walk, line, at);
    double *const kept = static_cast<double *>(s.carry) + line * tiles;
    const double g = read<double>(s, at, GRAD, 0);
    double before = 1.0, behind = 1.0;
    for (int64_t k = 0; k < tiles; k++) {
      if (t == 0) kept[k] = before;
      double x = 1.0, all;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const int64_t i = k * tile + (int64_t)t * EACH + j;
        if (i < s.rows.length) x *= read<double>(s, at, X, i);
      }
      (void)others<times, G, false>(x, &all);
      before *= all;
    }
    settle<G>();
    for (int64_t k = tiles - 1; k >= 0; k--) {
      const int64_t first = k * tile + (int64_t)t * EACH;
      double x[EACH], mine = 1.0, all;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        x[j] = first + j < s.rows.length ? read<double>(s, at, X, first + j) : 1.0;
        mine *= x[j];
      }
      double left = kept[k] * others<times, G, false>(mine, &all);
      double right = others<times, G, true>(mine, &all) * behind, suffix[EACH];
#pragma unroll
      for (int j = EACH - 1; j >= 0; j--) {
        suffix[j] = right;
        right *= x[j];
      }
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        if (first + j < s.rows.length) write(s, step_at(s, at, OUT, first + j), g * (left * suffix[j]));
        left *= x[j];
      }
      behind *= all;
    }
    settle<G>();
  }
}

/* cumprod: each line by a thread, in the order of the formula. */
static __global__ void __launch_bounds__(HM_BLOCK, 2) cumprod_gradient(scan s) {
  const int64_t length = s.rows.length, tiles = (length + CHAIN - 1) / CHAIN;
  for (uint32_t line = hm_global_thread(); line < s.rows.walk.count; line += hm_global_threads()) {
    int64_t at[VIEWS];
    hm_offsets(s.rows.walk, line, at);
    double *const kept = static_cast<double *>(s.carry) + line * tiles;
    double before = 1.0, behind = 0.0;
    for (int64_t i = 0; i < length; i++) {
      if (i % CHAIN == 0) kept[i / CHAIN] = before;
      before *= read<double>(s, at, X, i);
    }
    for (int64_t k = tiles - 1; k >= 0; k--) {
      double x[CHAIN], left[CHAIN];
      before = kept[k];
#pragma unroll
      for (int j = 0; j < CHAIN; j++) {
        const int64_t i = k * CHAIN + j;
        x[j] = i < length ? read<double>(s, at, X, i) : 1.0;
        left[j] = before;
        before *= x[j];
      }
#pragma unroll
      for (int j = CHAIN - 1; j >= 0; j--) {
        const int64_t i = k * CHAIN + j;
        if (i >= length) continue;
        const double sum = read<double>(s, at, GRAD, i) + behind;
        write(s, step_at(s, at, OUT, i), left[j] * sum);
        behind = x[j] * sum;
      }
    }
  }
}

/* ====== Setting up ====== */

static bool is_sum(int op) { return op == HM_OP_CUMSUM || op == HM_OP_CUMSUM_REVERSE; }

static const char *name_of(int op) {
  switch (op) {
  case HM_OP_CUMSUM: return "cumsum";
  case HM_OP_CUMSUM_REVERSE: return "cumsum_reverse";
  case HM_OP_CUMPROD: return "cumprod";
  case HM_OP_CUMPROD_BACKWARD: return "cumprod_backward";
  case HM_OP_PROD_BACKWARD: return "prod_backward";
  default: return NULL;
  }
}

static int64_t numel_of(const hm_view *v) {
  int64_t n = 1;
  for (int d = 0; d < v->ndim; d++) n *= v->shape[d];
  return n;
}

/* Dense memory as one line. */
static void flatten(hm_view *v, int64_t numel) {
  v->ndim = 1;
  v->shape[0] = numel;
  v->stride[0] = 1;
}

/* The gradient of a product, repeated along the dim: x's shape. */
static hm_view spread_view(const hm_view *g, const hm_view *x, int dim) {
  hm_view w = *x;
  w.data = g->data;
  w.dtype = g->dtype;
  for (int d = 0; d < x->ndim; d++)
    w.stride[d] = d == dim ? 0 : g->ndim == x->ndim ? g->stride[d] : g->stride[d < dim ? d : d - 1];
  return w;
}

/* Views of x, the result and g, all of x's shape; returns the dim. */
static int make_views(const hm_kernel_call *call, hm_view *view) {
  int dim = (int)call->attr[0].i;
  view[X] = call->in[call->n_in > 1 ? 1 : 0];
  view[OUT] = call->out[0];
  view[GRAD] = call->in[0];
  if (call->op != HM_OP_PROD_BACKWARD) return view[X].ndim ? dim : 0;
  if (call->attr[0].i == HM_NONE) {
    const int64_t numel = numel_of(&view[X]);
    flatten(&view[X], numel);
    flatten(&view[OUT], numel);
    view[GRAD].ndim = 1;
    dim = 0;
  }
  view[GRAD] = spread_view(&view[GRAD], &view[X], dim);
  return dim;
}

/* Threads that share a line. */
static int group_size(const scan *s, int op) {
  const hm_rows<VIEWS> &r = s->rows;
  const bool side_by_side =
      r.length > 1 && r.step[X] != 1 && r.walk.stride[X][r.walk.ndim - 1] == 1 && r.walk.count >= HM_WARP;
  if (side_by_side || op == HM_OP_CUMPROD_BACKWARD) return 1;
  return r.length <= 512 ? (int)HM_WARP : (int)HM_BLOCK;
}

/* Cuts running sums where there are too few lines. */
static void set_chunks(scan *s, int op, int group) {
  const int64_t length = s->rows.length, blocks = ((int64_t)s->rows.walk.count * group + HM_BLOCK - 1) / HM_BLOCK;
  const int64_t least = (int64_t)group * 4 * EACH;
  int64_t chunks = is_sum(op) ? ROOM / blocks : 1;
  if (chunks > length / least) chunks = length / least;
  if (chunks > MOST_CHUNKS) chunks = MOST_CHUNKS;
  if (chunks < 1) chunks = 1;
  s->chunk = (length + chunks - 1) / chunks;
  s->n_chunks = (length + s->chunk - 1) / s->chunk;
  s->by_chunks = hm_make_divisor(s->n_chunks);
}

/* Fills s.  Returns the number of lines, 0: nothing to do; -1: too many. */
static int64_t make_scan(scan *s, const hm_kernel_call *call) {
  hm_view view[VIEWS], row[VIEWS];
  const int dim = make_views(call, view);
  memset(s, 0, sizeof *s);
  s->rows.length = view[X].ndim ? view[X].shape[dim] : 1;
  s->reverse = call->op == HM_OP_CUMSUM_REVERSE;
  for (int k = 0; k < VIEWS; k++) {
    row[k] = hm_without_dim(&view[k], dim);
    s->rows.step[k] = view[k].ndim && s->rows.length > 1 ? view[k].stride[dim] : 1;
    s->rows.dtype[k] = (int8_t)view[k].dtype;
    s->rows.data[k] = view[k].data;
  }
  hm_loop loop;
  const int64_t count = hm__loop_make(&loop, &row[X], VIEWS - 1, &row[1]);
  if (count == 0 || s->rows.length == 0) return 0;
  if (count >= HM_CUDA_PIECE) return -1;
  s->rows.walk = hm_make_walk<VIEWS>(&loop);
  set_chunks(s, call->op, group_size(s, call->op));
  return count;
}

/* Numbers that the workspace keeps for each line. */
static int64_t kept_per_line(const scan *s, int op) {
  const int64_t tile = op == HM_OP_CUMPROD_BACKWARD ? (int64_t)CHAIN : (int64_t)group_size(s, op) * EACH;
  if (op == HM_OP_CUMPROD_BACKWARD || op == HM_OP_PROD_BACKWARD) return (s->rows.length + tile - 1) / tile;
  return s->n_chunks > 1 ? s->n_chunks : 0;
}

extern "C" int hm_cuda_scan_workspace(const hm_kernel_call *call, size_t *bytes) {
  scan s;
  const int64_t count = make_scan(&s, call);
  *bytes = count > 0 ? (size_t)(count * kept_per_line(&s, call->op)) * sizeof(double) : 0;
  return HM_OK;
}

/* ====== Launching ====== */

template <class J, class T> static int launch_lines(const scan &s, int group, const char *name, void *stream) {
  const int64_t units = (int64_t)s.rows.walk.count * s.n_chunks;
  if (group == 1) return HM_RUN(name, (scan_lines<J, T, 1>), hm_blocks(units), HM_BLOCK, 0, stream, s);
  if (group == HM_WARP)
    return HM_RUN(name, (scan_lines<J, T, HM_WARP>), hm_blocks(units, HM_WARPS), HM_BLOCK, 0, stream, s);
  return HM_RUN(name, (scan_lines<J, T, HM_BLOCK>), hm_blocks(units, 1), HM_BLOCK, 0, stream, s);
}

template <class J, class T> static int run_lines(scan s, int group, void *space, const char *name, void *stream) {
  if (s.n_chunks == 1) return launch_lines<J, T>(s, group, name, stream);
  s.carry = space;
  s.only = true;
  int status = launch_lines<J, T>(s, group, name, stream);
  if (status == HM_OK) status = HM_RUN(name, (scan_carry<T>), hm_blocks(s.rows.walk.count), HM_BLOCK, 0, stream, s);
  s.only = false;
  return status == HM_OK ? launch_lines<J, T>(s, group, name, stream) : status;
}

static int run_prod_gradient(const scan &s, int group, const char *name, void *stream) {
  const int64_t count = s.rows.walk.count;
  if (group == 1) return HM_RUN(name, (prod_gradient<1>), hm_blocks(count), HM_BLOCK, 0, stream, s);
  if (group == HM_WARP)
    return HM_RUN(name, (prod_gradient<HM_WARP>), hm_blocks(count, HM_WARPS), HM_BLOCK, 0, stream, s);
  return HM_RUN(name, (prod_gradient<HM_BLOCK>), hm_blocks(count, 1), HM_BLOCK, 0, stream, s);
}

extern "C" int hm_cuda_scan(const hm_kernel_call *call) {
  const int op = call->op;
  const char *name = name_of(op);
  if (!name) return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no scan with op id %d", op);
  scan s;
  const int64_t count = make_scan(&s, call);
  if (count < 0) return hm_cuda_fail(HM_ERR_UNSUPPORTED, "%s: 2^31 lines or more", name);
  if (count == 0) return HM_OK;
  if (call->workspace_bytes < (size_t)(count * kept_per_line(&s, op)) * sizeof(double))
    return hm_cuda_fail(HM_ERR_INTERNAL, "%s: the workspace is too small", name);
  const int group = group_size(&s, op);
  const bool integers = call->compute == HM_I64;
  if (op == HM_OP_PROD_BACKWARD || op == HM_OP_CUMPROD_BACKWARD) {
    s.carry = call->workspace;
    return op == HM_OP_PROD_BACKWARD ? run_prod_gradient(s, group, name, call->stream)
                                     : HM_RUN(name, cumprod_gradient, hm_blocks(count), HM_BLOCK, 0, call->stream, s);
  }
  if (op == HM_OP_CUMPROD)
    return integers ? run_lines<times, uint64_t>(s, group, call->workspace, name, call->stream)
                    : run_lines<times, double>(s, group, call->workspace, name, call->stream);
  return integers ? run_lines<add, uint64_t>(s, group, call->workspace, name, call->stream)
                  : run_lines<add, double>(s, group, call->workspace, name, call->stream);
}
