/*
 * blas_lt.cu -- products with an epilogue by cublasLt: a bias, an activation, or a part of a gradient comes with the product in one pass.
 *
 * Row-major products are the column-major products of blas.cu, with x and y in each other's place; so a bias runs along the columns of cuBLAS's
 * result, and sums of x over k are its BGRADB.  Descriptors and chosen algorithms are kept, by shape.
 *
 * An activation is believed only when it was seen to be right.  cublasLt's ReLU is max(x, 0), for which no manual promises that NaN stays NaN, and
 * an overflow that is swallowed is a wrong step; its GELU is a device function without a stated error.  So before an algorithm runs with one of
 * these for the first time, it runs once on operands that make the values going in known (zeros, and a bias of trial values; ones, for a gradient),
 * and its answers are compared with the formula: relu exactly, NaN included; gelu within two units in the last place of what goes in, in the
 * result's dtype, about what rounding that value to the dtype does.  One that fails is left alone for good, and the caller goes its long way.
 * The check allocates room for one result, waits for the device, and gives the room back; without room nothing is decided.
 *
 * relu's bits (aux) come from cublasLt and go back to cublasLt; nothing else reads them.
 */
#include <math.h>
#include <stdlib.h>

#include "blas.h"

/* What an algorithm was chosen for. */
typedef struct lt_key {
  int64_t m, n, k, x_ld, y_ld, out_ld, aux_ld;
  int32_t device, x_op, y_op, in, out, epilogue, align, pad; /* align: bytes that all addresses are multiples of */
} lt_key;

typedef struct lt_entry {
  lt_key key;
  bool made, usable;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t y, x, out;
  cublasLtMatmulAlgo_t algo;
} lt_entry;

enum { LT_ENTRIES = 256 };
static lt_entry lt_cache[LT_ENTRIES];

/* ====== Describing a product ====== */

static cublasLtEpilogue_t epilogue_of(const hm_cuda_product *p) {
  switch (p->epilogue) {
  case HM_CUDA_BIAS: return CUBLASLT_EPILOGUE_BIAS;
  case HM_CUDA_RELU: return p->aux_ld ? CUBLASLT_EPILOGUE_RELU_AUX_BIAS : CUBLASLT_EPILOGUE_RELU_BIAS;
  case HM_CUDA_GELU: return CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
  case HM_CUDA_RELU_GRAD: return CUBLASLT_EPILOGUE_DRELU;
  case HM_CUDA_GELU_GRAD: return CUBLASLT_EPILOGUE_DGELU;
  case HM_CUDA_BIAS_GRAD: return CUBLASLT_EPILOGUE_BGRADB;
  default: return CUBLASLT_EPILOGUE_DEFAULT;
  }
}

static uint64_t hash_key(const lt_key *key) {
  uint64_t h = UINT64_C(0xcbf29ce484222325);
  const unsigned char *bytes = (const unsigned char *)key;
  for (size_t i = 0; i < sizeof *key; i++) h = (h ^ bytes[i]) * UINT64_C(0x100000001b3);
  return h ^ h >> 32;
}

static void forget(lt_entry *e) {
  if (e->desc) (void)cublasLtMatmulDescDestroy(e->desc);
  if (e->y) (void)cublasLtMatrixLayoutDestroy(e->y);
  if (e->x) (void)cublasLtMatrixLayoutDestroy(e->x);
  if (e->out) (void)cublasLtMatrixLayoutDestroy(e->out);
  memset(e, 0, sizeof *e);
}

/* The largest power of two, up to 256, that divides all addresses. */
static int32_t alignment(const hm_cuda_product *p) {
  const uintptr_t all = (uintptr_t)p->x.data | (uintptr_t)p->y.data | (uintptr_t)p->out.data | (uintptr_t)p->bias |
                        (uintptr_t)p->aux | 256;
  return (int32_t)(all & (~all + 1));
}

/* A matrix as column-major cuBLAS sees it: `lines` of `length` elements. */
static cublasStatus_t make_layout(cublasLtMatrixLayout_t *out, int32_t type, cublasOperation_t op, int64_t rows,
                                  int64_t cols, int64_t ld) {
  const bool plain = op == CUBLAS_OP_N;
  return cublasLtMatrixLayoutCreate(out, (cudaDataType)type, (uint64_t)(plain ? cols : rows),
                                    (uint64_t)(plain ? rows : cols), ld);
}

static cublasStatus_t set_desc(lt_entry *e, cublasLtMatmulDescAttributes_t which, const void *value, size_t bytes) {
  return cublasLtMatmulDescSetAttribute(e->desc, which, value, bytes);
}

