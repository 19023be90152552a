/*
 * runtime.cpp -- the CUDA runtime's calls but for streams: device, errors, memory, copies; the counters and planned failures.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Owns the context's error, the last report, pinned host memory, the counters.
 *
 * Errors are of two kinds, as with CUDA.  A bad call returns its error and leaves it for cudaGetLastError.  A violation inside a kernel is the
 * context's: from then on every call returns it, until cudaDeviceReset; releasing functions still release.
 *
 * Copies to and from pageable host memory behave as the manual has it: the source of an upload is read before the call returns; a
 * download returns when it is done, and counts as a synchronisation.  Copies with pinned memory run in stream order.
 */
#include "emu.h"

#include <algorithm>
#include <cstdarg>
#include <map>
#include <mutex>
#include <vector>
#include <stdlib.h>

namespace hm_emu {

emu_stats stats;

namespace {

/* Nothing here is destroyed: releasing functions may be called while the process ends. */
auto &lock = *new std::recursive_mutex;
int call_depth;
cudaError_t last_error, context_error;
auto &last_report = *new std::string;
auto &launch_counts = *new std::map<std::string, uint64_t>;
auto &pinned = *new std::map<uintptr_t, size_t>;

struct plan { /* the n-th call of `name` is to fail */
  std::string name;
  int left;
};
auto &plans = *new std::vector<plan>;
bool plans_read;

void read_plans(void) {
  if (plans_read) return;
  plans_read = true;
  const char *text = getenv("HALFMOON_EMU_FAIL");
  while (text && *text) {
    const char *const end = strchrnul(text, ',');
    const std::string one(text, end);
    const size_t colon = one.find(':');
    if (colon != std::string::npos) plans.push_back({one.substr(0, colon), atoi(one.c_str() + colon + 1)});
    text = *end ? end + 1 : end;
  }
}

/* Is this call one that was to fail? */
bool planned(const char *name) {
  read_plans();
  bool fails = false;
  for (plan &p : plans)
    if ((p.name == "call" || p.name == name) && p.left > 0 && --p.left == 0) fails = true;
  return fails;
}

cudaError_t failure_of(const std::string &name) {
  if (name.find("Malloc") != std::string::npos || name.find("Alloc") != std::string::npos)
    return cudaErrorMemoryAllocation;
  return name == "launch" ? cudaErrorLaunchOutOfResources : cudaErrorUnknown;
}

} // namespace

call::call(const char *name) : injected(false), error(cudaSuccess) {
  lock.lock();
  error = context_error;
  if (call_depth++) return;
  stats.calls++;
  if (error) {
    last_error = error;
    return;
  }
  if (planned(name)) {
    injected = true;
    error = note(failure_of(name));
  }
}

call::~call() {
  call_depth--;
  lock.unlock();
}

cudaError_t note(cudaError_t e) {
  if (e) last_error = e;
  return e;
}

void report(const char *format, ...) {
  char text[1400];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  last_report = text;
  stats.violations++;
  if (!setting("HALFMOON_EMU_QUIET", false)) fprintf(stderr, "CUDA test double: %s\n", text);
}

void set_sticky(cudaError_t e) {
  if (!context_error) context_error = e;
  last_error = context_error;
}

cudaError_t sticky(void) { return context_error; }

bool setting(const char *name, bool fallback) {
  const char *const text = getenv(name);
  return text && *text ? strcmp(text, "0") != 0 : fallback;
}

long setting_number(const char *name, long fallback) {
  const char *const text = getenv(name);
  return text && *text ? atol(text) : fallback;
}

bool is_pinned(const void *p, size_t bytes) {
  auto i = pinned.upper_bound((uintptr_t)p);
  if (i == pinned.begin()) return false;
  --i;
  return (uintptr_t)p + bytes <= i->first + i->second;
}

cudaError_t enqueue(const launch &what, cudaStream_t stream) {
  call entered("launch");
  if (entered.error) return entered.error;
  const cudaError_t bad = check_launch(what);
  if (bad) return note(bad);
  if (!stream_exists(stream)) return note(cudaErrorInvalidResourceHandle);
  stats.launches++;
  launch_counts[what.name]++;
  push(stream, [what] { run_kernel(what); });
  return cudaSuccess;
}

} // namespace hm_emu

using namespace hm_emu;

#define ENTER(name)                                                                                                    \
  call entered(name);                                                                                                  \
  if (entered.error) return entered.error

/* ====== Counters and control ====== */

