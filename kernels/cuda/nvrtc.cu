/*
 * nvrtc.cu -- kernels that a user wrote: compiled at run time, checked, launched.
 *
 * NVRTC compiles the source for the device at hand.  The parameters' types are read from the source itself, from the declaration `__global__ void
 * name(...)`: a number from Lua is converted to the type declared, a tensor's dtype is held against the pointer's, and a pointer that is not const
 * counts as written.  Types of our own invention cannot be passed by value.
 *
 * The plug-in links to no driver library (a machine without one must load it): the driver's functions are asked from the runtime.  A kernel owns its
 * module until hm_cuda_user_free.
 */
#include <cuda.h>
#include <limits.h>
#include <nvrtc.h>
#include <stdio.h>
#include <stdlib.h>

#include "backend.h"

enum { NAME_BYTES = 128, TYPE_BYTES = 64, LOG_BYTES = 3500 };

typedef enum value_kind { KIND_UNKNOWN, KIND_POINTER, KIND_FLOAT, KIND_INT, KIND_UNSIGNED, KIND_BOOL } value_kind;

typedef struct parameter {
  value_kind kind;
  int bytes;             /* of a number */
  bool is_const;         /* pointers: to const */
  char type[TYPE_BYTES]; /* as messages print it, without const; of pointers: what they point at */
  char name[TYPE_BYTES]; /* "" if it has none */
} parameter;

struct hm_user_kernel {
  int device;
  CUmodule module;
  CUfunction function;
  int max_threads, static_shared;
  char name[NAME_BYTES];
  int n;
  parameter param[HM_MAX_USER_ARGS];
};

/* ====== The driver ====== */

typedef struct driver_table {
  CUresult (*load)(CUmodule *, const void *, unsigned int, CUjit_option *, void **);
  CUresult (*unload)(CUmodule);
  CUresult (*find)(CUfunction *, CUmodule, const char *);
  CUresult (*ask)(int *, CUfunction_attribute, CUfunction);
  CUresult (*set)(CUfunction, CUfunction_attribute, int);
  CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                     void **, void **);
} driver_table;

static driver_table driver;

