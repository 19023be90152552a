/*
 * cuda_runtime_api.h -- the calls of the CUDA runtime that the test double knows.
 *
 * Part of kernels/emu, a test double: it shows no speed, no memory model, no real cuBLAS.  Found on the include path in place of the
 * toolkit's header of that name.  Plain C.  scripts/emu-headers compares every line that starts with HM_EMU_API with the toolkit's
 * declaration.  What each call does is the CUDA manual's business; how the double does it is told in runtime.cpp, memory.cpp and
 * stream.cpp.
 */
#ifndef HM_EMU_CUDA_RUNTIME_API_H
#define HM_EMU_CUDA_RUNTIME_API_H

#include "driver_types.h"
#include "library_types.h"

#define HALFMOON_EMU 1 /* tells code that it is built against the test double */
#define CUDART_VERSION 12000

#ifdef __cplusplus
#define HM_EMU_API extern "C"
#define HM_EMU_DV(value) = value
#else
#define HM_EMU_API extern
#define HM_EMU_DV(value)
#endif

/* ====== Device ====== */

HM_EMU_API cudaError_t cudaGetDeviceCount(int *count);
HM_EMU_API cudaError_t cudaSetDevice(int device);
HM_EMU_API cudaError_t cudaGetDevice(int *device);
HM_EMU_API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int device);
HM_EMU_API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attr, int device);
HM_EMU_API cudaError_t cudaDeviceGetPCIBusId(char *pciBusId, int len, int device);
HM_EMU_API cudaError_t cudaDeviceSynchronize(void);
HM_EMU_API cudaError_t cudaDeviceReset(void);
HM_EMU_API cudaError_t cudaDriverGetVersion(int *driverVersion);
HM_EMU_API cudaError_t cudaRuntimeGetVersion(int *runtimeVersion);

/* ====== Errors ====== */

HM_EMU_API cudaError_t cudaGetLastError(void);
HM_EMU_API cudaError_t cudaPeekAtLastError(void);
HM_EMU_API const char *cudaGetErrorName(cudaError_t error);
HM_EMU_API const char *cudaGetErrorString(cudaError_t error);

/* ====== Memory ====== */

HM_EMU_API cudaError_t cudaMalloc(void **devPtr, size_t size);
HM_EMU_API cudaError_t cudaFree(void *devPtr);
HM_EMU_API cudaError_t cudaMallocAsync(void **devPtr, size_t size, cudaStream_t hStream);
HM_EMU_API cudaError_t cudaMallocFromPoolAsync(void **ptr, size_t size, cudaMemPool_t memPool, cudaStream_t stream);
HM_EMU_API cudaError_t cudaFreeAsync(void *devPtr, cudaStream_t hStream);
HM_EMU_API cudaError_t cudaMallocHost(void **ptr, size_t size);
HM_EMU_API cudaError_t cudaHostAlloc(void **pHost, size_t size, unsigned int flags);
HM_EMU_API cudaError_t cudaFreeHost(void *ptr);
HM_EMU_API cudaError_t cudaHostRegister(void *ptr, size_t size, unsigned int flags);
HM_EMU_API cudaError_t cudaHostUnregister(void *ptr);
HM_EMU_API cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
HM_EMU_API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *ptr);
HM_EMU_API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *memPool, int device);
HM_EMU_API cudaError_t cudaDeviceGetMemPool(cudaMemPool_t *memPool, int device);
HM_EMU_API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t memPool, enum cudaMemPoolAttr attr, void *value);
HM_EMU_API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t memPool, enum cudaMemPoolAttr attr, void *value);
HM_EMU_API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t memPool, size_t minBytesToKeep);

/* ====== Copies ====== */

HM_EMU_API cudaError_t cudaMemcpy(void *dst, const void *src, size_t count, enum cudaMemcpyKind kind);
HM_EMU_API cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t count, enum cudaMemcpyKind kind,
                                       cudaStream_t stream HM_EMU_DV(0));
HM_EMU_API cudaError_t cudaMemset(void *devPtr, int value, size_t count);
HM_EMU_API cudaError_t cudaMemsetAsync(void *devPtr, int value, size_t count, cudaStream_t stream HM_EMU_DV(0));

/* ====== Streams and events ====== */

HM_EMU_API cudaError_t cudaStreamCreate(cudaStream_t *pStream);
HM_EMU_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *pStream, unsigned int flags);
HM_EMU_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *pStream, unsigned int flags, int priority);
HM_EMU_API cudaError_t cudaDeviceGetStreamPriorityRange(int *leastPriority, int *greatestPriority);
HM_EMU_API cudaError_t cudaStreamDestroy(cudaStream_t stream);
HM_EMU_API cudaError_t cudaStreamSynchronize(cudaStream_t stream);
HM_EMU_API cudaError_t cudaStreamQuery(cudaStream_t stream);
HM_EMU_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags HM_EMU_DV(0));
HM_EMU_API cudaError_t cudaEventCreate(cudaEvent_t *event);
HM_EMU_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags);
HM_EMU_API cudaError_t cudaEventDestroy(cudaEvent_t event);
HM_EMU_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream HM_EMU_DV(0));
HM_EMU_API cudaError_t cudaEventQuery(cudaEvent_t event);
HM_EMU_API cudaError_t cudaEventSynchronize(cudaEvent_t event);
HM_EMU_API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end);
HM_EMU_API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t fn, void *userData);

/* ====== Kernels ====== */

HM_EMU_API cudaError_t cudaFuncSetAttribute(const void *func, enum cudaFuncAttribute attr, int value);
HM_EMU_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *numBlocks, const void *func, int blockSize,
                                                                     size_t dynamicSMemSize);
HM_EMU_API cudaError_t
cudaGetDriverEntryPointByVersion(const char *symbol, void **funcPtr, unsigned int cudaVersion, unsigned long long flags,
                                 enum cudaDriverEntryPointQueryResult *driverStatus HM_EMU_DV(NULL));

#endif
