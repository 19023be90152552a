/*
 * blas.cu -- matrix products by cuBLAS: family matmul, and one product for conv.cu.
 *
 * cuBLAS counts columns first; a row-major product out = x * y is the column-major out' = y' * x', so x and y change places and nothing is moved.
 * Half operands are multiplied as they are and summed in float32; float32 stays float32 unless HALFMOON_TF32=1 lets the tensor cores round its
 * operands.  A bias goes into the product's epilogue (blas_lt.cu); where that offers nothing, it is laid out first and the product added to it,
 * which rounds as often: once.  Operands of mixed dtypes and results that cuBLAS has no product for go through float32 copies in the workspace.
 *
 * Both handles of a device work on its compute stream with one workspace, so the order of sums, and with it the bits, is the same in every run.
 */
#include <limits.h>
#include <stdlib.h>

#include "blas.h"

static bool use_tf32;

bool hm_cuda_tf32(void) { return use_tf32; }

int hm_cuda_blas_open(hm_cuda_device *d) {
  const char *tf32 = getenv("HALFMOON_TF32");
  use_tf32 = tf32 && strcmp(tf32, "1") == 0;
  int status = hm_cuda_device_status(d, cudaMalloc(&d->blas_workspace, HM_CUDA_BLAS_WORKSPACE), "cuBLAS");
  if (!status) status = hm_cuda_blas_status(cublasCreate(&d->blas), "cuBLAS");
  if (!status) status = hm_cuda_blas_status(cublasSetStream(d->blas, d->compute), "cuBLAS");
  if (!status)
    status = hm_cuda_blas_status(cublasSetWorkspace(d->blas, d->blas_workspace, HM_CUDA_BLAS_WORKSPACE), "cuBLAS");
  if (!status)
    status =
        hm_cuda_blas_status(cublasSetMathMode(d->blas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION), "cuBLAS");
  if (!status) status = hm_cuda_blas_status(cublasLtCreate(&d->blas_lt), "cuBLAS");
  return status;
}

/* ====== One product ====== */

cudaDataType hm_cuda_blas_type(int dtype) {
  switch (dtype) {
  case HM_F16: return CUDA_R_16F;
  case HM_BF16: return CUDA_R_16BF;
  case HM_F64: return CUDA_R_64F;
  default: return CUDA_R_32F;
  }
}

cublasComputeType_t hm_cuda_blas_compute(int dtype) {
  if (dtype == HM_F64) return CUBLAS_COMPUTE_64F;
  return dtype == HM_F32 && use_tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
}

bool hm_cuda_gemm_takes(int x, int y, int out) {
  if (x != y || !hm_dtype_is_float(x)) return false;
  return out == x || (out == HM_F32 && (x == HM_F16 || x == HM_BF16));
}

/* How cuBLAS reads a row-major matrix: as its transpose with lines of `ld` (N), or transposed back (T).  False where neither stride is 1. */
static bool find_lines(const hm_cuda_matrix *a, int64_t rows, int64_t cols, cublasOperation_t *op, int64_t *ld) {
  if ((a->cs == 1 || cols == 1) && (rows == 1 || a->rs >= cols)) {
    *op = CUBLAS_OP_N;
    *ld = rows == 1 ? cols : a->rs;
    return true;
  }
  if ((a->rs == 1 || rows == 1) && (cols == 1 || a->cs >= rows)) {
    *op = CUBLAS_OP_T;
    *ld = cols == 1 ? rows : a->cs;
    return true;
  }
  return false;
}

int hm_cuda_read_lines(const hm_cuda_product *p, hm_cuda_lines *l) {
  if (!find_lines(&p->x, p->m, p->k, &l->x_op, &l->x_ld) || !find_lines(&p->y, p->k, p->n, &l->y_op, &l->y_ld) ||
      !find_lines(&p->out, p->m, p->n, &l->out_op, &l->out_ld) || l->out_op != CUBLAS_OP_N)
    return hm_cuda_fail(HM_ERR_INTERNAL, "%s: strides that suit no product", p->name);
  const int64_t sizes[] = {p->m, p->n, p->k, p->batches, l->x_ld, l->y_ld, l->out_ld};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    if (sizes[i] > INT_MAX)
      return hm_cuda_fail(HM_ERR_UNSUPPORTED,
                          "%s: a product of [%lld,%lld] and [%lld,%lld] is too large for cuBLAS\n  hint: split it",
                          p->name, (long long)p->m, (long long)p->k, (long long)p->k, (long long)p->n);
  return HM_OK;
}

