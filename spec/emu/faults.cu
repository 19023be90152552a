/*
 * faults.cu -- kernels with one planted fault each: `faults NAME` runs one.
 *
 * Run by spec/emu_spec.lua, which looks at what the test double says.  Prints "launch STATUS", "then STATUS" (the next synchronisation), a hash of
 * the result's bits, and whether a NaN is in it.
 */
#include "device.h"

#include <stdio.h>
#include <string>
#include <vector>

__global__ void good(const float *x, float *y, int) {
  HM_SHARED(float, s, [64]);
  s[threadIdx.x] = x[threadIdx.x];
  HM_BARRIER();
  y[threadIdx.x] = s[63 - threadIdx.x];
}

__global__ void missing_barrier(const float *x, float *y, int) {
  HM_SHARED(float, s, [64]);
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[63 - threadIdx.x];
}

/* All must have read s[0] before it is written again. */
__global__ void missing_barrier_before_rewrite(const float *x, float *y, int) {
  HM_SHARED(float, s, [64]);
  const int t = (int)threadIdx.x;
  s[t] = x[t] + 1.0f;
  HM_BARRIER();
  const float first = s[0];
  s[t] = -first;
  HM_BARRIER();
  y[t] = first + s[63 - t];
}

__global__ void divergent_barrier(const float *x, float *y, int) {
  if (threadIdx.x < 20) {
    HM_BARRIER();
    y[threadIdx.x] = x[0];
  } else {
    HM_BARRIER();
    y[threadIdx.x] = x[1];
  }
}

__global__ void return_before_barrier(const float *x, float *y, int) {
  if (threadIdx.x >= 20) return;
  HM_BARRIER();
  y[threadIdx.x] = x[0];
}

__global__ void missing_lane(const float *x, float *y, int) {
  float v = x[threadIdx.x];
  if (threadIdx.x != 7) v += __shfl_xor_sync(0xffffffffu, v, 1);
  HM_BARRIER();
  y[threadIdx.x] = v;
}

