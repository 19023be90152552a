/*
 * peak.c -- measures what this machine can do at most: multiply-adds in float32 and bfloat16 with all cores, and memory bandwidth.
 *
 * Used by run.lua, which builds it and compares the time of training steps with these limits.  Prints one line for each limit:
 *
 *     f32 avx2 481.2            GFLOP/s, float32 multiply-add (a multiply-add counts as two)
 *     bf16 avx512_bf16 912.0    GFLOP/s, bfloat16 products summed in float32; missing where the processor has no such instruction
 *     bandwidth axpy 41.8       GB/s of y[i] += s * x[i] over arrays far larger than the caches: two reads and a write, as optimizers do
 *
 * Usage: peak [SECONDS]: about how long each measurement takes (default 0.2).  Each is the best of several short runs, for a limit is
 * what nothing goes beyond.  Threads: OMP_NUM_THREADS, else all cores.
 */
#define _GNU_SOURCE
#include <omp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A kernel does n rounds of independent multiply-adds on the calling thread and returns something made of them all. */
typedef struct kernel {
  const char *name;
  double flops; /* per round */
  float (*run)(int64_t n);
} kernel;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Twelve sums hide the latency of two multiply-add units; the names are spelled out so that they stay in registers. */
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define SUMS 12
/* Keeps the compiler from folding rounds together. */
#define KEEP(s) __asm__ volatile("" : "+x"(s))
#define KEEP_V(s) __asm__ volatile("" : "+v"(s))

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2,fma"))) static float run_avx2(int64_t n) {
  __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
#define X(i) __m256 s##i = _mm256_set1_ps((float)i);
  EACH(X)
#undef X
  for (int64_t k = 0; k < n; k++) {
#define X(i)                                                                                                           \
  s##i = _mm256_fmadd_ps(s##i, a, b);                                                                                  \
  KEEP(s##i);
    EACH(X)
#undef X
  }
  float total = 0;
#define X(i) total += _mm256_cvtss_f32(s##i);
  EACH(X)
#undef X
  return total;
}

__attribute__((target("avx512f"))) static float run_avx512(int64_t n) {
  __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
#define X(i) __m512 s##i = _mm512_set1_ps((float)i);
  EACH(X)
#undef X
  for (int64_t k = 0; k < n; k++) {
#define X(i)                                                                                                           \
  s##i = _mm512_fmadd_ps(s##i, a, b);                                                                                  \
  KEEP_V(s##i);
    EACH(X)
#undef X
  }
  float total = 0;
#define X(i) total += _mm512_cvtss_f32(s##i);
  EACH(X)
#undef X
  return total;
}

__attribute__((target("avx512f,avx512bf16"))) static float run_avx512_bf16(int64_t n) {
  __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f)), b = a;
#define X(i) __m512 s##i = _mm512_set1_ps((float)i);
  EACH(X)
#undef X
  for (int64_t k = 0; k < n; k++) {
#define X(i)                                                                                                           \
  s##i = _mm512_dpbf16_ps(s##i, a, b);                                                                                 \
  KEEP_V(s##i);
    EACH(X)
#undef X
  }
  float total = 0;
#define X(i) total += _mm512_cvtss_f32(s##i);
  EACH(X)
#undef X
  return total;
}

/* The layout that ldtilecfg reads. */
typedef struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} tile_config;

__attribute__((target("amx-tile,amx-bf16"))) static float run_amx(int64_t n) {
  static const uint16_t ones[16 * 32] __attribute__((aligned(64))) = {0x3f80, 0x3f80, 0x3f80, 0x3f80};
  float out[16 * 16] __attribute__((aligned(64)));
  tile_config config = {.palette = 1};
  for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t k = 0; k < n; k++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  float total = 0;
  _tile_stored(0, out, 64);
  total += out[0];
  _tile_stored(1, out, 64);
  total += out[0];
  _tile_stored(2, out, 64);
  total += out[0];
  _tile_stored(3, out, 64);
  total += out[0];
  _tile_release();
  return total;
}

/* CPUID leaf 7: bit `bit` of register `reg` (0 eax .. 3 edx) of a subleaf. */
static bool leaf7(unsigned subleaf, int reg, int bit) {
  unsigned r[4] = {0, 0, 0, 0};
  __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(7), "c"(subleaf));
  return r[reg] >> bit & 1;
}

