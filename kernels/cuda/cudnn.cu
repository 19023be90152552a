/*
 * cudnn.cu -- convolutions by cuDNN, where its library is found at run time.  For conv.cu, which has the way without it.
 *
 * The library is looked for at the first convolution: libcudnn.so.9, then .8; HALFMOON_CUDNN=0 leaves it out, HALFMOON_CUDNN=/path names it, and
 * one that is named and does not work is an error.  On the test double the calls are the double's own.  hm_cuda_cudnn_about() says what was found.
 *
 * Activations and weights are channels-last (NHWC, and O, kH, kW, C for weights).  Operands and result are of one dtype; sums are float32.
 * The library proposes algorithms by shape, without trying them out, so each run gets the same.  Of these only implicit products are taken that the
 * library calls deterministic: transforms (Winograd, FFT) would let one infinity spread over values that it has no part in.  Choices and descriptors
 * are kept by shape.
 *
 * Owns the library, one handle for each device, and the descriptors, for the life of the process.
 */
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

#include "backend.h"
#include "cudnn_api.h"

/* The most that an algorithm may ask for. */
static const size_t MOST_WORKSPACE = (size_t)256 << 20;

/* ====== The library ====== */

#define CALLS(X)                                                                                                       \
  X(cudnnGetVersion)                                                                                                   \
  X(cudnnGetErrorString)                                                                                               \
  X(cudnnCreate)                                                                                                       \
  X(cudnnSetStream)                                                                                                    \
  X(cudnnCreateTensorDescriptor)                                                                                       \
  X(cudnnSetTensor4dDescriptor)                                                                                        \
  X(cudnnDestroyTensorDescriptor)                                                                                      \
  X(cudnnCreateFilterDescriptor)                                                                                       \
  X(cudnnSetFilter4dDescriptor)                                                                                        \
  X(cudnnDestroyFilterDescriptor)                                                                                      \
  X(cudnnCreateActivationDescriptor)                                                                                   \
  X(cudnnSetActivationDescriptor)                                                                                      \
  X(cudnnDestroyActivationDescriptor)                                                                                  \
  X(cudnnCreateConvolutionDescriptor)                                                                                  \
  X(cudnnSetConvolution2dDescriptor)                                                                                   \
  X(cudnnSetConvolutionGroupCount)                                                                                     \
  X(cudnnSetConvolutionMathType)                                                                                       \
  X(cudnnDestroyConvolutionDescriptor)                                                                                 \
  X(cudnnGetConvolutionForwardAlgorithm_v7)                                                                            \
  X(cudnnGetConvolutionForwardWorkspaceSize)                                                                           \
  X(cudnnConvolutionForward)                                                                                           \
  X(cudnnConvolutionBiasActivationForward)                                                                             \
  X(cudnnGetConvolutionBackwardDataAlgorithm_v7)                                                                       \
  X(cudnnGetConvolutionBackwardDataWorkspaceSize)                                                                      \
  X(cudnnConvolutionBackwardData)                                                                                      \
  X(cudnnGetConvolutionBackwardFilterAlgorithm_v7)                                                                     \
  X(cudnnGetConvolutionBackwardFilterWorkspaceSize)                                                                    \
  X(cudnnConvolutionBackwardFilter)

static struct library {
  bool tried, there, named; /* named: by HALFMOON_CUDNN */
  char about[512];          /* its name and version, or why it is not used */
  struct {
    bool tried, ready;
    char why[192]; /* it does not start */
    cudnnHandle_t handle;
  } device[HM_CUDA_MAX_DEVICES];
#define X(name) decltype(&::name) name;
  CALLS(X)
#undef X
} lib;

/* The first of two names that can be opened. */
static void *open_first(const char *first, const char *second) {
  void *so = dlopen(first, RTLD_NOW | RTLD_LOCAL);
  return so || !second ? so : dlopen(second, RTLD_NOW | RTLD_LOCAL);
}

/* Where the calls are to be found unless somebody names a library. */
static void *open_default(void) {
#ifdef HALFMOON_EMU
  Dl_info self;
  return dladdr((void *)&hm_cuda_cudnn_about, &self) ? open_first(self.dli_fname, NULL) : NULL;
#else
  return open_first("libcudnn.so.9", "libcudnn.so.8");
#endif
}

