/*
 * samples.cu -- kernels that are right: each gives the same numbers in every wake order and in deferred mode.
 *
 * Run by spec/emu_spec.lua on the test double; also compiled, unchanged, by nvcc where there is one.  Prints a line for each kernel, "NAME ok" or
 * what differs.
 */
#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <vector>

/* ====== Kernels ====== */

enum { F16, BF16 };

template <int KIND> __global__ void widen(const uint16_t *x, float *y, int n) {
  for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x))
    y[i] = KIND == F16 ? hm_dev_f16_to_f32(x[i]) : hm_dev_bf16_to_f32(x[i]);
}

template <int KIND> __global__ void narrow(const float *x, uint16_t *y, int n) {
  const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = KIND == F16 ? hm_dev_f32_to_f16(x[i]) : hm_dev_f32_to_bf16(x[i]);
}

/* One block of whole warps adds n numbers. */
template <class T> __global__ void block_sum(const T *x, T *out, int n) {
  HM_SHARED(T, part, [32]);
  const int row = (int)blockIdx.x;
  T sum = 0;
  for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) sum += x[row * n + i];
  for (int d = 16; d > 0; d >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, d);
  if (hm_lane() == 0) part[hm_warp()] = sum;
  HM_BARRIER();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : (T)0;
    for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (threadIdx.x == 0) out[row] = sum;
  }
}

/* Softmax of a row by a tree in dynamic shared memory: rewrites one buffer again and again. */
__global__ void softmax(const float *x, float *y, int columns) {
  HM_DYN_SHARED(float, buffer);
  const float *const row = x + (size_t)blockIdx.x * columns;
  const int t = (int)threadIdx.x;
  float top = -INFINITY;
  for (int j = t; j < columns; j += (int)blockDim.x) top = row[j] > top ? row[j] : top;
  buffer[t] = top;
  HM_BARRIER();
  for (int s = (int)blockDim.x / 2; s > 0; s /= 2) {
    if (t < s) buffer[t] = buffer[t] > buffer[t + s] ? buffer[t] : buffer[t + s];
    HM_BARRIER();
  }
  top = buffer[0];
  HM_BARRIER();
  float sum = 0;
  for (int j = t; j < columns; j += (int)blockDim.x) sum += hm_exp_f32(row[j] - top);
  buffer[t] = sum;
  HM_BARRIER();
  for (int s = (int)blockDim.x / 2; s > 0; s /= 2) {
    if (t < s) buffer[t] += buffer[t + s];
    HM_BARRIER();
  }
  for (int j = t; j < columns; j += (int)blockDim.x)
    y[(size_t)blockIdx.x * columns + j] = hm_exp_f32(row[j] - top) / buffer[0];
}

__global__ void transpose(const float *x, float *y, int n) {
  HM_SHARED(float, tile, [16][17]);
  const int tx = (int)threadIdx.x, ty = (int)threadIdx.y, bx = (int)blockIdx.x * 16, by = (int)blockIdx.y * 16;
  tile[ty][tx] = x[(by + ty) * n + bx + tx];
  __syncthreads();
  y[(bx + ty) * n + by + tx] = tile[tx][ty];
}

__device__ float atomic_max_float(float *p, float v) {
  int *const word = (int *)p;
  int seen = *word;
  while (__int_as_float(seen) < v) {
    const int before = atomicCAS(word, seen, __float_as_int(v));
    if (before == seen) break;
    seen = before;
  }
  return v;
}

struct sums {
  double wide;
  unsigned long long count;
  float single, top;
  int bins[8], highest;
  unsigned flags, last;
};

__global__ void atomics(const float *x, sums *s, int n) {
  const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  atomicAdd(&s->bins[i & 7], 1);
  atomicAdd(&s->wide, (double)i);
  atomicAdd(&s->single, 1.0f);
  atomicAdd(&s->count, 1ull);
  atomicOr(&s->flags, 1u << (i & 15));
  atomicMax(&s->highest, i);
  atomicExch(&s->last, 7u);
  atomic_max_float(&s->top, x[i]);
}

__global__ void warp_operations(unsigned *out) {
  const unsigned t = threadIdx.x, lane = hm_lane();
  unsigned *const mine = out + t * 8;
  mine[0] = __ballot_sync(0xffffffffu, lane % 3 == 0);
  mine[1] = (unsigned)__any_sync(0xffffffffu, lane == 31);
  mine[2] = (unsigned)__all_sync(0xffffffffu, lane < 31);
  mine[3] = __shfl_sync(0xffffffffu, t, 5);
  mine[4] = __shfl_up_sync(0xffffffffu, t, 3);
  mine[5] = __shfl_down_sync(0xffffffffu, t, 2, 8);
  __syncwarp();
  if (lane < 16) mine[6] = __shfl_xor_sync(0x0000ffffu, t, 1);
  else mine[6] = __shfl_xor_sync(0xffff0000u, t, 2);
  mine[7] = (unsigned)__syncthreads_count(lane == 0) + 10u * (unsigned)__syncthreads_or(t == 40) +
            100u * (unsigned)__syncthreads_and(t < 40);
}