__global__ void ended_lane(const float *x, float *y, int) {
  if (threadIdx.x == 9) return;
  y[threadIdx.x] = __shfl_down_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void lane_out_of_mask(const float *x, float *y, int) {
  y[threadIdx.x] = threadIdx.x < 16 ? __shfl_sync(0x0000ffffu, x[threadIdx.x], 20) : 0.0f;
}

__global__ void global_out_of_bounds(const float *x, float *y, int n) { y[threadIdx.x + n] = x[threadIdx.x]; }

__global__ void global_read_out_of_bounds(const float *x, float *y, int n) { y[threadIdx.x] = x[threadIdx.x + n]; }

__global__ void shared_out_of_bounds(const float *x, float *y, int n) {
  HM_SHARED(float, s, [64]);
  float *const p = s;
  p[threadIdx.x + n] = x[threadIdx.x];
  HM_BARRIER();
  y[threadIdx.x] = p[threadIdx.x + n];
}

__global__ void dynamic_out_of_bounds(const float *x, float *y, int n) {
  HM_DYN_SHARED(float, s);
  s[threadIdx.x + n] = x[threadIdx.x];
  HM_BARRIER();
  y[threadIdx.x] = s[threadIdx.x + n];
}

__global__ void misaligned(const float *x, float *y, int) {
  const uint4 v = hm_load16(x + 1);
  y[threadIdx.x] = __uint_as_float(v.x);
}

__global__ void null_pointer(const float *x, float *, int) { *(volatile float *)NULL = x[0]; }

__global__ void deep(const float *x, float *y, int n) {
  volatile char much[280 << 10];
  for (int i = 0; i < (int)sizeof much; i += 64) much[i] = (char)n;
  y[threadIdx.x] = x[threadIdx.x] + (float)much[n];
}

__global__ void too_much_static(const float *x, float *y, int) {
  HM_SHARED(float, a, [8000]);
  HM_SHARED(float, b, [8000]);
  a[threadIdx.x] = b[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = a[threadIdx.x] + b[threadIdx.x];
}

int main(int, char **arguments) {
  const std::string name = arguments[1];
  std::vector<float> x(64), result(64);
  for (size_t i = 0; i < 64; i++) x[i] = (float)i;
  float *dx = NULL, *dy = NULL;
  cudaMalloc((void **)&dx, 256);
  cudaMalloc((void **)&dy, 256);
  cudaMemcpy(dx, x.data(), 256, cudaMemcpyHostToDevice);
  cudaMemset(dy, 0, 256);
  cudaError_t e = cudaErrorUnknown;
#define RUN(kernel, grid, block, shared, n)                                                                            \
  if (name == #kernel) e = HM_LAUNCH(kernel, grid, block, shared, 0, dx, dy, n);
  RUN(good, 2, 64, 0, 0)
  RUN(missing_barrier, 1, 64, 0, 0)
  RUN(missing_barrier_before_rewrite, 1, 64, 0, 0)
  RUN(divergent_barrier, 1, 64, 0, 0)
  RUN(return_before_barrier, 1, 64, 0, 0)
  RUN(missing_lane, 1, 64, 0, 0)
  RUN(ended_lane, 1, 64, 0, 0)
  RUN(lane_out_of_mask, 1, 32, 0, 0)
  RUN(global_out_of_bounds, 1, 64, 0, 1)
  RUN(global_read_out_of_bounds, 1, 64, 0, 64)
  RUN(shared_out_of_bounds, 1, 64, 0, 1)
  RUN(dynamic_out_of_bounds, 1, 64, 256, 1)
  RUN(misaligned, 1, 32, 0, 0)
  RUN(null_pointer, 1, 32, 0, 0)
  RUN(deep, 1, 32, 0, 0)
  RUN(too_much_static, 1, 32, 0, 0)
  if (name == "too_many_threads") e = HM_LAUNCH(good, 1, dim3(64, 17), 0, 0, dx, dy, 0);
  if (name == "empty_grid") e = HM_LAUNCH(good, 0, 64, 0, 0, dx, dy, 0);
  if (name == "large_grid") e = HM_LAUNCH(good, dim3(1, 65536), 64, 0, 0, dx, dy, 0);
  if (name == "much_dynamic") e = HM_LAUNCH(dynamic_out_of_bounds, 1, 64, 50000, 0, dx, dy, 0);
  if (name == "host_pointer") e = HM_LAUNCH(good, 1, 64, 0, 0, x.data(), dy, 0);
  if (name == "small_overrun") { /* 100 bytes: the page's end is further than the allocation's */
    float *few = NULL;
    cudaMalloc((void **)&few, 100);
    e = HM_LAUNCH(global_out_of_bounds, 1, 25, 0, 0, dx, few, 1);
  }
  if (name == "use_after_free") {
    cudaFree(dx);
    e = HM_LAUNCH(good, 1, 64, 0, 0, dx, dy, 0);
  }
  printf("launch %s\n", cudaGetErrorName(e));
  const cudaError_t then = cudaDeviceSynchronize();
  printf("then %s: %s\n", cudaGetErrorName(then), cudaGetErrorString(then));
  if (then) {
    void *p = NULL;
    const cudaError_t a = cudaMalloc(&p, 16), b = cudaGetLastError(), c = cudaGetLastError();
    printf("sticky %s %s %s\n", cudaGetErrorName(a), cudaGetErrorName(b), cudaGetErrorName(c));
    cudaDeviceReset();
    const cudaError_t f = HM_LAUNCH(good, 1, 64, 0, 0, dy, dy, 0); /* the fibers are fit for use again */
    printf("after reset %s %s\n", cudaGetErrorName(f), cudaGetErrorName(cudaDeviceSynchronize()));
    return 0;
  }
  cudaMemcpy(result.data(), dy, 256, cudaMemcpyDeviceToHost);
  unsigned hash = 0;
  bool nan = false;
  for (float f : result) {
    hash = hash * 31 + hm_f32_bits(f);
    nan |= f != f;
  }
  printf("hash %08x nan %s\n", hash, nan ? "yes" : "no");
  return 0;
}
