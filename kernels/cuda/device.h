/*
 * device.h -- what every .cu file of this folder writes instead of CUDA's extensions, so that it compiles unchanged by nvcc and, as plain
 * C++17, by the host's compiler against the test double in kernels/emu.
 *
 *   HM_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)   launches; gives the cudaError_t of the launch (never throws, never waits).
 *                               A kernel with template arguments stands in parentheses: HM_LAUNCH((sum<float, 4>), ...)
 *   HM_SHARED(T, name, [N])     a static shared array (dimensions may repeat: [N][M]; none: a single T)
 *   HM_DYN_SHARED(T, name)      the launch's dynamic shared memory, 16-byte aligned, as T *name
 *   HM_BARRIER()                __syncthreads(), which works too
 *   hm_lane(), hm_warp()        lane within the warp, warp within the block, for blocks of any shape
 *   hm_load16(p), hm_store16(p, v)       16 bytes at once (uint4); p must be 16-byte aligned
 *   hm_dev_f16_to_f32 ... f32_to_bf16    16-bit storage to float and back: the processor's conversion on the GPU, half.h on the host
 *
 * Under their CUDA names: threadIdx blockIdx blockDim gridDim, __global__ __device__ __host__ __forceinline__ __launch_bounds__, __syncthreads
 * and _or _and _count, __syncwarp, __shfl_sync __shfl_up_sync __shfl_down_sync __shfl_xor_sync, __ballot_sync __any_sync __all_sync, atomicAdd
 * (int, unsigned, unsigned long long, float, double), atomicMax atomicMin atomicOr atomicAnd atomicExch atomicCAS, __ldg, __threadfence,
 * __umulhi, __popc, __ffs, __clz, __float_as_uint and kin, float4 uint4 int4 float2 ... with make_*.
 *
 * Rules: no raw __shared__ (the double would not see it), no __constant__ or __device__ variables, parameters by value and below 4 KiB,
 * blocks of whole warps where warp operations are used, every thread of a block reaches every barrier.  Elementwise files are built without
 * contraction on both sides (nvcc -fmad=false, g++ -ffp-contract=off) and take their functions from kernels/math.h.
 *
 * Owns nothing.  Includes kernels/half.h and kernels/math.h and the CUDA runtime's header (the toolkit's, or kernels/emu's).
 */
#ifndef HM_CUDA_DEVICE_H
#define HM_CUDA_DEVICE_H

#ifndef __cplusplus
#error "device.h is for .cu files"
#endif

#include <cuda_runtime.h>
#include "half.h"

#ifdef __CUDACC__

#include <cuda_fp16.h>

/* clang-format off */
#define HM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                      \
  ((kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__), cudaGetLastError())
/* clang-format on */
#define HM_SHARED(T, name, dims) __shared__ T name dims
#define HM_DYN_SHARED(T, name)                                                                                         \
  extern __shared__ __align__(16) unsigned char hm_dynamic_shared[];                                                   \
  T *const name = reinterpret_cast<T *>(hm_dynamic_shared)
#define HM_BARRIER() __syncthreads()

#else

#include <emu_device.h>

#define HM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                      \
  hm_emu::start(#kernel, (grid), (block), (shared_bytes), (stream), (kernel)__VA_OPT__(, ) __VA_ARGS__)
#define HM_SHARED(T, name, dims)                                                                                       \
  typedef T name##_hm_type dims;                                                                                       \
  static hm_emu::slot name##_hm_slot = {sizeof(name##_hm_type), alignof(T), 0, nullptr};                               \
  name##_hm_type &name = hm_emu::shared<name##_hm_type>(name##_hm_slot, #name)
#define HM_DYN_SHARED(T, name) T *const name = reinterpret_cast<T *>(hm_emu::table->dynamic())
#define HM_BARRIER() __syncthreads()
#define __shared__ HM_SHARED_must_be_used_instead_of_raw_shared

#endif

#ifdef __CUDACC__
#define HM_DEV static __device__ __forceinline__
#else
#define HM_DEV static inline __attribute__((unused))
#endif

/* ====== Place of a thread ====== */

HM_DEV unsigned hm_thread(void) { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
HM_DEV unsigned hm_lane(void) { return hm_thread() & 31u; }
HM_DEV unsigned hm_warp(void) { return hm_thread() >> 5; }

/* ====== 16 bytes at once ====== */

#ifdef __CUDACC__
#define HM_CHECK_ALIGNED(p, what)
#else
#define HM_CHECK_ALIGNED(p, what)                                                                                      \
  if ((uintptr_t)(p)&15u)                                                                                              \
  hm_emu::table->complain(cudaErrorMisalignedAddress, what ": the address is not 16-byte aligned", __FILE__, __LINE__)
#endif

HM_DEV uint4 hm_load16(const void *p) {
  HM_CHECK_ALIGNED(p, "hm_load16");
  return *static_cast<const uint4 *>(p);
}

HM_DEV void hm_store16(void *p, uint4 v) {
  HM_CHECK_ALIGNED(p, "hm_store16");
  *static_cast<uint4 *>(p) = v;
}

/* ====== 16-bit storage ====== */

#ifdef __CUDACC__
HM_DEV float hm_dev_f16_to_f32(uint16_t h) { return __half2float(__ushort_as_half(h)); }
HM_DEV uint16_t hm_dev_f32_to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
HM_DEV float hm_dev_f16_to_f32(uint16_t h) { return hm_f16_to_f32(h); }
HM_DEV uint16_t hm_dev_f32_to_f16(float x) { return hm_f32_to_f16(x); }
#endif
HM_DEV float hm_dev_bf16_to_f32(uint16_t h) { return hm_bf16_to_f32(h); }
HM_DEV uint16_t hm_dev_f32_to_bf16(float x) { return hm_f32_to_bf16(x); }

#endif
