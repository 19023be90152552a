/*
 * backend.cu -- CUDA as a backend: which devices there are, the way of a kernel call to its stream, errors, and the table that core gets.
 *
 * A kernel call finds its device by the address of its first output, runs on that device's compute stream and does not wait.  An error that the
 * device meets later is told by the next call that notices, with the names of the ops queued since the host last waited; HALFMOON_CUDA_SYNC=1 waits
 * after every op, so that the name is the op's own.  Owns the devices' streams, events and handles, for the life of the process.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "linear_steps.h"

#include "blas.h"

#ifdef HALFMOON_EMU
#include <emu_stats.h>
#endif

static struct {
  const hm_host *host;
  bool counted, wait_always;
  int count;
  hm_cuda_device device[HM_CUDA_MAX_DEVICES];
  hm_cuda_device *current; /* of the running call */
} cuda;

static thread_local int thread_device = -1;

enum { OPTIMIZER = -1, USER_KERNEL = -2 }; /* among ids of ops */

/* ====== Messages ====== */

int hm_cuda_fail(int code, const char *format, ...) {
  char message[4096];
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  return cuda.host ? cuda.host->fail(code, message) : code;
}

const char *hm_cuda_op_name(int op) { return cuda.host->op_name(op); }

/* Errors after which the context gives nothing but errors. */
static bool is_fatal(cudaError_t error) {
  const int e = (int)error;
  return e == 214 || e == 220 || e == 226 || (e >= 700 && e <= 702 && e != 701) || e == 709 || e == 710 ||
         (e >= 714 && e <= 719);
}

/* "conv2d, relu, sum": what was queued since the host last waited, oldest first. */
static const char *recent_ops(const hm_cuda_device *d, char *text, size_t size) {
  size_t at = 0;
  text[0] = '\0';
  const int n = d->n_recent < HM_CUDA_RECENT ? d->n_recent : HM_CUDA_RECENT;
  for (int i = 0; i < n && at + 1 < size; i++) {
    const int op = d->recent[(d->n_recent - n + i) % HM_CUDA_RECENT];
    const char *name = op >= 0 ? hm_cuda_op_name(op) : (op == OPTIMIZER ? "the optimizer" : "a user's kernel");
    const int wrote = snprintf(text + at, size - at, "%s%s", i ? ", " : (d->n_recent > n ? "..., " : ""), name);
    at += wrote > 0 ? (size_t)wrote : 0;
  }
  return text;
}

/* What the test double's cuBLAS complained about; nothing on a real device. */
static const char *details(void) {
#ifdef HALFMOON_EMU
  static char text[512];
  const char *report = emu_last_report();
  if (!report || !*report) return "";
  snprintf(text, sizeof text, "\n  %s", report);
  return text;
#else
  return "";
#endif
}

/* "relu: cuda:0: "; what may be NULL. */
static const char *place(const hm_cuda_device *d, const char *what, char *text, size_t size) {
  snprintf(text, size, "%s%scuda:%d: ", what ? what : "", what ? ": " : "", d->index);
  return text;
}

/* The device was lost: by this op, where every op is waited for, else by one queued before. */
static int report_lost(hm_cuda_device *d, const char *what) {
  char ops[384], where[160];
  const char *text = cudaGetErrorString(d->lost);
  place(d, what, where, sizeof where);
  if (cuda.wait_always)
    return hm_cuda_fail(HM_ERR_DEVICE, "%s%s\n  hint: the device cannot be used again in this process", where, text);
  return hm_cuda_fail(
      HM_ERR_DEVICE,
      "%s%s, in work queued earlier\n  queued since the last wait: %s\n  hint: HALFMOON_CUDA_SYNC=1 waits "
      "after each op and names the one that failed; the device cannot be used again in this process",
      where, text, recent_ops(d, ops, sizeof ops));
}

