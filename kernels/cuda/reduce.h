/*
 * reduce.h -- reductions over dims: the plan and the kernels.  What is reduced, and how, is a struct of the including file's.
 *
 * The plan splits the input's dims into kept and reduced ones and joins what lies together.  Then one of two kernels
 * runs:
 *   rows      each result by a warp, or by a block where it has many elements; neighbours are read by neighbours
 *   columns   the innermost kept dim is dense: a block takes 32 columns, its 8 warps every eighth row each
 * Where there are too few results to fill the device, the reduced elements are cut into chunks, whose results meet in
 * the workspace and are joined by a third kernel.  All of it depends on shapes and strides only: the order of the
 * additions, and so the bits, never change.
 *
 * A struct R has
 *   raw, load(x, dtype, at, v)   HM_REDUCE_AHEAD elements as they are read
 *   acc, identity()              what is accumulated, and of nothing
 *   take(v, place, p, centre)    one element as an accumulator
 *   join(a, b)                   two of them as one
 *   value(a, p, centre), place(a)   the results
 *
 * Included by reduce.cu and spread.cu.  Owns nothing.
 */
#ifndef HM_CUDA_REDUCE_H
#define HM_CUDA_REDUCE_H

#include "group.h"

enum { HM_REDUCE_AHEAD = 4 }; /* elements that a thread reads at once */

/* ====== The plan ====== */

/* A divisor of 64-bit indices.  A division instruction of that width does not exist, and a call of a function
 * would cost registers: narrow indices are multiplied in integers, wide ones (to 2^52) in double and put right. */
struct hm_wide_divisor {
  int64_t size;
  double inverse;
  hm_divisor by;
  bool narrow; /* all indices are below 2^31 */
};

static hm_wide_divisor hm_make_wide_divisor(int64_t size, int64_t count) {
  if (size < 1) size = 1;
  const bool narrow = count < HM_CUDA_PIECE && size < HM_CUDA_PIECE;
  return {size, 1.0 / (double)size, hm_make_divisor(narrow ? size : 1), narrow};
}

HM_DEV int64_t hm_divide_wide(int64_t i, const hm_wide_divisor &d) {
  if (d.narrow) return hm_divide((uint32_t)i, d.by);
  const int64_t q = (int64_t)((double)i * d.inverse), r = i - q * d.size;
  return r < 0 ? q - 1 : r >= d.size ? q + 1 : q;
}

/* Dims of which an element is found from a flat index. */
struct hm_flat {
  int32_t ndim;
  hm_wide_divisor by[HM_MAX_NDIM];
  int64_t stride[3][HM_MAX_NDIM]; /* x, and of kept dims out 0 and out 1 */
};

struct hm_reduction {
  const void *x;
  void *out[2]; /* value and place; NULL: not wanted */
  int32_t dtype, out_dtype[2];
  hm_flat kept, reduced;
  int64_t n_keep, n_red;
  int64_t chunk, n_chunks; /* reduced elements of a chunk */
  hm_wide_divisor by_chunks, by_tiles;
  int64_t cols, outer;  /* columns: size of the inner kept dim, product of the others */
  bool columns, divide; /* divide: mean */
  void *partial;        /* n_chunks x n_keep accumulators, or NULL: results are written at once */
  /* for ops that take two passes (spread.cu) */
  int32_t kind; /* the op's own */
  double param;
  const double *centre; /* one number for each result, which terms are taken about; NULL: none */
  double *result;       /* results go here, too, as float64; NULL: they do not */
};

HM_DEV int64_t hm_flat_offset(const hm_flat &f, int which, int64_t i) {
  int64_t at = 0;
  for (int d = f.ndim - 1; d > 0; d--) {
    const int64_t q = hm_divide_wide(i, f.by[d]);
    at += (i - q * f.by[d].size) * f.stride[which][d];
    i = q;
  }
  return f.ndim ? at + i * f.stride[which][0] : 0;
}

/* ====== Kernels ====== */

HM_DEV double hm_reduce_centre(const hm_reduction &p, int64_t k) { return p.centre ? p.centre[k] : 0.0; }

template <class R> HM_DEV void hm_reduce_finish(const hm_reduction &p, int64_t k, typename R::acc a) {
  auto v = R::value(a, p, hm_reduce_centre(p, k));
  if (p.divide) v = v / (decltype(v))p.n_red;
  if (p.result) p.result[k] = (double)v;
  if (p.out[0]) hm_store(p.out[0], p.out_dtype[0], hm_flat_offset(p.kept, 1, k), v);
  if (p.out[1]) hm_store(p.out[1], p.out_dtype[1], hm_flat_offset(p.kept, 2, k), R::place(a));
}

template <class R> HM_DEV void hm_reduce_keep(const hm_reduction &p, int64_t k, int64_t chunk, typename R::acc a) {
  if (p.partial) static_cast<typename R::acc *>(p.partial)[chunk * p.n_keep + k] = a;
  else hm_reduce_finish<R>(p, k, a);
}

