/*
 * attention.cu -- attention by blocks, and its gradients: memory grows with T and S, never with T x S.
 *
 * The method is that of cpu/attention.c.  A block of 256 threads takes a tile of queries (keys, for dk and dv) and walks
 * over the other side tile by tile; a thread has R x R pairs of a tile and R rows of the sums, in registers.  Operands
 * come through shared memory in pieces, so that widths do not matter to it.  Tiles are 64 x 64 in float32 and 32 x 32 in
 * float64; tiles beyond the triangle of a causal call are skipped.  Every sum has one order and one owner: no atomics,
 * the same bits in every run.  Half types are computed in float32; results are rounded once.
 *
 * Multiplications are fused with additions here, explicitly.  Works in the call's workspace (delta, one number for each
 * query).
 */
#include "cpu/attention.h"
#include "group.h"

enum { FORWARD, QUERIES, KEYS };
enum { MOST_WIDTH = 256, DEPTH = 32 }; /* of a head; dims that a piece of a dot product has */

template <class T>
struct sizes; /* R: pairs of a tile by a thread, each way; PIECE: rows that a product takes at once */
template <> struct sizes<float> {
  enum { R = 4, TILE = 64, PIECE = 16 };
};
template <> struct sizes<double> {
  enum { R = 2, TILE = 32, PIECE = 8 };
};

struct attention_job {
  hm_att_plan p;
  void *delta; /* T [B][H][T] */
};

/* Rows [first, first + n) of an operand, in one head. */
struct block_rows {
  const void *data;
  int64_t at, step;
  int32_t dtype, n;
};

template <class T> struct scratch {
  T *stage; /* pieces of operands */
  T *tile;  /* [TILE][TILE + 1] */
};

HM_DEV float fused(float a, float b, float c) { return fmaf(a, b, c); }
HM_DEV double fused(double a, double b, double c) { return fma(a, b, c); }

HM_DEV int tx(void) { return (int)threadIdx.x & 15; }
HM_DEV int ty(void) { return (int)threadIdx.x >> 4; }

HM_DEV block_rows rows_of(const hm_att_rows &r, int64_t b, int64_t h, int64_t first, int64_t all, int tile) {
  block_rows x;
  x.data = r.data, x.dtype = r.dtype, x.step = r.step;
  x.at = b * r.batch + h * r.head + first * r.step;
  x.n = (int32_t)(all - first < tile ? all - first : tile);
  return x;
}

/* ====== Products ====== */

/* A piece of rows as [DEPTH][TILE + 1], zeros outside. */
template <class T> HM_DEV void stage_columns(const block_rows &x, int64_t from, int64_t width, T *to) {
  enum { TILE = sizes<T>::TILE };
  for (int u = (int)threadIdx.x; u < TILE * DEPTH; u += HM_BLOCK) {
    const int d = u % DEPTH, r = u / DEPTH;
    to[d * (TILE + 1) + r] =
        r < x.n && from + d < width ? hm_load<T>(x.data, x.dtype, x.at + r * x.step + from + d) : (T)0;
  }
}

/* pair[r][c] = sum over `width` of a[ty * R + r] * b[tx + 16 c]. */
template <class T>
HM_DEV void dots(const scratch<T> &s, const block_rows &a, const block_rows &b, int64_t width,
                 T (&pair)[sizes<T>::R][sizes<T>::R]) {
  enum { R = sizes<T>::R, LINE = sizes<T>::TILE + 1 };
  T *const left = s.stage, *const right = s.stage + DEPTH * LINE;
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int c = 0; c < R; c++) pair[r][c] = (T)0;
  for (int64_t from = 0; from < width; from += DEPTH) {
    HM_BARRIER();
    stage_columns<T>(a, from, width, left);
    stage_columns<T>(b, from, width, right);
    HM_BARRIER();
    const int depth = width - from < DEPTH ? (int)(width - from) : (int)DEPTH;
    for (int d = 0; d < depth; d++) {
      T x[R], y[R];
#pragma unroll
      for (int r = 0; r < R; r++) x[r] = left[d * LINE + ty() * R + r], y[r] = right[d * LINE + tx() + 16 * r];
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < R; c++) pair[r][c] = fused(x[r], y[c], pair[r][c]);
    }
  }
}

