/*
 * emu_device.h -- device code on the host: what a kernel may name, as macros and templates over the scheduler in exec.cpp.
 *
 * Part of kernels/emu, a test double: it shows no speed, no memory model, no real cuBLAS.  Included by kernels/cuda/device.h when the
 * compiler is not nvcc, and, with HM_EMU_MODULE defined, in front of source that is compiled at run time (nvrtc.cpp).
 *
 * A kernel is an ordinary function, run once for each thread on a fiber.  All blocks run in turn on the calling thread of the host; so
 * threadIdx and its kin are plain variables that the scheduler sets whenever it resumes a thread.  Shared memory comes from slots: fresh,
 * filled with NaN and fenced for each block.  A barrier or warp operation has an identity (file, line, __COUNTER__), so that threads
 * which wait at different ones are told from each other.
 */
#ifndef HM_EMU_DEVICE_H
#define HM_EMU_DEVICE_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <tuple>
#include <type_traits>
#include <utility>
#include "cuda_runtime.h"
#ifndef HM_EMU_MODULE
#include <memory>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#ifdef HM_EMU_MODULE
#define HM_EMU_VAR static
#else
#define HM_EMU_VAR extern
#endif
HM_EMU_VAR uint3 threadIdx, blockIdx;
HM_EMU_VAR dim3 blockDim, gridDim;
HM_EMU_VAR uint64_t hm_emu_epoch; /* counts blocks, over all launches: tells a slot that its memory is stale */
static const int warpSize = 32;

#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void *);
#endif

namespace hm_emu {

/* Where the scheduler writes the indices that a kernel reads: each module has its own. */
struct indices {
  uint3 *thread, *block;
  dim3 *block_dim, *grid_dim;
  uint64_t *epoch;
};

/* Lanes of a warp that meet. */
struct rendezvous {
  uint32_t mask, arrived;
  int left;
  int id, line;
  const char *file, *what;
  uint64_t value[32];
};

struct vote {
  int any, all, count;
};

/* One shared array of one kernel. */
struct slot {
  size_t bytes, align;
  uint64_t epoch;
  unsigned char *data;
};

/* What exec.cpp does for device code.  A table, because a module that was compiled at run time is given its address. */
struct services {
  const vote *(*barrier)(int id, const char *file, int line, int predicate);
  rendezvous *(*meet)(uint32_t mask, uint64_t value, const char *what, int id, const char *file, int line);
  void (*leave)(rendezvous *r);
  void (*make_shared)(slot *s, const char *name);
  unsigned char *(*dynamic)(void);
  void (*complain)(cudaError_t code, const char *what, const char *file, int line); /* does not return */
};

#ifdef HM_EMU_MODULE
static const services *table;
#else
extern const services *const table;
#endif

/* ====== Shared memory ====== */

template <class T> inline T &shared(slot &s, const char *name) {
  if (s.epoch != hm_emu_epoch) table->make_shared(&s, name);
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(&s);
#endif
  return *reinterpret_cast<T *>(s.data);
}

/* ====== Warp operations ====== */

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31u; }

enum { SHFL_IDX, SHFL_UP, SHFL_DOWN, SHFL_XOR };

template <class T>
T shuffle(unsigned mask, T value, int argument, int width, int mode, const char *what, int id, const char *file,
          int line) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) <= 8, "a shuffle moves one number");
  if (width < 1 || width > 32 || (width & (width - 1)))
    table->complain(cudaErrorLaunchFailure, "a shuffle's width must be a power of two up to 32", file, line);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  rendezvous *const r = table->meet(mask, bits, what, id, file, line);
  const int me = (int)lane(), base = me & ~(width - 1);
  int from = me;
  if (mode == SHFL_IDX) from = base | (argument & (width - 1));
  if (mode == SHFL_UP && me - argument >= base) from = me - argument;
  if (mode == SHFL_DOWN && me + argument < base + width) from = me + argument;
  if (mode == SHFL_XOR && (me ^ argument) < base + width) from = me ^ argument;
  if (!(mask >> from & 1u))
    table->complain(cudaErrorLaunchFailure, "a shuffle reads a lane that its mask leaves out", file, line);
  memcpy(&value, &r->value[from], sizeof value);
  table->leave(r);
  return value;
}