int hm_cuda_device_status(hm_cuda_device *d, cudaError_t error, const char *what) {
  char where[160];
  if (error == cudaSuccess) return HM_OK;
  (void)cudaGetLastError();
  place(d, what, where, sizeof where);
  if (is_fatal(error)) {
    d->lost = error;
    return report_lost(d, what);
  }
  if (error == cudaErrorMemoryAllocation)
    return hm_cuda_fail(HM_ERR_MEMORY, "%sout of memory, outside the tensors' pool\n  hint: a smaller batch needs less",
                        where);
  if (error == cudaErrorNoKernelImageForDevice)
    return hm_cuda_fail(
        HM_ERR_DEVICE,
        "%sit has compute capability %d.%d, for which the plug-in has no code\n  hint: build with `make "
        "cuda-all`",
        where, d->major, d->minor);
  return hm_cuda_fail(HM_ERR_INTERNAL, "%s%s (%s)", where, cudaGetErrorString(error), cudaGetErrorName(error));
}

int hm_cuda_status(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return HM_OK;
  return hm_cuda_device_status(cuda.current ? cuda.current : &cuda.device[0], error, what);
}

cudaError_t hm_cuda_pending(void) {
  const hm_cuda_device *d = cuda.current ? cuda.current : &cuda.device[0];
  cudaError_t error = cudaPeekAtLastError();
  if (error == cudaSuccess) error = cudaStreamQuery(d->compute);
  if (error != cudaErrorNotReady) return error;
  (void)cudaGetLastError();
  return cudaSuccess;
}

int hm_cuda_blas_status(cublasStatus_t status, const char *what) {
  if (status == CUBLAS_STATUS_SUCCESS) return HM_OK;
  const cudaError_t error = hm_cuda_pending();
  if (error != cudaSuccess) return hm_cuda_status(error, what);
  const int code = status == CUBLAS_STATUS_ALLOC_FAILED ? HM_ERR_MEMORY : HM_ERR_INTERNAL;
  return hm_cuda_fail(code, "%s: cuBLAS: %s%s", what, cublasGetStatusString(status), details());
}

/* ====== Devices ====== */

/* Says why there are none. */
static void explain_none(cudaError_t error) {
  int driver = 0, runtime = 0;
  (void)cudaDriverGetVersion(&driver);
  (void)cudaRuntimeGetVersion(&runtime);
  if (driver == 0) hm_cuda_fail(HM_ERR_DEVICE, "no NVIDIA driver is installed");
  else if (driver / 1000 < runtime / 1000)
    hm_cuda_fail(HM_ERR_DEVICE,
                 "the NVIDIA driver knows CUDA %d.%d and the plug-in needs %d.%d: a newer driver is wanted",
                 driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  else if (error == cudaErrorNoDevice || error == cudaSuccess)
    hm_cuda_fail(HM_ERR_DEVICE, "the NVIDIA driver sees no device");
  else hm_cuda_fail(HM_ERR_DEVICE, "the NVIDIA driver does not start: %s", cudaGetErrorString(error));
}

static int device_count(void) {
  if (!cuda.counted) {
    int n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      n = 0;
    }
    if (n == 0) explain_none(error);
    cuda.count = n < HM_CUDA_MAX_DEVICES ? n : HM_CUDA_MAX_DEVICES;
    cuda.counted = true;
  }
  return cuda.count;
}

int hm_cuda_count(void) { return device_count(); }

static int attribute(enum cudaDeviceAttr which, int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) (void)cudaGetLastError();
  return value;
}

static int device_info(int device, hm_device_info *out) {
  struct cudaDeviceProp properties;
  if (device < 0 || device >= device_count())
    return hm_cuda_fail(HM_ERR_DEVICE, "cuda:%d: there is no such device", device);
  const int status =
      hm_cuda_device_status(&cuda.device[device], cudaGetDeviceProperties(&properties, device), "device_info");
  if (status) return status;
  memset(out, 0, sizeof *out);
  snprintf(out->name, sizeof out->name, "%.127s", properties.name);
  snprintf(out->detail, sizeof out->detail, "compute capability %d.%d", properties.major, properties.minor);
  out->memory_bytes = properties.totalGlobalMem;
  out->major = properties.major;
  out->minor = properties.minor;
  out->multiprocessors = properties.multiProcessorCount;
  out->max_threads_per_block = properties.maxThreadsPerBlock;
  out->shared_bytes_per_block =
      properties.sharedMemPerBlockOptin ? properties.sharedMemPerBlockOptin : properties.sharedMemPerBlock;
  (void)cudaDriverGetVersion(&out->driver);
  (void)cudaRuntimeGetVersion(&out->runtime);
  return HM_OK;
}