static bool find_calls(void *so, const char **missing) {
  *missing = NULL;
#define X(name)                                                                                                        \
  if (!*missing && !(lib.name = (decltype(lib.name))dlsym(so, #name))) *missing = #name;
  CALLS(X)
#undef X
  return !*missing;
}

/* "cudnn 9.19.0": version 9 counts by 10,000, those before by 1,000. */
static void describe_version(void) {
  const int v = (int)lib.cudnnGetVersion(), major = v >= 90000 ? v / 10000 : v / 1000;
  const int rest = v >= 90000 ? v % 10000 : v % 1000;
#ifdef HALFMOON_EMU
  const char *double_ = lib.named ? "" : " (the test double's)";
#else
  const char *double_ = "";
#endif
  snprintf(lib.about, sizeof lib.about, "cudnn %d.%d.%d%s", major, rest / 100, rest % 100, double_);
}

static void open_library(void) {
  const char *name = getenv("HALFMOON_CUDNN"), *missing = NULL;
  lib.tried = true;
  if (name && !strcmp(name, "0")) {
    snprintf(lib.about, sizeof lib.about, "im2col + cublas (HALFMOON_CUDNN=0 leaves cudnn out)");
    return;
  }
  lib.named = name && *name;
  void *so = lib.named ? open_first(name, NULL) : open_default();
  const char *why = so ? NULL : dlerror();
  if (!so && lib.named)
    snprintf(lib.about, sizeof lib.about, "HALFMOON_CUDNN: %.400s\n  hint: a path of libcudnn.so.9, or 0 for none",
             why ? why : name);
  else if (!so)
    snprintf(lib.about, sizeof lib.about, "im2col + cublas (no cudnn: neither libcudnn.so.9 nor libcudnn.so.8 opens)");
  else if (!find_calls(so, &missing))
    snprintf(lib.about, sizeof lib.about, "%scudnn has no %s",
             lib.named ? "HALFMOON_CUDNN: " : "im2col + cublas: ", missing);
  else describe_version();
  lib.there = so && !missing;
}

/* Opens the library, and its handle on a device.  *ready false: it is not to be had, and nobody insists. */
static int open_handle(hm_cuda_device *d, bool *ready) {
  *ready = false;
  if (!lib.tried) open_library();
  if (!lib.there) return lib.named ? hm_cuda_fail(HM_ERR_DEVICE, "%s", lib.about) : HM_OK;
  auto *own = &lib.device[d->index];
  if (!own->tried) {
    own->tried = true;
    cudnnStatus_t s = lib.cudnnCreate(&own->handle);
    if (!s) s = lib.cudnnSetStream(own->handle, d->compute);
    own->ready = s == CUDNN_STATUS_SUCCESS;
    if (s)
      snprintf(own->why, sizeof own->why, "%.40s does not start on cuda:%d: %.100s", lib.about, d->index,
               lib.cudnnGetErrorString(s));
    (void)cudaGetLastError();
  }
  *ready = own->ready;
  return !own->ready && lib.named ? hm_cuda_fail(HM_ERR_DEVICE, "HALFMOON_CUDNN: %s", own->why) : HM_OK;
}

const char *hm_cuda_cudnn_about(int device) {
  static char text[256];
  if (!lib.tried) open_library();
  const bool failed =
      device >= 0 && device < HM_CUDA_MAX_DEVICES && lib.device[device].tried && !lib.device[device].ready;
  if (!lib.there || !failed) return lib.about;
  snprintf(text, sizeof text, "im2col + cublas (%s)", lib.device[device].why);
  return text;
}

/* ====== What was chosen, by shape ====== */

typedef struct entry {
  hm_cuda_conv_shape key;
  int device;
  bool made, usable;
  bool lay_bias; /* the library does not add this one's bias itself */
  cudnnTensorDescriptor_t x, out, bias;
  cudnnFilterDescriptor_t weight;
  cudnnConvolutionDescriptor_t conv;
  cudnnActivationDescriptor_t none;
  int algo;
  size_t bytes;
} entry;

enum { ENTRIES = 256 };
static entry cache[ENTRIES];

static void forget(entry *e) {
  if (e->x) (void)lib.cudnnDestroyTensorDescriptor(e->x);
  if (e->out) (void)lib.cudnnDestroyTensorDescriptor(e->out);
  if (e->bias) (void)lib.cudnnDestroyTensorDescriptor(e->bias);
  if (e->weight) (void)lib.cudnnDestroyFilterDescriptor(e->weight);
  if (e->conv) (void)lib.cudnnDestroyConvolutionDescriptor(e->conv);
  if (e->none) (void)lib.cudnnDestroyActivationDescriptor(e->none);
  memset(e, 0, sizeof *e);
}

static cudnnDataType_t type_of(int dtype) {
  return dtype == HM_F16 ? CUDNN_DATA_HALF : dtype == HM_BF16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_FLOAT;
}

/* Half operands go to the tensor cores; float32 ones only if they may be rounded to TF32. */
static cudnnMathType_t math_of(const hm_cuda_conv_shape *s) {
  if (s->dtype != HM_F32) return CUDNN_TENSOR_OP_MATH;
  return s->tf32 ? CUDNN_DEFAULT_MATH : CUDNN_FMA_MATH;
}

static cudnnStatus_t make_tensor(cudnnTensorDescriptor_t *out, int dtype, int64_t n, int64_t c, int64_t h, int64_t w) {
  const cudnnStatus_t s = lib.cudnnCreateTensorDescriptor(out);
  return s ? s
           : lib.cudnnSetTensor4dDescriptor(*out, CUDNN_TENSOR_NHWC, type_of(dtype), (int)n, (int)c, (int)h, (int)w);
}

static cudnnStatus_t make_window(const hm_cuda_conv_shape *s, entry *e) {
  cudnnStatus_t r = lib.cudnnCreateConvolutionDescriptor(&e->conv);
  if (!r)
    r = lib.cudnnSetConvolution2dDescriptor(e->conv, (int)s->ph, (int)s->pw, (int)s->sh, (int)s->sw, (int)s->dh,
                                            (int)s->dw, CUDNN_CROSS_CORRELATION, CUDNN_DATA_FLOAT);
  if (!r) r = lib.cudnnSetConvolutionGroupCount(e->conv, (int)s->groups);
  return r ? r : lib.cudnnSetConvolutionMathType(e->conv, math_of(s));
}

static cudnnStatus_t describe(const hm_cuda_conv_shape *s, entry *e) {
  cudnnStatus_t r = make_tensor(&e->x, s->dtype, s->n, s->c, s->h, s->w);
  if (!r) r = make_tensor(&e->out, s->dtype, s->n, s->o, s->oh, s->ow);
  if (!r) r = make_tensor(&e->bias, s->dtype, 1, s->o, 1, 1);
  if (!r) r = lib.cudnnCreateFilterDescriptor(&e->weight);
  if (!r)
    r = lib.cudnnSetFilter4dDescriptor(e->weight, type_of(s->dtype), CUDNN_TENSOR_NHWC, (int)s->o,
                                       (int)(s->c / s->groups), (int)s->kh, (int)s->kw);
  if (!r) r = lib.cudnnCreateActivationDescriptor(&e->none);
  if (!r) r = lib.cudnnSetActivationDescriptor(e->none, CUDNN_ACTIVATION_IDENTITY, CUDNN_PROPAGATE_NAN, 0);
  return r ? r : make_window(s, e);
}

/* Takes the first of the library's proposals that is deterministic, allowed (a bit for each algorithm) and small enough.
 * ask(most, &n, list) gets them; measure(algo, &bytes) tells what one needs. */
template <class Proposal, int most, class Ask, class Measure>
static cudnnStatus_t choose(entry *e, unsigned allowed, Ask ask, Measure measure) {
  Proposal list[most];
  int n = 0;
  const cudnnStatus_t s = ask(most, &n, list);
  for (int i = 0; i < n && !s && !e->usable; i++) {
    const Proposal *p = &list[i];
    if (p->status || p->determinism != CUDNN_DETERMINISTIC || !(allowed >> (int)p->algo & 1)) continue;
    e->algo = (int)p->algo;
    e->usable = !measure(p->algo, &e->bytes) && e->bytes <= MOST_WORKSPACE;
  }
  return s;
}

static cudnnStatus_t choose_forward(cudnnHandle_t h, entry *e) {
  const unsigned allowed =
      1u << CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM | 1u << CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM;
  return choose<cudnnConvolutionFwdAlgoPerf_t, CUDNN_CONVOLUTION_FWD_ALGO_COUNT>(
      e, allowed,
      [&](int most, int *n, cudnnConvolutionFwdAlgoPerf_t *list) {
        return lib.cudnnGetConvolutionForwardAlgorithm_v7(h, e->x, e->weight, e->conv, e->out, most, n, list);
      },
      [&](cudnnConvolutionFwdAlgo_t algo, size_t *bytes) {
        return lib.cudnnGetConvolutionForwardWorkspaceSize(h, e->x, e->weight, e->conv, e->out, algo, bytes);
      });
}

static cudnnStatus_t choose_input(cudnnHandle_t h, entry *e) {
  return choose<cudnnConvolutionBwdDataAlgoPerf_t, CUDNN_CONVOLUTION_BWD_DATA_ALGO_COUNT>(
      e, 1u << CUDNN_CONVOLUTION_BWD_DATA_ALGO_1,
      [&](int most, int *n, cudnnConvolutionBwdDataAlgoPerf_t *list) {
        return lib.cudnnGetConvolutionBackwardDataAlgorithm_v7(h, e->weight, e->out, e->conv, e->x, most, n, list);
      },
      [&](cudnnConvolutionBwdDataAlgo_t algo, size_t *bytes) {
        return lib.cudnnGetConvolutionBackwardDataWorkspaceSize(h, e->weight, e->out, e->conv, e->x, algo, bytes);
      });
}

static cudnnStatus_t choose_weight(cudnnHandle_t h, entry *e) {
  return choose<cudnnConvolutionBwdFilterAlgoPerf_t, CUDNN_CONVOLUTION_BWD_FILTER_ALGO_COUNT>(
      e, 1u << CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1,
      [&](int most, int *n, cudnnConvolutionBwdFilterAlgoPerf_t *list) {
        return lib.cudnnGetConvolutionBackwardFilterAlgorithm_v7(h, e->x, e->out, e->conv, e->weight, most, n, list);
      },
      [&](cudnnConvolutionBwdFilterAlgo_t algo, size_t *bytes) {
        return lib.cudnnGetConvolutionBackwardFilterWorkspaceSize(h, e->x, e->out, e->conv, e->weight, algo, bytes);
      });
}

static bool fits_int(const hm_cuda_conv_shape *s) {
  const int64_t size[] = {s->n,  s->c,  s->h,  s->w,  s->o,  s->oh, s->ow, s->kh,
                          s->kw, s->sh, s->sw, s->ph, s->pw, s->dh, s->dw, s->groups};
  for (size_t i = 0; i < sizeof size / sizeof *size; i++)
    if (size[i] > INT_MAX) return false;
  return true;
}

/* The entry of a shape, made when it is new; what the library refuses is not usable. */
static entry *find_entry(const hm_cuda_device *d, const hm_cuda_conv_shape *s) {
  uint64_t hash = UINT64_C(0xcbf29ce484222325) ^ (uint64_t)d->index;
  uint64_t words[sizeof *s / sizeof(uint64_t)];
  memcpy(words, s, sizeof words);
  for (uint64_t word : words) hash = (hash ^ word ^ word >> 29) * UINT64_C(0x9e3779b97f4a7c15);
  entry *e = &cache[(hash ^ hash >> 32) % ENTRIES];
  if (e->made && e->device == d->index && !memcmp(&e->key, s, sizeof *s)) return e;
  const cudnnHandle_t h = lib.device[d->index].handle;
  forget(e);
  cudnnStatus_t r = fits_int(s) ? describe(s, e) : CUDNN_STATUS_NOT_SUPPORTED;
  if (!r)
    r = s->kind == HM_CUDA_CONV_FORWARD ? choose_forward(h, e)
        : s->kind == HM_CUDA_CONV_INPUT ? choose_input(h, e)
                                        : choose_weight(h, e);
  e->usable = e->usable && !r;
  e->key = *s, e->device = d->index, e->made = true;
  return e;
}

int hm_cuda_cudnn_ask(hm_cuda_device *d, const hm_cuda_conv_shape *s, hm_cuda_cudnn_answer *answer, size_t *bytes) {
  bool ready;
  *answer = HM_CUDA_CUDNN_ABSENT;
  *bytes = 0;
  const int status = open_handle(d, &ready);
  if (status || !ready) return status;
  const entry *e = find_entry(d, s);
  *answer = e->usable ? HM_CUDA_CUDNN_YES : HM_CUDA_CUDNN_NO;
  *bytes = e->usable ? e->bytes : 0;
  return HM_OK;
}

/* ====== Running ====== */

static bool is_refusal(cudnnStatus_t s) {
  return (int)s == 9 || ((int)s >= CUDNN_STATUS_NOT_SUPPORTED && (int)s < CUDNN_STATUS_INTERNAL_ERROR);
}

/* A refusal is no error here: *answer tells of it. */
static int run_status(cudnnStatus_t s, const char *name, hm_cuda_cudnn_answer *answer) {
  *answer = s ? HM_CUDA_CUDNN_NO : HM_CUDA_CUDNN_YES;
  if (!s || is_refusal(s)) return HM_OK;
  const cudaError_t error = hm_cuda_pending();
  if (error != cudaSuccess) return hm_cuda_status(error, name);
  return hm_cuda_fail(s == CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED ? HM_ERR_MEMORY : HM_ERR_INTERNAL,
                      "%s: %s: %s\n  hint: HALFMOON_CUDNN=0 leaves cudnn out", name, lib.about,
                      lib.cudnnGetErrorString(s));
}

static cudnnStatus_t run_forward(cudnnHandle_t h, const entry *e, const hm_cuda_cudnn_call *c) {
  const float one = 1, zero = 0, beta = c->add ? 1.0f : 0.0f;
  const cudnnConvolutionFwdAlgo_t algo = (cudnnConvolutionFwdAlgo_t)e->algo;
  if (c->bias)
    return lib.cudnnConvolutionBiasActivationForward(h, &one, e->x, c->x, e->weight, c->weight, e->conv, algo,
                                                     c->workspace, e->bytes, &zero, e->out, c->out, e->bias, c->bias,
                                                     e->none, e->out, c->out);
  return lib.cudnnConvolutionForward(h, &one, e->x, c->x, e->weight, c->weight, e->conv, algo, c->workspace, e->bytes,
                                     &beta, e->out, c->out);
}

static cudnnStatus_t run_gradient(cudnnHandle_t h, const entry *e, const hm_cuda_cudnn_call *c) {
  const float one = 1, zero = 0, beta = c->add ? 1.0f : 0.0f;
  if (e->key.kind == HM_CUDA_CONV_INPUT)
    return lib.cudnnConvolutionBackwardData(h, &one, e->weight, c->weight, e->out, c->out, e->conv,
                                            (cudnnConvolutionBwdDataAlgo_t)e->algo, c->workspace, e->bytes, &zero, e->x,
                                            c->x);
  return lib.cudnnConvolutionBackwardFilter(h, &one, e->x, c->x, e->out, c->out, e->conv,
                                            (cudnnConvolutionBwdFilterAlgo_t)e->algo, c->workspace, e->bytes, &beta,
                                            e->weight, c->weight);
}

int hm_cuda_cudnn_run(hm_cuda_device *d, const hm_cuda_conv_shape *s, const hm_cuda_cudnn_call *c,
                      hm_cuda_cudnn_answer *answer) {
  entry *e = find_entry(d, s);
  const cudnnHandle_t h = lib.device[d->index].handle;
  *answer = e->usable ? HM_CUDA_CUDNN_LAY_BIAS : HM_CUDA_CUDNN_NO;
  if (!e->usable || (c->bias && e->lay_bias)) return HM_OK;
  if (c->bias && e->algo != CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM) {
    e->lay_bias = true; /* only that one adds a bias */
    return HM_OK;
  }
  hm_cuda_count_launch();
  const cudnnStatus_t r = s->kind == HM_CUDA_CONV_FORWARD ? run_forward(h, e, c) : run_gradient(h, e, c);
  const int status = run_status(r, c->name, answer);
  if (status || *answer == HM_CUDA_CUDNN_YES) return status;
  if (c->bias) {
    e->lay_bias = true;
    *answer = HM_CUDA_CUDNN_LAY_BIAS;
  } else e->usable = false;
  return HM_OK;
}
