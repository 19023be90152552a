/*
 * backend.c -- the CPU as a backend: memory, the choice of instruction set, threads, and the table of kernels.
 *
 * Compiled once.  hm_backend_cpu() reads HALFMOON_ISA and HALFMOON_THREADS on its first call, finds out what the processor can do, and picks one of
 * isa.c's tables; nothing changes afterwards but the number of threads.  A setting that cannot be obeyed is kept as a message: the backend then counts
 * no devices and says why.  Owns nothing but this state; memory belongs to the caller (core's caching allocator).
 */
#include <errno.h>
#include <omp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../linear_steps.h"
#include "isa.h"

enum {
  ALIGN = 64,
  HUGE_PAGE = 2 << 20,
  HUGE_FROM = 4 << 20,   /* blocks from here on are laid on huge pages */
  THREAD_BYTES = 1 << 16 /* work that is worth a thread */
};

static struct {
  const hm_host *host;
  const hm_isa *isa;
  hm_linear_kernels linear; /* of isa */
  hm_cpu_features features;
  bool open;
  int problem_code; /* HM_OK, or why the backend cannot be used */
  char problem[256];
  char name[128];
  hm_backend backend;
  bool deterministic; /* hm_cpu_set_deterministic */
} cpu;

/* ====== Messages ====== */

int hm_cpu_fail(int code, const char *format, ...) {
  char message[512];
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  return cpu.host && cpu.host->fail ? cpu.host->fail(code, message) : code;
}

/* Keeps the first reason why the backend cannot be used. */
static void refuse(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void refuse(int code, const char *format, ...) {
  if (cpu.problem_code) return;
  va_list args;
  va_start(args, format);
  vsnprintf(cpu.problem, sizeof cpu.problem, format, args);
  va_end(args);
  cpu.problem_code = code;
}

/* ====== What the processor has ====== */

static void detect(hm_cpu_features *f) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  f->f16c = __builtin_cpu_supports("f16c");
  f->avx2 = __builtin_cpu_supports("avx2") && f->f16c;
  f->avx512 = f->avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  f->avx512_bf16 = f->avx512 && __builtin_cpu_supports("avx512bf16");
  f->amx = f->avx512_bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
#else
  (void)f;
#endif
}

/* Takes away what a lower instruction set does not allow. */
static void limit(hm_cpu_features *f, bool avx2, bool avx512) {
  if (!avx512) f->avx512 = f->avx512_bf16 = f->amx = false;
  if (!avx2) f->avx2 = f->f16c = false;
  f->native_bf16 = f->avx512_bf16;
}

/* Obeys HALFMOON_ISA, or takes the best. */
static void choose_isa(hm_cpu_features *f) {
  const char *want = getenv("HALFMOON_ISA");
  if (want && !*want) want = NULL;
  cpu.isa = &hm_isa_baseline;
#if defined(__x86_64__)
  const bool has2 = f->avx2, has512 = f->avx512;
  if (want ? !strcmp(want, "avx512") : has512) cpu.isa = &hm_isa_avx512;
  else if (want ? !strcmp(want, "avx2") : has2) cpu.isa = &hm_isa_avx2;
  if ((cpu.isa == &hm_isa_avx512 && !has512) || (cpu.isa == &hm_isa_avx2 && !has2)) {
    refuse(HM_ERR_UNSUPPORTED, "HALFMOON_ISA: this processor has no %s\n  hint: %s", want,
           has2 ? "avx2 and baseline are there" : "baseline is there");
    cpu.isa = &hm_isa_baseline;
  }
  limit(f, cpu.isa != &hm_isa_baseline, cpu.isa == &hm_isa_avx512);
#else
  limit(f, false, false);
#endif
  f->isa = cpu.isa->name;
  if (want && strcmp(want, cpu.isa->name) != 0) {
    refuse(HM_ERR_ARG, "HALFMOON_ISA: baseline, avx2 or avx512 is wanted, not '%.40s'%s", want,
           cpu.isa == &hm_isa_baseline ? "" : "\n  hint: unset it to take the best");
  }
}

/* Obeys HALFMOON_THREADS, or takes what OpenMP would. */
static void choose_threads(hm_cpu_features *f) {
  const char *want = getenv("HALFMOON_THREADS");
  f->threads = omp_get_max_threads();
  if (!want || !*want) return;
  char *end;
  errno = 0;
  const long n = strtol(want, &end, 10);
  if (errno || *end || n < 1 || n > 4096) {
    refuse(HM_ERR_ARG, "HALFMOON_THREADS: a number from 1 to 4096 is wanted, not '%.40s'", want);
    return;
  }
  f->threads = (int)n;
  omp_set_num_threads(f->threads);
}