void emu_get_stats(emu_stats *out) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  *out = stats;
}

void emu_reset_counts(void) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  const emu_stats before = stats;
  stats = emu_stats{};
  stats.live_allocations = before.live_allocations;
  stats.live_bytes = before.live_bytes;
  stats.peak_bytes = before.peak_bytes;
  stats.live_pinned = before.live_pinned;
  stats.live_objects = before.live_objects;
  launch_counts.clear();
}

const char *emu_last_report(void) { return last_report.c_str(); }

void emu_fail(const char *name, int n) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  plans_read = true;
  if (n <= 0) plans.clear();
  else plans.push_back({name, n});
}

uint64_t emu_launches_of(const char *kernel) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  const auto i = launch_counts.find(kernel);
  return i == launch_counts.end() ? 0 : i->second;
}

/* ====== Errors ====== */

/* X(name, text) */
#define CUDA_ERRORS(X)                                                                                                 \
  X(cudaSuccess, "no error")                                                                                           \
  X(cudaErrorInvalidValue, "invalid argument")                                                                         \
  X(cudaErrorMemoryAllocation, "out of memory")                                                                        \
  X(cudaErrorInitializationError, "initialization error")                                                              \
  X(cudaErrorInvalidConfiguration, "invalid configuration argument")                                                   \
  X(cudaErrorInvalidDevicePointer, "invalid device pointer")                                                           \
  X(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy")                                              \
  X(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version")                       \
  X(cudaErrorInvalidDeviceFunction, "invalid device function")                                                         \
  X(cudaErrorNoDevice, "no CUDA-capable device is detected")                                                           \
  X(cudaErrorInvalidDevice, "invalid device ordinal")                                                                  \
  X(cudaErrorInvalidKernelImage, "device kernel image is invalid")                                                     \
  X(cudaErrorDeviceUninitialized, "invalid device context")                                                            \
  X(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device")                       \
  X(cudaErrorInvalidPtx, "a PTX JIT compilation failed")                                                               \
  X(cudaErrorInvalidResourceHandle, "invalid resource handle")                                                         \
  X(cudaErrorSymbolNotFound, "named symbol not found")                                                                 \
  X(cudaErrorNotReady, "device not ready")                                                                             \
  X(cudaErrorIllegalAddress, "an illegal memory access was encountered")                                               \
  X(cudaErrorLaunchOutOfResources, "too many resources requested for launch")                                          \
  X(cudaErrorAssert, "device-side assert triggered")                                                                   \
  X(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped")               \
  X(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region")                     \
  X(cudaErrorMisalignedAddress, "misaligned address")                                                                  \
  X(cudaErrorLaunchFailure, "unspecified launch failure")                                                              \
  X(cudaErrorNotPermitted, "operation not permitted")                                                                  \
  X(cudaErrorNotSupported, "operation not supported")                                                                  \
  X(cudaErrorUnknown, "unknown error")

const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define X(name, text)                                                                                                  \
  case name: return #name;
    CUDA_ERRORS(X)
#undef X
  }
  return "unrecognized error code";
}

/* The text of a violation is told with the error that it led to: there is no better place for it. */
const char *cudaGetErrorString(cudaError_t error) {
  const char *text = "unrecognized error code";
  switch (error) {
#define X(name, words)                                                                                                 \
  case name: text = words; break;
    CUDA_ERRORS(X)
#undef X
  }
  if (!error || error != context_error) return text;
  static thread_local std::string with_report;
  with_report = std::string(text) + " (" + last_report + ")";
  return with_report.c_str();
}

cudaError_t cudaPeekAtLastError(void) { return context_error ? context_error : last_error; }

cudaError_t cudaGetLastError(void) {
  const cudaError_t e = cudaPeekAtLastError();
  last_error = context_error;
  return e;
}

/* ====== Device ====== */

static void capability(int *major, int *minor) {
  const char *const text = getenv("HALFMOON_EMU_CC");
  *major = 9;
  *minor = 0;
  if (text && *text) sscanf(text, "%d.%d", major, minor);
}

static const int CLOCK_KHZ = 1000000;

/* The CUDA version that the driver knows, as cudaDriverGetVersion gives it. */
static int driver_version(void) {
  const char *const text = getenv("HALFMOON_EMU_DRIVER");
  int major = 0, minor = 0;
  if (!text || !*text) return CUDART_VERSION;
  sscanf(text, "%d.%d", &major, &minor);
  return major * 1000 + minor * 10;
}