/* sum[r][c] += sum over rows k of x: tile[ty * R + r][k] * x[k][tx + 16 c], where the tile is made of pair[][]. */
template <class T, int NC>
HM_DEV void add_rows(const scratch<T> &s, const T (&pair)[sizes<T>::R][sizes<T>::R], const block_rows &x, int64_t width,
                     T (&sum)[sizes<T>::R][NC]) {
  enum { R = sizes<T>::R, LINE = sizes<T>::TILE + 1, PIECE = sizes<T>::PIECE, WIDE = NC * 16 };
  HM_BARRIER();
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int c = 0; c < R; c++) s.tile[(ty() * R + r) * LINE + tx() + 16 * c] = pair[r][c];
  for (int from = 0; from < x.n; from += PIECE) {
    HM_BARRIER();
    const int n = x.n - from < PIECE ? x.n - from : (int)PIECE;
    for (int u = (int)threadIdx.x; u < n * WIDE; u += HM_BLOCK) {
      const int k = u / WIDE, c = u % WIDE;
      s.stage[u] = c < width ? hm_load<T>(x.data, x.dtype, x.at + (from + k) * x.step + c) : (T)0;
    }
    HM_BARRIER();
    for (int k = 0; k < n; k++) {
      T w[R];
#pragma unroll
      for (int r = 0; r < R; r++) w[r] = s.tile[(ty() * R + r) * LINE + from + k];
#pragma unroll
      for (int c = 0; c < NC; c++) {
        const T v = s.stage[k * WIDE + tx() + 16 * c];
#pragma unroll
        for (int r = 0; r < R; r++) sum[r][c] = fused(w[r], v, sum[r][c]);
      }
    }
  }
}

template <class T, int NC> HM_DEV void clear(T (&sum)[sizes<T>::R][NC]) {
#pragma unroll
  for (int r = 0; r < sizes<T>::R; r++)
#pragma unroll
    for (int c = 0; c < NC; c++) sum[r][c] = (T)0;
}

/* Rows of sums to rows [first, ...) of an operand. */
template <class T, int NC>
HM_DEV void store_rows(const hm_att_rows &r, int64_t b, int64_t h, int64_t first, int64_t all, int64_t width,
                       const T (&sum)[sizes<T>::R][NC]) {
  enum { R = sizes<T>::R };
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int64_t row = first + ty() * R + i, at = b * r.batch + h * r.head + row * r.step;
#pragma unroll
    for (int c = 0; c < NC; c++)
      if (row < all && tx() + 16 * c < width) hm_store<T>(r.data, r.dtype, at + tx() + 16 * c, sum[i][c]);
  }
}

/* ====== One pair ====== */

/* The score of query t and key s: product times scale, mask, triangle; -infinity outside. */
template <class T> HM_DEV T score_of(const hm_att_plan &p, int64_t b, int64_t h, int64_t t, int64_t s, T product) {
  if (t >= p.t || s >= p.s || (p.causal && s > t)) return -(T)INFINITY;
  T x = product * (T)p.scale;
  if (p.mask) {
    const int64_t *const step = p.mask_stride;
    const T m = hm_load<T>(p.mask, p.mask_dtype, b * step[0] + h * step[1] + t * step[2] + s * step[3]);
    x = p.mask_dtype != HM_BOOL ? x + m : m != (T)0 ? x : -(T)INFINITY;
  }
  return x;
}

/* What the weight is multiplied by: 0 or 1 / (1 - p). */
template <class T> HM_DEV T chance_of(const hm_att_plan &p, int64_t b, int64_t h, int64_t t, int64_t s) {
  const uint64_t at = (uint64_t)(((b * p.h + h) * p.t + t) * p.s + s);
  uint32_t w[4];
  hm_philox_words(w, p.seed, p.offset + at / 4, 0);
  const uint32_t low = at & 1 ? w[1] : w[0], high = at & 1 ? w[3] : w[2];
  return (at & 2 ? high : low) < p.threshold ? (T)0 : (T)p.keep;
}