/* The processor's name as the system tells it. */
static void read_name(char *name, size_t size) {
  char line[256];
  snprintf(name, size, "CPU");
  FILE *f = fopen("/proc/cpuinfo", "re");
  if (!f) return;
  while (fgets(line, sizeof line, f)) {
    char *value = strchr(line, ':');
    if (strncmp(line, "model name", 10) != 0 || !value) continue;
    value += strspn(value, ": \t");
    value[strcspn(value, "\n")] = '\0';
    snprintf(name, size, "%s", value);
    break;
  }
  fclose(f);
}

const hm_isa *hm_cpu_isa(void) { return cpu.isa; }

const hm_cpu_features *hm_cpu_get_features(void) { return &cpu.features; }

int hm_cpu_set_threads(int n) {
  if (n < 1 || n > 4096) return hm_cpu_fail(HM_ERR_ARG, "threads: a number from 1 to 4096 is wanted, not %d", n);
  cpu.features.threads = n;
  omp_set_num_threads(n);
  return HM_OK;
}

void hm_cpu_set_deterministic(bool on) { cpu.deterministic = on; }

bool hm_cpu_is_deterministic(void) { return cpu.deterministic; }

int hm_cpu_threads(int64_t work, int64_t cost) {
  const int most = cpu.features.threads;
  if (most <= 1 || work <= 0) return 1;
  const int64_t worth = (work > INT64_MAX / (cost > 0 ? cost : 1) ? INT64_MAX : work * cost) / THREAD_BYTES;
  return worth < 2 ? 1 : (worth < most ? (int)worth : most);
}

/* ====== Device and memory ====== */

static int device_count(void) {
  if (!cpu.problem_code) return 1;
  hm_cpu_fail(cpu.problem_code, "%s", cpu.problem);
  return 0;
}

static int device_info(int device, hm_device_info *out) {
  if (cpu.problem_code) return hm_cpu_fail(cpu.problem_code, "%s", cpu.problem);
  if (device != 0) return hm_cpu_fail(HM_ERR_DEVICE, "cpu: there is no device %d", device);
  memset(out, 0, sizeof *out);
  snprintf(out->name, sizeof out->name, "%s", cpu.name);
  snprintf(out->detail, sizeof out->detail, "%s", cpu.isa->name);
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  out->memory_bytes = pages > 0 && page > 0 ? (size_t)pages * (size_t)page : 0;
  return HM_OK;
}

static void *mem_alloc(int device, size_t bytes) {
  (void)device;
  const size_t align = bytes >= HUGE_FROM ? HUGE_PAGE : ALIGN;
  if (bytes > SIZE_MAX - align) return NULL;
  const size_t whole = bytes ? (bytes + align - 1) / align * align : align;
  void *data = aligned_alloc(align, whole);
#ifdef MADV_HUGEPAGE
  if (data && align == HUGE_PAGE) (void)madvise(data, whole, MADV_HUGEPAGE); /* only a wish */
#endif
  return data;
}

static void mem_free(int device, void *data, size_t bytes) {
  (void)device;
  (void)bytes;
  free(data);
}

static int mem_copy(void *to, const void *from, size_t bytes, void *stream) {
  (void)stream;
  if (bytes) memcpy(to, from, bytes);
  return HM_OK;
}

static int synchronize(int device) {
  (void)device;
  return HM_OK;
}

/* ====== Kernels ====== */

static int products(const hm_kernel_call *call) {
  return hm_linear_has_steps(call->op) ? hm_linear_steps(call, &cpu.linear) : hm_cpu_matmul(call);
}

