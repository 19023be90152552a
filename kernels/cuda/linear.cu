/*
 * linear.cu -- linear with an activation, and gradients of linear that share a pass: the rows of linear_steps.h.
 *
 * Each is one product of cublasLt with an epilogue (blas_lt.cu) where operands lie as it wants them and it has one that is right; else the same in
 * steps.  linear_relu's aux, the bits of its positive results, is made for the gradient to come: hm_cuda_linear_aux() asks beforehand whether
 * there will be such a product, and where it says 0 bytes the gradient reads the result instead.
 */
#include "linear_steps.h"

#include "blas.h"

static const hm_linear_kernels steps = {hm_cuda_matmul, hm_cuda_elementwise, hm_cuda_reduce, hm_cuda_matmul_workspace,
                                        hm_cuda_reduce_workspace};

static struct { int64_t fused, stepped; } counted;

void hm_cuda_linear_counters(hm_device_counters *out) {
  out->fused_linears = counted.fused;
  out->stepped_linears = counted.stepped;
}

enum { BIT_LINE = 128, ELEMENT_LINE = 8, AUX_ALIGN = 16 }; /* cublasLt's rules for aux: its lines and its address */

static int64_t bit_line(int64_t n) { return (n + BIT_LINE - 1) / BIT_LINE * BIT_LINE; }

static bool is_absent(const hm_view *v) { return v->flags & HM_VIEW_ABSENT; }

/* A bias goes into the epilogue as it is. */
static bool takes_bias(const hm_kernel_call *call, hm_cuda_product *p) {
  const hm_view *bias = &call->in[2];
  if (is_absent(bias) || bias->dtype != p->out.dtype) return false;
  p->bias = bias->data;
  return true;
}

/* gelu's aux is a matrix like the result. */
static bool takes_matrix(const hm_view *v, hm_cuda_product *p) {
  p->aux = v->data;
  p->aux_ld = p->n;
  return v->dtype == p->out.dtype && p->n % ELEMENT_LINE == 0 && (uintptr_t)v->data % AUX_ALIGN == 0;
}

/* Reads a call as one product with an epilogue; false where none fits it. */
static bool read_product(const hm_kernel_call *call, hm_cuda_product *p) {
  hm_kernel_call product, rest;
  hm_linear_split(call, &product, &rest);
  memset(p, 0, sizeof *p);
  p->name = hm_cuda_op_name(call->op);
  hm_cuda_linear_product(product.op, &call->in[0], &call->in[1], &call->out[0], p);
  if (p->m == 0 || p->n == 0 || p->k == 0 || !hm_cuda_gemm_takes(p->x.dtype, p->y.dtype, p->out.dtype)) return false;
  switch (call->op) {
  case HM_OP_LINEAR_RELU: p->epilogue = HM_CUDA_RELU; return takes_bias(call, p);
  case HM_OP_LINEAR_GELU_TANH: p->epilogue = HM_CUDA_GELU; return takes_bias(call, p) && takes_matrix(&call->out[1], p);
  case HM_OP_LINEAR_BACKWARD_PARAMS:
    p->epilogue = HM_CUDA_BIAS_GRAD;
    p->bias = call->out[1].data;
    return call->out[1].dtype == p->out.dtype;
  case HM_OP_LINEAR_BACKWARD_INPUT_RELU:
    p->epilogue = HM_CUDA_RELU_GRAD;
    p->aux = call->in[3].data;
    p->aux_ld = bit_line(p->n);
    return hm_cuda_numel(&call->in[3]) == p->m * p->aux_ld / 8;
  default: p->epilogue = HM_CUDA_GELU_GRAD; return takes_matrix(&call->in[2], p);
  }
}

int hm_cuda_linear_aux(const hm_kernel_call *call, int64_t *bytes) {
  hm_cuda_product p;
  bool has = false;
  *bytes = 0;
  if (!read_product(call, &p)) return HM_OK;
  p.aux_ld = bit_line(p.n);
  const int status = hm_cuda_lt_has(&p, &has);
  if (has) *bytes = p.m * p.aux_ld / 8;
  return status;
}

int hm_cuda_linear_workspace(const hm_kernel_call *call, size_t *bytes) {
  return hm_linear_steps_workspace(call, &steps, bytes);
}

int hm_cuda_linear(const hm_kernel_call *call) {
  hm_cuda_product p;
  bool done = false;
  const bool keeps = call->op == HM_OP_LINEAR_RELU && hm_cuda_numel(&call->out[1]) > 0;
  if (read_product(call, &p)) {
    if (keeps) {
      p.aux = call->out[1].data;
      p.aux_ld = bit_line(p.n);
    }
    const int status = hm_cuda_lt_gemm(&p, &done);
    if (status) return status;
  }
  if (done) {
    counted.fused++;
    return HM_OK;
  }
  if (keeps) return hm_cuda_fail(HM_ERR_INTERNAL, "%s: the product that was to fill aux is not there", p.name);
  counted.stepped++;
  return hm_linear_steps(call, &steps);
}
