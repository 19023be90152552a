/*
 * cuda.h -- the calls of the driver that load and launch code compiled at run time.
 *
 * Part of kernels/emu, a test double: it shows no speed, no memory model, no real cuBLAS.  Found on the include path in place of the
 * toolkit's header of that name.  A module is a shared object made by nvrtc.cpp; streams are the runtime's.
 */
#ifndef HM_EMU_CUDA_H
#define HM_EMU_CUDA_H

#include "cuda_runtime_api.h"

#define CUDA_VERSION 12000

typedef enum cudaError_enum {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NOT_INITIALIZED = 3,
  CUDA_ERROR_NO_DEVICE = 100,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_IMAGE = 200,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_INVALID_PTX = 218,
  CUDA_ERROR_INVALID_HANDLE = 400,
  CUDA_ERROR_NOT_FOUND = 500,
  CUDA_ERROR_ILLEGAL_ADDRESS = 700,
  CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701,
  CUDA_ERROR_LAUNCH_FAILED = 719,
  CUDA_ERROR_UNKNOWN = 999
} CUresult;

typedef enum CUfunction_attribute_enum {
  CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 0,
  CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1,
  CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3,
  CU_FUNC_ATTRIBUTE_NUM_REGS = 4,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
} CUfunction_attribute;

typedef enum CUjit_option_enum {
  CU_JIT_MAX_REGISTERS = 0,
  CU_JIT_INFO_LOG_BUFFER = 3,
  CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES = 4,
  CU_JIT_ERROR_LOG_BUFFER = 5,
  CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6
} CUjit_option;

typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2

HM_EMU_API CUresult cuInit(unsigned int Flags);
HM_EMU_API CUresult cuDriverGetVersion(int *driverVersion);
HM_EMU_API CUresult cuDeviceGet(CUdevice *device, int ordinal);
HM_EMU_API CUresult cuDeviceGetCount(int *count);
HM_EMU_API CUresult cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev);
HM_EMU_API CUresult cuDevicePrimaryCtxRelease(CUdevice dev);
HM_EMU_API CUresult cuCtxSetCurrent(CUcontext ctx);
HM_EMU_API CUresult cuCtxGetCurrent(CUcontext *pctx);
HM_EMU_API CUresult cuCtxSynchronize(void);
HM_EMU_API CUresult cuModuleLoadData(CUmodule *module, const void *image);
HM_EMU_API CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned int numOptions,
                                       CUjit_option *options, void **optionValues);
HM_EMU_API CUresult cuModuleUnload(CUmodule hmod);
HM_EMU_API CUresult cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name);
HM_EMU_API CUresult cuFuncGetAttribute(int *pi, CUfunction_attribute attrib, CUfunction hfunc);
HM_EMU_API CUresult cuFuncSetAttribute(CUfunction hfunc, CUfunction_attribute attrib, int value);
HM_EMU_API CUresult cuLaunchKernel(CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,
                                   unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ,
                                   unsigned int sharedMemBytes, CUstream hStream, void **kernelParams, void **extra);
HM_EMU_API CUresult cuGetErrorString(CUresult error, const char **pStr);
HM_EMU_API CUresult cuGetErrorName(CUresult error, const char **pStr);

#endif
