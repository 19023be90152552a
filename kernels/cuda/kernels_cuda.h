/*
 * kernels_cuda.h -- what the kernels of this folder offer to the backend, and what they ask of it.
 *
 * One C function for each family.  Each queues its work on (cudaStream_t)call->stream and returns; it waits for
 * nothing and allocates nothing beyond the workspace that its own workspace function asks for.  Arguments are those
 * of kernels.h.
 *
 *   elementwise.cu  elementwise        copy.cu  copy, cast      norm.cu    softmax and kin
 *   reduce.cu       reductions         fill.cu  fill, random    loss.cu    cross entropy
 *   index.cu        ids (see index.h)  pool.cu  pooling         multi.cu   multi-tensor passes
 *   im2col.cu       for convolution    fault.cu faults as messages
 *   rownorm.cu      layer, rms norm    normalize.cu  batch and group norm
 *   spread.cu       var, norm and kin  scan.cu  running sums    nll.cu     nll_loss
 *
 * Bad values that only the device sees (a class label out of range, a division by integer zero) become a fault: a
 * small record in memory that the host can read without a copy.  The first one is kept; the backend looks after each
 * wait, and at each call if it likes.
 *
 * Included by every .cu file of this folder.  Owns nothing.
 */
#ifndef HM_KERNELS_CUDA_H
#define HM_KERNELS_CUDA_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "device.h"

extern "C" {
#include "kernels.h"

/* ====== Families ====== */

int hm_cuda_elementwise(const hm_kernel_call *call);
int hm_cuda_reduce(const hm_kernel_call *call);
int hm_cuda_copy(const hm_kernel_call *call);
int hm_cuda_fill(const hm_kernel_call *call);
int hm_cuda_random(const hm_kernel_call *call);
int hm_cuda_index(const hm_kernel_call *call);
int hm_cuda_pool(const hm_kernel_call *call);
int hm_cuda_resample(const hm_kernel_call *call); /* resample.cu: what pool.cu hands on */
int hm_cuda_norm(const hm_kernel_call *call);
int hm_cuda_normalize(const hm_kernel_call *call);    /* rownorm.cu: what norm.cu hands on */
int hm_cuda_channel_norm(const hm_kernel_call *call); /* normalize.cu: what rownorm.cu hands on */
int hm_cuda_loss(const hm_kernel_call *call);
int hm_cuda_attention(const hm_kernel_call *call);
int hm_cuda_scan(const hm_kernel_call *call);
int hm_cuda_spread(const hm_kernel_call *call); /* what reduce.cu hands on */
int hm_cuda_nll(const hm_kernel_call *call);    /* what loss.cu hands on */

/* Scratch memory of a call; families without a function here need none. */
int hm_cuda_reduce_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cuda_loss_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cuda_attention_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cuda_spread_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cuda_scan_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cuda_index_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cuda_normalize_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cuda_channel_norm_workspace(const hm_kernel_call *call, size_t *bytes); /* its part in normalize.cu */

/* Every element of `out` becomes a number: i when out's dtype is an integer or bool, else f. */
int hm_cuda_fill_number(const hm_view *out, double f, int64_t i, void *stream);
/* The same for a number operand (HM_VIEW_SCALAR), converted once from its own type. */
int hm_cuda_fill_scalar(const hm_view *out, const hm_view *number, void *stream);

/* ====== Multi-tensor passes ====== */

/* As kernels.h has it.  CHECK and UNSCALE copy stat[] back and wait for it: the one wait of a step.  The others
 * queue and return. Scratch memory comes from cudaMallocAsync and goes back in the same call. */
int hm_cuda_multi_tensor(const hm_multi_call *call);

/* hm_backend.late_tensor and late_scale, on call->stream and `stream`. */
int hm_cuda_late_tensor(const hm_multi_call *call, const hm_late *late);
int hm_cuda_late_scale(const hm_scale_step *step, void *stream);

/* ====== Convolution as a matrix product ====== */

/* Images [n, c, h, w] with any strides; windows oh x ow.  One group has c / groups channels. */
typedef struct hm_im2col {
  int64_t n, c, h, w, oh, ow;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw, groups; /* kernel, stride, padding, dilation */
  int64_t xs[4];                                  /* strides of the image side (n, c, h, w), in elements */
  int64_t ld; /* elements from one line of the matrix to the next, >= kh * kw * c / groups */
} hm_im2col;

/* The matrix of group G begins at col + G * n*oh*ow * ld: one line for each window, in the order n, oh, ow; in a
 * line kh, kw, c, the channel running fastest.  Padding is 0; what lies between a line's end and ld is not
 * written. */
/* col = windows of x; both of one dtype (any of 2, 4 or 8 bytes). */
int hm_cuda_im2col(const hm_im2col *g, const void *x, void *col, int dtype, void *stream);
/* x = sums over the windows that cover each pixel, in the order of the windows; accumulated in float32 (float64
 * for float64).  Every element of x is written.  dtypes F16, BF16, F32, F64 on either side. */
int hm_cuda_col2im(const hm_im2col *g, const void *col, int col_dtype, void *x, int x_dtype, void *stream);

/* ====== What the backend provides ====== */

/* Tells the host why (printf style); returns code. */
int hm_cuda_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* HM_OK for cudaSuccess, else a message that names `op`. */
int hm_cuda_status(cudaError_t e, const char *op);

/* A bad value that a kernel met.  `code` is HM_OK until the first one. */
typedef struct hm_cuda_fault {
  int32_t code;  /* hm_status; written last */
  int32_t taken; /* set by the thread that writes the others */
  int32_t op;    /* enum hm_op */
  int32_t pad;
  int64_t value, limit; /* the value; the first that would be too large, where there is such */
} hm_cuda_fault;

/* The record of the device that `stream` belongs to: zeroed, device-accessible, readable by the host
 * (cudaHostAllocMapped). NULL: none, faults are then not reported. */
hm_cuda_fault *hm_cuda_fault_word(void *stream);
}

/* Counts one launch. */
void hm_cuda_count_launch(void);

/* Offered by fault.cu: if there is a fault, clears it and returns its code with a message, else HM_OK.  To be
 * called when the stream is idle. */
extern "C" int hm_cuda_fault_take(hm_cuda_fault *fault);

/* Device side: keeps the first fault. */
HM_DEV void hm_fault(hm_cuda_fault *f, int code, int op, int64_t value, int64_t limit) {
  if (!f || atomicCAS(&f->taken, 0, 1) != 0) return;
  f->op = op;
  f->value = value;
  f->limit = limit;
  __threadfence();
  atomicExch(&f->code, code);
}

/* Queues a kernel (in parentheses if it has template arguments); its status as HM_OK or an error with a message. */
#define HM_RUN(name, kernel, grid, block, shared, stream, ...)                                                         \
  (hm_cuda_count_launch(),                                                                                             \
   hm_cuda_status(HM_LAUNCH(kernel, (grid), (block), (shared), (cudaStream_t)(stream), __VA_ARGS__), (name)))

#endif
