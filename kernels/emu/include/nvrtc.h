/*
 * nvrtc.h -- compilation at run time, for the test double: the host's compiler makes a shared object.
 *
 * Part of kernels/emu, a test double: it shows no speed, no memory model, no real cuBLAS.  Found on the include path in place of the
 * toolkit's header of that name.  What nvrtcGetPTX gives is that shared object, good for cuModuleLoadData and nothing else.
 */
#ifndef HM_EMU_NVRTC_H
#define HM_EMU_NVRTC_H

#include <stddef.h>

#ifdef __cplusplus
#define HM_EMU_NVRTC_API extern "C"
#else
#define HM_EMU_NVRTC_API extern
#endif

typedef enum {
  NVRTC_SUCCESS = 0,
  NVRTC_ERROR_OUT_OF_MEMORY = 1,
  NVRTC_ERROR_PROGRAM_CREATION_FAILURE = 2,
  NVRTC_ERROR_INVALID_INPUT = 3,
  NVRTC_ERROR_INVALID_PROGRAM = 4,
  NVRTC_ERROR_INVALID_OPTION = 5,
  NVRTC_ERROR_COMPILATION = 6,
  NVRTC_ERROR_BUILTIN_OPERATION_FAILURE = 7,
  NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION = 8,
  NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION = 9,
  NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID = 10,
  NVRTC_ERROR_INTERNAL_ERROR = 11
} nvrtcResult;

typedef struct _nvrtcProgram *nvrtcProgram;

HM_EMU_NVRTC_API const char *nvrtcGetErrorString(nvrtcResult result);
HM_EMU_NVRTC_API nvrtcResult nvrtcVersion(int *major, int *minor);
HM_EMU_NVRTC_API nvrtcResult nvrtcCreateProgram(nvrtcProgram *prog, const char *src, const char *name, int numHeaders,
                                                const char *const *headers, const char *const *includeNames);
HM_EMU_NVRTC_API nvrtcResult nvrtcDestroyProgram(nvrtcProgram *prog);
HM_EMU_NVRTC_API nvrtcResult nvrtcCompileProgram(nvrtcProgram prog, int numOptions, const char *const *options);
HM_EMU_NVRTC_API nvrtcResult nvrtcGetPTXSize(nvrtcProgram prog, size_t *ptxSizeRet);
HM_EMU_NVRTC_API nvrtcResult nvrtcGetPTX(nvrtcProgram prog, char *ptx);
HM_EMU_NVRTC_API nvrtcResult nvrtcGetCUBINSize(nvrtcProgram prog, size_t *cubinSizeRet);
HM_EMU_NVRTC_API nvrtcResult nvrtcGetCUBIN(nvrtcProgram prog, char *cubin);
HM_EMU_NVRTC_API nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram prog, size_t *logSizeRet);
HM_EMU_NVRTC_API nvrtcResult nvrtcGetProgramLog(nvrtcProgram prog, char *log);
HM_EMU_NVRTC_API nvrtcResult nvrtcAddNameExpression(nvrtcProgram prog, const char *const name_expression);
HM_EMU_NVRTC_API nvrtcResult nvrtcGetLoweredName(nvrtcProgram prog, const char *const name_expression,
                                                 const char **lowered_name);

#endif