static int find_entry(const char *symbol, void **out) {
  enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050 || defined(HALFMOON_EMU)
  const cudaError_t e = cudaGetDriverEntryPointByVersion(symbol, out, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t e = cudaGetDriverEntryPoint(symbol, out, cudaEnableDefault, &found);
#endif
  if (e == cudaSuccess && found == cudaDriverEntryPointSuccess && *out) return HM_OK;
  (void)cudaGetLastError();
  return hm_cuda_fail(HM_ERR_DEVICE, "kernel: the driver has no %s: a newer driver is wanted", symbol);
}

static int open_driver(void) {
  if (driver.launch) return HM_OK;
  int status = find_entry("cuModuleLoadDataEx", (void **)&driver.load);
  if (!status) status = find_entry("cuModuleUnload", (void **)&driver.unload);
  if (!status) status = find_entry("cuModuleGetFunction", (void **)&driver.find);
  if (!status) status = find_entry("cuFuncGetAttribute", (void **)&driver.ask);
  if (!status) status = find_entry("cuFuncSetAttribute", (void **)&driver.set);
  if (!status) status = find_entry("cuLaunchKernel", (void **)&driver.launch);
  return status;
}

/* The driver's codes are the runtime's. */
static int driver_status(hm_cuda_device *d, CUresult result, const char *what) {
  return hm_cuda_device_status(d, (cudaError_t)result, what);
}

/* ====== Reading the declaration ====== */

static bool is_word(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

/* A copy of the source with comments and strings blanked; the caller frees it. */
static char *without_comments(const char *source) {
  char *text = strdup(source);
  for (char *p = text; p && *p;) {
    char *end = NULL;
    if (p[0] == '/' && p[1] == '/') end = p + strcspn(p, "\n");
    else if (p[0] == '/' && p[1] == '*') {
      char *close = strstr(p + 2, "*/");
      end = close ? close + 2 : p + strlen(p);
    } else if (*p == '"') {
      end = p + 1;
      while (*end && *end != '"') end += end[0] == '\\' && end[1] ? 2 : 1;
      if (*end) end++;
    }
    if (!end) {
      p++;
      continue;
    }
    for (; p < end; p++)
      if (*p != '\n') *p = ' ';
  }
  return text;
}

/* Does the word stand between `from` and `to`? */
static bool has_word(const char *from, const char *to, const char *word) {
  const size_t n = strlen(word);
  for (const char *p = from; p + n <= to; p++)
    if (!strncmp(p, word, n) && (p == from || !is_word(p[-1])) && (p + n == to || !is_word(p[n]))) return true;
  return false;
}

/* The parameter list of `__global__ ... name(`: where it begins and ends; false if there is none. */
static bool find_list(const char *text, const char *name, const char **begin, const char **end) {
  const size_t n = strcspn(name, "<");
  const char *statement = text;
  for (const char *p = text; *p; p++) {
    if (*p == ';' || *p == '}') statement = p + 1;
    if (strncmp(p, name, n) != 0 || is_word(p[n]) || (p > text && is_word(p[-1])) ||
        !has_word(statement, p, "__global__"))
      continue;
    const char *open = p + n + strspn(p + n, " \t\r\n");
    if (*open != '(') continue;
    int depth = 0;
    for (const char *q = open; *q; q++) {
      depth += (*q == '(') - (*q == ')');
      if (depth) continue;
      *begin = open + 1;
      *end = q;
      return true;
    }
  }
  return false;
}

/* What numbers there are, by the words of their types in any order of the source ("long unsigned int" is given as it is usually written). */
static const struct number_type {
  const char *name;
  value_kind kind;
  int bytes;
} number_types[] = {{"float", KIND_FLOAT, 4},
                    {"double", KIND_FLOAT, 8},
                    {"bool", KIND_BOOL, 1},
                    {"char", KIND_INT, 1},
                    {"signed char", KIND_INT, 1},
                    {"unsigned char", KIND_UNSIGNED, 1},
                    {"short", KIND_INT, 2},
                    {"unsigned short", KIND_UNSIGNED, 2},
                    {"int", KIND_INT, 4},
                    {"signed int", KIND_INT, 4},
                    {"unsigned", KIND_UNSIGNED, 4},
                    {"unsigned int", KIND_UNSIGNED, 4},
                    {"long", KIND_INT, 8},
                    {"long int", KIND_INT, 8},
                    {"long long", KIND_INT, 8},
                    {"long long int", KIND_INT, 8},
                    {"unsigned long", KIND_UNSIGNED, 8},
                    {"unsigned long int", KIND_UNSIGNED, 8},
                    {"unsigned long long", KIND_UNSIGNED, 8},
                    {"unsigned long long int", KIND_UNSIGNED, 8},
                    {"size_t", KIND_UNSIGNED, 8},
                    {"int8_t", KIND_INT, 1},
                    {"uint8_t", KIND_UNSIGNED, 1},
                    {"int16_t", KIND_INT, 2},
                    {"uint16_t", KIND_UNSIGNED, 2},
                    {"int32_t", KIND_INT, 4},
                    {"uint32_t", KIND_UNSIGNED, 4},
                    {"int64_t", KIND_INT, 8},
                    {"uint64_t", KIND_UNSIGNED, 8}};

static const struct number_type *find_number(const char *type) {
  for (size_t i = 0; i < sizeof number_types / sizeof *number_types; i++)
    if (!strcmp(number_types[i].name, type)) return &number_types[i];
  return NULL;
}

/* Words that say nothing about what is passed. */
static bool is_qualifier(const char *word, size_t n) {
  static const char *const list[] = {"const",    "volatile", "__restrict__",      "__restrict",
                                     "restrict", "struct",   "__grid_constant__", "std"};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++)
    if (strlen(list[i]) == n && !strncmp(list[i], word, n)) return true;
  return false;
}

static void append_word(char *text, const char *word, size_t n) {
  const size_t at = strlen(text);
  if (at + n + 2 > TYPE_BYTES) return;
  if (at) text[at] = ' ';
  memcpy(text + at + (at ? 1 : 0), word, n);
  text[at + n + (at ? 1 : 0)] = '\0';
}

/* One parameter's text. */
static void read_parameter(const char *from, const char *to, parameter *p) {
  memset(p, 0, sizeof *p);
  const char *star = NULL;
  for (const char *q = from; q < to; q++)
    if (*q == '*' || *q == '[') star = q;
  p->is_const = star && has_word(from, star, "const");
  char last[TYPE_BYTES] = "";
  for (const char *q = from; q < to;) {
    if (!is_word(*q)) {
      q++;
      continue;
    }
    const char *word = q;
    while (q < to && is_word(*q)) q++;
    const size_t n = (size_t)(q - word);
    if (is_qualifier(word, n) || n >= TYPE_BYTES) continue;
    if (star && word > star) { /* the name of a pointer */
      snprintf(p->name, sizeof p->name, "%.*s", (int)n, word);
      continue;
    }
    if (last[0]) append_word(p->type, last, strlen(last));
    snprintf(last, sizeof last, "%.*s", (int)n, word);
  }
  char whole[TYPE_BYTES];
  snprintf(whole, sizeof whole, "%s", p->type);
  append_word(whole, last, strlen(last));
  const bool bracket = star && *star == '[';
  if ((star && !bracket) || !p->type[0] || find_number(whole))
    snprintf(p->type, sizeof p->type, "%s", whole); /* no name stands here */
  else snprintf(p->name, sizeof p->name, "%s", last);
  const struct number_type *number = find_number(p->type);
  p->kind = star ? KIND_POINTER : (number ? number->kind : KIND_UNKNOWN);
  p->bytes = number ? number->bytes : 0;
}

static int read_list(hm_user_kernel *k, const char *begin, const char *end) {
  int depth = 0;
  const char *from = begin;
  for (const char *p = begin; p <= end; p++) {
    if (p < end) depth += (*p == '(' || *p == '<' || *p == '[') - (*p == ')' || *p == '>' || *p == ']');
    if (p < end && (*p != ',' || depth)) continue;
    const bool blank = from + strspn(from, " \t\r\n") >= p;
    if (blank || (k->n == 0 && p == end && has_word(from, p, "void") && !memchr(from, '*', (size_t)(p - from))))
      break; /* () and (void) */
    if (k->n == HM_MAX_USER_ARGS)
      return hm_cuda_fail(HM_ERR_ARG, "kernel %s: it has more than %d parameters", k->name, (int)HM_MAX_USER_ARGS);
    parameter *q = &k->param[k->n++];
    read_parameter(from, p, q);
    if (q->kind == KIND_UNKNOWN)
      return hm_cuda_fail(HM_ERR_ARG,
                          "kernel %s: parameter %d has type %s; parameters must be pointers, integers, floats or bools",
                          k->name, k->n, q->type);
    from = p + 1;
  }
  return HM_OK;
}

static int read_declaration(hm_user_kernel *k, const char *source) {
  char *text = without_comments(source);
  if (!text) return hm_cuda_fail(HM_ERR_MEMORY, "kernel %s: out of memory", k->name);
  const char *begin, *end;
  int status;
  if (find_list(text, k->name, &begin, &end)) status = read_list(k, begin, end);
  else
    status = hm_cuda_fail(HM_ERR_ARG,
                          "kernel: the source has no kernel named %s\n  hint: it must read __global__ void %s(...)",
                          k->name, k->name);
  free(text);
  return status;
}

/* ====== Compiling ====== */

static int nvrtc_status(nvrtcResult r, const char *name) {
  return r == NVRTC_SUCCESS ? HM_OK
                            : hm_cuda_fail(HM_ERR_INTERNAL, "kernel %s: NVRTC: %s", name, nvrtcGetErrorString(r));
}

/* The compiler's own words, indented. */
static int compile_failed(nvrtcProgram program, const char *name) {
  char shown[LOG_BYTES];
  size_t size = 0, at = 0;
  (void)nvrtcGetProgramLogSize(program, &size);
  char *log = (char *)calloc(1, size + 1);
  if (log && size) (void)nvrtcGetProgramLog(program, log);
  for (const char *line = log; line && *line && at + 4 < sizeof shown;) {
    const size_t n = strcspn(line, "\n");
    const int wrote = snprintf(shown + at, sizeof shown - at, "\n  %.*s", (int)n, line);
    at += n && wrote > 0 ? (size_t)wrote : 0; /* blank lines are left out */
    line += n + (line[n] == '\n');
  }
  shown[at < sizeof shown ? at : sizeof shown - 1] = '\0';
  free(log);
  return hm_cuda_fail(HM_ERR_ARG, "kernel %s: it does not compile%s", name, shown);
}

/* Gives the kernel its module from a compiled program. */
static int load_module(hm_cuda_device *d, nvrtcProgram program, hm_user_kernel *k) {
  const char *symbol = NULL;
  size_t size = 0;
  int status = nvrtc_status(nvrtcGetLoweredName(program, k->name, &symbol), k->name);
  if (!status) status = nvrtc_status(nvrtcGetCUBINSize(program, &size), k->name);
  char *image = status ? NULL : (char *)malloc(size);
  if (!status && !image) status = hm_cuda_fail(HM_ERR_MEMORY, "kernel %s: out of memory", k->name);
  if (!status) status = nvrtc_status(nvrtcGetCUBIN(program, image), k->name);
  if (!status) status = driver_status(d, driver.load(&k->module, image, 0, NULL, NULL), k->name);
  if (!status) status = driver_status(d, driver.find(&k->function, k->module, symbol), k->name);
  if (!status)
    status =
        driver_status(d, driver.ask(&k->max_threads, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, k->function), k->name);
  if (!status)
    status = driver_status(d, driver.ask(&k->static_shared, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, k->function), k->name);
  free(image);
  return status;
}

static int compile(hm_cuda_device *d, const char *source, bool exact, hm_user_kernel *k) {
  char arch[64];
  snprintf(arch, sizeof arch, "--gpu-architecture=sm_%d%d", d->major, d->minor);
  const char *options[6] = {arch, "-std=c++17", "-default-device"};
  int n = 3;
  if (exact) options[n++] = "--fmad=false";
#ifdef HM_CUDA_INCLUDE /* where cuda_fp16.h lies on the machine that built this, and from CUDA 13 on cuda/std/cstdint */
  options[n++] = "--include-path=" HM_CUDA_INCLUDE;
  options[n++] = "--include-path=" HM_CUDA_INCLUDE "/cccl";
#endif
  nvrtcProgram program = NULL;
  int status = nvrtc_status(nvrtcCreateProgram(&program, source, "kernel.cu", 0, NULL, NULL), k->name);
  if (!status) status = nvrtc_status(nvrtcAddNameExpression(program, k->name), k->name);
  if (!status && nvrtcCompileProgram(program, n, options) != NVRTC_SUCCESS) status = compile_failed(program, k->name);
  if (!status) status = load_module(d, program, k);
  if (program) (void)nvrtcDestroyProgram(&program);
  return status;
}

int hm_cuda_user_compile(int device, const char *source, const char *name, bool exact, hm_user_kernel **out) {
  *out = NULL;
  hm_cuda_device *d = hm_cuda_use(device);
  if (!d) return HM_ERR_DEVICE;
  if (!*name || strlen(name) >= NAME_BYTES)
    return hm_cuda_fail(HM_ERR_ARG, "kernel: a name of 1 to %d characters is wanted", NAME_BYTES - 1);
  hm_user_kernel *k = (hm_user_kernel *)calloc(1, sizeof *k);
  if (!k) return hm_cuda_fail(HM_ERR_MEMORY, "kernel %s: out of memory", name);
  k->device = device;
  snprintf(k->name, sizeof k->name, "%s", name);
  int status = open_driver();
  if (!status) status = read_declaration(k, source);
  if (!status) status = compile(d, source, exact, k);
  if (status) hm_cuda_user_free(k);
  else *out = k;
  return status;
}

const char *hm_cuda_user_name(const hm_user_kernel *k) { return k->name; }

void hm_cuda_user_free(hm_user_kernel *k) {
  if (!k) return;
  hm_cuda_device *d = k->module ? hm_cuda_use(k->device) : NULL;
  if (d && !d->lost) {
    (void)cudaStreamSynchronize(d->compute); /* a launch may be under way */
    (void)driver.unload(k->module);
  }
  free(k);
}

/* ====== Arguments ====== */

/* Which dtypes a pointer to that type may be given; 0: any. */
static uint32_t dtypes_of(const parameter *p) {
  const char *t = p->type;
  if (!strcmp(t, "float")) return 1u << HM_F32;
  if (!strcmp(t, "double")) return 1u << HM_F64;
  if (!strcmp(t, "half") || !strcmp(t, "__half")) return 1u << HM_F16;
  if (!strcmp(t, "nv_bfloat16") || !strcmp(t, "__nv_bfloat16")) return 1u << HM_BF16;
  if (!strcmp(t, "bool")) return 1u << HM_BOOL;
  if (p->bytes == 1) return !strcmp(t, "char") ? 0 : 1u << HM_U8 | 1u << HM_BOOL;
  if (p->bytes == 2) return 1u << HM_F16 | 1u << HM_BF16;
  if (p->bytes == 4) return 1u << HM_I32;
  if (p->bytes == 8) return 1u << HM_I64;
  return 0;
}

static const char *label(const parameter *p, int i, char *text, size_t size) {
  snprintf(text, size, p->name[0] ? "argument %d (%s)" : "argument %d", i + 1, p->name);
  return text;
}

static int check_pointer(const hm_user_kernel *k, int i, hm_user_arg *a) {
  const parameter *p = &k->param[i];
  char text[TYPE_BYTES + 32];
  if (a->kind != HM_USER_POINTER)
    return hm_cuda_fail(HM_ERR_ARG, "kernel %s: %s must be a tensor for %s *, got a number", k->name,
                        label(p, i, text, sizeof text), p->type);
  const uint32_t fit = dtypes_of(p);
  if (fit && !(fit >> a->dtype & 1))
    return hm_cuda_fail(HM_ERR_DTYPE, "kernel %s: %s is declared %s *, got a tensor of %s", k->name,
                        label(p, i, text, sizeof text), p->type, hm_dtype_name(a->dtype));
  a->written = !p->is_const;
  return HM_OK;
}

/* Does an integer fit the type declared? */
static bool fits(const parameter *p, int64_t v) {
  if (p->kind == KIND_FLOAT) return true;
  if (p->kind == KIND_BOOL) return v == 0 || v == 1;
  if (p->kind == KIND_UNSIGNED && v < 0) return false;
  if (p->bytes == 8) return true;
  const int bits = 8 * p->bytes - (p->kind == KIND_INT);
  return v < (int64_t)1 << bits && v >= -((int64_t)1 << bits);
}

static int check_number(const hm_user_kernel *k, int i, hm_user_arg *a) {
  const parameter *p = &k->param[i];
  char text[TYPE_BYTES + 32];
  if (a->kind == HM_USER_POINTER)
    return hm_cuda_fail(HM_ERR_ARG, "kernel %s: %s must be a number for %s, got a tensor", k->name,
                        label(p, i, text, sizeof text), p->type);
  if (a->kind == HM_USER_INT && fits(p, a->i)) return HM_OK;
  if (a->kind == HM_USER_INT)
    return hm_cuda_fail(HM_ERR_ARG, "kernel %s: %s: %lld does not fit %s", k->name, label(p, i, text, sizeof text),
                        (long long)a->i, p->type);
  if (p->kind == KIND_FLOAT) return HM_OK;
  if (a->f >= -9007199254740992.0 && a->f <= 9007199254740992.0 && a->f == (double)(int64_t)a->f &&
      fits(p, (int64_t)a->f))
    return HM_OK;
  return hm_cuda_fail(HM_ERR_ARG, "kernel %s: %s: %g is no value of %s", k->name, label(p, i, text, sizeof text), a->f,
                      p->type);
}

int hm_cuda_user_check(const hm_user_kernel *k, hm_user_arg *arg, int n) {
  if (n != k->n) return hm_cuda_fail(HM_ERR_ARG, "kernel %s: it takes %d arguments, got %d", k->name, k->n, n);
  for (int i = 0; i < n; i++) {
    arg[i].written = false;
    const int status = k->param[i].kind == KIND_POINTER ? check_pointer(k, i, &arg[i]) : check_number(k, i, &arg[i]);
    if (status) return status;
  }
  return HM_OK;
}

/* ====== Launching ====== */

typedef union slot {
  void *pointer;
  float f;
  double d;
  int64_t i; /* little-endian: its low bytes are the narrower integers */
} slot;

static slot convert(const parameter *p, const hm_user_arg *a) {
  slot s;
  s.i = 0;
  if (p->kind == KIND_POINTER) s.pointer = a->data;
  else if (p->kind == KIND_FLOAT) {
    const double x = a->kind == HM_USER_INT ? (double)a->i : a->f;
    if (p->bytes == 4) s.f = a->kind == HM_USER_INT ? (float)a->i : (float)x;
    else s.d = x;
  } else s.i = a->kind == HM_USER_INT ? a->i : (int64_t)a->f;
  return s;
}

static int too_large(const hm_user_kernel *k, const char *what, const int64_t v[3], const char *limit) {
  return hm_cuda_fail(HM_ERR_ARG, "kernel %s: %s = {%lld, %lld, %lld} cannot be launched: %s", k->name, what,
                      (long long)v[0], (long long)v[1], (long long)v[2], limit);
}

static int check_size(const hm_user_kernel *k, const int64_t grid[3], const int64_t block[3]) {
  char text[96];
  for (int d = 0; d < 3; d++) {
    if (grid[d] < 1) return too_large(k, "grid", grid, "every size must be at least 1");
    if (block[d] < 1) return too_large(k, "block", block, "every size must be at least 1");
  }
  if (grid[0] > INT_MAX || grid[1] > 65535 || grid[2] > 65535)
    return too_large(k, "grid", grid, "the most is {2147483647, 65535, 65535}");
  if (block[0] > 1024 || block[1] > 1024 || block[2] > 64)
    return too_large(k, "block", block, "the most is {1024, 1024, 64}");
  if (block[0] * block[1] * block[2] <= k->max_threads) return HM_OK;
  snprintf(text, sizeof text, "a block of this kernel has at most %d threads", k->max_threads);
  return too_large(k, "block", block, text);
}

/* Allows the dynamic shared memory of a launch. */
static int allow_shared(hm_cuda_device *d, hm_user_kernel *k, int64_t bytes) {
  int most = 0;
  const int status =
      hm_cuda_device_status(d, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, k->device),
                            k->name);
  if (status) return status;
  if (bytes < 0 || bytes + k->static_shared > most)
    return hm_cuda_fail(
        HM_ERR_ARG,
        "kernel %s: shared = %lld bytes cannot be launched: a block has at most %d, and %d are taken already", k->name,
        (long long)bytes, most, k->static_shared);
  if (bytes + k->static_shared <= 48 << 10) return HM_OK;
  return driver_status(d, driver.set(k->function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)bytes),
                       k->name);
}

int hm_cuda_user_device(const hm_user_kernel *k) { return k->device; }

int hm_cuda_user_launch(hm_cuda_device *d, hm_user_kernel *k, const int64_t grid[3], const int64_t block[3],
                        int64_t shared_bytes, hm_user_arg *arg, int n) {
  slot value[HM_MAX_USER_ARGS];
  void *address[HM_MAX_USER_ARGS + 1];
  int status = hm_cuda_user_check(k, arg, n);
  if (!status) status = check_size(k, grid, block);
  if (!status) status = allow_shared(d, k, shared_bytes);
  if (status) return status;
  for (int i = 0; i < n; i++) {
    value[i] = convert(&k->param[i], &arg[i]);
    address[i] = &value[i];
  }
  hm_cuda_count_launch();
  const CUresult r = driver.launch(k->function, (unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2],
                                   (unsigned)block[0], (unsigned)block[1], (unsigned)block[2], (unsigned)shared_bytes,
                                   (CUstream)d->compute, address, NULL);
  return driver_status(d, r, k->name);
}
