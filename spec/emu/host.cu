/*
 * host.cu -- the host's side of the test double: streams, events, memory, planned failures, counters.  `host NAME` runs one case.
 *
 * Run by spec/emu_spec.lua.  Prints what each case finds.
 */
#include "device.h"
#include "emu_stats.h"

#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <vector>

enum { N = 1024, BYTES = N * 4 };

__global__ void twice(const float *x, float *y, int n) {
  const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = 2.0f * x[i];
}

static const char *named(cudaError_t e) { return cudaGetErrorName(e); }

/* One stream makes, the other uses; with and without the event between them, with and without the last synchronisation. */
static void pipeline(bool wait, bool synchronise) {
  cudaStream_t a, b;
  cudaEvent_t made;
  float *x, *y, *in, *out;
  cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
  cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
  cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
  cudaMalloc((void **)&x, BYTES);
  cudaMalloc((void **)&y, BYTES);
  cudaMallocHost((void **)&in, BYTES);
  cudaMallocHost((void **)&out, BYTES);
  for (int i = 0; i < N; i++) in[i] = (float)i, out[i] = -1.0f;
  cudaMemcpyAsync(x, in, BYTES, cudaMemcpyHostToDevice, a);
  cudaEventRecord(made, a);
  if (wait) cudaStreamWaitEvent(b, made, 0);
  HM_LAUNCH(twice, 4, 256, 0, b, x, y, N);
  cudaMemcpyAsync(out, y, BYTES, cudaMemcpyDeviceToHost, b);
  if (synchronise) cudaStreamSynchronize(b);
  int wrong = 0;
  for (int i = 0; i < N; i++) wrong += out[i] != 2.0f * (float)i;
  printf("wrong %d\n", wrong);
  cudaFree(x);
  cudaFree(y);
  cudaFreeHost(in);
  cudaFreeHost(out);
  cudaEventDestroy(made);
  cudaStreamDestroy(a);
  cudaStreamDestroy(b);
  emu_stats s;
  emu_get_stats(&s);
  printf("left %d %d %d\n", (int)s.live_allocations, (int)s.live_pinned, (int)s.live_objects);
}

/* The default stream waits for a blocking stream, and the other way round. */
static void default_stream(void) {
  cudaStream_t a;
  float *x, *y, *in, *out;
  cudaStreamCreate(&a);
  cudaMalloc((void **)&x, BYTES);
  cudaMalloc((void **)&y, BYTES);
  cudaMallocHost((void **)&in, BYTES);
  cudaMallocHost((void **)&out, BYTES);
  for (int i = 0; i < N; i++) in[i] = 1.0f, out[i] = -1.0f;
  cudaMemcpyAsync(x, in, BYTES, cudaMemcpyHostToDevice, a);
  HM_LAUNCH(twice, 4, 256, 0, 0, x, y, N); /* default stream */
  cudaMemcpyAsync(out, y, BYTES, cudaMemcpyDeviceToHost, a);
  printf("before %s %g\n", named(cudaStreamQuery(a)), (double)out[5]);
  cudaStreamSynchronize(a);
  printf("after %s %g\n", named(cudaStreamQuery(a)), (double)out[5]);
}

static void host_access(bool write) {
  float *x;
  cudaMalloc((void **)&x, BYTES);
  cudaMemset(x, 0, BYTES);
  fflush(stdout);
  volatile float *const p = x;
  if (write) p[3] = 1.0f;
  else printf("read %g\n", (double)p[3]);
  printf("survived\n");
}

static void copies(void) {
  float *x;
  std::vector<float> h(N + 1);
  cudaMalloc((void **)&x, BYTES);
  printf("past the end %s\n", named(cudaMemcpy(h.data(), x, BYTES + 4, cudaMemcpyDeviceToHost)));
  printf("offset %s\n", named(cudaMemcpyAsync(x + 1, h.data(), BYTES, cudaMemcpyHostToDevice, 0)));
  printf("direction %s\n", named(cudaMemcpy(x, h.data(), BYTES, cudaMemcpyDeviceToHost)));
  printf("host for device %s\n", named(cudaMemcpy(h.data(), h.data(), 4, cudaMemcpyHostToDevice)));
  printf("memset %s\n", named(cudaMemset(x, 0, BYTES + 1)));
  cudaFree(x);
  printf("freed %s\n", named(cudaMemcpy(h.data(), x, 4, cudaMemcpyDeviceToHost)));
  printf("free twice %s\n", named(cudaFree(x)));
  printf("last %s", named(cudaGetLastError()));
  printf(" %s\n", named(cudaGetLastError()));
}

static void failing(void) {
  void *p;
  for (int i = 1; i <= 4; i++) printf("malloc %d %s\n", i, named(cudaMalloc(&p, 256)));
  emu_fail("launch", 2);
  float *x;
  cudaMalloc((void **)&x, BYTES);
  for (int i = 1; i <= 3; i++) printf("launch %d %s\n", i, named(HM_LAUNCH(twice, 4, 256, 0, 0, x, x, N)));
  emu_fail("call", 1);
  printf("any %s\n", named(cudaDeviceSynchronize()));
  printf("next %s\n", named(cudaDeviceSynchronize()));
}

