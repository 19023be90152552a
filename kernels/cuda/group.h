/*
 * group.h -- threads that work on one result together: a warp, or a block of 256.  Sums and maxima in one fixed order.
 *
 * Each thread brings a value; values meet in halves (16, 8, 4, 2, 1) within a warp, then in order of the warps.
 * Every thread gets the result. Nothing depends on which thread comes first, so the bits are the same in every run.
 *
 * Included by reduce.h, norm.cu, loss.cu, multi.cu, scan.cu and nll.cu.  Owns nothing.
 */
#ifndef HM_CUDA_GROUP_H
#define HM_CUDA_GROUP_H

#include "view.h"

enum { HM_WARP = 32, HM_WARPS = HM_BLOCK / HM_WARP };

HM_DEV float hm_shuffle_down(float x, int by) { return __shfl_down_sync(0xffffffffu, x, by); }
HM_DEV double hm_shuffle_down(double x, int by) { return __shfl_down_sync(0xffffffffu, x, by); }
HM_DEV int hm_shuffle_down(int x, int by) { return __shfl_down_sync(0xffffffffu, x, by); }
HM_DEV int64_t hm_shuffle_down(int64_t x, int by) { return (int64_t)__shfl_down_sync(0xffffffffu, (long long)x, by); }
HM_DEV uint64_t hm_shuffle_down(uint64_t x, int by) {
  return (uint64_t)__shfl_down_sync(0xffffffffu, (unsigned long long)x, by);
}

/* What lane 0 of the warp has. */
HM_DEV float hm_first_lane(float x) { return __shfl_sync(0xffffffffu, x, 0); }
HM_DEV double hm_first_lane(double x) { return __shfl_sync(0xffffffffu, x, 0); }
HM_DEV int hm_first_lane(int x) { return __shfl_sync(0xffffffffu, x, 0); }
HM_DEV int64_t hm_first_lane(int64_t x) { return (int64_t)__shfl_sync(0xffffffffu, (long long)x, 0); }
HM_DEV uint64_t hm_first_lane(uint64_t x) { return (uint64_t)__shfl_sync(0xffffffffu, (unsigned long long)x, 0); }

/* How two values become one; a NaN wins over everything in Max and Min. */
struct hm_sum {
  template <class T> HM_DEV T join(T a, T b) { return a + b; }
};
struct hm_max {
  template <class T> HM_DEV T join(T a, T b) { return b > a || b != b ? b : a; }
};

/* Lane 0 of each warp gets its warp's result. */
template <class J, class T> HM_DEV T hm_warp_join(T x) {
  for (int by = HM_WARP / 2; by > 0; by /= 2) {
    const T other = hm_shuffle_down(x, by);
    x = J::join(x, other);
  }
  return x;
}

/* All G threads of the group (32: the warp, 256: the block) get the result.  Every thread of the block must come. */
template <class J, int G, class T> HM_DEV T hm_group_join(T x) {
  x = hm_warp_join<J>(x);
  if constexpr (G == HM_WARP) {
    return hm_first_lane(x);
  } else {
    HM_SHARED(T, part, [HM_WARPS]);
    if (hm_lane() == 0) part[hm_warp()] = x;
    HM_BARRIER();
    T all = part[0];
    for (int w = 1; w < G / HM_WARP; w++) all = J::join(all, part[w]);
    HM_BARRIER(); /* part may be used again */
    return all;
  }
}

/* ====== Rows along one dim ====== */

/* K tensors of one shape, seen as rows along a dim: offsets of a row come from the walk, its elements lie `step`
 * apart. */
template <int K> struct hm_rows {
  hm_walk<K> walk;
  int64_t step[K], length;
  void *data[K];
  int8_t dtype[K];
};

enum { HM_KEEP = 8, HM_AHEAD = 4 }; /* elements of a row that a thread keeps in registers; that it reads at once */

/* The elements t, t + G, ... of a row.  KEEP: they are read once and kept (the row has at most G * HM_KEEP); else
 * read at each pass. */
template <class T, int G, bool KEEP> struct hm_row {
  const void *data;
  int dtype, t;
  int64_t base, step, length;
  T kept[KEEP ? HM_KEEP : 1];

  /* Elements i, i + G, ...; those behind the end are read at the row's beginning, which is always there. */
  template <int N> __device__ __forceinline__ void fetch(int64_t i, T *x) const {
    int64_t at[N];
#pragma unroll
    for (int j = 0; j < N; j++) at[j] = base + (i + j * G < length ? (i + j * G) * step : 0);
    hm_load_many<N>(data, dtype, at, x);
  }
  __device__ __forceinline__ void open(const void *from, int type, int64_t at, int64_t by, int64_t n, int thread) {
    data = from, dtype = type, base = at, step = by, length = n, t = thread;
    if constexpr (KEEP) fetch<HM_KEEP>(t, kept);
  }
  /* Calls f(i, x) for each; what f writes to x stays only where KEEP holds. */
  template <class F> __device__ __forceinline__ void each(F f) {
    if constexpr (KEEP) {
#pragma unroll
      for (int j = 0; j < HM_KEEP; j++)
        if (t + j * G < length) f((int64_t)(t + j * G), kept[j]);
    } else {
      for (int64_t i = t; i < length; i += HM_AHEAD * G) {
        T x[HM_AHEAD];
        fetch<HM_AHEAD>(i, x);
#pragma unroll
        for (int j = 0; j < HM_AHEAD; j++)
          if (i + j * G < length) f(i + j * G, x[j]);
      }
    }
  }
};

/* How rows are shared out. */
typedef enum hm_row_plan {
  HM_ROWS_WARP_KEEP,
  HM_ROWS_WARP,
  HM_ROWS_BLOCK_KEEP,
  HM_ROWS_BLOCK,
  HM_ROWS_THREAD
} hm_row_plan;

/* By the layout of operand x: rows that lie side by side in memory are taken by neighbouring threads, one each. */
template <int K> static hm_row_plan hm_plan_rows(const hm_rows<K> &r, int x) {
  const bool side_by_side = r.step[x] != 1 && r.walk.stride[x][r.walk.ndim - 1] == 1 && r.length > 1;
  if (side_by_side && r.walk.count >= HM_WARP && (r.length <= 1024 || r.walk.count >= 8192)) return HM_ROWS_THREAD;
  if (r.length <= HM_WARP * HM_KEEP) return HM_ROWS_WARP_KEEP;
  if (r.length <= 1024) return HM_ROWS_WARP;
  return r.length <= HM_BLOCK * HM_KEEP ? HM_ROWS_BLOCK_KEEP : HM_ROWS_BLOCK;
}

static inline unsigned hm_row_blocks(int64_t rows, hm_row_plan plan) {
  return hm_blocks(rows, plan == HM_ROWS_THREAD                              ? HM_BLOCK
                         : plan == HM_ROWS_WARP || plan == HM_ROWS_WARP_KEEP ? HM_WARPS
                                                                             : 1);
}

/* Sums one number after the other and keeps what each addition loses. */
template <class T> struct hm_long_sum {
  T sum, lost;
  __device__ __forceinline__ void add(T x) {
    const T y = x - lost, s = sum + y, l = (s - sum) - y;
    lost = l - l == (T)0 ? l : (T)0; /* infinity and NaN lose nothing */
    sum = s;
  }
};

HM_DEV float hm_exp(float x) { return hm_exp_f32(x); }
HM_DEV double hm_exp(double x) { return hm_exp_f64(x); }
HM_DEV float hm_log(float x) { return hm_log_f32(x); }
HM_DEV double hm_log(double x) { return hm_log_f64(x); }

#endif