/* Memory freed by core stays with the process: core gives it back when it means to. */
static void keep_pool(int device) {
  cudaMemPool_t pool;
  uint64_t all = UINT64_MAX;
  if (cudaDeviceGetDefaultMemPool(&pool, device) == cudaSuccess)
    (void)cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all);
  (void)cudaGetLastError();
}

/* Makes streams, events and handles. */
static int open_device(hm_cuda_device *d) {
  d->major = attribute(cudaDevAttrComputeCapabilityMajor, d->index);
  d->minor = attribute(cudaDevAttrComputeCapabilityMinor, d->index);
  d->pools = attribute(cudaDevAttrMemoryPoolsSupported, d->index) != 0;
  if (d->pools) keep_pool(d->index);
  cudaError_t e = cudaStreamCreateWithFlags(&d->compute, cudaStreamNonBlocking);
  if (e == cudaSuccess) e = cudaStreamCreateWithFlags(&d->copy, cudaStreamNonBlocking);
  if (e == cudaSuccess) e = cudaEventCreateWithFlags(&d->fork, cudaEventDisableTiming);
  if (e == cudaSuccess) e = cudaEventCreateWithFlags(&d->join, cudaEventDisableTiming);
  if (e == cudaSuccess)
    e = cudaHostAlloc((void **)&d->fault, sizeof *d->fault, cudaHostAllocMapped | cudaHostAllocPortable);
  int status = hm_cuda_device_status(d, e, "opening the device");
  if (!status) memset(d->fault, 0, sizeof *d->fault);
  if (!status) status = hm_cuda_blas_open(d);
  d->open = status == HM_OK;
  return status;
}

hm_cuda_device *hm_cuda_use(int device) {
  if (device < 0 || device >= device_count()) {
    hm_cuda_fail(HM_ERR_DEVICE, "cuda:%d: there is no such device", device);
    return NULL;
  }
  hm_cuda_device *d = &cuda.device[device];
  d->index = device;
  if (thread_device != device) {
    if (hm_cuda_device_status(d, cudaSetDevice(device), "choosing the device")) return NULL;
    thread_device = device;
  }
  if (!d->open && open_device(d)) return NULL;
  return d;
}

hm_cuda_device *hm_cuda_device_of(const void *data, const char *what) {
  if (device_count() == 1 || !data) return hm_cuda_use(0);
  struct cudaPointerAttributes found;
  const cudaError_t e = cudaPointerGetAttributes(&found, data);
  if (e == cudaSuccess && found.type == cudaMemoryTypeDevice) return hm_cuda_use(found.device);
  (void)cudaGetLastError();
  hm_cuda_fail(HM_ERR_INTERNAL, "%s: the address is no device memory", what);
  return NULL;
}

hm_cuda_device *hm_cuda_current(void) { return cuda.current; }

hm_cuda_fault *hm_cuda_fault_word(void *stream) {
  for (int i = 0; i < cuda.count; i++)
    if (cuda.device[i].open && cuda.device[i].compute == stream) return cuda.device[i].fault;
  return NULL;
}

int hm_cuda_waited(hm_cuda_device *d) {
  d->n_recent = 0;
  return hm_cuda_fault_take(d->fault);
}

int hm_cuda_wait(hm_cuda_device *d, const char *what) {
  if (d->lost) return report_lost(d, what);
  hm_cuda_count_wait();
  const int status = hm_cuda_device_status(d, cudaStreamSynchronize(d->compute), what);
  return status ? status : hm_cuda_waited(d);
}

static int synchronize(int device) {
  hm_cuda_device *d = hm_cuda_use(device);
  return d ? hm_cuda_wait(d, NULL) : HM_ERR_DEVICE;
}

/* ====== The way of a call ====== */

