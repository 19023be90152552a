/*
 * pad.h -- which element of x a padded place shows, and which places show an element.
 *
 * One dim at a time: x has `size` entries, of which the first stands at place `left` of the `out` places.  In the order of the row's enum:
 * constant, reflect, replicate, circular.  Shared by the CPU's kernels and CUDA's; owns nothing.
 */
#ifndef HM_PAD_H
#define HM_PAD_H

#include <stdint.h>

#include "math.h"

enum { HM_PAD_CONSTANT, HM_PAD_REFLECT, HM_PAD_REPLICATE, HM_PAD_CIRCULAR };

/* The entry of x at place i; -1: none. */
HM_FN int64_t hm_pad_source(int mode, int64_t i, int64_t left, int64_t size) {
  const int64_t j = i - left;
  if (j >= 0 && j < size) return j;
  switch (mode) {
  case HM_PAD_REFLECT: return j < 0 ? -j : 2 * (size - 1) - j;
  case HM_PAD_REPLICATE: return j < 0 ? 0 : size - 1;
  case HM_PAD_CIRCULAR: return j < 0 ? j + size : j - size;
  default: return -1;
  }
}

/* The first place behind p that shows entry q; -1: no more.  p: one that does, or -1 to begin. */
HM_FN int64_t hm_pad_next(int mode, int64_t q, int64_t left, int64_t size, int64_t out, int64_t p) {
  const int64_t own = q + left;
  switch (mode) {
  case HM_PAD_REFLECT: {
    const int64_t before = q > 0 ? left - q : -1, behind = q < size - 1 ? left + 2 * (size - 1) - q : -1;
    if (before > p) return before;
    if (own > p) return own;
    return behind > p && behind < out ? behind : -1;
  }
  case HM_PAD_REPLICATE: {
    const int64_t first = q == 0 ? 0 : own, last = q == size - 1 ? out - 1 : own;
    const int64_t next = p + 1 > first ? p + 1 : first;
    return next <= last ? next : -1;
  }
  case HM_PAD_CIRCULAR: {
    const int64_t next = p < 0 ? own % size : p + size;
    return next < out ? next : -1;
  }
  default: return own > p && own < out ? own : -1;
  }
}

#endif