/* What one thread gets of elements i, i + STEP, ... before `end`. */
template <class R, int STEP>
HM_DEV typename R::acc hm_reduce_part(const hm_reduction &p, int64_t base, int64_t i, int64_t end, double centre) {
  typename R::acc a[HM_REDUCE_AHEAD];
#pragma unroll
  for (int j = 0; j < HM_REDUCE_AHEAD; j++) a[j] = R::identity();
  for (; i < end; i += HM_REDUCE_AHEAD * STEP) {
    int64_t at[HM_REDUCE_AHEAD];
    typename R::raw v[HM_REDUCE_AHEAD];
#pragma unroll
    for (int j = 0; j < HM_REDUCE_AHEAD; j++)
      at[j] = base + hm_flat_offset(p.reduced, 0, i + j * STEP < end ? i + j * STEP : i);
    R::load(p.x, p.dtype, at, v);
#pragma unroll
    for (int j = 0; j < HM_REDUCE_AHEAD; j++)
      if (i + j * STEP < end) a[j] = R::join(a[j], R::take(v[j], i + j * STEP, p, centre));
  }
  return R::join(R::join(a[0], a[1]), R::join(a[2], a[3]));
}

/* One result (of one chunk) by G threads. */
template <class R, int G> static __global__ void __launch_bounds__(HM_BLOCK, 2) hm_reduce_rows(hm_reduction p) {
  const int groups = HM_BLOCK / G, t = (int)threadIdx.x % G;
  const int64_t units = p.n_keep * p.n_chunks, step = (int64_t)gridDim.x * groups;
  for (int64_t first = (int64_t)blockIdx.x * groups; first < units;
       first += step) { /* the same rounds for all threads */
    const int64_t u = first + threadIdx.x / G;
    const bool here = u < units;
    const int64_t k = here ? hm_divide_wide(u, p.by_chunks) : 0, chunk = here ? u - k * p.n_chunks : 0;
    const int64_t begin = chunk * p.chunk, limit = begin + p.chunk,
                  end = !here             ? begin
                        : limit < p.n_red ? limit
                                          : p.n_red;
    const int64_t base = hm_flat_offset(p.kept, 0, k);
    const typename R::acc mine = hm_reduce_part<R, G>(p, base, begin + t, end, hm_reduce_centre(p, k));
    const typename R::acc all = hm_group_join<R, G>(mine);
    if (here && t == 0) hm_reduce_keep<R>(p, k, chunk, all);
  }
}

/* 32 columns of one chunk by a block of 32 x 8. */
template <class R> static __global__ void __launch_bounds__(HM_BLOCK, 2) hm_reduce_columns(hm_reduction p) {
  HM_SHARED(typename R::acc, part, [HM_WARPS][HM_WARP]);
  const int64_t tiles = p.by_tiles.size, units = p.outer * tiles * p.n_chunks;
  const int lane = (int)threadIdx.x % HM_WARP, warp = (int)threadIdx.x / HM_WARP;
  for (int64_t u = blockIdx.x; u < units; u += gridDim.x) {
    const int64_t rest = hm_divide_wide(u, p.by_tiles), tile = u - rest * tiles;
    const int64_t outer = hm_divide_wide(rest, p.by_chunks), chunk = rest - outer * p.n_chunks;
    const int64_t c = tile * HM_WARP + lane, k = outer * p.cols + c;
    const int64_t begin = chunk * p.chunk, limit = begin + p.chunk, end = limit < p.n_red ? limit : p.n_red;
    const bool here = c < p.cols;
    const int64_t base = here ? hm_flat_offset(p.kept, 0, k) : 0;
    part[warp][lane] =
        hm_reduce_part<R, HM_WARPS>(p, base, here ? begin + warp : end, end, here ? hm_reduce_centre(p, k) : 0.0);
    HM_BARRIER();
    if (warp == 0 && here) {
      typename R::acc all = part[0][lane];
      for (int w = 1; w < HM_WARPS; w++) all = R::join(all, part[w][lane]);
      hm_reduce_keep<R>(p, k, chunk, all);
    }
    HM_BARRIER();
  }
}

/* Results from those of the chunks, in order: 32 results by a block of 32 x 8. */
template <class R> static __global__ void __launch_bounds__(HM_BLOCK, 2) hm_reduce_chunks(hm_reduction p) {
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
      hm_reduce_finish<R>(p, k, all);
    }
    HM_BARRIER();
  }
}

/* ====== Making the plan ====== */

/* Appends a dim of x, joining it to the one before where all strides allow it. */
static void hm__flat_append(hm_flat *f, int64_t size, int64_t s0, int64_t s1, int64_t s2) {
  const int64_t s[3] = {s0, s1, s2};
  bool joins = f->ndim > 0;
  for (int k = 0; k < 3; k++) joins = joins && f->stride[k][f->ndim - 1] == s[k] * size;
  const int at = joins ? f->ndim - 1 : f->ndim++;
  f->by[at].size = joins ? f->by[at].size * size : size;
  for (int k = 0; k < 3; k++) f->stride[k][at] = s[k];
}

