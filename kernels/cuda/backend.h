/*
 * backend.h -- private to kernels/cuda: devices, their streams and handles, errors, and matrix products, as the files around the kernels share
 * them.
 *
 *   backend.cu   opens devices, runs kernels on the compute stream, turns CUDA's errors into messages; the struct hm_backend
 *   memory.cu    device memory, copies between host and device, pinned memory and transfers out of it, counters
 *   blas.cu      family matmul, and hm_cuda_gemm for everybody
 *   blas_lt.cu   products with an epilogue (blas.h)
 *   linear.cu    linear with an activation, and its gradients (blas.h)
 *   conv.cu      family conv: by cuDNN, or as im2col and products
 *   cudnn.cu     convolutions by cuDNN, where it is found
 *   nvrtc.cu     kernels compiled at run time
 *   fetch.cu     small copies to the host that nobody waits for
 *
 * Each device has one compute stream, on which all kernels, products and allocations are ordered, and one copy stream for transfers; events
 * order the two.  Everything here runs on the host, on core's mutator thread.
 */
#ifndef HM_CUDA_BACKEND_H
#define HM_CUDA_BACKEND_H

#include <cublasLt.h>
#include <cublas_v2.h>

#include "kernels_cuda.h"

enum {
  HM_CUDA_MAX_DEVICES = 16,
  HM_CUDA_STAGES = 2,            /* pinned buffers of a device, used in turn */
  HM_CUDA_STAGE_BYTES = 4 << 20, /* of each */
  HM_CUDA_RECENT = 8,            /* ops remembered for messages */
  HM_CUDA_BLAS_WORKSPACE = 32 << 20
};

typedef struct hm_cuda_stage {
  void *pinned;     /* NULL until first used */
  cudaEvent_t done; /* the last copy out of it has run */
} hm_cuda_stage;

/* One device.  Opened on first use, never closed: its memory outlives every user. */
typedef struct hm_cuda_device {
  int index;
  bool open;
  bool pools; /* cudaMallocAsync is there */
  int major, minor;
  cudaStream_t compute, copy;
  cudaEvent_t fork, join; /* order the copy stream behind the compute stream, and back */
  cublasHandle_t blas;    /* on the compute stream */
  cublasLtHandle_t blas_lt;
  void *blas_workspace; /* of both */
  hm_cuda_stage stage[HM_CUDA_STAGES];
  int next_stage;
  int recent[HM_CUDA_RECENT]; /* ops queued since the host last waited, a ring */
  int n_recent;
  hm_cuda_fault *fault; /* where kernels tell of bad values; mapped host memory */
  cudaError_t lost;     /* an error that every later call will give: the context is gone */
} hm_cuda_device;

/* ====== backend.cu ====== */

/* The device of that index, opened, and made the current one of this thread; NULL with a message. */
hm_cuda_device *hm_cuda_use(int device);
/* The device that an address belongs to, made current; NULL with a message. */
hm_cuda_device *hm_cuda_device_of(const void *data, const char *what);
/* How many devices there are; 0 without a driver. */
int hm_cuda_count(void);
/* "what: cuda:0: text" for a CUDA error of a device; HM_OK for cudaSuccess.  what may be NULL here and in hm_cuda_wait. */
int hm_cuda_device_status(hm_cuda_device *device, cudaError_t error, const char *what);
/* The error that the current device or the runtime has to tell, also where it came up in a library: these have a runtime of their own, whose
 * errors ours does not see. */
cudaError_t hm_cuda_pending(void);
/* The same as hm_cuda_status for cuBLAS. */
int hm_cuda_blas_status(cublasStatus_t status, const char *what);
/* Waits for everything queued on the device, and tells what went wrong in it. */
int hm_cuda_wait(hm_cuda_device *device, const char *what);
/* To be called after any other wait that covers all work: tells of bad values that kernels met. */
int hm_cuda_waited(hm_cuda_device *device);
/* Name of an op of the table. */
const char *hm_cuda_op_name(int op);
/* The device that runs the current kernel call; set by the entry of every family. */
hm_cuda_device *hm_cuda_current(void);

/* ====== memory.cu ====== */

