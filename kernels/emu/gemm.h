/*
 * gemm.h -- the loops behind the test double's cuBLAS: products, and what happens to a product on its way out.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Private to kernels/emu.  blas.cpp has checked every argument before.
 */
#ifndef HM_EMU_GEMM_H
#define HM_EMU_GEMM_H

#include <stddef.h>
#include <stdint.h>
#include "library_types.h"

namespace hm_emu {

/* Element (i, j) lies at data + (i * row + j * column) elements. */
struct matrix {
  void *data;
  cudaDataType type;
  int64_t row, column;
};

enum rounding { ROUND_NOT, ROUND_TF32, ROUND_F16, ROUND_BF16 }; /* of float32 inputs, before they are multiplied */

enum activation { ACT_NONE, ACT_RELU, ACT_GELU, ACT_DRELU, ACT_DGELU };

/* D = act(alpha * acc + beta * C + bias). */
struct finish {
  double alpha, beta;
  matrix c, d; /* c is read if beta is not 0 */
  activation act;
  const void *bias; /* one for each row of D, or NULL */
  cudaDataType bias_type;
  void *aux; /* what the activation saves, or its gradient reads; or NULL */
  cudaDataType aux_type;
  int64_t aux_ld;      /* column-major; for relu one bit each */
  void *bias_gradient; /* sum of D's rows, or NULL */
  bool drops_nan;      /* relu makes NaN 0 */
  bool rough;          /* gelu and its gradient are a thousandth off */
};

/* acc (column-major, m rows) = A (m x k) times B (k x n), summed over k in order, in float32; double for CUDA_R_64F (acc is then of doubles). */
void multiply(int64_t m, int64_t n, int64_t k, const matrix &a, const matrix &b, rounding how, void *acc);
/* Does what `f` says with acc.  wide: acc and the arithmetic are in double. */
void finish_product(int64_t m, int64_t n, const void *acc, bool wide, const finish &f);
/* out[i] = sum over j of M(i, j): a gradient of a bias. */
void sum_rows(int64_t rows, int64_t columns, const matrix &m, void *out, cudaDataType out_type);

} // namespace hm_emu

#endif
