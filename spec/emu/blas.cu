/*
 * blas.cu -- cuBLAS and cublasLt on the test double: products against a plain sum in double, epilogues, refusals.
 *
 * Run by spec/emu_spec.lua.  Prints "NAME ok" or how far it is off, and the status of each refused call.  `blas speed` times one product.
 */
#include "device.h"
#include "emu_stats.h"

#include <cublasLt.h>
#include <cublas_v2.h>
#include <stdio.h>
#include <string>
#include <time.h>
#include <vector>

static cublasHandle_t handle;
static cublasLtHandle_t lt;

static size_t size_of(cudaDataType t) { return t == CUDA_R_64F ? 8 : t == CUDA_R_32F ? 4 : 2; }

static double round_to(double x, cudaDataType t) {
  if (t == CUDA_R_16F) return (double)hm_f16_to_f32(hm_f32_to_f16((float)x));
  if (t == CUDA_R_16BF) return (double)hm_bf16_to_f32(hm_f32_to_bf16((float)x));
  return t == CUDA_R_32F ? (double)(float)x : x;
}

/* A column-major matrix on the device, with its values as doubles on the host. */
struct matrix {
  int rows, columns, ld, batch;
  cudaDataType type;
  std::vector<double> value;
  void *data;
  matrix(int r, int c, cudaDataType t, int pad = 0, int n = 1) : rows(r), columns(c), ld(r + pad), batch(n), type(t) {
    static unsigned seed = 1;
    value.resize((size_t)(ld * c * n));
    for (double &v : value) {
      seed = seed * 1664525u + 1013904223u;
      v = round_to((double)(seed >> 20) / 2048.0 - 1.0, t);
    }
    cudaMalloc(&data, value.size() * size_of(t));
    upload();
  }
  ~matrix() { cudaFree(data); }
  void upload() {
    std::vector<char> raw(value.size() * size_of(type));
    for (size_t i = 0; i < value.size(); i++) {
      if (type == CUDA_R_64F) ((double *)raw.data())[i] = value[i];
      else if (type == CUDA_R_32F) ((float *)raw.data())[i] = (float)value[i];
      else if (type == CUDA_R_16F) ((uint16_t *)raw.data())[i] = hm_f32_to_f16((float)value[i]);
      else ((uint16_t *)raw.data())[i] = hm_f32_to_bf16((float)value[i]);
    }
    cudaMemcpy(data, raw.data(), raw.size(), cudaMemcpyHostToDevice);
  }
  std::vector<double> download() const {
    std::vector<char> raw(value.size() * size_of(type));
    std::vector<double> to(value.size());
    cudaMemcpy(raw.data(), data, raw.size(), cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < to.size(); i++) {
      if (type == CUDA_R_64F) to[i] = ((double *)raw.data())[i];
      else if (type == CUDA_R_32F) to[i] = (double)((float *)raw.data())[i];
      else if (type == CUDA_R_16F) to[i] = (double)hm_f16_to_f32(((uint16_t *)raw.data())[i]);
      else to[i] = (double)hm_bf16_to_f32(((uint16_t *)raw.data())[i]);
    }
    return to;
  }
  double at(int i, int j, int b = 0) const { return value[(size_t)(b * ld * columns + j * ld + i)]; }
  double at(bool turned, int i, int j, int b) const { return turned ? at(j, i, b) : at(i, j, b); }
};

static double product_at(const matrix &a, bool ta, const matrix &b, bool tb, int i, int j, int k, int n) {
  double sum = 0;
  for (int l = 0; l < k; l++) sum += a.at(ta, i, l, n) * b.at(tb, l, j, n);
  return sum;
}

static double unit_of(cudaDataType t) {
  return t == CUDA_R_64F ? 1e-13 : t == CUDA_R_32F ? 1e-5 : t == CUDA_R_16F ? 1.0 / 1024 : 1.0 / 128;
}

static void verdict(const char *name, double worst) {
  if (worst < 1) printf("%s ok\n", name);
  else printf("%s is off by %g bounds\n", name, worst);
}

