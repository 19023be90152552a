/*
 * cudnn.cpp -- the double's cuDNN: convolutions by plain loops, and what a call may ask for, checked at entry.
 *
 * Test double: it shows no speed, no memory model, no real cuDNN.  The calls are those of kernels/cuda/cudnn_api.h.  Descriptors must agree with
 * each other, every operand must lie in one live allocation, the workspace must be as large as was told; running writes rubbish into it, so that
 * nobody keeps anything there.  Proposed algorithms begin with ones that are not deterministic or transform, as the library's do.  A call that cuDNN
 * would not take is refused with its reason.  HALFMOON_EMU_CUDNN plays refusals out:
 *   refuse   no algorithm is proposed        late   proposed, but refused when run        bias   no bias is added by the library
 */
#pragma GCC optimize("O3") /* axpy loops over float: vectors do not change their bits */

#include "emu.h"

#include <stdlib.h>
#include <string.h>
#include <vector>
#include "cudnn_api.h"
#include "half.h"

struct cudnnContext {
  cudaStream_t stream;
};
struct cudnnTensorStruct {
  bool set;
  cudnnDataType_t type;
  int64_t n, c, h, w;
};
struct cudnnFilterStruct {
  bool set;
  cudnnDataType_t type;
  int64_t k, c, h, w;
};
struct cudnnActivationStruct {
  bool set;
  cudnnActivationMode_t mode;
};
struct cudnnConvolutionStruct {
  bool set;
  int64_t ph, pw, sh, sw, dh, dw, groups;
  cudnnMathType_t math;
};

using namespace hm_emu;

