/*
 * group.h -- threads that work on one result together: a warp, or a block of 256.  Sums and maxima in one fixed order.
 *
 * Each thread brings a value; values meet in halves (16, 8, 4, 2, 1) within a warp, then in order of the warps.  Every thread gets the result.
 * Nothing depends on which thread comes first, so the bits are the same in every run.
 *
 * Included by reduce.cu, norm.cu, loss.cu and multi.cu.  Owns nothing.
 */
#ifndef HM_CUDA_GROUP_H
#define HM_CUDA_GROUP_H

#include "view.h"

enum { HM_WARP = 32, HM_WARPS = HM_BLOCK / HM_WARP };

HM_DEV float hm_shuffle_down(float x, int by) { return __shfl_down_sync(0xffffffffu, x, by); }
HM_DEV double hm_shuffle_down(double x, int by) { return __shfl_down_sync(0xffffffffu, x, by); }
HM_DEV int hm_shuffle_down(int x, int by) { return __shfl_down_sync(0xffffffffu, x, by); }
HM_DEV int64_t hm_shuffle_down(int64_t x, int by) { return (int64_t)__shfl_down_sync(0xffffffffu, (long long)x, by); }
HM_DEV uint64_t hm_shuffle_down(uint64_t x, int by) { return (uint64_t)__shfl_down_sync(0xffffffffu, (unsigned long long)x, by); }

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

#endif