/* The factors as cuBLAS reads them: double for float64, else float. */
typedef union factor {
  float f;
  double d;
} factor;

static factor make_factor(int dtype, int value) {
  factor x;
  if (dtype == HM_F64) x.d = value;
  else x.f = (float)value;
  return x;
}

static int plain_gemm(const hm_cuda_product *p, const hm_cuda_lines *l, bool add) {
  const cublasHandle_t blas = hm_cuda_current()->blas;
  const factor one = make_factor(p->x.dtype, 1), beta = make_factor(p->x.dtype, add ? 1 : 0);
  const cudaDataType in = hm_cuda_blas_type(p->x.dtype), out = hm_cuda_blas_type(p->out.dtype);
  const cublasComputeType_t compute = hm_cuda_blas_compute(p->x.dtype);
  const int m = (int)p->m, n = (int)p->n, k = (int)p->k;
  cublasStatus_t s;
  hm_cuda_count_launch();
  if (p->batches == 1)
    s = cublasGemmEx(blas, l->y_op, l->x_op, n, m, k, &one, p->y.data, in, (int)l->y_ld, p->x.data, in, (int)l->x_ld,
                     &beta, p->out.data, out, (int)l->out_ld, compute, CUBLAS_GEMM_DEFAULT);
  else
    s = cublasGemmStridedBatchedEx(blas, l->y_op, l->x_op, n, m, k, &one, p->y.data, in, (int)l->y_ld, p->y.batch,
                                   p->x.data, in, (int)l->x_ld, p->x.batch, &beta, p->out.data, out, (int)l->out_ld,
                                   p->out.batch, (int)p->batches, compute, CUBLAS_GEMM_DEFAULT);
  return hm_cuda_blas_status(s, p->name);
}

/* ====== A product with a bias ====== */

/* The bias in each line of out. */
static int lay_bias(const hm_cuda_product *p) {
  const int64_t shape[2] = {p->m, p->n};
  hm_view bias = hm_cuda_dense((void *)p->bias, p->out.dtype, 2, shape),
          out = hm_cuda_dense(p->out.data, p->out.dtype, 2, shape);
  bias.stride[0] = 0;
  out.stride[0] = p->out.rs;
  return hm_cuda_copy_view(&bias, &out);
}

static int bias_gemm(const hm_cuda_product *p, const hm_cuda_lines *l) {
  hm_cuda_product by_lt = *p;
  bool done;
  by_lt.epilogue = HM_CUDA_BIAS;
  int status = hm_cuda_lt_gemm(&by_lt, &done);
  if (status || done) return status;
  status = lay_bias(p);
  return status ? status : plain_gemm(p, l, true);
}

int hm_cuda_gemm(const hm_cuda_product *p) {
  hm_cuda_lines l;
  const int status = hm_cuda_read_lines(p, &l);
  if (status) return status;
  return p->bias ? bias_gemm(p, &l) : plain_gemm(p, &l, p->accumulate);
}

/* ====== Family matmul: which copies a call needs ====== */

/* One operand: as it came, or as a copy in the workspace. */
typedef struct operand {
  hm_view from, view; /* view: what the product reads or writes */
  bool copied;
  size_t at;
} operand;

typedef struct plan {
  const char *name;
  operand x, y, out, bias; /* bias.view.ndim == 0: none */
  size_t bytes;
} plan;

/* Dims that repeat are not copied: they keep stride 0. */
static void copy_operand(plan *l, operand *a, int dtype) {
  int64_t shape[HM_MAX_NDIM];
  for (int d = 0; d < a->from.ndim; d++) shape[d] = a->from.stride[d] == 0 ? 1 : a->from.shape[d];
  a->view = hm_cuda_dense(NULL, dtype, a->from.ndim, shape);
  a->copied = true;
  a->at = hm_cuda_take(&l->bytes, (size_t)(hm_cuda_numel(&a->view) * hm_dtype_size(dtype)));
  for (int d = 0; d < a->from.ndim; d++) {
    if (shape[d] == a->from.shape[d]) continue;
    a->view.shape[d] = a->from.shape[d];
    a->view.stride[d] = 0;
  }
}

/* The matrix of an operand's last two dims. */
static hm_cuda_matrix matrix_of(const hm_view *v) {
  hm_cuda_matrix a;
  memset(&a, 0, sizeof a);
  a.data = v->data;
  a.dtype = v->dtype;
  a.rs = v->ndim > 1 ? v->stride[v->ndim - 2] : v->shape[0];
  a.cs = v->stride[v->ndim - 1];
  return a;
}