static void remember(hm_cuda_device *d, int op) {
  d->recent[d->n_recent % HM_CUDA_RECENT] = op;
  if (++d->n_recent == 1 << 30) d->n_recent = HM_CUDA_RECENT + d->n_recent % HM_CUDA_RECENT;
}

/* After a call queued its work: waits for it, if that is wanted. */
static int settle(hm_cuda_device *d, int status, const char *what) {
  return !status && cuda.wait_always ? hm_cuda_wait(d, what) : status;
}

/* What is known to be wrong before a call: a lost device, or a bad value that earlier work met. */
static int check(hm_cuda_device *d, const char *what) {
  if (d->lost) return report_lost(d, what);
  return ((volatile hm_cuda_fault *)d->fault)->code == HM_OK ? HM_OK : hm_cuda_wait(d, what);
}

/* Runs one kernel function of a family on the compute stream of the device that its output lies on. */
template <hm_kernel_fn fn> static int entry(const hm_kernel_call *call) {
  const char *name = hm_cuda_op_name(call->op);
  hm_cuda_device *d = hm_cuda_device_of(call->out[0].data, name);
  if (!d) return HM_ERR_DEVICE;
  const int status = check(d, name);
  if (status) return status;
  hm_kernel_call on_stream = *call;
  on_stream.stream = d->compute;
  cuda.current = d;
  remember(d, call->op);
  return settle(d, fn(&on_stream), name);
}

static int multi_tensor(const hm_multi_call *call) {
  if (call->n == 0) return HM_OK;
  const void *data = call->item[0].param ? call->item[0].param : call->item[0].grad;
  hm_cuda_device *d = hm_cuda_device_of(data, "optimizer");
  if (!d) return HM_ERR_DEVICE;
  const int status = check(d, "optimizer");
  if (status) return status;
  hm_multi_call on_stream = *call;
  on_stream.stream = d->compute;
  cuda.current = d;
  remember(d, OPTIMIZER);
  return settle(d, hm_cuda_multi_tensor(&on_stream), "optimizer");
}

static int late_tensor(const hm_multi_call *call, const hm_late *late) {
  hm_cuda_device *d = hm_cuda_device_of(call->item[0].grad, "optimizer");
  if (!d) return HM_ERR_DEVICE;
  const int status = check(d, "optimizer");
  if (status) return status;
  hm_multi_call on_stream = *call;
  on_stream.stream = d->compute;
  cuda.current = d;
  remember(d, OPTIMIZER);
  return settle(d, hm_cuda_late_tensor(&on_stream, late), "optimizer");
}

static int late_scale(int device, const hm_scale_step *step) {
  hm_cuda_device *d = hm_cuda_use(device);
  if (!d) return HM_ERR_DEVICE;
  const int status = check(d, "GradScaler");
  if (status) return status;
  cuda.current = d;
  remember(d, OPTIMIZER);
  return settle(d, hm_cuda_late_scale(step, d->compute), "GradScaler");
}

/* Packing queues a copy, like a kernel. */
static int pack(const hm_kernel_call *call, int arg, void *dst) {
  hm_cuda_device *d = hm_cuda_device_of(dst, hm_cuda_op_name(call->op));
  if (!d) return HM_ERR_DEVICE;
  hm_kernel_call on_stream = *call;
  on_stream.stream = d->compute;
  cuda.current = d;
  return hm_cuda_conv_pack(&on_stream, arg, dst);
}

static int packing(const hm_kernel_call *call, int arg, hm_packing *out) {
  *out = {0, 0};
  return call->op == HM_OP_CONV2D || call->op == HM_OP_CONV2D_BACKWARD_INPUT ? hm_cuda_conv_packing(call, arg, out)
                                                                             : HM_OK;
}

static int products(const hm_kernel_call *call) {
  return hm_linear_has_steps(call->op) ? hm_cuda_linear(call) : hm_cuda_matmul(call);
}

static int aux_bytes(const hm_kernel_call *call, int64_t *bytes) {
  hm_cuda_device *d = hm_cuda_device_of(call->in[0].data, hm_cuda_op_name(call->op));
  if (!d) return HM_ERR_DEVICE;
  cuda.current = d;
  return hm_cuda_linear_aux(call, bytes);
}

