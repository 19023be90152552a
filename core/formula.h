/*
 * formula.h -- private to core: what expression.c and expression_source.c share.
 */
#ifndef HM_CORE_FORMULA_H
#define HM_CORE_FORMULA_H

#include "expression.h" /* of kernels/ */
#include "op.h"

/* Room for hm__expression_key. */
enum { HM_EXPRESSION_KEY = 64 };

/* How a call's operands lie, for a kernel that is made for that: dims joined where they can be. */
typedef struct hm_expression_layout {
  int ndim; /* at least 1 */
  int64_t count;
  int64_t shape[HM_MAX_NDIM];
  int64_t stride[HM_MAX_IN + 1][HM_MAX_NDIM]; /* operand 0 is the output, 1 + i input i */
} hm_expression_layout;

void hm__expression_layout(const hm_kernel_call *k, hm_expression_layout *l);
/* Arguments that a kernel for this layout takes. */
int hm__expression_args(const hm_kernel_call *k, const hm_expression_layout *l);
/* Names the kernel that the call needs: two calls with the same key share one. */
void hm__expression_key(const hm_kernel_call *k, const hm_expression_layout *l, char key[HM_EXPRESSION_KEY]);
/* CUDA C with a kernel HM_EXPRESSION_KERNEL for that key; hm_free it.  NULL when memory is out. */
char *hm__expression_source(const hm_program *p, const hm_kernel_call *k, const hm_expression_layout *l);
#define HM_EXPRESSION_KERNEL "hm_elementwise"
/* Fills the kernel's arguments; returns how many. */
int hm__expression_fill(const hm_kernel_call *k, const hm_expression_layout *l, hm_user_arg *arg);

#endif