static bool is_regular(const hm_view *v) {
  const hm_cuda_matrix a = matrix_of(v);
  cublasOperation_t op;
  int64_t ld;
  return find_lines(&a, v->ndim > 1 ? v->shape[v->ndim - 2] : 1, v->shape[v->ndim - 1], &op, &ld);
}

static int make_plan(const hm_kernel_call *call, plan *l) {
  memset(l, 0, sizeof *l);
  l->name = hm_cuda_op_name(call->op);
  l->x.from = l->x.view = call->in[0];
  l->y.from = l->y.view = call->in[1];
  l->out.from = l->out.view = call->out[0];
  const int x = call->in[0].dtype, y = call->in[1].dtype, out = call->out[0].dtype;
  if (!hm_dtype_is_float(x) || !hm_dtype_is_float(y) || !hm_dtype_is_float(out) || (x == HM_F64) != (y == HM_F64))
    return hm_cuda_fail(HM_ERR_DTYPE, "%s: no product of %s and %s into %s", l->name, hm_dtype_short(x),
                        hm_dtype_short(y), hm_dtype_short(out));
  const int in = x == y ? x : HM_F32;
  if (x != in || !is_regular(&l->x.from)) copy_operand(l, &l->x, in);
  if (y != in || !is_regular(&l->y.from)) copy_operand(l, &l->y, in);
  const bool biased = call->op == HM_OP_LINEAR && !(call->in[2].flags & HM_VIEW_ABSENT);
  const int wide = in == HM_F64 ? HM_F64 : HM_F32;
  const bool fine_bias =
      biased && hm_dtype_size(call->in[2].dtype) > hm_dtype_size(out); /* rounding it first would round twice */
  const bool odd_bias = biased && call->in[2].dtype != out && out != wide;
  if (!hm_cuda_gemm_takes(in, in, out) || fine_bias || odd_bias) copy_operand(l, &l->out, wide);
  if (!biased) return HM_OK;
  l->bias.from = l->bias.view = call->in[2];
  if (call->in[2].dtype != l->out.view.dtype) copy_operand(l, &l->bias, l->out.view.dtype);
  return HM_OK;
}

/* ====== Family matmul: reading a call ====== */

/* Batch dims of a matmul, outermost first. */
typedef struct batch {
  int n;
  int64_t shape[HM_MAX_NDIM], x[HM_MAX_NDIM], y[HM_MAX_NDIM], out[HM_MAX_NDIM];
} batch;

/* Appends a dim, merged with the last one where all strides allow. */
static void add_dim(batch *b, int64_t size, int64_t x, int64_t y, int64_t out) {
  if (size == 1) return;
  const int d = b->n;
  if (d > 0 && b->x[d - 1] == x * size && b->y[d - 1] == y * size && b->out[d - 1] == out * size) {
    b->shape[d - 1] *= size;
    b->x[d - 1] = x, b->y[d - 1] = y, b->out[d - 1] = out;
    return;
  }
  b->shape[d] = size;
  b->x[d] = x, b->y[d] = y, b->out[d] = out;
  b->n++;
}

/* Many x against one y are one tall x, where they follow each other in memory. */
static void stack_rows(hm_cuda_product *p, batch *b) {
  while (b->n > 0) {
    const int d = b->n - 1;
    if (b->y[d] != 0 || p->x.cs != 1 || b->out[d] != p->m * p->out.rs) return;
    if (p->m == 1 && b->x[d] >= p->k) p->x.rs = b->x[d];
    else if (b->x[d] != p->m * p->x.rs) return;
    p->m *= b->shape[d];
    b->n--;
  }
}

static void read_matmul(const plan *l, hm_cuda_product *p, batch *b) {
  const hm_view *x = &l->x.view, *y = &l->y.view, *out = &l->out.view;
  const int nd = out->ndim;
  p->m = x->shape[nd - 2], p->k = x->shape[nd - 1], p->n = y->shape[nd - 1];
  p->x = matrix_of(x), p->y = matrix_of(y), p->out = matrix_of(out);
  for (int d = 0; d < nd - 2; d++)
    add_dim(b, out->shape[d], x->shape[d] == 1 ? 0 : x->stride[d], y->shape[d] == 1 ? 0 : y->stride[d], out->stride[d]);
  stack_rows(p, b);
}

