/*
 * driver.cpp -- the driver's calls: modules made by nvrtc.cpp, their kernels, launches by pointers to arguments.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Owns loaded modules.  A CUresult has the number of the runtime's error.
 */
#include "emu.h"

#include <map>
#include <set>
#include <vector>
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>
#include "cuda.h"
#include "emu_nvrtc.h"

struct CUfunc_st {
  const hm_emu::entry *entry;
  CUmod_st *module;
};

struct CUmod_st {
  void *library;
  hm_emu::module_face face;
  std::map<std::string, CUfunc_st> functions;
};

using namespace hm_emu;

namespace {

typedef const entry *(*attach_function)(const services *, module_face *);

auto &modules = *new std::set<CUmodule>;
auto &functions = *new std::set<CUfunction>;
char context; /* there is one, and its address is its handle */

CUresult result_of(cudaError_t e) { return (CUresult)(int)e; }

/* Size and start of the shared object in an image; false if it is none of ours. */
bool parse_image(const char *image, const char **start, size_t *bytes) {
  if (!image || strncmp(image, "HMEMU ", 6) != 0) return false;
  char *end;
  *bytes = strtoull(image + 6, &end, 10);
  *start = end + 1;
  return *end == '\n' && *bytes > 0;
}

/* Loads the object from a file that is gone again when the call returns. */
void *load_object(const char *start, size_t bytes) {
  const char *const top = getenv("TMPDIR");
  std::string path = std::string(top && *top ? top : "/tmp") + "/halfmoon-emu-XXXXXX";
  const int fd = mkstemp(path.data());
  if (fd < 0) return nullptr;
  size_t done = 0;
  while (done < bytes) {
    const ssize_t n = write(fd, start + done, bytes - done);
    if (n <= 0) break;
    done += (size_t)n;
  }
  close(fd);
  void *const library = done == bytes ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (!library && done == bytes) report("cuModuleLoadData: %s", dlerror());
  unlink(path.c_str());
  return library;
}

} // namespace

#define ENTER(name)                                                                                                    \
  call entered(name);                                                                                                  \
  if (entered.error) return result_of(entered.error)

CUresult cuInit(unsigned int Flags) {
  ENTER("cuInit");
  return Flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *driverVersion) { return result_of(cudaDriverGetVersion(driverVersion)); }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  ENTER("cuDeviceGet");
  if (ordinal) return CUDA_ERROR_INVALID_DEVICE;
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) { return result_of(cudaGetDeviceCount(count)); }

CUresult cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev) {
  ENTER("cuDevicePrimaryCtxRetain");
  if (dev) return CUDA_ERROR_INVALID_DEVICE;
  *pctx = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice dev) { return dev ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS; }

CUresult cuCtxSetCurrent(CUcontext ctx) {
  return !ctx || ctx == (CUcontext)&context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuCtxGetCurrent(CUcontext *pctx) {
  *pctx = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) { return result_of(cudaDeviceSynchronize()); }

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  ENTER("cuModuleLoadData");
  const char *start;
  size_t bytes;
  if (!parse_image((const char *)image, &start, &bytes)) return CUDA_ERROR_INVALID_IMAGE;
  void *const library = load_object(start, bytes);
  if (!library) return CUDA_ERROR_INVALID_PTX;
  const attach_function attach = (attach_function)dlsym(library, "hm_emu_attach");
  if (!attach) {
    dlclose(library);
    return CUDA_ERROR_INVALID_PTX;
  }
  const CUmodule m = new CUmod_st{library, {}, {}};
  for (const entry *e = attach(table, &m->face); e->name; e++) {
    m->functions[e->name] = CUfunc_st{e, m};
    functions.insert(&m->functions[e->name]);
  }
  modules.insert(m);
  stats.live_objects++;
  *module = m;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned int, CUjit_option *, void **) {
  return cuModuleLoadData(module, image);
}

CUresult cuModuleUnload(CUmodule hmod) {
  call entered("cuModuleUnload");
  if (!modules.erase(hmod)) return CUDA_ERROR_INVALID_HANDLE;
  drain_all(); /* queued launches need its code */
  for (auto &f : hmod->functions) functions.erase(&f.second);
  dlclose(hmod->library);
  stats.live_objects--;
  delete hmod;
  return result_of(entered.error);
}