static void counting(void) {
  float *x, *y;
  std::vector<float> h(N);
  cudaMalloc((void **)&x, BYTES);
  cudaMalloc((void **)&y, BYTES);
  emu_reset_counts();
  cudaMemcpy(x, h.data(), BYTES, cudaMemcpyHostToDevice);
  cudaMemcpyAsync(y, x, BYTES, cudaMemcpyDeviceToDevice, 0);
  for (int i = 0; i < 3; i++) HM_LAUNCH(twice, 4, 256, 0, 0, x, y, N);
  cudaMemsetAsync(x, 0, 16, 0);
  cudaMemcpy(h.data(), y, 8, cudaMemcpyDeviceToHost);
  cudaDeviceSynchronize();
  emu_stats s;
  emu_get_stats(&s);
  printf("launches %d %d\n", (int)s.launches, (int)emu_launches_of("twice"));
  printf("h2d %d %d d2h %d %d d2d %d %d\n", (int)s.copies_h2d, (int)s.bytes_h2d, (int)s.copies_d2h, (int)s.bytes_d2h,
         (int)s.copies_d2d, (int)s.bytes_d2d);
  printf("memsets %d %d\n", (int)s.memsets, (int)s.bytes_memset);
  printf("synchronisations %d\n", (int)s.synchronisations);
  printf("live %d %d\n", (int)s.live_allocations, (int)s.live_bytes);
}

static uint64_t pool_value(cudaMemPool_t pool, enum cudaMemPoolAttr which) {
  uint64_t v = 0;
  cudaMemPoolGetAttribute(pool, which, &v);
  return v;
}

static void pools(void) {
  cudaMemPool_t pool;
  cudaStream_t s;
  void *p, *q;
  const uint64_t mib = 1 << 20;
  uint64_t keep = 64 * mib;
  cudaDeviceGetDefaultMemPool(&pool, 0);
  cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep);
  cudaStreamCreate(&s);
  cudaMallocAsync(&p, 3 * mib, s);
  cudaMallocAsync(&q, 5 * mib, s);
  cudaFreeAsync(p, s);
  printf("freed twice %s\n", named(cudaFreeAsync(p, s)));
  cudaStreamSynchronize(s);
  printf("used %d high %d\n", (int)(pool_value(pool, cudaMemPoolAttrUsedMemCurrent) / mib),
         (int)(pool_value(pool, cudaMemPoolAttrUsedMemHigh) / mib));
  printf("reserved %d\n", (int)(pool_value(pool, cudaMemPoolAttrReservedMemCurrent) / mib));
  cudaMemPoolTrimTo(pool, 0);
  printf("trimmed %d\n", (int)(pool_value(pool, cudaMemPoolAttrReservedMemCurrent) / mib));
  printf("too much %s\n", named(cudaMallocAsync(&p, (size_t)5 << 30, s)));
}

static void device(void) {
  struct cudaDeviceProp p;
  int n, sms;
  cudaGetDeviceCount(&n);
  cudaGetDeviceProperties(&p, 0);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
  printf("%d %s %d.%d %d %d\n", n, p.name, p.major, p.minor, p.warpSize, sms == p.multiProcessorCount);
  printf("%s\n", named(cudaSetDevice(1)));
}

static void set_flag(void *p) { *(int *)p = 1; }

static void events(void) {
  cudaEvent_t a, b;
  cudaStream_t s;
  int flag = 0;
  float ms = -1;
  cudaStreamCreate(&s);
  cudaEventCreate(&a);
  cudaEventCreate(&b);
  cudaEventRecord(a, s);
  cudaLaunchHostFunc(s, set_flag, &flag);
  cudaEventRecord(b, s);
  printf("query %s", named(cudaEventQuery(b)));
  printf(" flag %d\n", flag);
  printf("synchronize %s", named(cudaEventSynchronize(b)));
  printf(" flag %d\n", flag);
  printf("elapsed %s", named(cudaEventElapsedTime(&ms, a, b)));
  printf(" %d\n", ms > 0);
  cudaEventDestroy(a);
  printf("gone %s\n", named(cudaEventRecord(a, s)));
}

int main(int, char **arguments) {
  const std::string name = arguments[1];
  if (name == "pipeline") pipeline(true, true);
  if (name == "no_wait") pipeline(false, true);
  if (name == "no_sync") pipeline(true, false);
  if (name == "default_stream") default_stream();
  if (name == "host_read") host_access(false);
  if (name == "host_write") host_access(true);
  if (name == "copies") copies();
  if (name == "failing") failing();
  if (name == "counting") counting();
  if (name == "pools") pools();
  if (name == "device") device();
  if (name == "events") events();
  return 0;
}