void hm_cuda_linear_product(int op, const hm_view *a, const hm_view *b, const hm_view *out, hm_cuda_product *p) {
  const int64_t last = a->shape[a->ndim - 1], cols = b->shape[b->ndim - 1];
  int64_t rows = 1;
  for (int d = 0; d < a->ndim - 1; d++) rows *= a->shape[d];
  p->x = {a->data, a->dtype, last, 1, 0};
  p->y = {b->data, b->dtype, cols, 1, 0};
  if (op == HM_OP_LINEAR) {
    p->m = rows, p->k = last, p->n = b->shape[0];
    p->y.rs = 1, p->y.cs = cols; /* the weight is [out, in] */
  } else if (op == HM_OP_LINEAR_BACKWARD_INPUT) {
    p->m = rows, p->k = last, p->n = cols;
  } else {
    p->m = last, p->k = rows, p->n = cols;
    p->x.rs = 1, p->x.cs = last;
  }
  p->out = {out->data, out->dtype, p->n, 1, 0};
  p->batches = 1;
}

/* ====== Family matmul: running a call ====== */

/* All products of a batch: its innermost dim in one call, the others in turn. */
static int run_batch(hm_cuda_product *p, const batch *b) {
  const int inner = b->n - 1;
  int64_t calls = 1;
  if (b->n > 0) {
    p->batches = b->shape[inner];
    p->x.batch = b->x[inner], p->y.batch = b->y[inner], p->out.batch = b->out[inner];
  }
  for (int d = 0; d < inner; d++) calls *= b->shape[d];
  const hm_cuda_product first = *p;
  int status = HM_OK;
  for (int64_t i = 0; i < calls && !status; i++) {
    int64_t rest = i, x = 0, y = 0, out = 0;
    for (int d = inner - 1; d >= 0; d--) {
      const int64_t at = rest % b->shape[d];
      rest /= b->shape[d];
      x += at * b->x[d], y += at * b->y[d], out += at * b->out[d];
    }
    p->x.data = hm_cuda_at(first.x.data, x, p->x.dtype);
    p->y.data = hm_cuda_at(first.y.data, y, p->y.dtype);
    p->out.data = hm_cuda_at(first.out.data, out, p->out.dtype);
    status = hm_cuda_gemm(p);
  }
  return status;
}

/* An inner dim of 0: zeros, or the bias. */
static int run_no_inner(const hm_kernel_call *call, const char *name) {
  const hm_view *out = &call->out[0];
  if (call->op != HM_OP_LINEAR || (call->in[2].flags & HM_VIEW_ABSENT))
    return hm_cuda_zero(out->data, (size_t)(hm_cuda_numel(out) * hm_dtype_size(out->dtype)), name);
  hm_view bias = *out;
  bias.data = call->in[2].data;
  bias.dtype = call->in[2].dtype;
  for (int d = 0; d < bias.ndim; d++) bias.stride[d] = d == bias.ndim - 1 ? 1 : 0;
  return hm_cuda_copy_view(&bias, out);
}

/* Gives an operand its place in the workspace; reads it in. */
static int fetch(operand *a, char *workspace, bool read) {
  if (!a->copied) return HM_OK;
  a->view.data = workspace + a->at;
  if (!read) return HM_OK;
  hm_view from = a->from, to = a->view;
  for (int d = 0; d < to.ndim; d++) {
    if (to.stride[d] != 0) continue;
    from.shape[d] = to.shape[d] = 1;
  }
  return hm_cuda_copy_view(&from, &to);
}

int hm_cuda_matmul_workspace(const hm_kernel_call *call, size_t *bytes) {
  plan l;
  const int status = make_plan(call, &l);
  *bytes = l.bytes;
  return status;
}

int hm_cuda_matmul(const hm_kernel_call *call) {
  plan l;
  hm_cuda_product p;
  batch b;
  int status = make_plan(call, &l);
  if (status || hm_cuda_numel(&call->out[0]) == 0) return status;
  if (hm_cuda_numel(&call->in[0]) == 0) return run_no_inner(call, l.name); /* m and n are not 0, so k is */
  char *workspace = (char *)call->workspace;
  status = fetch(&l.x, workspace, true);
  if (!status) status = fetch(&l.y, workspace, true);
  if (!status) status = fetch(&l.bias, workspace, true);
  if (!status) status = fetch(&l.out, workspace, false);
  if (status) return status;
  memset(&p, 0, sizeof p);
  memset(&b, 0, sizeof b);
  p.name = l.name;
  p.batches = 1;
  if (call->op == HM_OP_MATMUL) read_matmul(&l, &p, &b);
  else hm_cuda_linear_product(call->op, &l.x.view, &l.y.view, &l.out.view, &p);
  if (l.bias.view.ndim) p.bias = l.bias.view.data;
  status = run_batch(&p, &b);
  if (!status && l.out.copied) status = hm_cuda_copy_view(&l.out.view, &call->out[0]);
  return status;
}