/* Bits of the lanes whose predicate holds. */
inline unsigned ballot(unsigned mask, bool predicate, const char *what, int id, const char *file, int line) {
  rendezvous *const r = table->meet(mask, predicate, what, id, file, line);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++)
    if ((mask >> i & 1u) && r->value[i]) bits |= 1u << i;
  table->leave(r);
  return bits;
}

inline void sync_warp(int id, const char *file, int line, unsigned mask = 0xffffffffu) {
  table->leave(table->meet(mask, 0, "__syncwarp", id, file, line));
}

/* ====== Atomics: relaxed, by compare and exchange, so that ThreadSanitizer sees them as such ====== */

template <class T, class F> T update(T *p, F f) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are 32 or 64 bits wide");
  static_assert(!std::is_same<T, long>::value && !std::is_same<T, unsigned long>::value,
                "CUDA has atomics for long long, not for long");
  typedef typename std::conditional<sizeof(T) == 8, uint64_t, uint32_t>::type word;
  word *const w = reinterpret_cast<word *>(p);
  word seen = __atomic_load_n(w, __ATOMIC_RELAXED), wanted;
  T before;
  do {
    memcpy(&before, &seen, sizeof before);
    const T after = f(before);
    memcpy(&wanted, &after, sizeof after);
  } while (!__atomic_compare_exchange_n(w, &seen, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

/* ====== Launching ====== */

/* A pointer among a launch's arguments: it must not be the host's. */
struct pointer_argument {
  int index;
  const void *value;
};

template <class T> void note_pointer(pointer_argument *list, int *n, int index, const T &value) {
  if constexpr (std::is_pointer<T>::value) list[(*n)++] = {index, (const void *)value};
  else (void)list, (void)n, (void)index, (void)value;
}

/* A kernel with its arguments, converted once to the parameters' types as a launch does. */
template <class... P> struct frame {
  void (*kernel)(P...);
  std::tuple<P...> arguments;
  static void call(const void *self) {
    const frame *f = static_cast<const frame *>(self);
    std::apply(f->kernel, f->arguments);
  }
  int pointers(pointer_argument *list) const {
    int n = 0;
    std::apply(
        [&](const P &...p) {
          int i = 0;
          (note_pointer(list, &n, i++, p), ...);
          (void)i;
        },
        arguments);
    return n;
  }
};

enum { MAX_ARGUMENTS = 64, MAX_ARGUMENT_BYTES = 4096 };

#ifndef HM_EMU_MODULE
struct launch {
  const char *name;
  const void *kernel;
  dim3 grid, block;
  size_t dynamic;
  std::shared_ptr<const void> frame;
  void (*call)(const void *frame);
  const indices *where;               /* of the module; NULL: the program's own */
  unsigned char *raw_begin, *raw_end; /* the module's __shared__ variables */
  int n_pointers;
  pointer_argument pointers[MAX_ARGUMENTS];
};

/* Checks the configuration and puts the kernel on its stream.  Takes what it needs of `what`. */
cudaError_t enqueue(const launch &what, cudaStream_t stream);

template <class... P, class... A>
cudaError_t start(const char *name, dim3 grid, dim3 block, size_t dynamic, cudaStream_t stream, void (*kernel)(P...),
                  A &&...arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "as many arguments as parameters");
  static_assert((!std::is_reference<P>::value && ...), "a kernel takes its parameters by value");
  static_assert((std::is_trivially_copyable<P>::value && ...), "a kernel's parameters are copied as bytes");
  static_assert(sizeof(std::tuple<P...>) <= MAX_ARGUMENT_BYTES, "4 KiB of parameters is what every driver takes");
  static_assert(sizeof...(P) <= MAX_ARGUMENTS, "too many parameters");
  typedef hm_emu::frame<P...> frame_type;
  auto f = std::make_shared<frame_type>(frame_type{kernel, std::tuple<P...>(static_cast<P>(arguments)...)});
  launch l{name, (const void *)kernel, grid, block, dynamic, f, frame_type::call, nullptr, nullptr, nullptr, 0, {}};
  l.n_pointers = f->pointers(l.pointers);
  return enqueue(l, stream);
}
#endif

} // namespace hm_emu