static int workspace_size(const hm_kernel_call *call, size_t *bytes) {
  *bytes = 0;
  switch (call->op) {
  case HM_OP_MATMUL:
  case HM_OP_LINEAR:
  case HM_OP_LINEAR_BACKWARD_INPUT:
  case HM_OP_LINEAR_BACKWARD_WEIGHT: return hm_cpu_matmul_workspace(call, bytes);
  case HM_OP_LINEAR_RELU:
  case HM_OP_LINEAR_GELU_TANH:
  case HM_OP_LINEAR_BACKWARD_PARAMS:
  case HM_OP_LINEAR_BACKWARD_INPUT_RELU:
  case HM_OP_LINEAR_BACKWARD_INPUT_GELU_TANH: return hm_linear_steps_workspace(call, &cpu.linear, bytes);
  case HM_OP_CONV2D:
  case HM_OP_CONV2D_BACKWARD_INPUT:
  case HM_OP_CONV2D_BACKWARD_WEIGHT: return hm_cpu_conv_workspace(call, bytes);
  case HM_OP_SELECT_BACKWARD:
  case HM_OP_GATHER_BACKWARD:
  case HM_OP_INDEX_SELECT_BACKWARD:
  case HM_OP_INDEX_ADD:
  case HM_OP_SCATTER:
  case HM_OP_SCATTER_ADD:
  case HM_OP_EMBEDDING_BACKWARD:
  case HM_OP_SORT:
  case HM_OP_TOPK: return hm_cpu_index_workspace(call, bytes);
  case HM_OP_SUM:
  case HM_OP_MEAN:
  case HM_OP_AMAX:
  case HM_OP_AMIN:
  case HM_OP_MAX_DIM:
  case HM_OP_MIN_DIM:
  case HM_OP_ARGMAX:
  case HM_OP_ARGMIN:
  case HM_OP_ANY:
  case HM_OP_ALL:
  case HM_OP_LINEAR_BACKWARD_BIAS:
  case HM_OP_PROD:
  case HM_OP_CONV2D_BACKWARD_BIAS: return hm_cpu_reduce_workspace(call, bytes);
  case HM_OP_VAR:
  case HM_OP_STD:
  case HM_OP_NORM:
  case HM_OP_LOGSUMEXP: return hm_cpu_spread_workspace(call, bytes);
  case HM_OP_PROD_BACKWARD:
  case HM_OP_CUMSUM:
  case HM_OP_CUMSUM_REVERSE:
  case HM_OP_CUMPROD_BACKWARD: return hm_cpu_scan_workspace(call, bytes);
  case HM_OP_ATTENTION:
  case HM_OP_ATTENTION_BACKWARD: return hm_cpu_attention_workspace(call, bytes);
  case HM_OP_BATCH_NORM:
  case HM_OP_BATCH_NORM_BACKWARD:
  case HM_OP_LAYER_NORM:
  case HM_OP_LAYER_NORM_BACKWARD:
  case HM_OP_RMS_NORM:
  case HM_OP_RMS_NORM_BACKWARD:
  case HM_OP_GROUP_NORM:
  case HM_OP_GROUP_NORM_BACKWARD: return hm_cpu_normalize_workspace(call, bytes);
  default: return HM_OK; /* our other kernels need none */
  }
}

static void fill_backend(hm_backend *b, const hm_isa *isa) {
  cpu.linear = (hm_linear_kernels){hm_cpu_matmul, isa->elementwise, isa->reduce, hm_cpu_matmul_workspace,
                                   hm_cpu_reduce_workspace};
  *b = (hm_backend){
      .version = HM_BACKEND_VERSION,
      .bytes = sizeof *b,
      .name = "cpu",
      .device_count = device_count,
      .device_info = device_info,
      .mem_alloc = mem_alloc,
      .mem_free = mem_free,
      .mem_to_host = mem_copy,
      .mem_from_host = mem_copy,
      .synchronize = synchronize,
      .kernel = {[HM_FAMILY_ELEMENTWISE] = isa->elementwise,
                 [HM_FAMILY_REDUCE] = isa->reduce,
                 [HM_FAMILY_SCAN] = hm_cpu_scan,
                 [HM_FAMILY_COPY] = isa->copy,
                 [HM_FAMILY_FILL] = isa->fill,
                 [HM_FAMILY_RANDOM] = isa->random,
                 [HM_FAMILY_INDEX] = hm_cpu_index,
                 [HM_FAMILY_MATMUL] = products,
                 [HM_FAMILY_CONV] = hm_cpu_conv,
                 [HM_FAMILY_POOL] = isa->pool,
                 [HM_FAMILY_NORM] = isa->norm,
                 [HM_FAMILY_ATTENTION] = isa->attention,
                 [HM_FAMILY_LOSS] = isa->loss},
      .multi_tensor = isa->multi_tensor,
      .expression = isa->expression,
      .workspace_size = workspace_size,
      .packing = hm_cpu_packing,
      .pack = hm_cpu_pack,
  };
}

const hm_backend *hm_backend_cpu(const hm_host *host) {
  cpu.host = host;
  if (cpu.open) return &cpu.backend;
  cpu.open = true;
  detect(&cpu.features);
  choose_isa(&cpu.features);
  choose_threads(&cpu.features);
  read_name(cpu.name, sizeof cpu.name);
  if (hm_cpu_onednn_open(&cpu.features) != HM_OK) refuse(HM_ERR_INTERNAL, "cpu: oneDNN does not start");
  hm_cpu_onednn_version(cpu.features.onednn_version);
  fill_backend(&cpu.backend, cpu.isa);
  return &cpu.backend;
}