/* Over the 16 threads of a row. */
HM_DEV float swap_with(float x, int by) { return __shfl_xor_sync(0xffffffffu, x, by); }
HM_DEV double swap_with(double x, int by) { return __shfl_xor_sync(0xffffffffu, x, by); }
template <class T> HM_DEV T row_max(T x) {
  for (int by = 8; by > 0; by /= 2) {
    const T y = swap_with(x, by);
    x = y > x ? y : x;
  }
  return x;
}
template <class T> HM_DEV T row_sum(T x) {
  for (int by = 8; by > 0; by /= 2) x += swap_with(x, by);
  return x;
}

/* ====== Output ====== */

/* What a row of queries carries from tile to tile. */
template <class T, int NC> struct soft_rows { T top[sizes<T>::R], sum[sizes<T>::R], out[sizes<T>::R][NC]; };

/* Scores of one row become weights; the row's maximum, sum and output so far follow. */
template <class T, int NC> HM_DEV void soften(soft_rows<T, NC> &y, int r, T (&pair)[sizes<T>::R]) {
  enum { R = sizes<T>::R };
  T top = pair[0];
#pragma unroll
  for (int c = 1; c < R; c++) top = pair[c] > top ? pair[c] : top;
  top = row_max(top == top ? top : -(T)INFINITY); /* NaN comes back with the exponentials */
  top = top > y.top[r] ? top : y.top[r];
  const T safe = top == -(T)INFINITY ? (T)0 : top; /* no key yet: nothing minus nothing */
  const T factor = hm_exp(y.top[r] - safe);
  T more = (T)0;
#pragma unroll
  for (int c = 0; c < R; c++) more += pair[c] = hm_exp(pair[c] - safe);
  y.sum[r] = y.sum[r] * factor + row_sum(more);
  y.top[r] = top;
#pragma unroll
  for (int c = 0; c < NC; c++) y.out[r][c] *= factor;
}

template <class T, int NC>
HM_DEV void forward(const hm_att_plan &p, const scratch<T> &s, int64_t b, int64_t h, int64_t q) {
  enum { R = sizes<T>::R, TILE = sizes<T>::TILE };
  const int64_t head = h / hm__att_group(&p), end = p.causal && q + TILE < p.s ? q + TILE : p.s;
  const block_rows queries = rows_of(p.q, b, h, q, p.t, TILE);
  soft_rows<T, NC> y;
  clear<T, NC>(y.out);
#pragma unroll
  for (int r = 0; r < R; r++) y.top[r] = -(T)INFINITY, y.sum[r] = (T)0;
  for (int64_t k = 0; k < end; k += TILE) {
    T pair[R][R];
    dots<T>(s, queries, rows_of(p.k, b, head, k, p.s, TILE), p.d, pair);
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int64_t t = q + ty() * R + r;
#pragma unroll
      for (int c = 0; c < R; c++) pair[r][c] = score_of<T>(p, b, h, t, k + tx() + 16 * c, pair[r][c]);
      soften<T, NC>(y, r, pair[r]);
      if (p.drops)
        for (int c = 0; c < R; c++) pair[r][c] *= chance_of<T>(p, b, h, t, k + tx() + 16 * c);
    }
    add_rows<T, NC>(s, pair, rows_of(p.v, b, head, k, p.s, TILE), p.e, y.out);
  }
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int64_t t = q + ty() * R + r;
    const bool none = y.sum[r] == (T)0;
#pragma unroll
    for (int c = 0; c < NC; c++) y.out[r][c] = none ? (T)0 : y.out[r][c] / y.sum[r];
    if (t < p.t && tx() == 0)
      hm_store<T>(p.lse.data, p.lse.dtype, b * p.lse.batch + h * p.lse.head + t,
                  none ? -(T)INFINITY : y.top[r] + hm_log(y.sum[r]));
  }
  store_rows<T, NC>(p.out, b, h, q, p.t, p.e, y.out);
}