CUresult cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name) {
  ENTER("cuModuleGetFunction");
  if (!modules.count(hmod)) return CUDA_ERROR_INVALID_HANDLE;
  if (!name || !hfunc) return CUDA_ERROR_INVALID_VALUE;
  const auto i = hmod->functions.find(name);
  if (i == hmod->functions.end()) return CUDA_ERROR_NOT_FOUND;
  *hfunc = &i->second;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *pi, CUfunction_attribute attrib, CUfunction hfunc) {
  ENTER("cuFuncGetAttribute");
  if (!functions.count(hfunc)) return CUDA_ERROR_INVALID_HANDLE;
  const module_face &face = hfunc->module->face;
  switch (attrib) {
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *pi = 1024; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *pi = (int)(face.shared_end - face.shared_begin); break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *pi = 0; break;
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *pi = 32; break;
  case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
    *pi = (int)std::max((size_t)SHARED_STATIC_LIMIT, allowed_dynamic(hfunc->entry->kernel));
    break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction hfunc, CUfunction_attribute attrib, int value) {
  ENTER("cuFuncSetAttribute");
  if (!functions.count(hfunc)) return CUDA_ERROR_INVALID_HANDLE;
  if (attrib != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 || value > SHARED_OPT_IN_LIMIT)
    return CUDA_ERROR_INVALID_VALUE;
  allow_dynamic(hfunc->entry->kernel, (size_t)value);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,
                        unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ,
                        unsigned int sharedMemBytes, CUstream hStream, void **kernelParams, void **extra) {
  call entered("cuLaunchKernel");
  if (entered.error) return result_of(entered.error);
  if (!functions.count(f)) return CUDA_ERROR_INVALID_HANDLE;
  if (extra || (f->entry->parameters && !kernelParams)) return CUDA_ERROR_INVALID_VALUE;
  const module_face &face = f->module->face;
  launch l = {f->entry->name,
              f->entry->kernel,
              dim3(gridDimX, gridDimY, gridDimZ),
              dim3(blockDimX, blockDimY, blockDimZ),
              sharedMemBytes,
              {},
              f->entry->call,
              &face.where,
              face.shared_begin,
              face.shared_end,
              0,
              {}};
  l.frame = std::shared_ptr<const void>(f->entry->pack(kernelParams, l.pointers, &l.n_pointers),
                                        [drop = f->entry->drop](const void *p) { drop((void *)p); });
  const cudaError_t e = enqueue(l, hStream);
  return e == cudaErrorInvalidConfiguration ? CUDA_ERROR_INVALID_VALUE : result_of(e);
}

CUresult cuGetErrorString(CUresult error, const char **pStr) {
  *pStr = cudaGetErrorString((cudaError_t)(int)error);
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **pStr) {
  switch (error) {
#define X(name)                                                                                                        \
  case name: *pStr = #name; return CUDA_SUCCESS;
    X(CUDA_SUCCESS)
    X(CUDA_ERROR_INVALID_VALUE)
    X(CUDA_ERROR_OUT_OF_MEMORY)
    X(CUDA_ERROR_NOT_INITIALIZED)
    X(CUDA_ERROR_NO_DEVICE)
    X(CUDA_ERROR_INVALID_DEVICE)
    X(CUDA_ERROR_INVALID_IMAGE)
    X(CUDA_ERROR_INVALID_CONTEXT)
    X(CUDA_ERROR_INVALID_PTX)
    X(CUDA_ERROR_INVALID_HANDLE)
    X(CUDA_ERROR_NOT_FOUND)
    X(CUDA_ERROR_ILLEGAL_ADDRESS)
    X(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES)
    X(CUDA_ERROR_LAUNCH_FAILED)
    X(CUDA_ERROR_UNKNOWN)
#undef X
  }
  *pStr = nullptr;
  return CUDA_ERROR_INVALID_VALUE;
}

/* The way to the driver for code that links to the runtime only. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **funcPtr, unsigned int, unsigned long long,
                                             enum cudaDriverEntryPointQueryResult *driverStatus) {
  call entered("cudaGetDriverEntryPointByVersion");
  if (entered.error) return entered.error;
  if (!symbol || !funcPtr) return note(cudaErrorInvalidValue);
  static const std::map<std::string, void *> known = {
#define X(name) {#name, (void *)name},
      X(cuInit) X(cuDriverGetVersion) X(cuDeviceGet) X(cuDeviceGetCount) X(cuDevicePrimaryCtxRetain) X(cuCtxSetCurrent)
          X(cuCtxGetCurrent) X(cuCtxSynchronize) X(cuModuleLoadData) X(cuModuleLoadDataEx) X(cuModuleUnload)
              X(cuModuleGetFunction) X(cuFuncGetAttribute) X(cuFuncSetAttribute) X(cuLaunchKernel) X(cuGetErrorString)
                  X(cuGetErrorName)
#undef X
                      {"cuDevicePrimaryCtxRelease", (void *)cuDevicePrimaryCtxRelease}};
  const auto i = known.find(symbol);
  *funcPtr = i == known.end() ? nullptr : i->second;
  if (driverStatus) *driverStatus = i == known.end() ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