static cublasStatus_t set_addresses(lt_entry *e, const void *bias, const void *aux) {
  cublasStatus_t s = set_desc(e, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
  if (!s && e->key.aux_ld) s = set_desc(e, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux, sizeof aux);
  return s;
}

static cublasStatus_t describe(int dtype, lt_entry *e) {
  const lt_key *key = &e->key;
  const int32_t y_op = key->y_op, x_op = key->x_op;
  const cublasLtEpilogue_t epilogue = (cublasLtEpilogue_t)key->epilogue;
  const int32_t bias_type = key->out;
  cublasStatus_t s = cublasLtMatmulDescCreate(&e->desc, hm_cuda_blas_compute(dtype), CUDA_R_32F);
  if (!s) s = set_desc(e, CUBLASLT_MATMUL_DESC_TRANSA, &y_op, sizeof y_op);
  if (!s) s = set_desc(e, CUBLASLT_MATMUL_DESC_TRANSB, &x_op, sizeof x_op);
  if (!s) s = set_desc(e, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
  if (!s) s = set_desc(e, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type);
  if (!s && key->aux_ld) s = set_desc(e, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &key->aux_ld, sizeof key->aux_ld);
  if (!s) s = make_layout(&e->y, key->in, (cublasOperation_t)y_op, key->k, key->n, key->y_ld);
  if (!s) s = make_layout(&e->x, key->in, (cublasOperation_t)x_op, key->m, key->k, key->x_ld);
  if (!s) s = make_layout(&e->out, key->out, CUBLAS_OP_N, key->m, key->n, key->out_ld);
  return s;
}

/* Asks for the best algorithm; none is no error. */
static cublasStatus_t choose(cublasLtHandle_t lt, lt_entry *e) {
  static const cublasLtMatmulPreferenceAttributes_t sides[] = {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                                                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                                                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
  const size_t room = HM_CUDA_BLAS_WORKSPACE;
  const uint32_t exact_sums = 3; /* split products are added in place or in the computing type, never in the output's */
  const uint32_t align = (uint32_t)e->key.align;
  cublasLtMatmulPreference_t wish = NULL;
  cublasStatus_t s = cublasLtMatmulPreferenceCreate(&wish);
  if (!s) s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room);
  if (!s)
    s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &exact_sums,
                                             sizeof exact_sums);
  for (int i = 0; i < 4 && !s; i++) s = cublasLtMatmulPreferenceSetAttribute(wish, sides[i], &align, sizeof align);
  cublasLtMatmulHeuristicResult_t found;
  int n = 0;
  if (!s) {
    const cublasStatus_t asked =
        cublasLtMatmulAlgoGetHeuristic(lt, e->desc, e->y, e->x, e->out, e->out, wish, 1, &found, &n);
    e->usable = asked == CUBLAS_STATUS_SUCCESS && n > 0 && found.state == CUBLAS_STATUS_SUCCESS;
    if (e->usable) e->algo = found.algo;
  }
  if (wish) (void)cublasLtMatmulPreferenceDestroy(wish);
  return s;
}

/* ====== Running one ====== */

static int run_entry(hm_cuda_device *d, lt_entry *e, const hm_cuda_product *p) {
  const float one = 1, zero = 0;
  cublasStatus_t s = set_addresses(e, p->bias, p->aux);
  hm_cuda_count_launch();
  if (!s)
    s = cublasLtMatmul(d->blas_lt, e->desc, &one, p->y.data, e->y, p->x.data, e->x, &zero, p->out.data, e->out,
                       p->out.data, e->out, &e->algo, d->blas_workspace, HM_CUDA_BLAS_WORKSPACE, d->compute);
  return hm_cuda_blas_status(s, p->name);
}

/* ====== Is an activation right? ====== */

enum { TRIALS = 64, VERDICTS = 256 };

/* What was seen of an algorithm.  Never forgotten: a result's aux is only made where its gradient will be able to read it. */
typedef struct verdict {
  cublasLtMatmulAlgo_t algo;
  int32_t device, epilogue, in, out;
  bool good;
} verdict;

static verdict verdicts[VERDICTS];
static int n_verdicts;

/* Value i that goes in: NaN, infinity (relu only), and from -6 to 6. */
static double trial(hm_cuda_epilogue epilogue, int i) {
  if (i == 0) return NAN;
  if (i == 1) return epilogue == HM_CUDA_RELU ? INFINITY : 0.0;
  return -6.0 + 12.0 * (i - 2) / (TRIALS - 3);
}

/* What comes out of it: z is the value, `by` what the derivative is multiplied by. */
static double expected(hm_cuda_epilogue epilogue, double z, double by) {
  const double root = 0.7978845608028654 /* of 2 / pi */, t = tanh(root * (z + 0.044715 * z * z * z));
  if (epilogue == HM_CUDA_RELU) return z < 0 ? 0 : z;
  if (epilogue == HM_CUDA_GELU) return 0.5 * z * (1 + t);
  return by * (0.5 * (1 + t) + 0.5 * z * (1 - t * t) * root * (1 + 3 * 0.044715 * z * z));
}

static double allowed(hm_cuda_epilogue epilogue, int dtype, double z, double by) {
  if (epilogue == HM_CUDA_RELU) return 0;
  const int digits = dtype == HM_F16 ? 10 : (dtype == HM_BF16 ? 7 : 23);
  const double size = epilogue == HM_CUDA_GELU ? fabs(z) : fmax(1.0, fabs(by));
  return 2 * ldexp(1.0, ilogb(fmax(size, 0.0625)) - digits);
}

static bool is_right(double got, double want, double bound) {
  if (isnan(want)) return isnan(got);
  return got == want || fabs(got - want) <= bound;
}

static void put(void *to, int dtype, int64_t i, double x) {
  if (dtype == HM_F32) ((float *)to)[i] = (float)x;
  else ((uint16_t *)to)[i] = dtype == HM_F16 ? hm_f32_to_f16((float)x) : hm_f32_to_bf16((float)x);
}

static double get(const void *from, int dtype, int64_t i) {
  if (dtype == HM_F32) return ((const float *)from)[i];
  const uint16_t bits = ((const uint16_t *)from)[i];
  return dtype == HM_F16 ? hm_f16_to_f32(bits) : hm_bf16_to_f32(bits);
}

/* The operands of a check, in one block of device memory, and a line of values on the host. */
typedef struct probe {
  hm_cuda_product p;
  void *block, *line;
  size_t block_bytes, line_bytes;
  double by; /* each element of the product */
} probe;

static bool asks_gradient(const probe *b) { return b->p.epilogue == HM_CUDA_GELU_GRAD; }

static int fill(void *data, int dtype, int64_t n, double value) {
  const hm_view v = hm_cuda_dense(data, dtype, 1, &n);
  return hm_cuda_fill_number(&v, value, 0, hm_cuda_current()->compute);
}

/* Lays the operands out; b->block stays NULL where there is no room.  Strides are those of the product that asks, whose lines are dense. */
static int set_up(hm_cuda_device *d, const hm_cuda_product *p, probe *b) {
  const int in = hm_dtype_size(p->x.dtype), out = hm_dtype_size(p->out.dtype);
  size_t bytes = 0;
  b->p = *p;
  b->by = 0;
  const size_t x = hm_cuda_take(&bytes, (size_t)(p->m * p->k * in)),
               y = hm_cuda_take(&bytes, (size_t)(p->n * p->k * in)),
               result = hm_cuda_take(&bytes, (size_t)(p->m * p->n * out)),
               bias = hm_cuda_take(&bytes, (size_t)(p->n * out)),
               aux = hm_cuda_take(&bytes, (size_t)(p->m * p->aux_ld * (p->epilogue == HM_CUDA_RELU ? 1 : 8 * out) / 8));
  b->line_bytes = (size_t)(p->n * out);
  b->line = malloc(b->line_bytes);
  b->block = b->line ? hm_cuda_mem_alloc(d->index, bytes) : NULL;
  b->block_bytes = bytes;
  if (!b->block) return HM_OK;
  char *base = (char *)b->block;
  b->p.x.data = base + x, b->p.y.data = base + y, b->p.out.data = base + result;
  b->p.bias = base + bias, b->p.aux = base + aux;
  int status = hm_cuda_zero(b->block, bytes, p->name);
  if (status || !asks_gradient(b)) return status;
  uint32_t one[1];
  put(one, p->x.dtype, 0, 1.0 / (double)p->k);
  b->by = get(one, p->x.dtype, 0) * (double)p->k;
  status = fill(b->p.x.data, p->x.dtype, p->m * p->k, 1.0);
  return status ? status : fill(b->p.y.data, p->y.dtype, p->n * p->k, 1.0 / (double)p->k);
}

/* Runs the trial values from `first` on, one for each column, and looks at the first row of what comes. */
static int try_line(hm_cuda_device *d, lt_entry *e, probe *b, int first, bool *good) {
  const int dtype = b->p.out.dtype;
  const hm_cuda_epilogue epilogue = b->p.epilogue;
  for (int64_t j = 0; j < b->p.n; j++) put(b->line, dtype, j, trial(epilogue, (int)((first + j) % TRIALS)));
  int status = hm_cuda_mem_from_host(asks_gradient(b) ? b->p.aux : b->p.bias, b->line, b->line_bytes, NULL);
  if (!status) status = run_entry(d, e, &b->p);
  if (!status) status = hm_cuda_mem_to_host(b->line, b->p.out.data, b->line_bytes, NULL);
  for (int64_t j = 0; j < b->p.n && !status && *good; j++) {
    uint32_t rounded[1];
    put(rounded, dtype, 0, trial(epilogue, (int)((first + j) % TRIALS)));
    const double z = get(rounded, dtype, 0);
    *good = is_right(get(b->line, dtype, j), expected(epilogue, z, b->by), allowed(epilogue, dtype, z, b->by));
  }
  return status;
}

static bool needs_check(hm_cuda_epilogue e) { return e == HM_CUDA_RELU || e == HM_CUDA_GELU || e == HM_CUDA_GELU_GRAD; }

/* Makes the entry usable or not, by what is known or now found out of its algorithm; *known: it is decided. */
static int check_entry(hm_cuda_device *d, lt_entry *e, const hm_cuda_product *p, bool *known) {
  verdict asked;
  memset(&asked, 0, sizeof asked);
  asked.algo = e->algo;
  asked.device = d->index, asked.epilogue = e->key.epilogue, asked.in = e->key.in, asked.out = e->key.out;
  for (int i = 0; i < n_verdicts; i++) {
    verdict *v = &verdicts[i];
    if (memcmp(&v->algo, &asked.algo, sizeof v->algo) || v->device != asked.device || v->epilogue != asked.epilogue ||
        v->in != asked.in || v->out != asked.out)
      continue;
    e->usable = v->good;
    return HM_OK;
  }
  e->usable = false;
  if (n_verdicts == VERDICTS) return HM_OK;
  probe b;
  int status = set_up(d, p, &b);
  asked.good = b.block != NULL;
  for (int64_t first = 0; first < TRIALS && asked.good && !status; first += p->n)
    status = try_line(d, e, &b, (int)first, &asked.good);
  if (b.block) hm_cuda_mem_free(d->index, b.block, b.block_bytes);
  *known = b.block && !status;
  if (*known) verdicts[n_verdicts++] = asked;
  e->usable = *known && asked.good;
  free(b.line);
  return status;
}

/* ====== Finding one ====== */

/* The entry for a product; made when it is new. */
static int find_entry(const hm_cuda_product *p, lt_entry **out) {
  hm_cuda_device *d = hm_cuda_current();
  hm_cuda_lines l;
  lt_key key;
  int status = hm_cuda_read_lines(p, &l);
  if (status) return status;
  memset(&key, 0, sizeof key);
  key.m = p->m, key.n = p->n, key.k = p->k;
  key.x_ld = l.x_ld, key.y_ld = l.y_ld, key.out_ld = l.out_ld, key.aux_ld = p->aux_ld;
  key.device = d->index, key.x_op = l.x_op, key.y_op = l.y_op;
  key.in = hm_cuda_blas_type(p->x.dtype), key.out = hm_cuda_blas_type(p->out.dtype);
  key.epilogue = epilogue_of(p);
  key.align = alignment(p);
  lt_entry *e = &lt_cache[hash_key(&key) % LT_ENTRIES];
  *out = e;
  if (e->made && !memcmp(&e->key, &key, sizeof key)) return HM_OK;
  forget(e);
  e->key = key;
  cublasStatus_t s = describe(p->x.dtype, e);
  const char *alike =
      (char *)d->blas_workspace + key.align % 256; /* proposals go by the alignment of these addresses */
  if (!s) s = set_addresses(e, alike, alike);
  if (!s) s = choose(d->blas_lt, e);
  status = hm_cuda_blas_status(s, p->name);
  bool known = true;
  if (!status && e->usable && needs_check(p->epilogue)) status = check_entry(d, e, p, &known);
  e->made = !status && known;
  if (status) forget(e);
  return status;
}

/* Batches, and products in float64, go another way. */
static bool is_for_lt(const hm_cuda_product *p) { return p->batches == 1 && p->x.dtype != HM_F64; }

int hm_cuda_lt_has(const hm_cuda_product *p, bool *has) {
  lt_entry *e;
  *has = false;
  if (!is_for_lt(p)) return HM_OK;
  const int status = find_entry(p, &e);
  *has = !status && e->usable;
  return status;
}

int hm_cuda_lt_gemm(const hm_cuda_product *p, bool *done) {
  lt_entry *e;
  *done = false;
  if (!is_for_lt(p)) return HM_OK;
  const int status = find_entry(p, &e);
  if (status || !e->usable) return status;
  *done = true;
  return run_entry(hm_cuda_current(), e, p);
}