namespace {

enum direction { FORWARD, DATA, FILTER };
const int TRANSFORM = 4; /* an algorithm by Fourier transform, of the forward direction */

cudnnStatus_t begin(const call &entered) {
  return entered.injected || entered.error ? CUDNN_STATUS_EXECUTION_FAILED : CUDNN_STATUS_SUCCESS;
}

#define BEGIN(name)                                                                                                    \
  call entered(name);                                                                                                  \
  {                                                                                                                    \
    const cudnnStatus_t ended = begin(entered);                                                                        \
    if (ended) return ended;                                                                                           \
  }

bool plays(const char *what) {
  const char *const asked = getenv("HALFMOON_EMU_CUDNN");
  return asked && !strcmp(asked, what);
}

int64_t size_of(cudnnDataType_t type) {
  return type == CUDNN_DATA_FLOAT ? 4 : type == CUDNN_DATA_HALF || type == CUDNN_DATA_BFLOAT16 ? 2 : 8;
}

/* ====== Checks ====== */

/* One convolution: what its descriptors say together. */
struct problem {
  const char *name;
  cudnnDataType_t type;
  cudnnTensorStruct x, y;
  cudnnFilterStruct w;
  cudnnConvolutionStruct conv;
};

int64_t windows(int64_t size, int64_t pad, int64_t kernel, int64_t stride, int64_t dilation) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

cudnnStatus_t bad(const char *name, const char *what) {
  report("%s: %s", name, what);
  return CUDNN_STATUS_BAD_PARAM;
}

cudnnStatus_t read_problem(const char *name, cudnnHandle_t handle, cudnnTensorDescriptor_t x, cudnnFilterDescriptor_t w,
                           cudnnConvolutionDescriptor_t conv, cudnnTensorDescriptor_t y, problem *p) {
  if (!handle || !x || !w || !conv || !y) return bad(name, "no handle, or no descriptor");
  if (!x->set || !w->set || !conv->set || !y->set) return bad(name, "a descriptor was not set");
  *p = problem{name, x->type, *x, *y, *w, *conv};
  if (w->type != p->type || y->type != p->type) {
    report("%s: types %d, %d and %d: all are one", name, x->type, w->type, y->type);
    return CUDNN_STATUS_NOT_SUPPORTED;
  }
  if (p->type == CUDNN_DATA_DOUBLE) {
    report("%s: the double has no float64", name);
    return CUDNN_STATUS_NOT_SUPPORTED;
  }
  const char *const capability = getenv("HALFMOON_EMU_CC");
  if (p->type == CUDNN_DATA_BFLOAT16 && capability && *capability && atof(capability) < 8)
    return CUDNN_STATUS_NOT_SUPPORTED;
  if (x->c != w->c * conv->groups || w->k % conv->groups || y->c != w->k || y->n != x->n)
    return bad(name, "channels, groups or batches do not fit");
  if (y->h != windows(x->h, conv->ph, w->h, conv->sh, conv->dh) ||
      y->w != windows(x->w, conv->pw, w->w, conv->sw, conv->dw))
    return bad(name, "the output is not as large as the windows make it");
  return CUDNN_STATUS_SUCCESS;
}

bool is_there(const char *name, const char *which, const void *data, int64_t elements, cudnnDataType_t type) {
  const size_t bytes = (size_t)(elements * size_of(type));
  if ((uintptr_t)data % (uintptr_t)size_of(type) == 0 && block_with(data, bytes)) return true;
  report("%s: %s is misaligned or outside every live allocation: %s", name, which, describe(data, bytes).c_str());
  return false;
}

int64_t count(const cudnnTensorStruct &t) { return t.n * t.c * t.h * t.w; }
int64_t count(const cudnnFilterStruct &f) { return f.k * f.c * f.h * f.w; }

/* The workspace of an algorithm: a number that changes with shape and direction. */
size_t workspace_of(const problem &p, direction d, int algo) {
  if (d == FORWARD && algo == CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM) return 0;
  return (size_t)(4 * (d == FILTER ? count(p.w) : p.y.h * p.y.w * p.w.h * p.w.w));
}

bool has_algorithm(direction d, int algo) {
  return d == FORWARD ? algo == CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM ||
                            algo == CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM
                      : algo == 1;
}

/* ====== Running ====== */

/* A convolution on its way through the stream. */
struct work {
  problem p;
  direction d;
  void *x, *w, *y;
  const void *bias; /* forward: added to each place, or NULL */
  float alpha, beta;
  void *workspace;
  size_t bytes;
};

float load(const void *data, cudnnDataType_t type, int64_t i) {
  if (type == CUDNN_DATA_HALF) return hm_f16_to_f32(((const uint16_t *)data)[i]);
  if (type == CUDNN_DATA_BFLOAT16) return hm_bf16_to_f32(((const uint16_t *)data)[i]);
  return ((const float *)data)[i];
}

void store(void *data, cudnnDataType_t type, int64_t i, float v) {
  if (type == CUDNN_DATA_HALF) ((uint16_t *)data)[i] = hm_f32_to_f16(v);
  else if (type == CUDNN_DATA_BFLOAT16) ((uint16_t *)data)[i] = hm_f32_to_bf16(v);
  else ((float *)data)[i] = v;
}

/* To TF32, to nearest with ties away; infinities and NaN stay. */
float round_tf32(float v) {
  const uint32_t u = hm_f32_bits(v);
  return (u & 0x7f800000u) == 0x7f800000u ? v : hm_bits_f32((u + 0x1000u) & ~0x1fffu);
}

std::vector<float> fetch(const void *data, const problem &p, int64_t n) {
  std::vector<float> out((size_t)n);
  const bool tf32 = p.type == CUDNN_DATA_FLOAT && p.conv.math != CUDNN_FMA_MATH;
  for (int64_t i = 0; i < n; i++) out[(size_t)i] = load(data, p.type, i);
  if (tf32)
    for (float &v : out) v = round_tf32(v);
  return out;
}

/* Calls each(image place, window place, kernel place) for every pair of a pixel and a window that covers it; places count pixels. */
template <class F> void each_pair(const problem &p, F each) {
  for (int64_t n = 0; n < p.y.n; n++)
    for (int64_t oy = 0; oy < p.y.h; oy++)
      for (int64_t ox = 0; ox < p.y.w; ox++)
        for (int64_t ky = 0; ky < p.w.h; ky++)
          for (int64_t kx = 0; kx < p.w.w; kx++) {
            const int64_t iy = oy * p.conv.sh - p.conv.ph + ky * p.conv.dh,
                          ix = ox * p.conv.sw - p.conv.pw + kx * p.conv.dw;
            if (iy < 0 || iy >= p.x.h || ix < 0 || ix >= p.x.w) continue;
            each((n * p.x.h + iy) * p.x.w + ix, (n * p.y.h + oy) * p.y.w + ox, ky * p.w.w + kx);
          }
}

void axpy(float *to, float a, const float *from, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += a * from[i];
}

/* Weights [k, place, c] as [place, c, k of all groups], for the forward direction. */
std::vector<float> turned(const std::vector<float> &w, const problem &p) {
  const int64_t places = p.w.h * p.w.w, c = p.w.c, k = p.w.k;
  std::vector<float> out(w.size());
  for (int64_t o = 0; o < k; o++)
    for (int64_t i = 0; i < places * c; i++) out[(size_t)(i * k + o)] = w[(size_t)(o * places * c + i)];
  return out;
}

std::vector<float> forward(const problem &p, const std::vector<float> &x, const std::vector<float> &weight) {
  const std::vector<float> w = turned(weight, p);
  const int64_t cg = p.w.c, k = p.w.k, kg = k / p.conv.groups;
  std::vector<float> y((size_t)count(p.y));
  each_pair(p, [&](int64_t pixel, int64_t window, int64_t place) {
    for (int64_t g = 0; g < p.conv.groups; g++)
      for (int64_t c = 0; c < cg; c++)
        axpy(&y[(size_t)(window * k + g * kg)], x[(size_t)(pixel * p.x.c + g * cg + c)],
             &w[(size_t)((place * cg + c) * k + g * kg)], kg);
  });
  return y;
}

std::vector<float> by_data(const problem &p, const std::vector<float> &y, const std::vector<float> &w) {
  const int64_t cg = p.w.c, k = p.w.k, kg = k / p.conv.groups, places = p.w.h * p.w.w;
  std::vector<float> x((size_t)count(p.x));
  each_pair(p, [&](int64_t pixel, int64_t window, int64_t place) {
    for (int64_t o = 0; o < k; o++)
      axpy(&x[(size_t)(pixel * p.x.c + o / kg * cg)], y[(size_t)(window * k + o)],
           &w[(size_t)((o * places + place) * cg)], cg);
  });
  return x;
}

std::vector<float> by_filter(const problem &p, const std::vector<float> &x, const std::vector<float> &y) {
  const int64_t cg = p.w.c, k = p.w.k, kg = k / p.conv.groups, places = p.w.h * p.w.w;
  std::vector<float> w((size_t)count(p.w));
  each_pair(p, [&](int64_t pixel, int64_t window, int64_t place) {
    for (int64_t o = 0; o < k; o++)
      axpy(&w[(size_t)((o * places + place) * cg)], y[(size_t)(window * k + o)],
           &x[(size_t)(pixel * p.x.c + o / kg * cg)], cg);
  });
  return w;
}

void run(const work &j) {
  if (sticky()) return;
  device_access access;
  const problem &p = j.p;
  if (j.bytes) memset(j.workspace, 0xff, j.bytes);
  std::vector<float> x, w, y, sum;
  if (j.d != DATA) x = fetch(j.x, p, count(p.x));
  if (j.d != FILTER) w = fetch(j.w, p, count(p.w));
  if (j.d != FORWARD) y = fetch(j.y, p, count(p.y));
  sum = j.d == FORWARD ? forward(p, x, w) : j.d == DATA ? by_data(p, y, w) : by_filter(p, x, y);
  void *const to = j.d == FORWARD ? j.y : j.d == DATA ? j.x : j.w;
  for (int64_t i = 0; i < (int64_t)sum.size(); i++) {
    float v = j.alpha * sum[(size_t)i];
    if (j.beta != 0) v += j.beta * load(to, p.type, i);
    if (j.bias) v += load(j.bias, p.type, i % p.y.c);
    store(to, p.type, i, v);
  }
}

/* Checks what all directions have in common, and queues the work. */
cudnnStatus_t submit(cudnnHandle_t handle, const work &j, int algo) {
  const char *const name = j.p.name;
  if (!has_algorithm(j.d, algo)) {
    report("%s: the double has no algorithm %d", name, algo);
    return CUDNN_STATUS_NOT_SUPPORTED;
  }
  if (plays("late")) return CUDNN_STATUS_NOT_SUPPORTED;
  if (!is_there(name, "x", j.x, count(j.p.x), j.p.type) || !is_there(name, "w", j.w, count(j.p.w), j.p.type) ||
      !is_there(name, "y", j.y, count(j.p.y), j.p.type))
    return CUDNN_STATUS_BAD_PARAM;
  if (j.bias && !is_there(name, "the bias", j.bias, j.p.y.c, j.p.type)) return CUDNN_STATUS_BAD_PARAM;
  work queued = j;
  queued.bytes = workspace_of(j.p, j.d, algo);
  if (j.bytes < queued.bytes || (queued.bytes && !block_with(j.workspace, queued.bytes))) {
    report("%s: %zu bytes of workspace, %zu are needed in one live allocation: %s", name, j.bytes, queued.bytes,
           describe(j.workspace, queued.bytes).c_str());
    return CUDNN_STATUS_BAD_PARAM;
  }
  stats.gemms++;
  stats.gemm_flops += 2.0 * (double)count(j.p.y) * (double)(j.p.w.c * j.p.w.h * j.p.w.w);
  push(handle->stream, [queued] { run(queued); });
  return CUDNN_STATUS_SUCCESS;
}

} // namespace

