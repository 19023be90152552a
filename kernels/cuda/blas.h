/*
 * blas.h -- private to blas.cu, blas_lt.cu and linear.cu: a product in cuBLAS's terms, and products with an epilogue.
 */
#ifndef HM_CUDA_BLAS_H
#define HM_CUDA_BLAS_H

#include "backend.h"

/* ====== blas.cu ====== */

/* How cuBLAS reads the three matrices. */
typedef struct hm_cuda_lines {
  cublasOperation_t x_op, y_op, out_op;
  int64_t x_ld, y_ld, out_ld;
} hm_cuda_lines;

cudaDataType hm_cuda_blas_type(int dtype);
cublasComputeType_t hm_cuda_blas_compute(int dtype); /* for operands of that dtype */
/* Fails where strides or sizes suit no product of cuBLAS. */
int hm_cuda_read_lines(const hm_cuda_product *p, hm_cuda_lines *l);
/* linear or a gradient of it as a product: operands lie densely, leading dims are rows.  Sets sizes and matrices. */
void hm_cuda_linear_product(int op, const hm_view *a, const hm_view *b, const hm_view *out, hm_cuda_product *p);

/* ====== blas_lt.cu ====== */

/* Runs the product with its epilogue, if cublasLt has one that is right: *done.  Else nothing is queued. */
int hm_cuda_lt_gemm(const hm_cuda_product *p, bool *done);
/* Would it?  Addresses of results may be NULL. */
int hm_cuda_lt_has(const hm_cuda_product *p, bool *has);

/* ====== linear.cu ====== */

/* linear with an activation, and gradients of linear that share a pass. */
int hm_cuda_linear(const hm_kernel_call *call);
int hm_cuda_linear_workspace(const hm_kernel_call *call, size_t *bytes);
/* Adds to the counters: calls done in one product, and in steps. */
void hm_cuda_linear_counters(hm_device_counters *out);
/* What linear_relu keeps for the gradient (hm_backend.aux_bytes). */
int hm_cuda_linear_aux(const hm_kernel_call *call, int64_t *bytes);

#endif
