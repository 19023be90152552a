/*
 * races.cu -- kernels for ThreadSanitizer: one that is right, and two races that no wake order need show.  `races NAME` runs one.
 *
 * Built by emu.mk as emu-tsan and run by spec/emu_spec.lua.
 */
#include "device.h"

#include <stdio.h>
#include <string>

__global__ void good(const float *x, float *y) {
  HM_SHARED(float, s, [64]);
  const int t = (int)threadIdx.x;
  s[t] = x[t];
  HM_BARRIER();
  const float v = s[63 - t];
  HM_BARRIER();
  s[t] = -v;
  HM_BARRIER();
  y[t + 64 * (int)blockIdx.x] = s[63 - t] + __shfl_xor_sync(0xffffffffu, v, 1);
  atomicAdd(y + 200, 1.0f);
}

__global__ void missing_barrier(const float *x, float *y) {
  HM_SHARED(float, s, [64]);
  const int t = (int)threadIdx.x;
  s[t] = x[t];
  HM_BARRIER();
  const float first = s[0];
  s[t] = -first;
  HM_BARRIER();
  y[t] = s[63 - t] + first;
}

__global__ void blocks_without_atomics(const float *x, float *y) {
  if (threadIdx.x == 0) y[0] += x[0];
}

int main(int, char **arguments) {
  const std::string name = arguments[1];
  float *x = NULL, *y = NULL;
  cudaMalloc((void **)&x, 256);
  cudaMalloc((void **)&y, 1024);
  cudaMemset(x, 0, 256);
  cudaMemset(y, 0, 1024);
  if (name == "good") HM_LAUNCH(good, 3, 64, 0, 0, x, y);
  if (name == "missing_barrier") HM_LAUNCH(missing_barrier, 1, 64, 0, 0, x, y);
  if (name == "blocks_without_atomics") HM_LAUNCH(blocks_without_atomics, 3, 32, 0, 0, x, y);
  printf("%s\n", cudaGetErrorName(cudaDeviceSynchronize()));
  return 0;
}