/* ====== Gradients ====== */

/* lse of a query; one that sees nothing, or is none, gets weights of 0. */
template <class T> HM_DEV T lse_of(const hm_att_plan &p, int64_t b, int64_t h, int64_t t) {
  if (t >= p.t) return (T)INFINITY;
  const T x = hm_load<T>(p.lse.data, p.lse.dtype, b * p.lse.batch + h * p.lse.head + t);
  return x == -(T)INFINITY ? (T)INFINITY : x;
}

template <class T> HM_DEV T delta_of(const attention_job &j, int64_t b, int64_t h, int64_t t) {
  return t < j.p.t ? static_cast<const T *>(j.delta)[(b * j.p.h + h) * j.p.t + t] : (T)0;
}

/* dq; what delta lacks of a sum over keys is found meanwhile, taken out of dq, and added to delta. */
template <class T, int NC>
HM_DEV void by_queries(const attention_job &j, const scratch<T> &s, int64_t b, int64_t h, int64_t q) {
  enum { R = sizes<T>::R, TILE = sizes<T>::TILE };
  const hm_att_plan &p = j.p;
  const int64_t head = h / hm__att_group(&p), end = p.causal && q + TILE < p.s ? q + TILE : p.s;
  const block_rows queries = rows_of(p.q, b, h, q, p.t, TILE), grads = rows_of(p.grad, b, h, q, p.t, TILE);
  T dq[R][NC], mean[R][NC], lse[R], delta[R], lack[R]; /* mean: sums of weight * key */
  clear<T, NC>(dq);
  clear<T, NC>(mean);
#pragma unroll
  for (int r = 0; r < R; r++) {
    lse[r] = lse_of<T>(p, b, h, q + ty() * R + r);
    delta[r] = delta_of<T>(j, b, h, q + ty() * R + r);
    lack[r] = (T)0;
  }
  for (int64_t k = 0; k < end; k += TILE) {
    const block_rows keys = rows_of(p.k, b, head, k, p.s, TILE);
    T pair[R][R], other[R][R];
    dots<T>(s, queries, keys, p.d, pair);
    dots<T>(s, grads, rows_of(p.v, b, head, k, p.s, TILE), p.e, other);
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int64_t t = q + ty() * R + r;
      T more = (T)0;
#pragma unroll
      for (int c = 0; c < R; c++) {
        const int64_t key = k + tx() + 16 * c;
        pair[r][c] = hm_exp(score_of<T>(p, b, h, t, key, pair[r][c]) - lse[r]);
        if (p.drops) other[r][c] *= chance_of<T>(p, b, h, t, key);
        other[r][c] = pair[r][c] * (other[r][c] - delta[r]);
        more += other[r][c];
      }
      lack[r] += row_sum(more);
    }
    add_rows<T, NC>(s, other, keys, p.d, dq);
    add_rows<T, NC>(s, pair, keys, p.d, mean);
  }
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int64_t t = q + ty() * R + r;
#pragma unroll
    for (int c = 0; c < NC; c++) dq[r][c] = (dq[r][c] - lack[r] * mean[r][c]) * (T)p.scale;
    if (t < p.t && tx() == 0) static_cast<T *>(j.delta)[(b * p.h + h) * p.t + t] = delta[r] + lack[r];
  }
  store_rows<T, NC>(p.dq, b, h, q, p.t, p.d, dq);
}

/* A pair's score and g v^T become its weight after dropout and the gradient of its product q k^T. */
template <class T>
HM_DEV void differentiate(const hm_att_plan &p, int64_t b, int64_t h, int64_t t, int64_t s, T lse, T delta, T *pair,
                          T *other) {
  const T weight = hm_exp(score_of<T>(p, b, h, t, s, *pair) - lse);
  const T chance = p.drops ? chance_of<T>(p, b, h, t, s) : (T)1;
  *other = weight * (*other * chance - delta) * (T)p.scale;
  *pair = weight * chance;
}