static void test_gemm(const char *name, int m, int n, int k, cudaDataType in, cudaDataType out,
                      cublasComputeType_t compute, bool ta, bool tb, double beta, int batch) {
  matrix a(ta ? k : m, ta ? m : k, in, 3, batch), b(tb ? n : k, tb ? k : n, in, 1, batch), c(m, n, out, 2, batch);
  const std::vector<double> before = c.value;
  const double alpha = 0.5;
  const float alphaf = 0.5f, betaf = (float)beta;
  const bool wide = in == CUDA_R_64F;
  const cublasStatus_t s =
      cublasGemmStridedBatchedEx(handle, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k,
                                 wide ? (const void *)&alpha : &alphaf, a.data, in, a.ld, (long long)a.ld * a.columns,
                                 b.data, in, b.ld, (long long)b.ld * b.columns, wide ? (const void *)&beta : &betaf,
                                 c.data, out, c.ld, (long long)c.ld * n, batch, compute, CUBLAS_GEMM_DEFAULT);
  if (s) {
    printf("%s: %s\n", name, cublasGetStatusName(s));
    return;
  }
  const std::vector<double> got = c.download();
  const double loose = compute == CUBLAS_COMPUTE_32F_FAST_TF32 ? 2e-3 : unit_of(out);
  double worst = 0;
  for (int t = 0; t < batch; t++)
    for (int j = 0; j < n; j++)
      for (int i = 0; i < c.ld; i++) {
        const size_t at = (size_t)(t * c.ld * n + j * c.ld + i);
        const double expected = i >= m ? before[at] : alpha * product_at(a, ta, b, tb, i, j, k, t) + beta * before[at];
        const double off = fabs(got[at] - expected) / (loose * (fabs(expected) + sqrt((double)k) * (wide ? 1 : 0.1)));
        worst = off > worst || off != off ? off : worst;
      }
  verdict(name, worst);
}

static double gelu(double x) { return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
static double gelu_slope(double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; }

/* One product by cublasLt with an epilogue. */
static cublasStatus_t matmul(const matrix &a, const matrix &b, const matrix &d, cublasLtEpilogue_t epilogue, void *bias,
                             void *aux, int64_t aux_ld) {
  const float one = 1, zero = 0;
  const uint32_t number = epilogue;
  const uint64_t workspace = 0;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t la, lb, ld;
  cublasLtMatmulPreference_t preference;
  cublasLtMatmulHeuristicResult_t found;
  int n = 0;
  cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &number, sizeof number);
  cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
  if (aux) {
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux, sizeof aux);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_ld, sizeof aux_ld);
  }
  cublasLtMatrixLayoutCreate(&la, a.type, (uint64_t)a.rows, (uint64_t)a.columns, a.ld);
  cublasLtMatrixLayoutCreate(&lb, b.type, (uint64_t)b.rows, (uint64_t)b.columns, b.ld);
  cublasLtMatrixLayoutCreate(&ld, d.type, (uint64_t)d.rows, (uint64_t)d.columns, d.ld);
  cublasLtMatmulPreferenceCreate(&preference);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                       sizeof workspace);
  cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(lt, desc, la, lb, ld, ld, preference, 1, &found, &n);
  if (!s && n == 1)
    s = cublasLtMatmul(lt, desc, &one, a.data, la, b.data, lb, &zero, d.data, ld, d.data, ld, &found.algo, NULL, 0, 0);
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatrixLayoutDestroy(la);
  cublasLtMatrixLayoutDestroy(lb);
  cublasLtMatrixLayoutDestroy(ld);
  cublasLtMatmulDescDestroy(desc);
  return s;
}

enum { M = 24, COLUMNS = 9, K = 40 };