/* ====== CUDA's names ====== */

#define HM_EMU_HERE __COUNTER__, __FILE__, __LINE__
#define __syncthreads() ((void)hm_emu::table->barrier(HM_EMU_HERE, 0))
#define __syncthreads_or(p) (hm_emu::table->barrier(HM_EMU_HERE, (p) != 0)->any)
#define __syncthreads_and(p) (hm_emu::table->barrier(HM_EMU_HERE, (p) != 0)->all)
#define __syncthreads_count(p) (hm_emu::table->barrier(HM_EMU_HERE, (p) != 0)->count)
#define __syncwarp(...) hm_emu::sync_warp(HM_EMU_HERE __VA_OPT__(, ) __VA_ARGS__)

#define HM_EMU_SHUFFLE(mode, what, mask, value, argument, width, ...)                                                  \
  hm_emu::shuffle(mask, value, (int)(argument), width, hm_emu::mode, what, HM_EMU_HERE)
#define __shfl_sync(mask, value, ...) HM_EMU_SHUFFLE(SHFL_IDX, "__shfl_sync", mask, value, __VA_ARGS__, 32, )
#define __shfl_up_sync(mask, value, ...) HM_EMU_SHUFFLE(SHFL_UP, "__shfl_up_sync", mask, value, __VA_ARGS__, 32, )
#define __shfl_down_sync(mask, value, ...) HM_EMU_SHUFFLE(SHFL_DOWN, "__shfl_down_sync", mask, value, __VA_ARGS__, 32, )
#define __shfl_xor_sync(mask, value, ...) HM_EMU_SHUFFLE(SHFL_XOR, "__shfl_xor_sync", mask, value, __VA_ARGS__, 32, )
#define __ballot_sync(mask, p) hm_emu::ballot(mask, (p) != 0, "__ballot_sync", HM_EMU_HERE)
#define __any_sync(mask, p) ((int)(hm_emu::ballot(mask, (p) != 0, "__any_sync", HM_EMU_HERE) != 0))
#define __all_sync(mask, p) ((int)(hm_emu::ballot(mask, (p) == 0, "__all_sync", HM_EMU_HERE) == 0))

template <class T> struct hm_emu_same { typedef T type; };
#define HM_EMU_ATOMIC(name, expression)                                                                                \
  template <class T> inline T name(T *p, typename hm_emu_same<T>::type v) {                                            \
    return hm_emu::update(p, [=](T old) -> T { return expression; });                                                  \
  }
HM_EMU_ATOMIC(atomicAdd, (T)(old + v))
HM_EMU_ATOMIC(atomicSub, (T)(old - v))
HM_EMU_ATOMIC(atomicMax, old < v ? v : old)
HM_EMU_ATOMIC(atomicMin, v < old ? v : old)
HM_EMU_ATOMIC(atomicOr, (T)(old | v))
HM_EMU_ATOMIC(atomicAnd, (T)(old &v))
HM_EMU_ATOMIC(atomicExch, ((void)old, v))
#undef HM_EMU_ATOMIC
template <class T> inline T atomicCAS(T *p, typename hm_emu_same<T>::type expected, typename hm_emu_same<T>::type v) {
  return hm_emu::update(p, [=](T old) -> T { return old == expected ? v : old; });
}

template <class T> inline T __ldg(const T *p) { return *p; }
template <class T> inline T __ldcs(const T *p) { return *p; }
template <class T> inline void __stcs(T *p, typename hm_emu_same<T>::type v) { *p = v; }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline float __int_as_float(int i) {
  float f;
  memcpy(&f, &i, sizeof f);
  return f;
}
inline float __uint_as_float(unsigned i) {
  float f;
  memcpy(&f, &i, sizeof f);
  return f;
}
inline int __float_as_int(float f) {
  int i;
  memcpy(&i, &f, sizeof i);
  return i;
}
inline unsigned __float_as_uint(float f) {
  unsigned i;
  memcpy(&i, &f, sizeof i);
  return i;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned u) { return __builtin_popcount(u); }
inline int __ffs(int u) { return __builtin_ffs(u); }
inline int __clz(int u) { return u ? __builtin_clz((unsigned)u) : 32; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return b < a ? b : a; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

#endif
