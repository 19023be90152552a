/*
 * isa.h -- one instruction set's worth of kernels.
 *
 * Hot files (convert.c elementwise.c copy.c fill.c reduce.c norm.c loss.c pool.c multi.c index.c) are compiled three times, with
 * -DHM_ISA=baseline, avx2 and avx512.  Each defines its functions as `HM_ISA_FN(name)`, which becomes name_avx2 and so on, and
 * never anything else with external linkage.  isa.c (also compiled three times) gathers them into one table; backend.c picks a table once.
 * Files that are compiled once (backend.c onednn.c matmul.c conv.c) reach the chosen one through hm_cpu_isa().
 *
 * All these files are built with -ffp-contract=off -fno-math-errno -fno-trapping-math and without -mfma, so that the three
 * variants agree to the bit.
 */
#ifndef HM_CPU_ISA_H
#define HM_CPU_ISA_H

#include "../kernels.h"

#define HM_ISA_JOIN_(name, isa) name##_##isa
#define HM_ISA_JOIN(name, isa) HM_ISA_JOIN_(name, isa)
#ifdef HM_ISA
#define HM_ISA_FN(name) HM_ISA_JOIN(name, HM_ISA)
#endif

typedef struct hm_isa {
  const char *name;

  /* convert.c: n contiguous elements from one dtype to another, on the calling thread; dst and src may be equal only where dtypes are.
   * Rounds once to nearest even; out-of-range floats to integers as in C on x86 for int32/int64; to bool: != 0 (NaN is true). */
  void (*convert)(void *dst, int dst_dtype, const void *src, int src_dtype, int64_t n);

  /* Families. */
  int (*elementwise)(
      const hm_kernel_call *call);         /* elementwise.c: generated tile functions and the engine that feeds them */
  int (*copy)(const hm_kernel_call *call); /* copy.c: cast, copy_ */
  int (*fill)(const hm_kernel_call *call); /* fill.c: fill_, arange_, eye_ */
  int (*random)(const hm_kernel_call *call);      /* fill.c: uniform_, normal_, random_ */
  int (*reduce)(const hm_kernel_call *call);      /* reduce.c */
  int (*index)(const hm_kernel_call *call);       /* index.c: select_backward */
  int (*norm)(const hm_kernel_call *call);        /* norm.c: softmax and log_softmax, with gradients */
  int (*loss)(const hm_kernel_call *call);        /* loss.c: cross_entropy, with gradient */
  int (*pool)(const hm_kernel_call *call);        /* pool.c: max_pool2d, with gradient */
  int (*multi_tensor)(const hm_multi_call *call); /* multi.c: check, unscale, scale, sgd, adam */
} hm_isa;

#ifdef HM_ISA
/* The entries of this variant's table, each in the file named above; isa.c gathers them. */
void HM_ISA_FN(hm_cpu_convert)(void *dst, int dst_dtype, const void *src, int src_dtype, int64_t n);
int HM_ISA_FN(hm_cpu_elementwise)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_copy)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_fill)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_random)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_reduce)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_index)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_norm)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_loss)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_pool)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_multi_tensor)(const hm_multi_call *call);
#endif

extern const hm_isa hm_isa_baseline;
#if defined(__x86_64__)
extern const hm_isa hm_isa_avx2, hm_isa_avx512;
#endif

/* The table in use. */
const hm_isa *hm_cpu_isa(void);

/* Tells the host why (printf style); returns code.  (backend.c) */
int hm_cpu_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Threads to use for `work` items of about `cost` bytes or operations each: 1 below a threshold, else the configured number. (backend.c)
 * Never decides how a result is summed: partial sums depend on shapes only. */
int hm_cpu_threads(int64_t work, int64_t cost);

/* oneDNN entries (matmul.c, conv.c, onednn.c), compiled once. */
int hm_cpu_matmul(const hm_kernel_call *call);
int hm_cpu_conv(const hm_kernel_call *call);
int hm_cpu_matmul_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cpu_conv_workspace(const hm_kernel_call *call, size_t *bytes);
/* Scratch memory of a reduction (reduce.c): partial results of large ones.  The same for every instruction set. */
int hm_cpu_reduce_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cpu_packing(const hm_kernel_call *call, int arg, hm_packing *out);
int hm_cpu_pack(const hm_kernel_call *call, int arg, void *dst);
/* Called once by backend.c before the first primitive: limits oneDNN to the instruction set chosen. */
int hm_cpu_onednn_open(const hm_cpu_features *features);
void hm_cpu_onednn_version(int version[3]);

#endif
