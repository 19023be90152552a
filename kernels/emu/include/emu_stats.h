/*
 * emu_stats.h -- what the test double counted, and how a test steers it.
 *
 * Part of kernels/emu, a test double: it shows no speed, no memory model, no real cuBLAS.  Plain C.  May be included by specs and by the
 * part of kernels/cuda that reports statistics; there is no such header in the toolkit (HALFMOON_EMU is defined where it may be used).
 *
 * Environment
 *   HALFMOON_EMU_ORDER   ascending (default), descending, random or random:SEED: in which order threads wake, blocks run, streams drain
 *   HALFMOON_EMU_DEFER   1: nothing on a stream runs before somebody waits for it
 *   HALFMOON_EMU_FENCE   0: device memory stays readable by the host (faster; default 1)
 *   HALFMOON_EMU_CC      compute capability, default 9.0
 *   HALFMOON_EMU_DRIVER  CUDA version that the driver knows, default the runtime's; 0: none is installed
 *   HALFMOON_EMU_MEMORY  device memory in MiB, default 4096
 *   HALFMOON_EMU_SMS     multiprocessors, default 4
 *   HALFMOON_EMU_FAIL    NAME:N[,NAME:N...]: the N-th call of that function fails ("call": of any function, "launch": of any kernel)
 *   HALFMOON_EMU_CXX     compiler for run-time compilation, default g++
 *   HALFMOON_EMU_EPILOGUE  none, nan or rough: what cublasLt's epilogues are like (blas.cpp tells)
 *   HALFMOON_EMU_CUDNN   refuse, late or bias: what cuDNN refuses (cudnn.cpp tells)
 *   HALFMOON_EMU_QUIET   1: violations are not printed to stderr
 */
#ifndef HM_EMU_STATS_H
#define HM_EMU_STATS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct emu_stats {
  uint64_t calls;    /* of the runtime, cuBLAS and the driver */
  uint64_t launches; /* kernels, without the matrix products */
  uint64_t gemms;    /* matrix products */
  double gemm_flops; /* 2 m n k each */
  uint64_t
      synchronisations; /* the host waited for the device: synchronise calls, copies that return when done, cudaFree */
  uint64_t copies_h2d, copies_d2h, copies_d2d;
  uint64_t bytes_h2d, bytes_d2h, bytes_d2d;
  uint64_t memsets, bytes_memset;
  uint64_t allocations, frees; /* of device memory */
  uint64_t live_allocations, live_bytes, peak_bytes;
  uint64_t live_pinned;  /* blocks of pinned host memory */
  uint64_t live_objects; /* streams, events, handles, descriptors, modules: what has a destroy function */
  uint64_t violations;
} emu_stats;

/* Copies the counters as they stand.  Counts begin at the start of the process or the last emu_reset_counts. */
void emu_get_stats(emu_stats *out);
/* Sets the counts to zero; the live and peak figures stay true. */
void emu_reset_counts(void);
/* Text of the last violation ("" when there was none).  Valid until the next one. */
const char *emu_last_report(void);
/* The n-th call of `name` from now on fails, n >= 1 ("call": of any function, "launch": of any kernel).  n = 0 takes all such plans back. */
void emu_fail(const char *name, int n);
/* How often the kernel of that name was launched; names are those of the launch macro. */
uint64_t emu_launches_of(const char *kernel);

#ifdef __cplusplus
}
#endif
#endif