static int workspace_size(const hm_kernel_call *call, size_t *bytes) {
  *bytes = 0;
  switch (call->op) {
  case HM_OP_MATMUL:
  case HM_OP_LINEAR:
  case HM_OP_LINEAR_BACKWARD_INPUT:
  case HM_OP_LINEAR_BACKWARD_WEIGHT: return hm_cuda_matmul_workspace(call, bytes);
  case HM_OP_LINEAR_RELU:
  case HM_OP_LINEAR_GELU_TANH:
  case HM_OP_LINEAR_BACKWARD_PARAMS:
  case HM_OP_LINEAR_BACKWARD_INPUT_RELU:
  case HM_OP_LINEAR_BACKWARD_INPUT_GELU_TANH: return hm_cuda_linear_workspace(call, bytes);
  case HM_OP_CONV2D:
  case HM_OP_CONV2D_BACKWARD_INPUT:
  case HM_OP_CONV2D_BACKWARD_WEIGHT: return hm_cuda_conv_workspace(call, bytes);
  case HM_OP_GATHER_BACKWARD:
  case HM_OP_INDEX_SELECT_BACKWARD:
  case HM_OP_INDEX_ADD:
  case HM_OP_SCATTER:
  case HM_OP_SCATTER_ADD:
  case HM_OP_EMBEDDING_BACKWARD:
  case HM_OP_SORT:
  case HM_OP_TOPK: return hm_cuda_index_workspace(call, bytes);
  case HM_OP_SUM:
  case HM_OP_MEAN:
  case HM_OP_AMAX:
  case HM_OP_AMIN:
  case HM_OP_MAX_DIM:
  case HM_OP_MIN_DIM:
  case HM_OP_ARGMAX:
  case HM_OP_ARGMIN:
  case HM_OP_ANY:
  case HM_OP_ALL:
  case HM_OP_LINEAR_BACKWARD_BIAS:
  case HM_OP_PROD:
  case HM_OP_CONV2D_BACKWARD_BIAS: return hm_cuda_reduce_workspace(call, bytes);
  case HM_OP_VAR:
  case HM_OP_STD:
  case HM_OP_NORM:
  case HM_OP_LOGSUMEXP: return hm_cuda_spread_workspace(call, bytes);
  case HM_OP_CUMSUM:
  case HM_OP_CUMSUM_REVERSE:
  case HM_OP_CUMPROD_BACKWARD:
  case HM_OP_PROD_BACKWARD: return hm_cuda_scan_workspace(call, bytes);
  case HM_OP_NLL_LOSS:
  case HM_OP_NLL_LOSS_BACKWARD_BY_G:
  case HM_OP_CROSS_ENTROPY:
  case HM_OP_CROSS_ENTROPY_BACKWARD: return hm_cuda_loss_workspace(call, bytes);
  case HM_OP_ATTENTION:
  case HM_OP_ATTENTION_BACKWARD: return hm_cuda_attention_workspace(call, bytes);
  case HM_OP_BATCH_NORM:
  case HM_OP_BATCH_NORM_BACKWARD:
  case HM_OP_LAYER_NORM:
  case HM_OP_LAYER_NORM_BACKWARD:
  case HM_OP_RMS_NORM:
  case HM_OP_RMS_NORM_BACKWARD:
  case HM_OP_GROUP_NORM:
  case HM_OP_GROUP_NORM_BACKWARD: return hm_cuda_normalize_workspace(call, bytes);
  default: return HM_OK; /* the others need none */
  }
}

static int user_launch(hm_user_kernel *kernel, const int64_t grid[3], const int64_t block[3], int64_t shared_bytes,
                       hm_user_arg *arg, int n) {
  hm_cuda_device *d = hm_cuda_use(hm_cuda_user_device(kernel));
  if (!d) return HM_ERR_DEVICE;
  char what[160];
  snprintf(what, sizeof what, "kernel %s", hm_cuda_user_name(kernel));
  const int status = check(d, what);
  if (status) return status;
  cuda.current = d;
  remember(d, USER_KERNEL);
  return settle(d, hm_cuda_user_launch(d, kernel, grid, block, shared_bytes, arg, n), what);
}

