/*
 * runs.h -- runs of elements: n of them, a fixed distance apart, of any dtype; and walks over the runs of a loop.
 *
 * What the indexing kernels (index.c, index_add.c, place.c, sort.c) move data with.  Equal dtypes move as bytes; others pass through tiles that
 * the chosen instruction set converts.  Header-only; owns nothing.
 */
#ifndef HM_CPU_RUNS_H
#define HM_CPU_RUNS_H

#include <string.h>

#include "isa.h"
#include "layout.h"

enum { HM_RUN_TILE = 256 }; /* elements that pass through a buffer at once */

static inline char *hm__at(const void *data, int64_t at, int dtype) {
  return (char *)(uintptr_t)data + at * hm_dtype_size(dtype);
}

/* d[i * dstep] = s[i * sstep], elements of `size` bytes. */
static inline void hm__move_run(int size, void *d, int64_t dstep, const void *s, int64_t sstep, int64_t n) {
#define HM_MOVE_RUN(type)                                                                                              \
  for (int64_t i = 0; i < n; i++) ((type *)d)[i * dstep] = ((const type *)s)[i * sstep]
  if (n <= 0) return; /* there may be no memory */
  if (dstep == 1 && sstep == 1) memcpy(d, s, (size_t)(n * size));
  else if (size == 4) HM_MOVE_RUN(uint32_t);
  else if (size == 2) HM_MOVE_RUN(uint16_t);
  else if (size == 8) HM_MOVE_RUN(uint64_t);
  else HM_MOVE_RUN(uint8_t);
#undef HM_MOVE_RUN
}

/* A strided run of one dtype as a strided run of another, each rounded once. */
static inline void hm__copy_run(void *d, int to, int64_t dstep, const void *s, int from, int64_t sstep, int64_t n) {
  if (to == from) {
    hm__move_run(hm_dtype_size(to), d, dstep, s, sstep, n);
    return;
  }
  const hm_isa *isa = hm_cpu_isa();
  for (int64_t i = 0; i < n; i += HM_RUN_TILE) {
    const int64_t m = n - i < HM_RUN_TILE ? n - i : HM_RUN_TILE;
    uint64_t read[HM_RUN_TILE], wrote[HM_RUN_TILE];
    const void *src = hm__at(s, i * sstep, from);
    void *dst = hm__at(d, i * dstep, to);
    if (sstep != 1) hm__move_run(hm_dtype_size(from), read, 1, src, sstep, m);
    isa->convert(dstep == 1 ? dst : wrote, to, sstep == 1 ? src : read, from, m);
    if (dstep != 1) hm__move_run(hm_dtype_size(to), dst, dstep, wrote, 1, m);
  }
}

/* n strided ids as int64. */
static inline void hm__read_ids(int64_t *ids, const void *data, int dtype, int64_t step, int64_t n) {
#define HM_READ_IDS(type)                                                                                              \
  for (int64_t i = 0; i < n; i++) ids[i] = ((const type *)data)[i * step]
  if (dtype == HM_I64) HM_READ_IDS(int64_t);
  else if (dtype == HM_I32) HM_READ_IDS(int32_t);
  else HM_READ_IDS(uint8_t);
#undef HM_READ_IDS
}

/* Where K operands of a loop stand at flat position `at` of its outer dims (all but the last `skip`). */
static inline void hm__loop_seek(const hm_loop *l, int skip, int64_t at, int operands, int64_t *offset) {
  for (int k = 0; k < operands; k++) offset[k] = 0;
  for (int d = l->ndim - 1 - skip; d >= 0; d--) {
    const int64_t i = at % l->shape[d];
    at /= l->shape[d];
    for (int k = 0; k < operands; k++) offset[k] += i * l->stride[k][d];
  }
}

#endif
