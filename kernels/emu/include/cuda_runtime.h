/*
 * cuda_runtime.h -- the runtime's calls with C++'s conveniences: typed allocation, kernels as arguments, make_float4.
 *
 * Part of kernels/emu, a test double: it shows no speed, no memory model, no real cuBLAS.  Found on the include path in place of the
 * toolkit's header of that name.
 */
#ifndef HM_EMU_CUDA_RUNTIME_H
#define HM_EMU_CUDA_RUNTIME_H

#include "cuda_runtime_api.h"

#ifdef __cplusplus

static inline float2 make_float2(float x, float y) { return float2{x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return int2{x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return int4{x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return uint2{x, y}; }
static inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return uint3{x, y, z}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return double2{x, y}; }

template <class T> cudaError_t cudaMalloc(T **p, size_t size) { return cudaMalloc((void **)(void *)p, size); }
template <class T> cudaError_t cudaMallocAsync(T **p, size_t size, cudaStream_t stream) {
  return cudaMallocAsync((void **)(void *)p, size, stream);
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t size, unsigned int flags = 0) {
  return cudaHostAlloc((void **)(void *)p, size, flags);
}
template <class T> cudaError_t cudaHostAlloc(T **p, size_t size, unsigned int flags) {
  return cudaHostAlloc((void **)(void *)p, size, flags);
}
template <class R, class... P>
cudaError_t cudaFuncSetAttribute(R (*kernel)(P...), enum cudaFuncAttribute attr, int value) {
  return cudaFuncSetAttribute((const void *)kernel, attr, value);
}
template <class R, class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, R (*kernel)(P...), int block, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, (const void *)kernel, block, shared);
}

#endif
#endif