/* ====== Library and descriptors ====== */

size_t cudnnGetVersion(void) { return 90000; }
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }

const char *cudnnGetErrorString(cudnnStatus_t status) {
  switch (status) {
  case CUDNN_STATUS_SUCCESS: return "CUDNN_STATUS_SUCCESS";
  case CUDNN_STATUS_NOT_INITIALIZED: return "CUDNN_STATUS_NOT_INITIALIZED";
  case CUDNN_STATUS_BAD_PARAM: return "CUDNN_STATUS_BAD_PARAM";
  case CUDNN_STATUS_NOT_SUPPORTED: return "CUDNN_STATUS_NOT_SUPPORTED";
  case CUDNN_STATUS_EXECUTION_FAILED: return "CUDNN_STATUS_EXECUTION_FAILED";
  default: return "CUDNN_STATUS_INTERNAL_ERROR";
  }
}

template <class T> static cudnnStatus_t make(const char *name, T **out) {
  BEGIN(name);
  if (!out) return CUDNN_STATUS_BAD_PARAM;
  *out = new T{};
  stats.live_objects++;
  return CUDNN_STATUS_SUCCESS;
}

template <class T> static cudnnStatus_t unmake(const char *name, T *object) {
  call entered(name);
  if (!object) return CUDNN_STATUS_BAD_PARAM;
  stats.live_objects--;
  delete object;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) { return make("cudnnCreate", handle); }
cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) { return unmake("cudnnDestroy", handle); }

cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t streamId) {
  BEGIN("cudnnSetStream");
  if (!handle || !stream_exists(streamId)) return CUDNN_STATUS_BAD_PARAM;
  handle->stream = streamId;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t *tensorDesc) {
  return make("cudnnCreateTensorDescriptor", tensorDesc);
}
cudnnStatus_t cudnnDestroyTensorDescriptor(cudnnTensorDescriptor_t tensorDesc) {
  return unmake("cudnnDestroyTensorDescriptor", tensorDesc);
}
cudnnStatus_t cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t *filterDesc) {
  return make("cudnnCreateFilterDescriptor", filterDesc);
}
cudnnStatus_t cudnnDestroyFilterDescriptor(cudnnFilterDescriptor_t filterDesc) {
  return unmake("cudnnDestroyFilterDescriptor", filterDesc);
}
cudnnStatus_t cudnnCreateActivationDescriptor(cudnnActivationDescriptor_t *activationDesc) {
  return make("cudnnCreateActivationDescriptor", activationDesc);
}
cudnnStatus_t cudnnDestroyActivationDescriptor(cudnnActivationDescriptor_t activationDesc) {
  return unmake("cudnnDestroyActivationDescriptor", activationDesc);
}
cudnnStatus_t cudnnCreateConvolutionDescriptor(cudnnConvolutionDescriptor_t *convDesc) {
  return make("cudnnCreateConvolutionDescriptor", convDesc);
}
cudnnStatus_t cudnnDestroyConvolutionDescriptor(cudnnConvolutionDescriptor_t convDesc) {
  return unmake("cudnnDestroyConvolutionDescriptor", convDesc);
}