__global__ void vectors(const uint16_t *x, uint16_t *y, const float4 *u, float4 *v, int n) {
  const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  hm_store16(y + 8 * i, hm_load16(x + 8 * i));
  float4 f = __ldg(u + i);
  f.x += 1.0f;
  f.w *= 2.0f;
  v[i] = f;
}

__global__ void much_shared(float *out, int n) {
  HM_DYN_SHARED(float, all);
  for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) all[i] = (float)i;
  HM_BARRIER();
  if (threadIdx.x == 0) out[0] = all[0] + all[n / 2] + all[n - 1];
}

/* ====== Host ====== */

static int failures;

static void check(cudaError_t e, const char *what) {
  if (e == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(e));
  exit(1);
}

template <class T> struct device_array {
  T *data;
  size_t n;
  explicit device_array(size_t count) : data(NULL), n(count) {
    check(cudaMalloc((void **)&data, n * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data, 0, n * sizeof(T)), "cudaMemset");
  }
  explicit device_array(const std::vector<T> &from) : data(NULL), n(from.size()) {
    check(cudaMalloc((void **)&data, n * sizeof(T)), "cudaMalloc");
    check(cudaMemcpy(data, from.data(), n * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~device_array() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> to(n);
    check(cudaMemcpy(to.data(), data, n * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy back");
    return to;
  }
};

static void verdict(const char *name, long wrong) {
  if (wrong) printf("%s: %ld wrong\n", name, wrong);
  else printf("%s ok\n", name);
  failures += wrong != 0;
}

static std::vector<float> numbers(int n) {
  std::vector<float> x((size_t)n);
  unsigned s = 1;
  for (float &v : x) {
    s = s * 1664525u + 1013904223u;
    v = (float)(s >> 8) / 4194304.0f - 2.0f;
  }
  return x;
}

static bool same(float a, float b) { return a == b || (a != a && b != b); }

static void test_casts(cudaStream_t stream) {
  std::vector<uint16_t> all(65536);
  for (unsigned i = 0; i < 65536; i++) all[i] = (uint16_t)i;
  device_array<uint16_t> x(all), back(65536);
  device_array<float> y(65536);
  long wrong = 0;
  check(HM_LAUNCH((widen<F16>), 32, 256, 0, stream, x.data, y.data, 65536), "widen");
  check(HM_LAUNCH((narrow<F16>), 256, 256, 0, stream, y.data, back.data, 65536), "narrow");
  std::vector<float> f = y.host();
  std::vector<uint16_t> h = back.host();
  for (unsigned i = 0; i < 65536; i++) wrong += !same(f[i], hm_f16_to_f32((uint16_t)i)) || (f[i] == f[i] && h[i] != i);
  check(HM_LAUNCH((widen<BF16>), 32, 256, 0, stream, x.data, y.data, 65536), "widen");
  check(HM_LAUNCH((narrow<BF16>), 256, 256, 0, stream, y.data, back.data, 65536), "narrow");
  f = y.host();
  h = back.host();
  for (unsigned i = 0; i < 65536; i++) wrong += !same(f[i], hm_bf16_to_f32((uint16_t)i)) || (f[i] == f[i] && h[i] != i);
  verdict("casts", wrong);
}

static void test_sums(cudaStream_t stream) {
  const int rows = 5, n = 1000;
  std::vector<int> x((size_t)(rows * n));
  for (int i = 0; i < rows * n; i++) x[(size_t)i] = i % 91 - 45;
  std::vector<float> xf(x.begin(), x.end());
  device_array<int> dx(x), out(rows);
  device_array<float> dxf(xf), outf(rows);
  check(HM_LAUNCH((block_sum<int>), rows, 256, 0, stream, dx.data, out.data, n), "block_sum");
  check(HM_LAUNCH(block_sum<float>, dim3(rows), dim3(128), 0, stream, dxf.data, outf.data, n), "block_sum");
  const std::vector<int> got = out.host();
  const std::vector<float> gotf = outf.host();
  long wrong = 0;
  for (int r = 0; r < rows; r++) {
    int sum = 0;
    for (int i = 0; i < n; i++) sum += x[(size_t)(r * n + i)];
    wrong += got[(size_t)r] != sum || gotf[(size_t)r] != (float)sum;
  }
  verdict("block_sum", wrong);
}

static void test_softmax(cudaStream_t stream) {
  const int rows = 3, columns = 300;
  const std::vector<float> x = numbers(rows * columns);
  device_array<float> dx(x), dy((size_t)(rows * columns));
  check(HM_LAUNCH(softmax, rows, 128, 128 * sizeof(float), stream, dx.data, dy.data, columns), "softmax");
  const std::vector<float> y = dy.host();
  long wrong = 0;
  for (int r = 0; r < rows; r++) {
    double sum = 0;
    for (int j = 0; j < columns; j++) sum += exp((double)x[(size_t)(r * columns + j)]);
    for (int j = 0; j < columns; j++) {
      const double expected = exp((double)x[(size_t)(r * columns + j)]) / sum;
      wrong += !(fabs((double)y[(size_t)(r * columns + j)] - expected) < 1e-6 * expected + 1e-9);
    }
  }
  verdict("softmax", wrong);
}

static void test_transpose(cudaStream_t stream) {
  const int n = 64;
  const std::vector<float> x = numbers(n * n);
  device_array<float> dx(x), dy((size_t)(n * n));
  check(HM_LAUNCH(transpose, dim3(n / 16, n / 16), dim3(16, 16), 0, stream, dx.data, dy.data, n), "transpose");
  const std::vector<float> y = dy.host();
  long wrong = 0;
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) wrong += y[(size_t)(i * n + j)] != x[(size_t)(j * n + i)];
  verdict("transpose", wrong);
}

static void test_atomics(cudaStream_t stream) {
  const int n = 1000;
  std::vector<float> x = numbers(n);
  x[700] = 99.0f;
  device_array<float> dx(x);
  device_array<sums> ds(1);
  check(HM_LAUNCH(atomics, 8, 128, 0, stream, dx.data, ds.data, n), "atomics");
  const sums s = ds.host()[0];
  long wrong = s.wide != 499500.0 || s.count != 1000 || s.single != 1000.0f || s.top != 99.0f || s.highest != 999 ||
               s.flags != 0xffffu || s.last != 7;
  for (int b = 0; b < 8; b++) wrong += s.bins[b] != 125;
  verdict("atomics", wrong);
}

static void test_warp(cudaStream_t stream) {
  device_array<unsigned> out(64 * 8);
  check(HM_LAUNCH(warp_operations, 1, 64, 0, stream, out.data), "warp_operations");
  const std::vector<unsigned> o = out.host();
  long wrong = 0;
  for (unsigned t = 0; t < 64; t++) {
    const unsigned lane = t % 32, base = t - lane, *const mine = &o[t * 8];
    const unsigned expected[8] = {
        0x49249249u, 1, 0, base + 5, lane < 3 ? t : t - 3, lane % 8 < 6 ? t + 2 : t, lane < 16 ? t ^ 1u : t ^ 2u,
        2 + 10};
    for (int i = 0; i < 8; i++) wrong += mine[i] != expected[i];
  }
  verdict("warp_operations", wrong);
}

static void test_vectors(cudaStream_t stream) {
  const int n = 100;
  std::vector<uint16_t> x((size_t)n * 8);
  for (size_t i = 0; i < x.size(); i++) x[i] = (uint16_t)(i * 7);
  std::vector<float4> u((size_t)n, make_float4(1, 2, 3, 4));
  device_array<uint16_t> dx(x), dy(x.size());
  device_array<float4> du(u), dv((size_t)n);
  check(HM_LAUNCH(vectors, 1, 128, 0, stream, dx.data, dy.data, du.data, dv.data, n), "vectors");
  const std::vector<float4> v = dv.host();
  long wrong = dy.host() != x;
  for (const float4 &f : v) wrong += f.x != 2 || f.y != 2 || f.z != 3 || f.w != 8;
  verdict("vectors", wrong);
}

static void test_much_shared(cudaStream_t stream) {
  const int n = 25000;
  device_array<float> out(1);
  check(cudaFuncSetAttribute(much_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, n * 4), "cudaFuncSetAttribute");
  check(HM_LAUNCH(much_shared, 1, 64, n * 4, stream, out.data, n), "much_shared");
  verdict("much_shared", out.host()[0] != 12500.0f + 24999.0f);
}

int main(void) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate"); /* a blocking one: cudaMemcpy waits for it */
  test_casts(stream);
  test_sums(stream);
  test_softmax(stream);
  test_transpose(stream);
  test_atomics(stream);
  test_warp(stream);
  test_vectors(stream);
  test_much_shared(stream);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return failures != 0;
}