static void counters(hm_device_counters *out) {
  memset(out, 0, sizeof *out);
  hm_cuda_counters(out);
  hm_cuda_conv_counters(out);
  hm_cuda_linear_counters(out);
}

/* ====== The table ====== */

static hm_backend backend;

static void fill_backend(hm_backend *b) {
  memset(b, 0, sizeof *b);
  b->version = HM_BACKEND_VERSION;
  b->bytes = sizeof *b;
  b->name = "cuda";
  b->fuses_relu_backward = true; /* traffic is what a GPU waits for */
  b->device_count = device_count;
  b->device_info = device_info;
  b->mem_alloc = hm_cuda_mem_alloc;
  b->mem_free = hm_cuda_mem_free;
  b->mem_to_host = hm_cuda_mem_to_host;
  b->mem_from_host = hm_cuda_mem_from_host;
  b->synchronize = synchronize;
  b->kernel[HM_FAMILY_ELEMENTWISE] = entry<hm_cuda_elementwise>;
  b->kernel[HM_FAMILY_REDUCE] = entry<hm_cuda_reduce>;
  b->kernel[HM_FAMILY_SCAN] = entry<hm_cuda_scan>;
  b->kernel[HM_FAMILY_COPY] = entry<hm_cuda_copy>;
  b->kernel[HM_FAMILY_FILL] = entry<hm_cuda_fill>;
  b->kernel[HM_FAMILY_RANDOM] = entry<hm_cuda_random>;
  b->kernel[HM_FAMILY_INDEX] = entry<hm_cuda_index>;
  b->kernel[HM_FAMILY_MATMUL] = entry<products>;
  b->kernel[HM_FAMILY_CONV] = entry<hm_cuda_conv>;
  b->kernel[HM_FAMILY_POOL] = entry<hm_cuda_pool>;
  b->kernel[HM_FAMILY_NORM] = entry<hm_cuda_norm>;
  b->kernel[HM_FAMILY_LOSS] = entry<hm_cuda_loss>;
  b->kernel[HM_FAMILY_ATTENTION] = entry<hm_cuda_attention>;
  b->multi_tensor = multi_tensor;
  b->workspace_size = workspace_size;
  b->aux_bytes = aux_bytes;
  b->packing = packing;
  b->pack = pack;
  b->user_compile = hm_cuda_user_compile;
  b->user_check = hm_cuda_user_check;
  b->user_launch = user_launch;
  b->user_free = hm_cuda_user_free;
  b->counters = counters;
  b->convolution = hm_cuda_cudnn_about;
  b->host_alloc = hm_cuda_host_alloc;
  b->host_free = hm_cuda_host_free;
  b->transfer_new = hm_cuda_transfer_new;
  b->transfer_free = hm_cuda_transfer_free;
  b->transfer_start = hm_cuda_transfer_start;
  b->transfer_join = hm_cuda_transfer_join;
  b->transfer_ready = hm_cuda_transfer_ready;
  b->late_tensor = late_tensor;
  b->late_scale = late_scale;
  b->fetch_begin = hm_cuda_fetch_begin;
  b->fetch_end = hm_cuda_fetch_end;
  b->fetch_drop = hm_cuda_fetch_drop;
}

/* The plug-in's door (kernels.h tells about it). */
extern "C" __attribute__((visibility("default"))) const hm_backend *hm_backend_open(const hm_host *host) {
  if (host->version != HM_BACKEND_VERSION) { /* core reads the version and says so */
    backend.version = HM_BACKEND_VERSION;
    backend.bytes = sizeof backend;
    backend.name = "cuda";
    return &backend;
  }
  const char *wait = getenv("HALFMOON_CUDA_SYNC");
  cuda.host = host;
  cuda.wait_always = wait && strcmp(wait, "1") == 0;
  for (int i = 0; i < HM_CUDA_MAX_DEVICES; i++) cuda.device[i].index = i;
  fill_backend(&backend);
  return &backend;
}