struct hm_reduce_dim {
  int64_t size, x, out, place;
};

/* Larger strides outside; repeated dims (stride 0) outermost. */
static void hm__sort_dims(hm_reduce_dim *d, int n) {
  for (int i = 1; i < n; i++) {
    const hm_reduce_dim v = d[i];
    int j = i;
    for (; j > 0 && d[j - 1].x != 0 && (v.x == 0 || v.x > d[j - 1].x); j--) d[j] = d[j - 1];
    d[j] = v;
  }
}

static void hm__flat_set(hm_flat *f, const hm_reduce_dim *d, int n, int64_t count) {
  for (int i = 0; i < n; i++) hm__flat_append(f, d[i].size, d[i].x, d[i].out, d[i].place);
  for (int i = 0; i < f->ndim; i++) f->by[i] = hm_make_wide_divisor(f->by[i].size, count);
}

enum { HM_REDUCE_ROOM = 512, HM_REDUCE_CHUNKS = 256, HM_REDUCE_LONG = 512 };

/* Cuts the reduced elements where there are too few results for the device. */
static void hm__set_chunks(hm_reduction *p) {
  p->columns = p->kept.ndim > 0 && p->kept.stride[0][p->kept.ndim - 1] == 1 &&
               !(p->reduced.ndim > 0 && p->reduced.stride[0][p->reduced.ndim - 1] == 1);
  p->cols = p->columns ? p->kept.by[p->kept.ndim - 1].size : 1;
  p->outer = p->n_keep / p->cols;
  const int64_t tiles = (p->cols + HM_WARP - 1) / HM_WARP, units = p->columns ? p->outer * tiles : p->n_keep;
  const int64_t least = p->columns ? 128 : 8192; /* reduced elements that are worth a chunk */
  int64_t chunks = HM_REDUCE_ROOM / units;
  if (chunks > p->n_red / least) chunks = p->n_red / least;
  if (chunks > HM_REDUCE_CHUNKS) chunks = HM_REDUCE_CHUNKS;
  if (chunks < 1) chunks = 1;
  p->chunk = (p->n_red + chunks - 1) / chunks;
  p->n_chunks = (p->n_red + p->chunk - 1) / p->chunk;
  p->by_chunks = hm_make_wide_divisor(p->n_chunks, units * p->n_chunks);
  p->by_tiles = hm_make_wide_divisor(tiles, units * p->n_chunks);
}

/* Splits the dims of in[0]: those in mask are reduced; keep: the outputs keep them with size 1; sort: in any order.  value, place: the
 * outputs, or NULL. */
static void hm_reduction_make(hm_reduction *p, const hm_kernel_call *call, uint32_t mask, bool keep, bool sort,
                              const hm_view *value, const hm_view *place) {
  const hm_view *x = &call->in[0], *first = value ? value : place, *second = place ? place : first;
  hm_reduce_dim kept[HM_MAX_NDIM], red[HM_MAX_NDIM];
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
    else kept[nk++] = {n, x->stride[d], first->stride[to], second->stride[to]};
  }
  hm__sort_dims(kept, nk);
  if (sort) hm__sort_dims(red, nr);
  hm__flat_set(&p->kept, kept, nk, p->n_keep);
  hm__flat_set(&p->reduced, red, nr, p->n_red);
  if (value) p->out[0] = value->data, p->out_dtype[0] = value->dtype;
  if (place) p->out[1] = place->data, p->out_dtype[1] = place->dtype;
  p->divide = call->op == HM_OP_MEAN;
  if (p->n_keep > 0 && p->n_red > 0) hm__set_chunks(p);
}

/* ====== Launching ====== */

template <class R> static int hm_reduce(const hm_reduction *p, const char *name, void *stream) {
  int status;
  if (p->columns) {
    const int64_t units = p->outer * p->by_tiles.size * p->n_chunks;
    status = HM_RUN(name, (hm_reduce_columns<R>), hm_blocks(units, 1), HM_BLOCK, 0, stream, *p);
  } else if (p->chunk < HM_REDUCE_LONG) {
    status = HM_RUN(name, (hm_reduce_rows<R, HM_WARP>), hm_blocks(p->n_keep * p->n_chunks, HM_WARPS), HM_BLOCK, 0,
                    stream, *p);
  } else {
    status =
        HM_RUN(name, (hm_reduce_rows<R, HM_BLOCK>), hm_blocks(p->n_keep * p->n_chunks, 1), HM_BLOCK, 0, stream, *p);
  }
  if (status != HM_OK || !p->partial) return status;
  return HM_RUN(name, (hm_reduce_chunks<R>), hm_blocks(p->n_keep, HM_WARP), HM_BLOCK, 0, stream, *p);
}

#endif