/* The system lends the tile registers on request only. */
static bool amx_granted(void) {
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  return leaf7(0, 3, 24) && leaf7(0, 3, 22) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

static bool f32_kernel(kernel *out) {
  if (__builtin_cpu_supports("avx512f")) {
    *out = (kernel){"avx512", SUMS * 16 * 2, run_avx512};
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    *out = (kernel){"avx2", SUMS * 8 * 2, run_avx2};
  } else {
    return false;
  }
  return true;
}

static bool bf16_kernel(kernel *out) {
  if (!__builtin_cpu_supports("avx512f")) return false;
  if (amx_granted()) {
    *out = (kernel){"amx_bf16", 4 * 16 * 16 * 32 * 2, run_amx};
  } else if (leaf7(1, 0, 5)) {
    *out = (kernel){"avx512_bf16", SUMS * 32 * 2, run_avx512_bf16};
  } else {
    return false;
  }
  return true;
}
#else
static bool f32_kernel(kernel *out) {
  (void)out;
  return false;
}
static bool bf16_kernel(kernel *out) {
  (void)out;
  return false;
}
#undef KEEP
#define KEEP(s) __asm__ volatile("" : "+w"(s))
#endif

/* Where no vector instructions are known by name: what the compiler makes of vectors of four. */
static float run_plain(int64_t n) {
  typedef float vec __attribute__((vector_size(16)));
  vec a = {0.999f, 0.999f, 0.999f, 0.999f}, b = {0.001f, 0.001f, 0.001f, 0.001f};
#define X(i) vec s##i = a;
  EACH(X)
#undef X
  for (int64_t k = 0; k < n; k++) {
#define X(i)                                                                                                           \
  s##i = s##i * a + b;                                                                                                 \
  KEEP(s##i);
    EACH(X)
#undef X
  }
  float total = 0;
#define X(i) total += s##i[0];
  EACH(X)
#undef X
  return total;
}

static volatile float sink;

/* Seconds that all threads together need for n rounds each. */
static double time_rounds(const kernel *k, int64_t n) {
  double begin = 0;
#pragma omp parallel
  {
#pragma omp barrier
#pragma omp master
    begin = now();
#pragma omp barrier
    float x = k->run(n);
#pragma omp critical
    sink = x;
  }
  return now() - begin;
}

/* GFLOP/s of all threads: the best of several short runs. */
static double flop_rate(const kernel *k, double seconds) {
  enum { RUNS = 8 };
  int64_t n = 1000;
  /* One thread tells how many rounds fill a run; the best of three, for whatever interrupts it makes it longer. */
  for (double best = 0; best < seconds / RUNS && n < (int64_t)1 << 40;) {
    n *= 2;
    best = 1e30;
    for (int r = 0; r < 3; r++) {
      double t = now();
      sink = k->run(n);
      t = now() - t;
      if (t < best) best = t;
    }
  }
  double best = 1e30;
  for (int r = 0; r < RUNS; r++) {
    double t = time_rounds(k, n);
    if (t < best) best = t;
  }
  return k->flops * (double)n * omp_get_max_threads() / best / 1e9;
}

/* GB/s of y += s * x. */
static double bandwidth(double seconds) {
  int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  int64_t bytes = cache > 0 ? 4 * cache : 0;
  if (bytes < (int64_t)128 << 20) bytes = (int64_t)128 << 20;
  if (bytes > (int64_t)512 << 20) bytes = (int64_t)512 << 20;
  int64_t n = bytes / (int64_t)sizeof(float);
  float *x = malloc((size_t)bytes), *y = malloc((size_t)bytes);
  double best = 1e30, rate = 0;
  if (x && y) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) x[i] = 1, y[i] = 2;
    double begin = now();
    for (int r = 0; r < 3 || (now() - begin < seconds && r < 1000); r++) {
      double t = now();
#pragma omp parallel for simd schedule(static)
      for (int64_t i = 0; i < n; i++) y[i] += 0.001f * x[i];
      t = now() - t;
      if (t < best) best = t;
    }
    sink = y[n / 2];
    rate = 3.0 * (double)bytes / best / 1e9;
  }
  free(x);
  free(y);
  return rate;
}

int main(int argc, char **argv) {
  double seconds = argc > 1 ? atof(argv[1]) : 0.2;
  kernel k;
  if (!f32_kernel(&k)) k = (kernel){"plain", SUMS * 4 * 2, run_plain};
  printf("f32 %s %.2f\n", k.name, flop_rate(&k, seconds));
  if (bf16_kernel(&k)) printf("bf16 %s %.2f\n", k.name, flop_rate(&k, seconds));
  printf("bandwidth axpy %.2f\n", bandwidth(seconds));
  return 0;
}
