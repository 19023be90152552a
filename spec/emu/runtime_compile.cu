/*
 * runtime_compile.cu -- NVRTC and the driver on the test double: source that is compiled while the program runs.  `runtime_compile NAME` runs one.
 *
 * Run by spec/emu_spec.lua.  Prints what each case finds.
 */
#include "device.h"
#include "emu_stats.h"

#include <cuda.h>
#include <nvrtc.h>
#include <stdio.h>
#include <string>
#include <vector>

static const char *const GOOD = R"(// a user's kernel
#include "scale.h"
template <class T> __global__ void fill(T *y, T value) { y[threadIdx.x] = value; }

extern "C" __global__ void __launch_bounds__(256) reversed(const float *x, float *y, int n, float factor) {
  __shared__ float part[64];
  extern __shared__ float more[];
  int i = threadIdx.x;
  part[i] = x[i];
  more[i] = 1.0f;
  __syncthreads();
  if (i < n) y[i] = scaled(part[n - 1 - i], factor) * more[63 - i];
}

extern "C" {
__global__ void early(float *y) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  y[threadIdx.x] = 1.0f;
}
}
)";

static const char *const HEADER = "__device__ inline float scaled(float x, float f) { return tanhf(0.0f) + x * f; }\n";

static const char *const BAD = "extern \"C\" __global__ void k(float *x) {\n  x[0] = 1.0f;\n  x[1] = nonsense;\n}\n";

static void show_log(nvrtcProgram p) {
  size_t n = 0;
  nvrtcGetProgramLogSize(p, &n);
  std::vector<char> log(n);
  nvrtcGetProgramLog(p, log.data());
  printf("log: %s", log.data());
}

static void bad(void) {
  nvrtcProgram p;
  nvrtcCreateProgram(&p, BAD, "user.cu", 0, NULL, NULL);
  printf("compile %s\n", nvrtcGetErrorString(nvrtcCompileProgram(p, 0, NULL)));
  show_log(p);
  const char *const options[] = {"--no-such-option"};
  printf("option %s\n", nvrtcGetErrorString(nvrtcCompileProgram(p, 1, options)));
  nvrtcDestroyProgram(&p);
}

static void launch(void) {
  const char *const name = "scale.h", *const options[] = {"--gpu-architecture=compute_75", "-DUNUSED=1"};
  nvrtcProgram p;
  CUmodule module;
  CUfunction reversed, fill, early, none;
  const char *lowered = "";
  size_t n = 0;
  nvrtcCreateProgram(&p, GOOD, "user.cu", 1, &HEADER, &name);
  nvrtcAddNameExpression(p, "fill<int>");
  const nvrtcResult r = nvrtcCompileProgram(p, 2, options);
  printf("compile %s\n", nvrtcGetErrorString(r));
  if (r) show_log(p);
  if (r) return;
  nvrtcGetPTXSize(p, &n);
  std::vector<char> ptx(n);
  nvrtcGetPTX(p, ptx.data());
  nvrtcGetLoweredName(p, "fill<int>", &lowered);
  printf("load %d\n", (int)cuModuleLoadData(&module, ptx.data()));
  printf("functions %d %d %d %d\n", (int)cuModuleGetFunction(&reversed, module, "reversed"),
         (int)cuModuleGetFunction(&fill, module, lowered), (int)cuModuleGetFunction(&early, module, "early"),
         (int)cuModuleGetFunction(&none, module, "fill"));
  nvrtcDestroyProgram(&p);
  float *x, *y, factor = 3;
  int count = 64, value = 17;
  std::vector<float> h(64);
  std::vector<int> filled(64);
  for (int i = 0; i < 64; i++) h[(size_t)i] = (float)i;
  cudaMalloc((void **)&x, 256);
  cudaMalloc((void **)&y, 256);
  cudaMemcpy(x, h.data(), 256, cudaMemcpyHostToDevice);
  void *list[] = {&x, &y, &count, &factor};
  printf("launch %d\n", (int)cuLaunchKernel(reversed, 1, 1, 1, 64, 1, 1, 256, 0, list, NULL));
  count = 0; /* arguments were taken at the launch */
  cudaMemcpy(h.data(), y, 256, cudaMemcpyDeviceToHost);
  int wrong = 0;
  for (int i = 0; i < 64; i++) wrong += h[(size_t)i] != 3.0f * (float)(63 - i);
  void *few[] = {&y, &value};
  cuLaunchKernel(fill, 1, 1, 1, 64, 1, 1, 0, 0, few, NULL);
  cudaMemcpy(filled.data(), y, 256, cudaMemcpyDeviceToHost);
  for (int v : filled) wrong += v != 17;
  printf("wrong %d\n", wrong);
  printf("too large %d\n", (int)cuLaunchKernel(fill, 1, 1, 1, 2048, 1, 1, 0, 0, few, NULL));
  void *one[] = {&y};
  cuLaunchKernel(early, 1, 1, 1, 64, 1, 1, 0, 0, one, NULL);
  printf("early %d\n", (int)cuCtxSynchronize());
  printf("report: %s\n", emu_last_report());
  cudaDeviceReset();
  cudaFree(x);
  cudaFree(y);
  cuModuleUnload(module);
  emu_stats s;
  emu_get_stats(&s);
  printf("left %d %d\n", (int)s.live_allocations, (int)s.live_objects);
}

static void image(void) {
  CUmodule module;
  printf("image %d\n", (int)cuModuleLoadData(&module, "not a module"));
  void *f = NULL;
  enum cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuLaunchKernel", &f, 12000, cudaEnableDefault, &found);
  printf("entry %d %d\n", (int)found, f == (void *)cuLaunchKernel);
}

int main(int, char **arguments) {
  const std::string name = arguments[1];
  if (name == "bad") bad();
  if (name == "launch") launch();
  if (name == "image") image();
  return 0;
}