cudnnStatus_t cudnnSetTensor4dDescriptor(cudnnTensorDescriptor_t tensorDesc, cudnnTensorFormat_t format,
                                         cudnnDataType_t dataType, int n, int c, int h, int w) {
  BEGIN("cudnnSetTensor4dDescriptor");
  if (!tensorDesc || n < 1 || c < 1 || h < 1 || w < 1)
    return bad("cudnnSetTensor4dDescriptor", "no descriptor, or a size below 1");
  if (format != CUDNN_TENSOR_NHWC) return bad("cudnnSetTensor4dDescriptor", "the double is channels-last only");
  *tensorDesc = cudnnTensorStruct{true, dataType, n, c, h, w};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetFilter4dDescriptor(cudnnFilterDescriptor_t filterDesc, cudnnDataType_t dataType,
                                         cudnnTensorFormat_t format, int k, int c, int h, int w) {
  BEGIN("cudnnSetFilter4dDescriptor");
  if (!filterDesc || k < 1 || c < 1 || h < 1 || w < 1)
    return bad("cudnnSetFilter4dDescriptor", "no descriptor, or a size below 1");
  if (format != CUDNN_TENSOR_NHWC) return bad("cudnnSetFilter4dDescriptor", "the double is channels-last only");
  *filterDesc = cudnnFilterStruct{true, dataType, k, c, h, w};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetActivationDescriptor(cudnnActivationDescriptor_t activationDesc, cudnnActivationMode_t mode,
                                           cudnnNanPropagation_t, double) {
  BEGIN("cudnnSetActivationDescriptor");
  if (!activationDesc) return CUDNN_STATUS_BAD_PARAM;
  *activationDesc = cudnnActivationStruct{true, mode};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetConvolution2dDescriptor(cudnnConvolutionDescriptor_t convDesc, int pad_h, int pad_w, int u, int v,
                                              int dilation_h, int dilation_w, cudnnConvolutionMode_t mode,
                                              cudnnDataType_t computeType) {
  BEGIN("cudnnSetConvolution2dDescriptor");
  if (!convDesc || pad_h < 0 || pad_w < 0 || u < 1 || v < 1 || dilation_h < 1 || dilation_w < 1)
    return bad("cudnnSetConvolution2dDescriptor", "no descriptor, or a stride or dilation below 1");
  if (mode != CUDNN_CROSS_CORRELATION || computeType != CUDNN_DATA_FLOAT) {
    report("cudnnSetConvolution2dDescriptor: the double has cross-correlation with float32 sums only");
    return CUDNN_STATUS_NOT_SUPPORTED;
  }
  *convDesc = cudnnConvolutionStruct{true, pad_h, pad_w, u, v, dilation_h, dilation_w, 1, CUDNN_DEFAULT_MATH};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetConvolutionGroupCount(cudnnConvolutionDescriptor_t convDesc, int groupCount) {
  BEGIN("cudnnSetConvolutionGroupCount");
  if (!convDesc || !convDesc->set || groupCount < 1) return CUDNN_STATUS_BAD_PARAM;
  convDesc->groups = groupCount;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetConvolutionMathType(cudnnConvolutionDescriptor_t convDesc, cudnnMathType_t mathType) {
  BEGIN("cudnnSetConvolutionMathType");
  if (!convDesc || !convDesc->set) return CUDNN_STATUS_BAD_PARAM;
  convDesc->math = mathType;
  return CUDNN_STATUS_SUCCESS;
}

/* ====== Algorithms ====== */

/* An algorithm of a list of proposals. */
template <class Proposal, class Algo>
static void propose(Proposal *list, int most, int *n, const problem &p, direction d, int algo, bool same_bits) {
  if (*n >= most) return;
  Proposal one{};
  one.algo = (Algo)algo;
  one.memory = workspace_of(p, d, algo);
  one.determinism = same_bits ? CUDNN_DETERMINISTIC : CUDNN_NON_DETERMINISTIC;
  one.mathType = p.conv.math;
  if (plays("refuse")) one.status = CUDNN_STATUS_NOT_SUPPORTED;
  list[(*n)++] = one;
}

cudnnStatus_t cudnnGetConvolutionForwardAlgorithm_v7(cudnnHandle_t handle, const cudnnTensorDescriptor_t srcDesc,
                                                     const cudnnFilterDescriptor_t filterDesc,
                                                     const cudnnConvolutionDescriptor_t convDesc,
                                                     const cudnnTensorDescriptor_t destDesc,
                                                     const int requestedAlgoCount, int *returnedAlgoCount,
                                                     cudnnConvolutionFwdAlgoPerf_t *perfResults) {
  BEGIN("cudnnGetConvolutionForwardAlgorithm");
  problem p;
  const cudnnStatus_t s =
      read_problem("cudnnGetConvolutionForwardAlgorithm", handle, srcDesc, filterDesc, convDesc, destDesc, &p);
  if (s || !returnedAlgoCount || !perfResults) return s ? s : CUDNN_STATUS_BAD_PARAM;
  *returnedAlgoCount = 0;
  for (const int algo : {TRANSFORM, 1, 0})
    propose<cudnnConvolutionFwdAlgoPerf_t, cudnnConvolutionFwdAlgo_t>(perfResults, requestedAlgoCount,
                                                                      returnedAlgoCount, p, FORWARD, algo, true);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetConvolutionBackwardDataAlgorithm_v7(
    cudnnHandle_t handle, const cudnnFilterDescriptor_t filterDesc, const cudnnTensorDescriptor_t diffDesc,
    const cudnnConvolutionDescriptor_t convDesc, const cudnnTensorDescriptor_t gradDesc, const int requestedAlgoCount,
    int *returnedAlgoCount, cudnnConvolutionBwdDataAlgoPerf_t *perfResults) {
  BEGIN("cudnnGetConvolutionBackwardDataAlgorithm");
  problem p;
  const cudnnStatus_t s =
      read_problem("cudnnGetConvolutionBackwardDataAlgorithm", handle, gradDesc, filterDesc, convDesc, diffDesc, &p);
  if (s || !returnedAlgoCount || !perfResults) return s ? s : CUDNN_STATUS_BAD_PARAM;
  *returnedAlgoCount = 0;
  for (const int algo : {0, 1})
    propose<cudnnConvolutionBwdDataAlgoPerf_t, cudnnConvolutionBwdDataAlgo_t>(perfResults, requestedAlgoCount,
                                                                              returnedAlgoCount, p, DATA, algo,
                                                                              algo == 1);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetConvolutionBackwardFilterAlgorithm_v7(cudnnHandle_t handle, const cudnnTensorDescriptor_t srcDesc,
                                                            const cudnnTensorDescriptor_t diffDesc,
                                                            const cudnnConvolutionDescriptor_t convDesc,
                                                            const cudnnFilterDescriptor_t gradDesc,
                                                            const int requestedAlgoCount, int *returnedAlgoCount,
                                                            cudnnConvolutionBwdFilterAlgoPerf_t *perfResults) {
  BEGIN("cudnnGetConvolutionBackwardFilterAlgorithm");
  problem p;
  const cudnnStatus_t s =
      read_problem("cudnnGetConvolutionBackwardFilterAlgorithm", handle, srcDesc, gradDesc, convDesc, diffDesc, &p);
  if (s || !returnedAlgoCount || !perfResults) return s ? s : CUDNN_STATUS_BAD_PARAM;
  *returnedAlgoCount = 0;
  for (const int algo : {0, 3, 1})
    propose<cudnnConvolutionBwdFilterAlgoPerf_t, cudnnConvolutionBwdFilterAlgo_t>(perfResults, requestedAlgoCount,
                                                                                  returnedAlgoCount, p, FILTER, algo,
                                                                                  algo == 1);
  return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t tell_workspace(const char *name, cudnnHandle_t handle, cudnnTensorDescriptor_t x,
                                    cudnnFilterDescriptor_t w, cudnnConvolutionDescriptor_t conv,
                                    cudnnTensorDescriptor_t y, direction d, int algo, size_t *bytes) {
  BEGIN(name);
  problem p;
  const cudnnStatus_t s = read_problem(name, handle, x, w, conv, y, &p);
  if (s || !bytes) return s ? s : CUDNN_STATUS_BAD_PARAM;
  if (!has_algorithm(d, algo)) return CUDNN_STATUS_NOT_SUPPORTED;
  *bytes = workspace_of(p, d, algo);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetConvolutionForwardWorkspaceSize(cudnnHandle_t handle, const cudnnTensorDescriptor_t xDesc,
                                                      const cudnnFilterDescriptor_t wDesc,
                                                      const cudnnConvolutionDescriptor_t convDesc,
                                                      const cudnnTensorDescriptor_t yDesc,
                                                      cudnnConvolutionFwdAlgo_t algo, size_t *sizeInBytes) {
  return tell_workspace("cudnnGetConvolutionForwardWorkspaceSize", handle, xDesc, wDesc, convDesc, yDesc, FORWARD,
                        (int)algo, sizeInBytes);
}

cudnnStatus_t cudnnGetConvolutionBackwardDataWorkspaceSize(cudnnHandle_t handle, const cudnnFilterDescriptor_t wDesc,
                                                           const cudnnTensorDescriptor_t dyDesc,
                                                           const cudnnConvolutionDescriptor_t convDesc,
                                                           const cudnnTensorDescriptor_t dxDesc,
                                                           cudnnConvolutionBwdDataAlgo_t algo, size_t *sizeInBytes) {
  return tell_workspace("cudnnGetConvolutionBackwardDataWorkspaceSize", handle, dxDesc, wDesc, convDesc, dyDesc, DATA,
                        (int)algo, sizeInBytes);
}

cudnnStatus_t cudnnGetConvolutionBackwardFilterWorkspaceSize(cudnnHandle_t handle, const cudnnTensorDescriptor_t xDesc,
                                                             const cudnnTensorDescriptor_t dyDesc,
                                                             const cudnnConvolutionDescriptor_t convDesc,
                                                             const cudnnFilterDescriptor_t gradDesc,
                                                             cudnnConvolutionBwdFilterAlgo_t algo,
                                                             size_t *sizeInBytes) {
  return tell_workspace("cudnnGetConvolutionBackwardFilterWorkspaceSize", handle, xDesc, gradDesc, convDesc, dyDesc,
                        FILTER, (int)algo, sizeInBytes);
}

/* ====== Convolutions ====== */

static work make_work(const problem &p, direction d, const void *x, const void *w, const void *y, const void *alpha,
                      const void *beta, void *workspace, size_t bytes) {
  work j{};
  j.p = p;
  j.d = d;
  j.x = (void *)x, j.w = (void *)w, j.y = (void *)y;
  j.alpha = *(const float *)alpha;
  j.beta = *(const float *)beta;
  j.workspace = workspace;
  j.bytes = bytes;
  return j;
}

cudnnStatus_t cudnnConvolutionForward(cudnnHandle_t handle, const void *alpha, const cudnnTensorDescriptor_t xDesc,
                                      const void *x, const cudnnFilterDescriptor_t wDesc, const void *w,
                                      const cudnnConvolutionDescriptor_t convDesc, cudnnConvolutionFwdAlgo_t algo,
                                      void *workSpace, size_t workSpaceSizeInBytes, const void *beta,
                                      const cudnnTensorDescriptor_t yDesc, void *y) {
  BEGIN("cudnnConvolutionForward");
  problem p;
  const cudnnStatus_t s = read_problem("cudnnConvolutionForward", handle, xDesc, wDesc, convDesc, yDesc, &p);
  if (s || !alpha || !beta) return s ? s : CUDNN_STATUS_BAD_PARAM;
  return submit(handle, make_work(p, FORWARD, x, w, y, alpha, beta, workSpace, workSpaceSizeInBytes), (int)algo);
}

cudnnStatus_t cudnnConvolutionBiasActivationForward(
    cudnnHandle_t handle, const void *alpha1, const cudnnTensorDescriptor_t xDesc, const void *x,
    const cudnnFilterDescriptor_t wDesc, const void *w, const cudnnConvolutionDescriptor_t convDesc,
    cudnnConvolutionFwdAlgo_t algo, void *workSpace, size_t workSpaceSizeInBytes, const void *alpha2,
    const cudnnTensorDescriptor_t zDesc, const void *z, const cudnnTensorDescriptor_t biasDesc, const void *bias,
    const cudnnActivationDescriptor_t activationDesc, const cudnnTensorDescriptor_t yDesc, void *y) {
  const char *const name = "cudnnConvolutionBiasActivationForward";
  BEGIN(name);
  problem p;
  const cudnnStatus_t s = read_problem(name, handle, xDesc, wDesc, convDesc, yDesc, &p);
  if (s) return s;
  if (!alpha1 || !alpha2 || !zDesc || !z || !bias) return bad(name, "a NULL argument");
  if (!biasDesc || !biasDesc->set || biasDesc->c != p.y.c || count(*biasDesc) != p.y.c || biasDesc->type != p.type)
    return bad(name, "the bias is not [1, C, 1, 1] of the output's type");
  if (count(*zDesc) != count(p.y) || zDesc->type != p.type) return bad(name, "z is not like y");
  if (plays("bias")) return CUDNN_STATUS_NOT_SUPPORTED;
  if (!activationDesc || !activationDesc->set || activationDesc->mode != CUDNN_ACTIVATION_IDENTITY ||
      algo != CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM) {
    report("%s: no activation but the identity, by the precomputed implicit product", name);
    return CUDNN_STATUS_NOT_SUPPORTED;
  }
  if (*(const float *)alpha2 != 0) return bad(name, "the double adds no z");
  work j = make_work(p, FORWARD, x, w, y, alpha1, alpha2, workSpace, workSpaceSizeInBytes);
  j.bias = bias;
  return submit(handle, j, (int)algo);
}

cudnnStatus_t cudnnConvolutionBackwardData(cudnnHandle_t handle, const void *alpha, const cudnnFilterDescriptor_t wDesc,
                                           const void *w, const cudnnTensorDescriptor_t dyDesc, const void *dy,
                                           const cudnnConvolutionDescriptor_t convDesc,
                                           cudnnConvolutionBwdDataAlgo_t algo, void *workSpace,
                                           size_t workSpaceSizeInBytes, const void *beta,
                                           const cudnnTensorDescriptor_t dxDesc, void *dx) {
  BEGIN("cudnnConvolutionBackwardData");
  problem p;
  const cudnnStatus_t s = read_problem("cudnnConvolutionBackwardData", handle, dxDesc, wDesc, convDesc, dyDesc, &p);
  if (s || !alpha || !beta) return s ? s : CUDNN_STATUS_BAD_PARAM;
  return submit(handle, make_work(p, DATA, dx, w, dy, alpha, beta, workSpace, workSpaceSizeInBytes), (int)algo);
}

cudnnStatus_t cudnnConvolutionBackwardFilter(cudnnHandle_t handle, const void *alpha,
                                             const cudnnTensorDescriptor_t xDesc, const void *x,
                                             const cudnnTensorDescriptor_t dyDesc, const void *dy,
                                             const cudnnConvolutionDescriptor_t convDesc,
                                             cudnnConvolutionBwdFilterAlgo_t algo, void *workSpace,
                                             size_t workSpaceSizeInBytes, const void *beta,
                                             const cudnnFilterDescriptor_t dwDesc, void *dw) {
  BEGIN("cudnnConvolutionBackwardFilter");
  problem p;
  const cudnnStatus_t s = read_problem("cudnnConvolutionBackwardFilter", handle, xDesc, dwDesc, convDesc, dyDesc, &p);
  if (s || !alpha || !beta) return s ? s : CUDNN_STATUS_BAD_PARAM;
  return submit(handle, make_work(p, FILTER, x, dw, dy, alpha, beta, workSpace, workSpaceSizeInBytes), (int)algo);
}
