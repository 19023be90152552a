/*
 * linear_steps.h -- linear with an activation, and gradients of linear that share a pass, as calls of plainer ops.
 *
 * What a backend does with these rows where it has no kernel that does all at once: the product, then the activation in place of its result,
 * or a sum over the same gradient.  Each step is a call that the backend's own families take, so results are those of the plain ops to the bit.
 *
 * Included by both backends.  Owns nothing; workspace is the call's, used by one step after the other.
 */
#ifndef HM_LINEAR_STEPS_H
#define HM_LINEAR_STEPS_H

#include "kernels.h"

/* The backend's families, and the scratch memory that they ask for. */
typedef struct hm_linear_kernels {
  hm_kernel_fn matmul, elementwise, reduce;
  int (*matmul_workspace)(const hm_kernel_call *call, size_t *bytes);
  int (*reduce_workspace)(const hm_kernel_call *call, size_t *bytes);
} hm_linear_kernels;

/* Is op one of these rows? */
static inline bool hm_linear_has_steps(int op) {
  return op == HM_OP_LINEAR_RELU || op == HM_OP_LINEAR_GELU_TANH || op == HM_OP_LINEAR_BACKWARD_PARAMS ||
         op == HM_OP_LINEAR_BACKWARD_INPUT_RELU || op == HM_OP_LINEAR_BACKWARD_INPUT_GELU_TANH;
}

/* A step: `op` on the first n_in inputs of the call, into output `out`. */
static inline void hm_linear_step(const hm_kernel_call *call, int op, int n_in, int out, hm_kernel_call *step) {
  *step = *call;
  step->op = op;
  step->n_in = n_in;
  step->n_out = 1;
  step->out[0] = call->out[out];
}

/* The product of a call, and what follows it. */
static inline void hm_linear_split(const hm_kernel_call *call, hm_kernel_call *product, hm_kernel_call *rest) {
  switch (call->op) {
  case HM_OP_LINEAR_RELU:
    hm_linear_step(call, HM_OP_LINEAR, 3, 0, product);
    hm_linear_step(call, HM_OP_RELU, 1, 0, rest);
    rest->in[0] = call->out[0];
    break;
  case HM_OP_LINEAR_GELU_TANH:
    hm_linear_step(call, HM_OP_LINEAR, 3, 1, product);
    hm_linear_step(call, HM_OP_GELU_TANH, 1, 0, rest);
    rest->in[0] = call->out[1];
    break;
  case HM_OP_LINEAR_BACKWARD_PARAMS:
    hm_linear_step(call, HM_OP_LINEAR_BACKWARD_WEIGHT, 2, 0, product);
    hm_linear_step(call, HM_OP_LINEAR_BACKWARD_BIAS, 1, 1, rest);
    break;
  default: /* the gradient by the input, through the activation that made it */
    hm_linear_step(call, HM_OP_LINEAR_BACKWARD_INPUT, 2, 0, product);
    hm_linear_step(call, call->op == HM_OP_LINEAR_BACKWARD_INPUT_RELU ? HM_OP_RELU_BACKWARD : HM_OP_GELU_TANH_BACKWARD,
                   2, 0, rest);
    rest->in[0] = call->out[0];
    rest->in[1] = call->in[2];
  }
}

static inline int hm_linear_steps_workspace(const hm_kernel_call *call, const hm_linear_kernels *k, size_t *bytes) {
  hm_kernel_call product, rest;
  size_t more = 0;
  hm_linear_split(call, &product, &rest);
  int status = k->matmul_workspace(&product, bytes);
  if (!status && rest.op == HM_OP_LINEAR_BACKWARD_BIAS) status = k->reduce_workspace(&rest, &more);
  if (more > *bytes) *bytes = more;
  return status;
}

static inline int hm_linear_steps(const hm_kernel_call *call, const hm_linear_kernels *k) {
  hm_kernel_call product, rest;
  hm_linear_split(call, &product, &rest);
  const int status = k->matmul(&product);
  if (status) return status;
  return rest.op == HM_OP_LINEAR_BACKWARD_BIAS ? k->reduce(&rest) : k->elementwise(&rest);
}

#endif