/* Queries [q, q + TILE) of head h, added to dk and dv of the keys from k on. */
template <class T, int NC>
HM_DEV void add_queries(const attention_job &j, const scratch<T> &s, const block_rows &keys, const block_rows &values,
                        int64_t b, int64_t h, int64_t q, int64_t k, T (&dk)[sizes<T>::R][NC],
                        T (&dv)[sizes<T>::R][NC]) {
  enum { R = sizes<T>::R, TILE = sizes<T>::TILE };
  const hm_att_plan &p = j.p;
  const block_rows queries = rows_of(p.q, b, h, q, p.t, TILE), grads = rows_of(p.grad, b, h, q, p.t, TILE);
  T pair[R][R], other[R][R];
  dots<T>(s, keys, queries, p.d, pair);
  dots<T>(s, values, grads, p.e, other);
#pragma unroll
  for (int c = 0; c < R; c++) {
    const T lse = lse_of<T>(p, b, h, q + tx() + 16 * c), delta = delta_of<T>(j, b, h, q + tx() + 16 * c);
#pragma unroll
    for (int r = 0; r < R; r++)
      differentiate<T>(p, b, h, q + tx() + 16 * c, k + ty() * R + r, lse, delta, &pair[r][c], &other[r][c]);
  }
  add_rows<T, NC>(s, pair, grads, p.e, dv);
  add_rows<T, NC>(s, other, queries, p.d, dk);
}

template <class T, int NC>
HM_DEV void by_keys(const attention_job &j, const scratch<T> &s, int64_t b, int64_t head, int64_t k) {
  enum { R = sizes<T>::R, TILE = sizes<T>::TILE };
  const hm_att_plan &p = j.p;
  const int64_t group = hm__att_group(&p);
  const block_rows keys = rows_of(p.k, b, head, k, p.s, TILE), values = rows_of(p.v, b, head, k, p.s, TILE);
  T dk[R][NC], dv[R][NC];
  clear<T, NC>(dk);
  clear<T, NC>(dv);
  for (int64_t h = head * group; h < (head + 1) * group; h++)
    for (int64_t q = p.causal ? k : 0; q < p.t; q += TILE) add_queries<T, NC>(j, s, keys, values, b, h, q, k, dk, dv);
  store_rows<T, NC>(p.dk, b, head, k, p.s, p.d, dk);
  store_rows<T, NC>(p.dv, b, head, k, p.s, p.e, dv);
}

/* ====== Kernels ====== */

static int64_t tiles_of(const hm_att_plan &p, int pass, int tile) {
  return ((pass == KEYS ? p.s : p.t) + tile - 1) / tile;
}

/* A unit is a tile of one head; late tiles come first, they have most to do in a causal call. */
template <class T, int PASS, int NC>
static __global__ void __launch_bounds__(HM_BLOCK, 1) attend(attention_job j, int64_t units, int64_t tiles) {
  enum { TILE = sizes<T>::TILE, LINE = TILE + 1 };
  enum { COLUMNS = 2 * DEPTH * LINE, ROWS = sizes<T>::PIECE * NC * 16 };
  HM_SHARED(T, stage, [COLUMNS > ROWS ? (int)COLUMNS : (int) ROWS]);
  HM_SHARED(T, tile, [TILE * LINE]);
  const scratch<T> s = {stage, tile};
  const int64_t heads = PASS == KEYS ? j.p.g : j.p.h;
  for (int64_t u = blockIdx.x; u < units; u += gridDim.x) {
    const int64_t rest = u / tiles, first = (tiles - 1 - u % tiles) * TILE, b = rest / heads, h = rest % heads;
    if constexpr (PASS == FORWARD) forward<T, NC>(j.p, s, b, h, first);
    else if constexpr (PASS == QUERIES) by_queries<T, NC>(j, s, b, h, first);
    else by_keys<T, NC>(j, s, b, h, first);
  }
}