/* Forward with bias and activation, then the gradient through it, with what the forward saved. */
static void test_epilogues(const char *name, bool relu) {
  matrix a(M, K, CUDA_R_32F), b(K, COLUMNS, CUDA_R_32F), d(M, COLUMNS, CUDA_R_32F), bias(M, 1, CUDA_R_32F),
      sums(M, 1, CUDA_R_32F);
  matrix aux(relu ? 128 : M, COLUMNS, CUDA_R_32F); /* as bits: 128 a column, more than is needed */
  double worst = 0;
  const int64_t ld = relu ? 128 : M;
  cublasStatus_t s = matmul(a, b, d, relu ? CUBLASLT_EPILOGUE_RELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                            bias.data, aux.data, ld);
  std::vector<double> got = d.download();
  for (int j = 0; j < COLUMNS && !s; j++)
    for (int i = 0; i < M; i++) {
      const double x = product_at(a, false, b, false, i, j, K, 0) + bias.at(i, 0), y = relu ? (x > 0 ? x : 0) : gelu(x);
      worst = fmax(worst, fabs(got[(size_t)(j * M + i)] - y) / 1e-4);
    }
  s = s ? s
        : matmul(a, b, d, relu ? CUBLASLT_EPILOGUE_DRELU_BGRAD : CUBLASLT_EPILOGUE_DGELU_BGRAD, sums.data, aux.data,
                 ld);
  if (s) {
    printf("%s: %s\n", name, cublasGetStatusName(s));
    return;
  }
  got = d.download();
  const std::vector<double> summed = sums.download();
  for (int i = 0; i < M; i++) {
    double sum = 0;
    for (int j = 0; j < COLUMNS; j++) {
      const double g = product_at(a, false, b, false, i, j, K, 0), x = g + bias.at(i, 0);
      const double y = relu ? (x > 0 ? g : 0) : g * gelu_slope(x);
      sum += y;
      worst = fmax(worst, fabs(got[(size_t)(j * M + i)] - y) / 1e-3);
    }
    worst = fmax(worst, fabs(summed[(size_t)i] - sum) / 1e-2);
  }
  verdict(name, worst);
}

/* Bias alone, and bias gradients from the inputs. */
static void test_bias(void) {
  matrix a(M, K, CUDA_R_16F), b(K, COLUMNS, CUDA_R_16F), d(M, COLUMNS, CUDA_R_16F), bias(M, 1, CUDA_R_16F),
      ga(M, 1, CUDA_R_16F), gb(COLUMNS, 1, CUDA_R_16F);
  double worst = 0;
  const cublasStatus_t s = matmul(a, b, d, CUBLASLT_EPILOGUE_BIAS, bias.data, NULL, 0);
  const std::vector<double> got = d.download();
  for (int j = 0; j < COLUMNS; j++)
    for (int i = 0; i < M; i++) {
      const double y = product_at(a, false, b, false, i, j, K, 0) + bias.at(i, 0);
      worst = fmax(worst, fabs(got[(size_t)(j * M + i)] - y) / (1e-3 * (1 + fabs(y))));
    }
  if (s || matmul(a, b, d, CUBLASLT_EPILOGUE_BGRADA, ga.data, NULL, 0) ||
      matmul(a, b, d, CUBLASLT_EPILOGUE_BGRADB, gb.data, NULL, 0))
    worst = 1e9;
  for (int i = 0; i < M; i++) {
    double sum = 0;
    for (int l = 0; l < K; l++) sum += a.at(i, l);
    worst = fmax(worst, fabs(ga.download()[(size_t)i] - sum) / (1e-3 * (1 + fabs(sum))));
  }
  for (int j = 0; j < COLUMNS; j++) {
    double sum = 0;
    for (int l = 0; l < K; l++) sum += b.at(l, j);
    worst = fmax(worst, fabs(gb.download()[(size_t)j] - sum) / (1e-3 * (1 + fabs(sum))));
  }
  verdict("bias", worst);
}