void *hm_cuda_mem_alloc(int device, size_t bytes);
void hm_cuda_mem_free(int device, void *data, size_t bytes);
int hm_cuda_mem_to_host(void *host, const void *data, size_t bytes, void *stream);
int hm_cuda_mem_from_host(void *data, const void *host, size_t bytes, void *stream);
/* Pinned memory and uploads that nobody waits for, as kernels.h has them. */
void *hm_cuda_host_alloc(int device, size_t bytes);
void hm_cuda_host_free(int device, void *data, size_t bytes);
int hm_cuda_transfer_new(int device, hm_transfer **out);
void hm_cuda_transfer_free(hm_transfer *transfer);
int hm_cuda_transfer_start(hm_transfer *transfer, const hm_piece *piece, int n);
int hm_cuda_transfer_join(hm_transfer *transfer);
int hm_cuda_transfer_ready(hm_transfer *transfer, bool wait, bool *ready);
/* Zeroes device memory, in the order of the compute stream. */
int hm_cuda_zero(void *data, size_t bytes, const char *what);
/* dst = src, converted once, both strided; through the family copy, on the running call's stream. */
int hm_cuda_copy_view(const hm_view *src, const hm_view *dst);
void hm_cuda_counters(hm_device_counters *out);
/* Add to the counters, as hm_cuda_count_launch does (the test double counts by itself). */
void hm_cuda_count_wait(void);
void hm_cuda_count_copy(size_t bytes);

/* ====== blas.cu ====== */

/* out = x * y (+ bias), or out += x * y; row-major with any distance of lines; the batch is one dim.
 * An operand is read as it lies (cols 1 apart) or transposed (rows 1 apart).  Accumulates in float32, or float64 for float64. */
typedef struct hm_cuda_matrix {
  void *data;
  int dtype;
  int64_t rs, cs; /* strides of rows and columns in elements: one of them is 1 */
  int64_t batch;  /* distance of batches in elements; 0 repeats */
} hm_cuda_matrix;

/* What becomes of a product on its way out, in one pass (blas_lt.cu). */
typedef enum hm_cuda_epilogue {
  HM_CUDA_PLAIN,
  HM_CUDA_BIAS,      /* + bias */
  HM_CUDA_RELU,      /* + bias, then relu; aux, if given, gets what RELU_GRAD reads */
  HM_CUDA_GELU,      /* + bias, kept in aux, then gelu by tanh */
  HM_CUDA_RELU_GRAD, /* through relu, by aux */
  HM_CUDA_GELU_GRAD, /* through gelu, by aux */
  HM_CUDA_BIAS_GRAD  /* as it is; bias [m] gets the sums of x over k */
} hm_cuda_epilogue;

typedef struct hm_cuda_product {
  const char *name;
  int64_t m, n, k, batches;
  hm_cuda_matrix x, y, out; /* m*k, k*n, m*n */
  void *bias;               /* [n] in out's dtype, or NULL; written by BIAS_GRAD alone */
  bool accumulate;          /* add to what out holds; without bias */
  hm_cuda_epilogue epilogue;
  void *aux; /* relu: a bit for each element, in an order of the library's own; gelu: [m, n] in out's dtype; or NULL */
  int64_t aux_ld; /* from one of its lines to the next, in bits or elements */
} hm_cuda_product;

/* Can cuBLAS take these dtypes as they are?  x and y alike, out alike or float32. */
bool hm_cuda_gemm_takes(int x, int y, int out);
/* Runs a product with m, n, k and batches above 0; with `bias`, which needs batches == 1, it is added.  Does not look at epilogue and aux. */
int hm_cuda_gemm(const hm_cuda_product *p);
/* Does HALFMOON_TF32=1 let float32 products round their operands? */
bool hm_cuda_tf32(void);
/* Opens the handles of a device. */
int hm_cuda_blas_open(hm_cuda_device *device);
int hm_cuda_matmul(const hm_kernel_call *call);
int hm_cuda_matmul_workspace(const hm_kernel_call *call, size_t *bytes);

/* ====== conv.cu ====== */

int hm_cuda_conv(const hm_kernel_call *call);
int hm_cuda_conv_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cuda_conv_packing(const hm_kernel_call *call, int arg, hm_packing *out);
int hm_cuda_conv_pack(const hm_kernel_call *call, int arg, void *dst);

/* Adds to the counters: convolutions by cuDNN, through im2col, and refused by cuDNN. */
void hm_cuda_conv_counters(hm_device_counters *out);

/* ====== cudnn.cu ====== */

