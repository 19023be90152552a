/*
 * isa.h -- one instruction set's worth of kernels.
 *
 * Hot files (convert.c elementwise.c copy.c fill.c reduce.c norm.c rownorm.c normalize.c loss.c pool.c resample.c multi.c) are compiled three times, with
 * -DHM_ISA=baseline, avx2 and avx512.  Each defines its functions as `HM_ISA_FN(name)`, which becomes name_avx2 and so on, and
 * never anything else with external linkage.  isa.c (also compiled three times) gathers them into one table; backend.c picks a table once.
 * Files that are compiled once (backend.c onednn.c matmul.c conv.c) reach the chosen one through hm_cpu_isa().
 *
 * All these files are built with -ffp-contract=off -fno-math-errno -fno-trapping-math and without -mfma, so that the three
 * variants agree to the bit.
 */
#ifndef HM_CPU_ISA_H
#define HM_CPU_ISA_H

#include "../expression.h"

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
      const hm_kernel_call *call); /* elementwise.c: generated tile functions and the engine that feeds them */
  int (*expression)(const hm_kernel_call *call,
                    const hm_program *program); /* elementwise.c's engine on a program's tiles (expression.c) */
  int (*copy)(const hm_kernel_call *call);      /* copy.c: cast, copy_ */
  int (*fill)(const hm_kernel_call *call);      /* fill.c: fill_, arange_, eye_ */
  int (*random)(const hm_kernel_call *call);    /* fill.c: uniform_, normal_, random_ */
  int (*reduce)(const hm_kernel_call *call);    /* reduce.c, spread.c */
  int (*norm)(
      const hm_kernel_call *call); /* norm.c, rownorm.c, normalize.c: softmax and normalizations, with gradients */
  int (*loss)(const hm_kernel_call *call);        /* loss.c: cross_entropy, with gradient; the rest goes on to nll.c */
  int (*attention)(const hm_kernel_call *call);   /* attention.c: attention by blocks, with gradient */
  int (*pool)(const hm_kernel_call *call);        /* pool.c, resample.c: pooling and interpolation, with gradients */
  int (*multi_tensor)(const hm_multi_call *call); /* multi.c: check, unscale, scale, sgd, adam */
} hm_isa;

#ifdef HM_ISA
/* The entries of this variant's table, each in the file named above; isa.c gathers them. */
void HM_ISA_FN(hm_cpu_convert)(void *dst, int dst_dtype, const void *src, int src_dtype, int64_t n);
int HM_ISA_FN(hm_cpu_elementwise)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_expression)(const hm_kernel_call *call, const hm_program *program);
/* The program over n dense elements; dtype: F32, F64 or I64. */
void HM_ISA_FN(hm_cpu_expression_tile)(const hm_program *program, int dtype, int64_t n, void *o, const void *const *in);
int HM_ISA_FN(hm_cpu_copy)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_fill)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_random)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_reduce)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_spread)(const hm_kernel_call *call); /* spread.c: what reduce.c hands on */
int HM_ISA_FN(hm_cpu_norm)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_normalize)(const hm_kernel_call *call);    /* rownorm.c: what norm.c hands on */
int HM_ISA_FN(hm_cpu_channel_norm)(const hm_kernel_call *call); /* normalize.c: what rownorm.c hands on */
int HM_ISA_FN(hm_cpu_loss)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_attention)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_pool)(const hm_kernel_call *call);
int HM_ISA_FN(hm_cpu_resample)(const hm_kernel_call *call); /* resample.c: what pool.c hands on */
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
/* Family index (index.c), compiled once, and its scratch memory. */
int hm_cpu_index(const hm_kernel_call *call);
int hm_cpu_index_workspace(const hm_kernel_call *call, size_t *bytes);
/* Scratch memory of a reduction (reduce.c): partial results of large ones.  The same for every instruction set. */
int hm_cpu_reduce_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cpu_spread_workspace(const hm_kernel_call *call, size_t *bytes); /* likewise for var, std, norm, logsumexp */
/* Scans along a dim (scan.c), compiled once, and their scratch memory. */
int hm_cpu_scan(const hm_kernel_call *call);
int hm_cpu_scan_workspace(const hm_kernel_call *call, size_t *bytes);
/* attention.c: scratch memory of its threads, and float64, which all instruction sets share. */
int hm_cpu_attention_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cpu_attention_f64(const hm_kernel_call *call);
/* nll_loss (nll.c), compiled once: what loss.c hands on. */
int hm_cpu_nll(const hm_kernel_call *call);
/* "[3, 5]": the indices of position i of v, for messages (nll.c). */
enum { HM_POSITION_TEXT = HM_MAX_NDIM * 24 };
const char *hm_cpu_position_text(const hm_view *v, int64_t i, char text[HM_POSITION_TEXT]);
/* Scratch memory of batch, layer, rms and group norm (rownorm.c, normalize.c): likewise. */
int hm_cpu_normalize_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cpu_channel_norm_workspace(const hm_kernel_call *call, size_t *bytes); /* its part in normalize.c */
int hm_cpu_packing(const hm_kernel_call *call, int arg, hm_packing *out);
int hm_cpu_pack(const hm_kernel_call *call, int arg, void *dst);
/* Called once by backend.c before the first primitive: limits oneDNN to the instruction set chosen. */
int hm_cpu_onednn_open(const hm_cpu_features *features);
void hm_cpu_onednn_version(int version[3]);

#endif