/* As with CUDA, a driver of an older major version serves nothing. */
cudaError_t cudaGetDeviceCount(int *count) {
  ENTER("cudaGetDeviceCount");
  if (!count) return note(cudaErrorInvalidValue);
  *count = 0;
  if (driver_version() / 1000 < CUDART_VERSION / 1000) return note(cudaErrorInsufficientDriver);
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  ENTER("cudaSetDevice");
  return device == 0 ? cudaSuccess : note(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDevice(int *device) {
  ENTER("cudaGetDevice");
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int device) {
  ENTER("cudaGetDeviceProperties");
  if (device != 0 || !prop) return note(device ? cudaErrorInvalidDevice : cudaErrorInvalidValue);
  *prop = cudaDeviceProp{};
  strcpy(prop->name, "emulated (test double)");
  prop->totalGlobalMem = device_memory_total();
  prop->sharedMemPerBlock = SHARED_STATIC_LIMIT;
  prop->sharedMemPerBlockOptin = SHARED_OPT_IN_LIMIT;
  prop->sharedMemPerMultiprocessor = 228 << 10;
  prop->regsPerBlock = prop->regsPerMultiprocessor = 65536;
  prop->warpSize = 32;
  prop->maxThreadsPerBlock = 1024;
  prop->maxThreadsPerMultiProcessor = 2048;
  const int threads[3] = {1024, 1024, 64}, grid[3] = {2147483647, 65535, 65535};
  memcpy(prop->maxThreadsDim, threads, sizeof threads);
  memcpy(prop->maxGridSize, grid, sizeof grid);
  capability(&prop->major, &prop->minor);
  prop->multiProcessorCount = (int)setting_number("HALFMOON_EMU_SMS", 4);
  prop->concurrentKernels = prop->unifiedAddressing = prop->memoryPoolsSupported = 1;
  prop->asyncEngineCount = 2;
  prop->l2CacheSize = 4 << 20;
  prop->memoryBusWidth = 128;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attr, int device) {
  ENTER("cudaDeviceGetAttribute");
  if (device != 0 || !value) return note(device ? cudaErrorInvalidDevice : cudaErrorInvalidValue);
  int major, minor;
  capability(&major, &minor);
  switch (attr) {
  case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
  case cudaDevAttrMaxBlockDimX:
  case cudaDevAttrMaxBlockDimY: *value = 1024; break;
  case cudaDevAttrMaxBlockDimZ: *value = 64; break;
  case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
  case cudaDevAttrMaxGridDimY:
  case cudaDevAttrMaxGridDimZ: *value = 65535; break;
  case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_STATIC_LIMIT; break;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_OPT_IN_LIMIT; break;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
  case cudaDevAttrWarpSize: *value = 32; break;
  case cudaDevAttrClockRate:
  case cudaDevAttrMemoryClockRate: *value = CLOCK_KHZ; break;
  case cudaDevAttrMultiProcessorCount: *value = (int)setting_number("HALFMOON_EMU_SMS", 4); break;
  case cudaDevAttrConcurrentKernels:
  case cudaDevAttrUnifiedAddressing:
  case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
  case cudaDevAttrL2CacheSize: *value = 4 << 20; break;
  case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
  case cudaDevAttrAsyncEngineCount: *value = 2; break;
  case cudaDevAttrComputeCapabilityMajor: *value = major; break;
  case cudaDevAttrComputeCapabilityMinor: *value = minor; break;
  default: return note(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *pciBusId, int len, int device) {
  ENTER("cudaDeviceGetPCIBusId");
  if (device != 0 || !pciBusId || len < 13) return note(device ? cudaErrorInvalidDevice : cudaErrorInvalidValue);
  snprintf(pciBusId, (size_t)len, "0000:00:00.0");
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
  ENTER("cudaDeviceSynchronize");
  stats.synchronisations++;
  drain_all();
  pool_synchronised();
  return note(sticky());
}

/* Clears the context's error and all queued work.  Memory and objects stay as they are: the double's users release them. */
cudaError_t cudaDeviceReset(void) {
  call entered("cudaDeviceReset");
  forget_streams();
  context_error = last_error = cudaSuccess;
  last_report.clear();
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *driverVersion) {
  ENTER("cudaDriverGetVersion");
  *driverVersion = driver_version();
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *runtimeVersion) {
  ENTER("cudaRuntimeGetVersion");
  *runtimeVersion = CUDART_VERSION;
  return cudaSuccess;
}

/* ====== Device memory ====== */

static cudaError_t allocate(void **out, size_t size, pool *from) {
  if (!out) return note(cudaErrorInvalidValue);
  *out = nullptr;
  if (!size) return cudaSuccess;
  *out = device_alloc(size, from);
  return *out ? cudaSuccess : note(cudaErrorMemoryAllocation);
}

cudaError_t cudaMalloc(void **devPtr, size_t size) {
  ENTER("cudaMalloc");
  return allocate(devPtr, size, nullptr);
}

cudaError_t cudaFree(void *devPtr) {
  call entered("cudaFree");
  if (!devPtr || entered.injected) return entered.error;
  drain_all(); /* CUDA waits for the device before it takes memory back */
  stats.synchronisations++;
  if (!device_free(devPtr)) {
    report("cudaFree: no allocation begins at %s", describe(devPtr, 0).c_str());
    return note(cudaErrorInvalidValue);
  }
  return entered.error;
}

cudaError_t cudaMallocAsync(void **devPtr, size_t size, cudaStream_t hStream) {
  ENTER("cudaMallocAsync");
  if (!stream_exists(hStream)) return note(cudaErrorInvalidResourceHandle);
  return allocate(devPtr, size, &default_pool);
}

cudaError_t cudaMallocFromPoolAsync(void **ptr, size_t size, cudaMemPool_t memPool, cudaStream_t stream) {
  ENTER("cudaMallocFromPoolAsync");
  if (!stream_exists(stream) || (pool *)memPool != &default_pool) return note(cudaErrorInvalidResourceHandle);
  return allocate(ptr, size, &default_pool);
}

cudaError_t cudaFreeAsync(void *devPtr, cudaStream_t hStream) {
  call entered("cudaFreeAsync");
  if (!devPtr || entered.injected) return entered.error;
  block *const b = block_at(devPtr);
  if (!b || b->freeing) {
    report("cudaFreeAsync: %s %s", b ? "freed before:" : "no allocation begins at", describe(devPtr, 0).c_str());
    return note(cudaErrorInvalidValue);
  }
  if (!stream_exists(hStream)) return note(cudaErrorInvalidResourceHandle);
  b->freeing = true;
  push(hStream, [=] { device_free(devPtr); });
  return entered.error;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  ENTER("cudaMemGetInfo");
  if (free) *free = device_memory_free();
  if (total) *total = device_memory_total();
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *ptr) {
  ENTER("cudaPointerGetAttributes");
  if (!attributes) return note(cudaErrorInvalidValue);
  *attributes = cudaPointerAttributes{cudaMemoryTypeUnregistered, -1, nullptr, (void *)ptr};
  if (block_with(ptr, 1)) *attributes = cudaPointerAttributes{cudaMemoryTypeDevice, 0, (void *)ptr, nullptr};
  else if (is_pinned(ptr, 1)) *attributes = cudaPointerAttributes{cudaMemoryTypeHost, 0, (void *)ptr, (void *)ptr};
  return cudaSuccess;
}

/* ====== Pools ====== */

static cudaError_t give_pool(cudaMemPool_t *memPool, int device) {
  if (device != 0 || !memPool) return note(device ? cudaErrorInvalidDevice : cudaErrorInvalidValue);
  *memPool = (cudaMemPool_t)&default_pool;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *memPool, int device) {
  ENTER("cudaDeviceGetDefaultMemPool");
  return give_pool(memPool, device);
}

cudaError_t cudaDeviceGetMemPool(cudaMemPool_t *memPool, int device) {
  ENTER("cudaDeviceGetMemPool");
  return give_pool(memPool, device);
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t memPool, enum cudaMemPoolAttr attr, void *value) {
  ENTER("cudaMemPoolSetAttribute");
  pool *const p = (pool *)memPool;
  if (p != &default_pool || !value) return note(cudaErrorInvalidValue);
  switch (attr) {
  case cudaMemPoolReuseFollowEventDependencies:
  case cudaMemPoolReuseAllowOpportunistic:
  case cudaMemPoolReuseAllowInternalDependencies: p->reuse[attr] = *(int *)value; return cudaSuccess;
  case cudaMemPoolAttrReleaseThreshold: p->threshold = *(uint64_t *)value; return cudaSuccess;
  case cudaMemPoolAttrReservedMemHigh:
    if (*(uint64_t *)value) break;
    p->reserved_high = p->reserved;
    return cudaSuccess;
  case cudaMemPoolAttrUsedMemHigh:
    if (*(uint64_t *)value) break;
    p->used_high = p->used;
    return cudaSuccess;
  default: break;
  }
  return note(cudaErrorInvalidValue);
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t memPool, enum cudaMemPoolAttr attr, void *value) {
  ENTER("cudaMemPoolGetAttribute");
  const pool *const p = (pool *)memPool;
  if (p != &default_pool || !value) return note(cudaErrorInvalidValue);
  switch (attr) {
  case cudaMemPoolReuseFollowEventDependencies:
  case cudaMemPoolReuseAllowOpportunistic:
  case cudaMemPoolReuseAllowInternalDependencies: *(int *)value = p->reuse[attr]; break;
  case cudaMemPoolAttrReleaseThreshold: *(uint64_t *)value = p->threshold; break;
  case cudaMemPoolAttrReservedMemCurrent: *(uint64_t *)value = p->reserved; break;
  case cudaMemPoolAttrReservedMemHigh: *(uint64_t *)value = p->reserved_high; break;
  case cudaMemPoolAttrUsedMemCurrent: *(uint64_t *)value = p->used; break;
  case cudaMemPoolAttrUsedMemHigh: *(uint64_t *)value = p->used_high; break;
  default: return note(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t memPool, size_t minBytesToKeep) {
  ENTER("cudaMemPoolTrimTo");
  if ((pool *)memPool != &default_pool) return note(cudaErrorInvalidValue);
  pool_trim(&default_pool, minBytesToKeep);
  return cudaSuccess;
}

/* ====== Pinned host memory ====== */

static cudaError_t allocate_host(void **out, size_t size) {
  if (!out) return note(cudaErrorInvalidValue);
  *out = nullptr;
  if (!size) return cudaSuccess;
  void *p = nullptr;
  if (posix_memalign(&p, 4096, size)) return note(cudaErrorMemoryAllocation);
  pinned[(uintptr_t)p] = size;
  stats.live_pinned++;
  *out = p;
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void **ptr, size_t size) {
  ENTER("cudaMallocHost");
  return allocate_host(ptr, size);
}

cudaError_t cudaHostAlloc(void **pHost, size_t size, unsigned int) {
  ENTER("cudaHostAlloc");
  return allocate_host(pHost, size);
}

cudaError_t cudaFreeHost(void *ptr) {
  call entered("cudaFreeHost");
  if (!ptr || entered.injected) return entered.error;
  drain_all();
  if (!pinned.erase((uintptr_t)ptr)) return note(cudaErrorInvalidValue);
  stats.live_pinned--;
  free(ptr);
  return entered.error;
}

cudaError_t cudaHostRegister(void *ptr, size_t size, unsigned int) {
  ENTER("cudaHostRegister");
  if (!ptr || !size) return note(cudaErrorInvalidValue);
  if (is_pinned(ptr, 1)) return note(cudaErrorHostMemoryAlreadyRegistered);
  pinned[(uintptr_t)ptr] = size;
  stats.live_pinned++;
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *ptr) {
  call entered("cudaHostUnregister");
  drain_all();
  if (!pinned.erase((uintptr_t)ptr)) return note(cudaErrorHostMemoryNotRegistered);
  stats.live_pinned--;
  return entered.error;
}

/* ====== Copies ====== */

/* An end of a copy: device memory must lie in one live allocation, host memory must not be the device's. */
static bool end_is_good(const char *name, const void *p, size_t bytes, bool device) {
  if (!device && !is_device(p)) return true;
  if (!device) {
    report("%s: %s is device memory where host memory is meant", name, describe(p, bytes).c_str());
    return false;
  }
  if (!is_device(p)) {
    report("%s: %p is not device memory", name, p);
    return false;
  }
  const block *const b = block_with(p, bytes);
  if (b && !b->freeing) return true;
  if (b) report("%s: %s was given to cudaFreeAsync", name, describe(p, bytes).c_str());
  else report("%s: outside every live allocation: %s", name, describe(p, bytes).c_str());
  return false;
}

static void count_copy(bool from_device, bool to_device, size_t bytes) {
  uint64_t *const n = from_device && to_device ? &stats.copies_d2d
                      : from_device            ? &stats.copies_d2h
                                               : &stats.copies_h2d;
  uint64_t *const b = from_device && to_device ? &stats.bytes_d2d : from_device ? &stats.bytes_d2h : &stats.bytes_h2d;
  if (!from_device && !to_device) return;
  ++*n;
  *b += bytes;
}

/* Copies when its turn comes, unless the memory has been freed since. */
static void run_copy(const char *name, void *dst, const void *src, size_t bytes) {
  if (sticky()) return;
  if ((is_device(dst) && !block_with(dst, bytes)) || (is_device(src) && !block_with(src, bytes))) {
    report("%s: memory was freed before the copy ran: %s", name, describe(is_device(dst) ? dst : src, bytes).c_str());
    set_sticky(cudaErrorIllegalAddress);
    return;
  }
  device_access access;
  memmove(dst, src, bytes);
}

static cudaError_t copy(const char *name, void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                        cudaStream_t stream, bool wait) {
  if (!stream_exists(stream)) return note(cudaErrorInvalidResourceHandle);
  if (!bytes) return cudaSuccess;
  if ((unsigned)kind > cudaMemcpyDefault) return note(cudaErrorInvalidMemcpyDirection);
  if (!dst || !src) return note(cudaErrorInvalidValue);
  bool to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  bool from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (kind == cudaMemcpyDefault) to = is_device(dst), from = is_device(src);
  if (!end_is_good(name, dst, bytes, to) || !end_is_good(name, src, bytes, from)) return note(cudaErrorInvalidValue);
  count_copy(from, to, bytes);
  const bool reads_now = !wait && !from && !is_pinned(src, bytes);
  if (reads_now) {
    const std::shared_ptr<void> staged(malloc(bytes), free);
    if (!staged) return note(cudaErrorMemoryAllocation);
    memcpy(staged.get(), src, bytes);
    push(stream, [=] { run_copy(name, dst, staged.get(), bytes); });
    return cudaSuccess;
  }
  push(stream, [=] { run_copy(name, dst, src, bytes); });
  if (wait || (from && !to && !is_pinned(dst, bytes))) {
    stats.synchronisations += !(from && to);
    drain(stream);
    return note(sticky());
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *dst, const void *src, size_t count, enum cudaMemcpyKind kind) {
  ENTER("cudaMemcpy");
  return copy("cudaMemcpy", dst, src, count, kind, nullptr, true);
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t count, enum cudaMemcpyKind kind, cudaStream_t stream) {
  ENTER("cudaMemcpyAsync");
  return copy("cudaMemcpyAsync", dst, src, count, kind, stream, false);
}

static cudaError_t set(const char *name, void *p, int value, size_t bytes, cudaStream_t stream) {
  if (!stream_exists(stream)) return note(cudaErrorInvalidResourceHandle);
  if (!bytes) return cudaSuccess;
  if (!end_is_good(name, p, bytes, true)) return note(cudaErrorInvalidValue);
  stats.memsets++;
  stats.bytes_memset += bytes;
  push(stream, [=] {
    if (sticky()) return;
    if (!block_with(p, bytes)) {
      report("%s: memory was freed before it ran: %s", name, describe(p, bytes).c_str());
      set_sticky(cudaErrorIllegalAddress);
      return;
    }
    device_access access;
    memset(p, value, bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaMemset(void *devPtr, int value, size_t count) {
  ENTER("cudaMemset");
  return set("cudaMemset", devPtr, value, count, nullptr);
}

cudaError_t cudaMemsetAsync(void *devPtr, int value, size_t count, cudaStream_t stream) {
  ENTER("cudaMemsetAsync");
  return set("cudaMemsetAsync", devPtr, value, count, stream);
}

/* ====== Kernels ====== */

cudaError_t cudaFuncSetAttribute(const void *func, enum cudaFuncAttribute attr, int value) {
  ENTER("cudaFuncSetAttribute");
  if (attr == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (!func || attr != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > SHARED_OPT_IN_LIMIT)
    return note(cudaErrorInvalidValue);
  allow_dynamic(func, (size_t)value);
  return cudaSuccess;
}

/* By threads and shared memory alone: the double knows no registers. */
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *numBlocks, const void *func, int blockSize,
                                                          size_t dynamicSMemSize) {
  ENTER("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  if (!numBlocks || !func || blockSize < 1 || blockSize > 1024) return note(cudaErrorInvalidValue);
  int n = std::min(2048 / ((blockSize + 31) / 32 * 32), 32);
  if (dynamicSMemSize) n = std::min(n, (int)((228u << 10) / (dynamicSMemSize + 1024)));
  *numBlocks = n;
  return cudaSuccess;
}