typedef enum hm_cuda_conv_kind { HM_CUDA_CONV_FORWARD, HM_CUDA_CONV_INPUT, HM_CUDA_CONV_WEIGHT } hm_cuda_conv_kind;

/* What an algorithm is chosen for; zeroed before it is filled.  All operands are of one dtype (F16, BF16, F32) and channels-last. */
typedef struct hm_cuda_conv_shape {
  int32_t kind, dtype;
  int32_t tf32, pad; /* tf32: float32 operands may be rounded to TF32 */
  int64_t n, c, h, w, o, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw, groups;
} hm_cuda_conv_shape;

typedef enum hm_cuda_cudnn_answer {
  HM_CUDA_CUDNN_ABSENT,  /* no library, or switched off */
  HM_CUDA_CUDNN_NO,      /* the library refuses this shape */
  HM_CUDA_CUDNN_YES,     /* it can, or has done it */
  HM_CUDA_CUDNN_LAY_BIAS /* nothing was done: write the bias to the result, then call again with `add` */
} hm_cuda_cudnn_answer;

typedef struct hm_cuda_cudnn_call {
  const char *name;
  void *x, *weight, *out; /* one of them is written, by the shape's kind */
  const void *bias;       /* forward: [o] of the shape's dtype, or NULL */
  bool add;               /* forward, by weight: add to what the result holds */
  void *workspace;        /* as much as was asked for */
} hm_cuda_cudnn_call;

/* Asks whether cuDNN does it, and for its workspace.  Fails where HALFMOON_CUDNN names a library that does not work. */
int hm_cuda_cudnn_ask(hm_cuda_device *device, const hm_cuda_conv_shape *shape, hm_cuda_cudnn_answer *answer,
                      size_t *workspace);
/* Queues a convolution that was answered YES.  Answers YES, LAY_BIAS, or NO (from now on; nothing was queued). */
int hm_cuda_cudnn_run(hm_cuda_device *device, const hm_cuda_conv_shape *shape, const hm_cuda_cudnn_call *call,
                      hm_cuda_cudnn_answer *answer);
/* "cudnn 9.19.0", or "im2col + cublas (why)"; valid until the next call. */
const char *hm_cuda_cudnn_about(int device);

/* ====== fetch.cu ====== */

int hm_cuda_fetch_begin(int device, const void *data, size_t bytes, hm_fetch **out);
int hm_cuda_fetch_end(hm_fetch *fetch, void *host, bool wait, bool *done);
void hm_cuda_fetch_drop(hm_fetch *fetch);

/* ====== nvrtc.cu ====== */

int hm_cuda_user_compile(int device, const char *source, const char *name, bool exact, hm_user_kernel **out);
int hm_cuda_user_check(const hm_user_kernel *kernel, hm_user_arg *arg, int n);
/* On the kernel's own device, which is the current one. */
int hm_cuda_user_launch(hm_cuda_device *device, hm_user_kernel *kernel, const int64_t grid[3], const int64_t block[3],
                        int64_t shared_bytes, hm_user_arg *arg, int n);
int hm_cuda_user_device(const hm_user_kernel *kernel);
void hm_cuda_user_free(hm_user_kernel *kernel);
/* Its name; lives as long as the kernel. */
const char *hm_cuda_user_name(const hm_user_kernel *kernel);

/* A dense row-major view. */
static inline hm_view hm_cuda_dense(void *data, int dtype, int ndim, const int64_t *shape) {
  hm_view v;
  int64_t step = 1;
  v.data = data;
  v.dtype = (int16_t)dtype;
  v.ndim = (int16_t)ndim;
  v.flags = 0;
  v.scalar.i = 0;
  for (int d = ndim - 1; d >= 0; d--) {
    v.shape[d] = shape[d];
    v.stride[d] = step;
    step *= shape[d];
  }
  return v;
}

static inline int64_t hm_cuda_numel(const hm_view *v) {
  int64_t n = 1;
  for (int d = 0; d < v->ndim; d++) n *= v->shape[d];
  return n;
}

static inline char *hm_cuda_at(void *data, int64_t at, int dtype) { return (char *)data + at * hm_dtype_size(dtype); }

/* Takes room from a workspace, 256-byte aligned: returns its offset and moves *at on. */
static inline size_t hm_cuda_take(size_t *at, size_t bytes) {
  const size_t from = *at;
  *at += (bytes + 255) / 256 * 256;
  return from;
}

#endif
