/*
 * blas.cpp -- cuBLAS and cublasLt: what a call may ask for, checked at entry; the product itself is gemm.cpp's.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Types, leading dimensions, pointers (alignment, and that each matrix lies
 * in one live allocation) are checked when the call is made; the product runs on the handle's stream.  What cuBLAS does not support is refused
 * here too: a refusal is reported with its reason.  HALFMOON_EMU_EPILOGUE plays out what cublasLt's epilogues might be:
 *   none   no algorithm has one but a bias        nan   relu makes NaN 0        rough   gelu and its gradient are a thousandth off
 */
#include "emu.h"

#include <set>
#include <vector>
#include <stdlib.h>
#include <string.h>
#include "cublasLt.h"
#include "gemm.h"

struct cublasContext {
  cudaStream_t stream;
  cublasMath_t math;
  cublasPointerMode_t pointers;
};

using namespace hm_emu;

namespace {

/* One product with everything around it. */
struct product {
  const char *name;
  int64_t m, n, k, batch;
  matrix a, b; /* op(A), op(B): transposition is in the strides */
  int64_t stride_a, stride_b, stride_c, stride_d;
  rounding how;
  bool wide; /* double */
  bool device_scalars;
  const void *alpha, *beta;
  finish out;
  int64_t aux_stride, bias_stride;
  void *sum_a, *sum_b; /* bias gradients from the inputs */
};

auto &handles = *new std::set<const void *>; /* of both libraries */

/* Entry of a call: a status that ends it, or CUBLAS_STATUS_SUCCESS. */
cublasStatus_t begin(const call &entered, const void *handle, bool allocates = false) {
  if (entered.injected) return allocates ? CUBLAS_STATUS_ALLOC_FAILED : CUBLAS_STATUS_EXECUTION_FAILED;
  if (entered.error) return CUBLAS_STATUS_EXECUTION_FAILED;
  return handle && !handles.count(handle) ? CUBLAS_STATUS_NOT_INITIALIZED : CUBLAS_STATUS_SUCCESS;
}

bool plays(const char *what) {
  const char *const asked = getenv("HALFMOON_EMU_EPILOGUE");
  return asked && !strcmp(asked, what);
}

size_t size_of(cudaDataType type) {
  switch (type) {
  case CUDA_R_16F:
  case CUDA_R_16BF: return 2;
  case CUDA_R_32F: return 4;
  case CUDA_R_64F: return 8;
  default: return 0;
  }
}

/* ====== Checks ====== */

/* The matrix, batch times, lies in live device memory. */
bool matrix_is_there(const char *name, const char *which, const matrix &m, int64_t rows, int64_t columns, int64_t batch,
                     int64_t stride) {
  const size_t size = size_of(m.type);
  const int64_t last = (rows - 1) * m.row + (columns - 1) * m.column + (batch - 1) * stride + 1;
  if ((uintptr_t)m.data % size) {
    report("%s: %s is not aligned to its elements", name, which);
    return false;
  }
  if (block_with(m.data, (size_t)last * size)) return true;
  report("%s: %s is outside every live allocation: %s", name, which, describe(m.data, (size_t)last * size).c_str());
  return false;
}

bool vector_is_there(const char *name, const char *which, const void *p, cudaDataType type, int64_t n) {
  if (block_with(p, (size_t)n * size_of(type))) return true;
  report("%s: %s is outside every live allocation: %s", name, which, describe(p, (size_t)n * size_of(type)).c_str());
  return false;
}

/* Combinations of element types and arithmetic that cuBLAS has. */
cublasStatus_t check_types(const char *name, cudaDataType a, cudaDataType b, cudaDataType c,
                           cublasComputeType_t compute) {
  const bool fast = compute == CUBLAS_COMPUTE_32F_FAST_16F || compute == CUBLAS_COMPUTE_32F_FAST_16BF ||
                    compute == CUBLAS_COMPUTE_32F_FAST_TF32;
  const bool half = a == CUDA_R_16F || a == CUDA_R_16BF;
  bool good = false;
  if (compute == CUBLAS_COMPUTE_32F || compute == CUBLAS_COMPUTE_32F_PEDANTIC)
    good = a == b && ((a == CUDA_R_32F && c == a) || (half && (c == a || c == CUDA_R_32F)));
  else if (fast) good = a == CUDA_R_32F && b == a && c == a;
  else if (compute == CUBLAS_COMPUTE_64F || compute == CUBLAS_COMPUTE_64F_PEDANTIC)
    good = a == CUDA_R_64F && b == a && c == a;
  if (!good) {
    report("%s: no product of types %d and %d into %d with compute type %d", name, (int)a, (int)b, (int)c,
           (int)compute);
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  const char *const capability = getenv("HALFMOON_EMU_CC");
  if (a == CUDA_R_16BF && capability && *capability && atof(capability) < 8) {
    report("%s: bfloat16 needs compute capability 8.0", name);
    return CUBLAS_STATUS_ARCH_MISMATCH;
  }
  return CUBLAS_STATUS_SUCCESS;
}

rounding rounding_of(cublasComputeType_t compute, cudaDataType a, int math) {
  if (a != CUDA_R_32F) return ROUND_NOT;
  if (compute == CUBLAS_COMPUTE_32F_FAST_16F) return ROUND_F16;
  if (compute == CUBLAS_COMPUTE_32F_FAST_16BF) return ROUND_BF16;
  if (compute == CUBLAS_COMPUTE_32F_FAST_TF32) return ROUND_TF32;
  return compute == CUBLAS_COMPUTE_32F && (math & 15) == CUBLAS_TF32_TENSOR_OP_MATH ? ROUND_TF32 : ROUND_NOT;
}

bool bad_ld(const char *name, const char *which, int64_t ld, int64_t least) {
  if (ld >= (least > 1 ? least : 1)) return false;
  report("%s: leading dimension of %s is %lld, at least %lld is needed", name, which, (long long)ld, (long long)least);
  return true;
}

double scalar(const void *p, bool wide) { return wide ? *(const double *)p : *(const float *)p; }

/* ====== Running ====== */

matrix shifted(matrix m, int64_t elements) {
  m.data = (char *)m.data + elements * (int64_t)size_of(m.type);
  return m;
}

void *shifted(void *p, int64_t elements, cudaDataType type) {
  return p ? (char *)p + elements * (int64_t)size_of(type) : nullptr;
}

void run_product(const product &p) {
  if (sticky()) return;
  device_access access;
  finish out = p.out;
  if (p.device_scalars) {
    out.alpha = scalar(p.alpha, p.wide);
    out.beta = scalar(p.beta, p.wide);
  }
  std::vector<double> acc((size_t)(p.m * p.n) / (p.wide ? 1 : 2) + 1);
  for (int64_t i = 0; i < p.batch; i++) {
    multiply(p.m, p.n, p.k, shifted(p.a, i * p.stride_a), shifted(p.b, i * p.stride_b), p.how, acc.data());
    finish one = out;
    one.c = shifted(out.c, i * p.stride_c);
    one.d = shifted(out.d, i * p.stride_d);
    one.bias = shifted((void *)out.bias, i * p.bias_stride, out.bias_type);
    if (out.aux) {
      const bool bits = out.act == ACT_RELU || out.act == ACT_DRELU;
      one.aux = bits ? (char *)out.aux + i * p.aux_stride / 8 : shifted(out.aux, i * p.aux_stride, out.aux_type);
    }
    finish_product(p.m, p.n, acc.data(), p.wide, one);
  }
  if (p.sum_a) sum_rows(p.m, p.k, p.a, p.sum_a, out.bias_type);
  if (p.sum_b) {
    matrix turned = p.b;
    std::swap(turned.row, turned.column);
    sum_rows(p.n, p.k, turned, p.sum_b, out.bias_type);
  }
}

/* Checks what both libraries have in common, and queues the product. */
cublasStatus_t submit(product p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0 || p.batch == 0) return CUBLAS_STATUS_SUCCESS;
  if (!p.alpha || !p.beta) return CUBLAS_STATUS_INVALID_VALUE;
  if (!stream_exists(stream)) return CUBLAS_STATUS_INVALID_VALUE;
  if (p.device_scalars != is_device(p.alpha)) {
    report("%s: alpha lies in %s memory, against the pointer mode", p.name, p.device_scalars ? "host" : "device");
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (!p.device_scalars) {
    p.out.alpha = scalar(p.alpha, p.wide);
    p.out.beta = scalar(p.beta, p.wide);
  }
  const bool reads_c = p.device_scalars || p.out.beta != 0;
  if ((p.k && (!matrix_is_there(p.name, "A", p.a, p.m, p.k, p.batch, p.stride_a) ||
               !matrix_is_there(p.name, "B", p.b, p.k, p.n, p.batch, p.stride_b))) ||
      (reads_c && !matrix_is_there(p.name, "C", p.out.c, p.m, p.n, p.batch, p.stride_c)) ||
      !matrix_is_there(p.name, "the result", p.out.d, p.m, p.n, p.batch, p.stride_d))
    return CUBLAS_STATUS_INVALID_VALUE;
  stats.gemms++;
  stats.gemm_flops += 2.0 * (double)p.m * (double)p.n * (double)p.k * (double)p.batch;
  push(stream, [p] { run_product(p); });
  return CUBLAS_STATUS_SUCCESS;
}

} // namespace

#define BEGIN(name)                                                                                                    \
  call entered(name);                                                                                                  \
  {                                                                                                                    \
    const cublasStatus_t ended = begin(entered, handle);                                                               \
    if (ended) return ended;                                                                                           \
  }

/* ====== cuBLAS: handles ====== */

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
  call entered("cublasCreate");
  const cublasStatus_t ended = begin(entered, nullptr, true);
  if (ended || !handle) return ended ? ended : CUBLAS_STATUS_INVALID_VALUE;
  *handle = new cublasContext{nullptr, CUBLAS_DEFAULT_MATH, CUBLAS_POINTER_MODE_HOST};
  handles.insert(*handle);
  stats.live_objects++;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  call entered("cublasDestroy");
  if (!handles.erase(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  stats.live_objects--;
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetVersion_v2(cublasHandle_t, int *version) {
  *version = 120000;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t streamId) {
  BEGIN("cublasSetStream");
  if (!stream_exists(streamId)) return CUBLAS_STATUS_INVALID_VALUE;
  handle->stream = streamId;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t *streamId) {
  BEGIN("cublasGetStream");
  *streamId = handle->stream;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t workspaceSizeInBytes) {
  BEGIN("cublasSetWorkspace");
  if (!workspaceSizeInBytes) return CUBLAS_STATUS_SUCCESS;
  if ((uintptr_t)workspace % 256 || !block_with(workspace, workspaceSizeInBytes)) {
    report("cublasSetWorkspace: not 256-byte aligned, or outside every live allocation: %s",
           describe(workspace, workspaceSizeInBytes).c_str());
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
  BEGIN("cublasSetPointerMode");
  handle->pointers = mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
  BEGIN("cublasGetPointerMode");
  *mode = handle->pointers;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  BEGIN("cublasSetMathMode");
  handle->math = mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
  BEGIN("cublasGetMathMode");
  *mode = handle->math;
  return CUBLAS_STATUS_SUCCESS;
}

const char *cublasGetStatusName(cublasStatus_t status) {
  switch (status) {
#define X(name)                                                                                                        \
  case name: return #name;
    X(CUBLAS_STATUS_SUCCESS)
    X(CUBLAS_STATUS_NOT_INITIALIZED)
    X(CUBLAS_STATUS_ALLOC_FAILED)
    X(CUBLAS_STATUS_INVALID_VALUE)
    X(CUBLAS_STATUS_ARCH_MISMATCH)
    X(CUBLAS_STATUS_MAPPING_ERROR)
    X(CUBLAS_STATUS_EXECUTION_FAILED)
    X(CUBLAS_STATUS_INTERNAL_ERROR)
    X(CUBLAS_STATUS_NOT_SUPPORTED)
    X(CUBLAS_STATUS_LICENSE_ERROR)
#undef X
  }
  return "unknown status";
}

const char *cublasGetStatusString(cublasStatus_t status) { return cublasGetStatusName(status); }

/* ====== cuBLAS: products ====== */

static cublasStatus_t gemm(const char *name, cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                           int n, int k, const void *alpha, const void *a, cudaDataType at, int lda, long long sa,
                           const void *b, cudaDataType bt, int ldb, long long sb, const void *beta, void *c,
                           cudaDataType ct, int ldc, long long sc, int batch, cublasComputeType_t compute) {
  if (m < 0 || n < 0 || k < 0 || batch < 0 || (unsigned)ta > CUBLAS_OP_C || (unsigned)tb > CUBLAS_OP_C) {
    report("%s: a negative size, or an operation that is none", name);
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const bool na = ta == CUBLAS_OP_N, nb = tb == CUBLAS_OP_N;
  if (bad_ld(name, "A", lda, na ? m : k) || bad_ld(name, "B", ldb, nb ? k : n) || bad_ld(name, "C", ldc, m))
    return CUBLAS_STATUS_INVALID_VALUE;
  const cublasStatus_t bad = check_types(name, at, bt, ct, compute);
  if (bad) return bad;
  product p = {};
  p.name = name;
  p.m = m, p.n = n, p.k = k, p.batch = batch;
  p.a = matrix{(void *)a, at, na ? 1 : lda, na ? lda : 1};
  p.b = matrix{(void *)b, bt, nb ? 1 : ldb, nb ? ldb : 1};
  p.stride_a = sa, p.stride_b = sb, p.stride_c = p.stride_d = sc;
  p.how = rounding_of(compute, at, handle->math);
  p.wide = at == CUDA_R_64F;
  p.device_scalars = handle->pointers == CUBLAS_POINTER_MODE_DEVICE;
  p.alpha = alpha, p.beta = beta;
  p.out.c = p.out.d = matrix{c, ct, 1, ldc};
  return submit(p, handle->stream);
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n,
                            int k, const void *alpha, const void *A, cudaDataType Atype, int lda, const void *B,
                            cudaDataType Btype, int ldb, const void *beta, void *C, cudaDataType Ctype, int ldc,
                            cublasComputeType_t computeType, cublasGemmAlgo_t) {
  BEGIN("cublasGemmEx");
  return gemm("cublasGemmEx", handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B, Btype, ldb, 0, beta, C,
              Ctype, ldc, 0, 1, computeType);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                          int m, int n, int k, const void *alpha, const void *A, cudaDataType Atype,
                                          int lda, long long int strideA, const void *B, cudaDataType Btype, int ldb,
                                          long long int strideB, const void *beta, void *C, cudaDataType Ctype, int ldc,
                                          long long int strideC, int batchCount, cublasComputeType_t computeType,
                                          cublasGemmAlgo_t) {
  BEGIN("cublasGemmStridedBatchedEx");
  /* Results follow each other, or lie side by side within the columns. */
  const bool apart = strideC >= (long long)ldc * (n - 1) + m || (strideC >= m && strideC * (batchCount - 1) + m <= ldc);
  if (batchCount > 1 && !apart) {
    report("cublasGemmStridedBatchedEx: the results overlap: stride %lld", strideC);
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  return gemm("cublasGemmStridedBatchedEx", handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype,
              ldb, strideB, beta, C, Ctype, ldc, strideC, batchCount, computeType);
}

/* ====== cublasLt: descriptors ====== */

namespace {

/* What lies in the opaque words. */
struct description {
  cublasComputeType_t compute;
  cudaDataType scale;
  int32_t pointers, ta, tb, aux_type, bias_type; /* types: -1 for D's */
  uint32_t epilogue;
  void *bias, *aux;
  int64_t bias_stride, aux_ld, aux_stride;
};
struct layout {
  uint64_t rows, columns;
  int64_t ld, stride;
  cudaDataType type;
  int32_t order, batch;
};
struct preference {
  uint64_t workspace;
  uint32_t alignment[4];
};
static_assert(sizeof(description) <= sizeof(cublasLtMatmulDescOpaque_t) &&
                  sizeof(layout) <= sizeof(cublasLtMatrixLayoutOpaque_t) &&
                  sizeof(preference) <= sizeof(cublasLtMatmulPreferenceOpaque_t),
              "the toolkit's sizes are enough");

template <class Opaque, class T> cublasStatus_t make(const char *name, Opaque **out, const T &value) {
  call entered(name);
  const cublasStatus_t ended = begin(entered, nullptr, true);
  if (ended || !out) return ended ? ended : CUBLAS_STATUS_INVALID_VALUE;
  *out = new Opaque{};
  memcpy((void *)*out, &value, sizeof value);
  stats.live_objects++;
  return CUBLAS_STATUS_SUCCESS;
}

template <class Opaque> cublasStatus_t unmake(Opaque *p) {
  call entered("cublasLtDestroy");
  if (!p) return CUBLAS_STATUS_SUCCESS;
  stats.live_objects--;
  delete p;
  return CUBLAS_STATUS_SUCCESS;
}

/* Stores an attribute of exactly this size. */
template <class T> cublasStatus_t assign(T *field, const void *from, size_t bytes) {
  if (bytes != sizeof(T)) {
    report("cublasLt: an attribute of %zu bytes was given with %zu", sizeof(T), bytes);
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  memcpy((void *)field, from, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

} // namespace

cublasStatus_t cublasLtCreate(cublasLtHandle_t *lightHandle) {
  cublasHandle_t made;
  const cublasStatus_t status = cublasCreate_v2(&made);
  if (!status) *lightHandle = (cublasLtHandle_t)made;
  return status;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t lightHandle) { return cublasDestroy_v2((cublasHandle_t)lightHandle); }

size_t cublasLtGetVersion(void) { return 120000; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *matmulDesc, cublasComputeType_t computeType,
                                        cudaDataType_t scaleType) {
  description d = {};
  d.compute = computeType;
  d.scale = scaleType;
  d.aux_type = d.bias_type = -1;
  d.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  return make("cublasLtMatmulDescCreate", matmulDesc, d);
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t matmulDesc) { return unmake(matmulDesc); }

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t matmulDesc, cublasLtMatmulDescAttributes_t attr,
                                              const void *buf, size_t sizeInBytes) {
  if (!matmulDesc || !buf) return CUBLAS_STATUS_INVALID_VALUE;
  description *const d = (description *)(void *)matmulDesc;
  switch (attr) {
  case CUBLASLT_MATMUL_DESC_POINTER_MODE: return assign(&d->pointers, buf, sizeInBytes);
  case CUBLASLT_MATMUL_DESC_TRANSA: return assign(&d->ta, buf, sizeInBytes);
  case CUBLASLT_MATMUL_DESC_TRANSB: return assign(&d->tb, buf, sizeInBytes);
  case CUBLASLT_MATMUL_DESC_EPILOGUE: return assign(&d->epilogue, buf, sizeInBytes);
  case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return assign(&d->bias, buf, sizeInBytes);
  case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE: return assign(&d->bias_stride, buf, sizeInBytes);
  case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return assign(&d->aux, buf, sizeInBytes);
  case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return assign(&d->aux_ld, buf, sizeInBytes);
  case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE: return assign(&d->aux_stride, buf, sizeInBytes);
  case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE: return assign(&d->aux_type, buf, sizeInBytes);
  case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return assign(&d->bias_type, buf, sizeInBytes);
  default: return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *matLayout, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
  layout l = {};
  l.rows = rows, l.columns = cols, l.ld = ld, l.type = type, l.batch = 1;
  return make("cublasLtMatrixLayoutCreate", matLayout, l);
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t matLayout) { return unmake(matLayout); }

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t matLayout, cublasLtMatrixLayoutAttribute_t attr,
                                                const void *buf, size_t sizeInBytes) {
  if (!matLayout || !buf) return CUBLAS_STATUS_INVALID_VALUE;
  layout *const l = (layout *)(void *)matLayout;
  switch (attr) {
  case CUBLASLT_MATRIX_LAYOUT_TYPE: return assign((uint32_t *)&l->type, buf, sizeInBytes);
  case CUBLASLT_MATRIX_LAYOUT_ORDER: return assign(&l->order, buf, sizeInBytes);
  case CUBLASLT_MATRIX_LAYOUT_ROWS: return assign(&l->rows, buf, sizeInBytes);
  case CUBLASLT_MATRIX_LAYOUT_COLS: return assign(&l->columns, buf, sizeInBytes);
  case CUBLASLT_MATRIX_LAYOUT_LD: return assign(&l->ld, buf, sizeInBytes);
  case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return assign(&l->batch, buf, sizeInBytes);
  case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return assign(&l->stride, buf, sizeInBytes);
  }
  return CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *pref) {
  return make("cublasLtMatmulPreferenceCreate", pref, preference{});
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t pref) { return unmake(pref); }

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref,
                                                    cublasLtMatmulPreferenceAttributes_t attr, const void *buf,
                                                    size_t sizeInBytes) {
  if (!pref || !buf) return CUBLAS_STATUS_INVALID_VALUE;
  preference *const p = (preference *)(void *)pref;
  uint32_t ignored;
  switch (attr) {
  case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return assign(&p->workspace, buf, sizeInBytes);
  case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return assign(&p->alignment[0], buf, sizeInBytes);
  case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return assign(&p->alignment[1], buf, sizeInBytes);
  case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return assign(&p->alignment[2], buf, sizeInBytes);
  case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return assign(&p->alignment[3], buf, sizeInBytes);
  default: return assign(&ignored, buf, sizeInBytes);
  }
}

/* ====== cublasLt: products ====== */

namespace {

matrix matrix_of(const layout &l, const void *data, bool transposed) {
  const bool by_row = l.order == CUBLASLT_ORDER_ROW;
  matrix m = {(void *)data, l.type, by_row ? l.ld : 1, by_row ? 1 : l.ld};
  if (transposed) std::swap(m.row, m.column);
  return m;
}

bool bad_layout(const char *name, const char *which, const layout &l) {
  if (l.order != CUBLASLT_ORDER_COL && l.order != CUBLASLT_ORDER_ROW) {
    report("%s: the order of %s is neither by column nor by row", name, which);
    return true;
  }
  return bad_ld(name, which, l.ld, (int64_t)(l.order == CUBLASLT_ORDER_ROW ? l.columns : l.rows));
}

/* The epilogue's part of the product; false after a report. */
bool set_epilogue(product *p, const description &d, cudaDataType result) {
  finish &f = p->out;
  f.bias_type = d.bias_type < 0 ? result : (cudaDataType)d.bias_type;
  f.aux_type = d.aux_type < 0 ? result : (cudaDataType)d.aux_type;
  f.aux_ld = d.aux_ld;
  f.drops_nan = plays("nan");
  f.rough = plays("rough");
  p->aux_stride = d.aux_stride;
  p->bias_stride = d.bias_stride;
  const uint32_t e = d.epilogue;
  const bool gradient = e & 8 || e & 64; /* of relu, of gelu */
  switch (e) {
  case CUBLASLT_EPILOGUE_DEFAULT:
  case CUBLASLT_EPILOGUE_RELU:
  case CUBLASLT_EPILOGUE_BIAS:
  case CUBLASLT_EPILOGUE_RELU_BIAS:
  case CUBLASLT_EPILOGUE_GELU:
  case CUBLASLT_EPILOGUE_GELU_BIAS:
  case CUBLASLT_EPILOGUE_RELU_AUX:
  case CUBLASLT_EPILOGUE_RELU_AUX_BIAS:
  case CUBLASLT_EPILOGUE_DRELU:
  case CUBLASLT_EPILOGUE_DRELU_BGRAD:
  case CUBLASLT_EPILOGUE_GELU_AUX:
  case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
  case CUBLASLT_EPILOGUE_DGELU:
  case CUBLASLT_EPILOGUE_DGELU_BGRAD:
  case CUBLASLT_EPILOGUE_BGRADA:
  case CUBLASLT_EPILOGUE_BGRADB: break;
  default: report("%s: no epilogue has the number %u", p->name, e); return false;
  }
  f.act = e & 8 ? ACT_DRELU : e & 64 ? ACT_DGELU : e & 2 ? ACT_RELU : e & 32 ? ACT_GELU : ACT_NONE;
  if (e & 4) f.bias = d.bias;
  if (gradient && (e & 16)) f.bias_gradient = d.bias;
  if (e == CUBLASLT_EPILOGUE_BGRADA) p->sum_a = d.bias;
  if (e == CUBLASLT_EPILOGUE_BGRADB) p->sum_b = d.bias;
  if (e & 128) f.aux = d.aux;
  const bool uses_bias = e & (4 | 16 | 256 | 512), gives_bias = e & (16 | 256 | 512);
  if (gives_bias && f.bias_type != result) {
    report("%s: a bias gradient is of D's type", p->name);
    return false;
  }
  if (uses_bias &&
      !vector_is_there(p->name, "the bias", d.bias, f.bias_type, e == CUBLASLT_EPILOGUE_BGRADB ? p->n : p->m))
    return false;
  if (!(e & 128)) return true;
  const bool bits = f.act == ACT_RELU || f.act == ACT_DRELU;
  if (d.aux_ld < p->m || (bits && d.aux_ld % 128) || (!bits && d.aux_ld % 8)) {
    report("%s: leading dimension of the auxiliary matrix is %lld: at least %lld, and a multiple of %d", p->name,
           (long long)d.aux_ld, (long long)p->m, bits ? 128 : 8);
    return false;
  }
  const size_t bytes =
      bits ? (size_t)(d.aux_ld * p->n / 8) : (size_t)(d.aux_ld * (p->n - 1) + p->m) * size_of(f.aux_type);
  if ((uintptr_t)d.aux % 16 || !block_with(d.aux, bytes)) {
    report("%s: the auxiliary matrix is misaligned or outside every live allocation: %s", p->name,
           describe(d.aux, bytes).c_str());
    return false;
  }
  return true;
}

/* Checks shapes and types of a matmul; fills the product but for the pointers' targets. */
cublasStatus_t describe_matmul(product *p, const description &d, const layout &a, const layout &b, const layout &c,
                               const layout &r) {
  const bool ta = d.ta != CUBLAS_OP_N, tb = d.tb != CUBLAS_OP_N;
  p->m = (int64_t)r.rows, p->n = (int64_t)r.columns;
  p->k = (int64_t)(ta ? a.rows : a.columns);
  p->batch = r.batch;
  if ((int64_t)(ta ? a.columns : a.rows) != p->m || (int64_t)(tb ? b.columns : b.rows) != p->k ||
      (int64_t)(tb ? b.rows : b.columns) != p->n || c.rows != r.rows || c.columns != r.columns) {
    report("%s: shapes do not fit: op(A) is %llux%llu, op(B) %llux%llu, D %llux%llu", p->name,
           (unsigned long long)(ta ? a.columns : a.rows), (unsigned long long)p->k,
           (unsigned long long)(tb ? b.columns : b.rows), (unsigned long long)(tb ? b.rows : b.columns),
           (unsigned long long)r.rows, (unsigned long long)r.columns);
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (a.batch != r.batch || b.batch != r.batch || c.batch != r.batch || r.batch < 1) {
    report("%s: batch counts differ", p->name);
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (bad_layout(p->name, "A", a) || bad_layout(p->name, "B", b) || bad_layout(p->name, "C", c) ||
      bad_layout(p->name, "D", r))
    return CUBLAS_STATUS_INVALID_VALUE;
  if (c.type != r.type || d.scale != (r.type == CUDA_R_64F ? CUDA_R_64F : CUDA_R_32F)) {
    report("%s: C and D differ in type, or the scale type is %d", p->name, (int)d.scale);
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  return check_types(p->name, a.type, b.type, r.type, d.compute);
}

} // namespace

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t lightHandle, cublasLtMatmulDesc_t operationDesc,
                                              cublasLtMatrixLayout_t Adesc, cublasLtMatrixLayout_t Bdesc,
                                              cublasLtMatrixLayout_t Cdesc, cublasLtMatrixLayout_t Ddesc,
                                              cublasLtMatmulPreference_t preference, int requestedAlgoCount,
                                              cublasLtMatmulHeuristicResult_t heuristicResultsArray[],
                                              int *returnAlgoCount) {
  const void *const handle = lightHandle;
  BEGIN("cublasLtMatmulAlgoGetHeuristic");
  if (!operationDesc || !Adesc || !Bdesc || !Cdesc || !Ddesc || !preference || requestedAlgoCount < 1 ||
      !heuristicResultsArray || !returnAlgoCount)
    return CUBLAS_STATUS_INVALID_VALUE;
  *returnAlgoCount = 0;
  const uint32_t epilogue = ((description *)(void *)operationDesc)->epilogue;
  if (plays("none") && epilogue != CUBLASLT_EPILOGUE_DEFAULT && epilogue != CUBLASLT_EPILOGUE_BIAS)
    return CUBLAS_STATUS_NOT_SUPPORTED;
  product p = {};
  p.name = "cublasLtMatmulAlgoGetHeuristic";
  const cublasStatus_t bad =
      describe_matmul(&p, *(description *)(void *)operationDesc, *(layout *)(void *)Adesc, *(layout *)(void *)Bdesc,
                      *(layout *)(void *)Cdesc, *(layout *)(void *)Ddesc);
  if (bad) return bad;
  heuristicResultsArray[0] = cublasLtMatmulHeuristicResult_t{};
  heuristicResultsArray[0].algo.data[0] = 1;
  heuristicResultsArray[0].wavesCount = 1;
  *returnAlgoCount = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t lightHandle, cublasLtMatmulDesc_t computeDesc, const void *alpha,
                              const void *A, cublasLtMatrixLayout_t Adesc, const void *B, cublasLtMatrixLayout_t Bdesc,
                              const void *beta, const void *C, cublasLtMatrixLayout_t Cdesc, void *D,
                              cublasLtMatrixLayout_t Ddesc, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspaceSizeInBytes, cudaStream_t stream) {
  const void *const handle = lightHandle;
  BEGIN("cublasLtMatmul");
  if (!computeDesc || !Adesc || !Bdesc || !Cdesc || !Ddesc || (algo && algo->data[0] != 1))
    return CUBLAS_STATUS_INVALID_VALUE;
  const description &d = *(description *)(void *)computeDesc;
  const layout &a = *(layout *)(void *)Adesc, &b = *(layout *)(void *)Bdesc, &c = *(layout *)(void *)Cdesc,
               &r = *(layout *)(void *)Ddesc;
  product p = {};
  p.name = "cublasLtMatmul";
  const cublasStatus_t bad = describe_matmul(&p, d, a, b, c, r);
  if (bad) return bad;
  if (workspaceSizeInBytes && !block_with(workspace, workspaceSizeInBytes)) {
    report("cublasLtMatmul: the workspace is outside every live allocation: %s",
           describe(workspace, workspaceSizeInBytes).c_str());
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  p.a = matrix_of(a, A, d.ta != CUBLAS_OP_N);
  p.b = matrix_of(b, B, d.tb != CUBLAS_OP_N);
  p.stride_a = a.stride, p.stride_b = b.stride, p.stride_c = c.stride, p.stride_d = r.stride;
  p.how = rounding_of(d.compute, a.type, 0);
  p.wide = a.type == CUDA_R_64F;
  p.device_scalars = d.pointers == CUBLASLT_POINTER_MODE_DEVICE;
  p.alpha = alpha, p.beta = beta;
  p.out.c = matrix_of(c, C, false);
  p.out.d = matrix_of(r, D, false);
  if (!set_epilogue(&p, d, r.type)) return CUBLAS_STATUS_INVALID_VALUE;
  return submit(p, stream);
}