/* delta as it is before by_queries: sums of g * out, a warp for each query. */
template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) sum_products(attention_job j, int64_t rows) {
  const hm_att_plan &p = j.p;
  for (int64_t first = (int64_t)blockIdx.x * HM_WARPS; first < rows; first += (int64_t)gridDim.x * HM_WARPS) {
    const int64_t row = first + hm_warp();
    T sum = (T)0;
    if (row < rows) {
      const int64_t t = row % p.t, h = row / p.t % p.h, b = row / p.t / p.h;
      const int64_t g = b * p.grad.batch + h * p.grad.head + t * p.grad.step;
      const int64_t y = b * p.out.batch + h * p.out.head + t * p.out.step;
      for (int64_t e = hm_lane(); e < p.e; e += HM_WARP)
        sum = fused(hm_load<T>(p.grad.data, p.grad.dtype, g + e), hm_load<T>(p.out.data, p.out.dtype, y + e), sum);
    }
    sum = hm_warp_join<hm_sum>(sum);
    if (row < rows && hm_lane() == 0) static_cast<T *>(j.delta)[row] = sum;
  }
}

/* ====== Entry ====== */

template <class T, int PASS> static int launch(const attention_job &j, const char *name, void *stream) {
  const hm_att_plan &p = j.p;
  const int64_t tiles = tiles_of(p, PASS, sizes<T>::TILE), units = p.b * (PASS == KEYS ? p.g : p.h) * tiles;
  const int64_t width = PASS == FORWARD ? p.e : PASS != KEYS ? p.d : p.d > p.e ? p.d : p.e;
  if (units == 0) return HM_OK;
  const unsigned blocks = hm_blocks(units, 1);
  if (width <= 64) return HM_RUN(name, (attend<T, PASS, 4>), blocks, HM_BLOCK, 0, stream, j, units, tiles);
  if (width <= 128) return HM_RUN(name, (attend<T, PASS, 8>), blocks, HM_BLOCK, 0, stream, j, units, tiles);
  return HM_RUN(name, (attend<T, PASS, 16>), blocks, HM_BLOCK, 0, stream, j, units, tiles);
}

template <class T> static int run(const attention_job &j, bool back, void *stream) {
  if (!back) return launch<T, FORWARD>(j, "attention", stream);
  const int64_t rows = j.p.b * j.p.h * j.p.t;
  int status = HM_OK;
  if (rows > 0)
    status = HM_RUN("attention_backward", (sum_products<T>), hm_blocks(rows, HM_WARPS), HM_BLOCK, 0, stream, j, rows);
  if (status == HM_OK) status = launch<T, QUERIES>(j, "attention_backward", stream);
  return status == HM_OK ? launch<T, KEYS>(j, "attention_backward", stream) : status;
}

extern "C" int hm_cuda_attention_workspace(const hm_kernel_call *call, size_t *bytes) {
  const hm_view *q = &call->in[1];
  *bytes = 0;
  if (call->op == HM_OP_ATTENTION_BACKWARD)
    *bytes = (size_t)(q->shape[0] * q->shape[1] * q->shape[2]) * (call->compute == HM_F64 ? 8 : 4);
  return HM_OK;
}

extern "C" int hm_cuda_attention(const hm_kernel_call *call) {
  const bool back = call->op == HM_OP_ATTENTION_BACKWARD;
  if (!back && call->op != HM_OP_ATTENTION)
    return hm_cuda_fail(HM_ERR_UNSUPPORTED, "attention: op %d is unknown to cuda", call->op);
  attention_job j;
  memset(&j, 0, sizeof j);
  j.p = hm__att_plan(call);
  j.delta = call->workspace;
  if (j.p.d > MOST_WIDTH || j.p.e > MOST_WIDTH)
    return hm_cuda_fail(
        HM_ERR_UNSUPPORTED,
        "attention: heads are up to %d wide on cuda, got %lld (q, k) and %lld (v)\n  hint: use more heads",
        (int)MOST_WIDTH, (long long)j.p.d, (long long)j.p.e);
  return call->compute == HM_F64 ? run<double>(j, back, call->stream) : run<float>(j, back, call->stream);
}