static void refusals(void) {
  const float one = 1, zero = 0;
  matrix a(8, 16, CUDA_R_32F), b(16, 4, CUDA_R_32F), c(8, 4, CUDA_R_32F);
  std::vector<float> host(1000);
#define TRY(what, at, ta, lda, pa, pb, pc, tc, compute)                                                                \
  printf("%s %s\n", what,                                                                                              \
         cublasGetStatusName(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, 8, 4, 16, at, pa, ta, lda, pb, ta, 16,     \
                                          &zero, pc, tc, 8, compute, CUBLAS_GEMM_DEFAULT)))
  TRY("good", &one, CUDA_R_32F, 8, a.data, b.data, c.data, CUDA_R_32F, CUBLAS_COMPUTE_32F);
  TRY("small lda", &one, CUDA_R_32F, 7, a.data, b.data, c.data, CUDA_R_32F, CUBLAS_COMPUTE_32F);
  TRY("large lda", &one, CUDA_R_32F, 9, a.data, b.data, c.data, CUDA_R_32F, CUBLAS_COMPUTE_32F);
  TRY("host pointer", &one, CUDA_R_32F, 8, host.data(), b.data, c.data, CUDA_R_32F, CUBLAS_COMPUTE_32F);
  TRY("types", &one, CUDA_R_32F, 8, a.data, b.data, c.data, CUDA_R_16F, CUBLAS_COMPUTE_32F);
  TRY("compute", &one, CUDA_R_32F, 8, a.data, b.data, c.data, CUDA_R_32F, CUBLAS_COMPUTE_16F);
  TRY("device alpha", (float *)a.data, CUDA_R_32F, 8, a.data, b.data, c.data, CUDA_R_32F, CUBLAS_COMPUTE_32F);
  matrix t(16, 8, CUDA_R_32F);
  printf("shapes %s\n", cublasGetStatusName(matmul(t, b, c, CUBLASLT_EPILOGUE_DEFAULT, NULL, NULL, 0)));
  printf("no bias %s\n", cublasGetStatusName(matmul(a, b, c, CUBLASLT_EPILOGUE_BIAS, host.data(), NULL, 0)));
  emu_fail("cublasGemmEx", 1);
  TRY("planned", &one, CUDA_R_32F, 8, a.data, b.data, c.data, CUDA_R_32F, CUBLAS_COMPUTE_32F);
  cublasHandle_t gone;
  cublasCreate(&gone);
  cublasDestroy(gone);
  printf("destroyed %s\n", cublasGetStatusName(cublasSetStream(gone, 0)));
}

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void speed(int m, int n, int k, cudaDataType type) {
  const float one = 1, zero = 0;
  matrix a(m, k, type), b(k, n, type), c(m, n, type);
  double best = 1e9;
  for (int i = 0; i < 5; i++) {
    const double from = seconds();
    cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &one, a.data, type, m, b.data, type, k, &zero, c.data, type,
                 m, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    best = fmin(best, seconds() - from);
  }
  printf("%dx%dx%d type %d: %.2f ms, %.1f GFLOP/s\n", m, n, k, (int)type, best * 1e3, 2e-9 * m * n * k / best);
}

int main(int count, char **arguments) {
  const std::string name = count > 1 ? arguments[1] : "";
  cublasCreate(&handle);
  cublasLtCreate(&lt);
  if (name == "refusals") {
    refusals();
    return 0;
  }
  if (name == "speed") {
    speed(128, 3136, 128, CUDA_R_32F);
    speed(128, 3136, 128, CUDA_R_16F);
    speed(128, 3136, 128, CUDA_R_16BF);
    speed(288, 64, 25088, CUDA_R_32F);
    speed(512, 512, 512, CUDA_R_32F);
    return 0;
  }
  test_gemm("f32", 37, 29, 300, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, false, false, 0, 1);
  test_gemm("f32 transposed", 130, 19, 71, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, true, false, 1.5, 1);
  test_gemm("f32 both transposed, batched", 17, 6, 33, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, true, true, 1, 3);
  test_gemm("f16", 33, 21, 64, CUDA_R_16F, CUDA_R_16F, CUBLAS_COMPUTE_32F, false, true, 0, 2);
  test_gemm("f16 into f32", 33, 21, 64, CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F, false, true, 1, 1);
  test_gemm("bf16", 16, 600, 20, CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F, true, false, 0, 1);
  test_gemm("f64", 13, 11, 270, CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F, false, true, 2, 2);
  test_gemm("tf32", 16, 16, 50, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32, false, false, 0, 1);
  test_bias();
  test_epilogues("relu", true);
  test_epilogues("gelu", false);
  cublasLtDestroy(lt);
  cublasDestroy(handle);
  emu_stats s;
  emu_get_stats(&s);
  printf("left %d %d\n", (int)s.live_allocations, (int)s.live_objects);
  return 0;
}
