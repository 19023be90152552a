/*
 * emu.h -- what the parts of the test double know of each other.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Private to kernels/emu.
 *
 *   fiber.cpp    stacks and switching between them
 *   exec.cpp     blocks, threads, barriers, warp operations, shared memory: runs one kernel
 *   memory.cpp   device memory as a fenced arena; finds out who touched what
 *   stream.cpp   streams, events, the order in which work runs
 *   runtime.cpp  the CUDA runtime's other calls, errors, counters
 *   blas.cpp     cuBLAS and cublasLt: checks and epilogues; gemm.cpp: the loops
 *   cudnn.cpp    cuDNN's convolutions
 *   nvrtc.cpp    run-time compilation; driver.cpp: modules and their launch
 *
 * One lock (struct call) is held during every call from outside, so nothing here is run by two threads at once.
 */
#ifndef HM_EMU_H
#define HM_EMU_H

#include <functional>
#include <string>
#include "emu_device.h"
#include "emu_stats.h"

#if defined(__SANITIZE_ADDRESS__)
#define HM_EMU_ASAN 1
#else
#define HM_EMU_ASAN 0
#endif
#ifndef HM_EMU_TSAN /* set by hand: these files are themselves built without -fsanitize=thread */
#define HM_EMU_TSAN 0
#endif

namespace hm_emu {

/* ====== fiber.cpp ====== */

struct fiber {
  void *sp;    /* saved stack pointer, or the ucontext */
  char *stack; /* lowest usable byte; below it lies a guard page */
  size_t bytes;
  void *asan, *tsan; /* the sanitizers' own handles */
};

/* Makes a fiber that will run entry() when first switched to; entry must not return.  NULL when there is no memory. */
fiber *fiber_new(void (*entry)(void));
/* Throws away what a fiber was doing: the next switch enters entry() again. */
void fiber_rewind(fiber *f, void (*entry)(void));
/* Leaves the running fiber `from` for `to`; returns when somebody switches back.  `dying`: nobody will. */
void fiber_switch(fiber *from, fiber *to, bool dying);
/* To be called first in entry(). */
void fiber_entered(void);
/* Is the address in the guard below the fiber's stack? */
bool fiber_overflowed(const fiber *f, const void *address);

/* ====== exec.cpp ====== */

enum order_kind { ASCENDING, DESCENDING, RANDOM };

struct order {
  order_kind kind;
  uint64_t seed;
};

/* The order that HALFMOON_EMU_ORDER asks for now. */
order current_order(void);
/* cudaSuccess, or why this configuration cannot be launched; the reason goes to report(). */
cudaError_t check_launch(const launch &what);
/* Runs all blocks.  A violation becomes the context's error. */
void run_kernel(const launch &what);
/* Does a thread of a kernel run now? */
bool in_kernel(void);
/* A thread of a kernel did something wrong: reports it and ends the kernel.  Call only when in_kernel(). */
[[noreturn]] void violate(cudaError_t code, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *running_kernel(void);
/* The running thread's fiber; NULL outside kernels. */
const fiber *running_fiber(void);
/* Bytes of dynamic shared memory that a kernel was allowed beyond 48 KiB. */
void allow_dynamic(const void *kernel, size_t bytes);
size_t allowed_dynamic(const void *kernel);

enum { SHARED_STATIC_LIMIT = 48 << 10, SHARED_OPT_IN_LIMIT = 227 << 10 };

/* ====== memory.cpp ====== */

struct pool;

struct block { /* one allocation of device memory */
  uintptr_t begin, end;
  uintptr_t page_begin, page_end;
  pool *from;          /* NULL: cudaMalloc */
  uintptr_t low, high; /* between these, pages were opened; equal: all is closed */
  block *next_open;
  bool freeing; /* cudaFreeAsync was called, has not run */
};

struct pool {
  uint64_t threshold, used, used_high, reserved, reserved_high;
  int reuse[4];
};
extern pool default_pool;

size_t device_memory_total(void);
size_t device_memory_free(void);
/* NULL when the device is full. */
void *device_alloc(size_t bytes, pool *from);
/* False if no allocation begins there. */
bool device_free(void *p);
/* The allocation that begins at p, or NULL. */
block *block_at(const void *p);
/* The allocation that holds [p, p + bytes), or NULL. */
block *block_with(const void *p, size_t bytes);
/* Does the address lie in the arena, allocated or not? */
bool is_device(const void *p);
/* "512 bytes at 0x...: 12 bytes past the end of the allocation of 500 bytes ..." */
std::string describe(const void *p, size_t bytes);
void pool_trim(pool *p, uint64_t keep);
void pool_synchronised(void);

/* While one of these lives, the calling thread may touch device memory; blocks open when they are touched. */
struct device_access {
  device_access();
  ~device_access();
};

bool is_pinned(const void *p, size_t bytes);

/* ====== stream.cpp ====== */

/* Puts work on a stream; runs it at once unless work is deferred.  False: no such stream. */
bool push(cudaStream_t stream, std::function<void()> work);
bool stream_exists(cudaStream_t stream);
/* Runs everything that was put on one stream, or on all. */
void drain(cudaStream_t stream);
void drain_all(void);
void forget_streams(void); /* cudaDeviceReset */

/* ====== runtime.cpp ====== */

extern emu_stats stats;

/* Entry of every public call: takes the lock, counts, plays out planned failures, hands out the context's error (which releasing functions
 * return after their work). */
struct call {
  explicit call(const char *name);
  ~call();
  call(const call &) = delete;
  bool injected;     /* this call was told to fail */
  cudaError_t error; /* what it must return at once, unless cudaSuccess */
};

/* Notes an error for cudaGetLastError and returns it. */
cudaError_t note(cudaError_t e);
/* Keeps a message for emu_last_report and prints it. */
void report(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* From now on every call fails with this error. */
void set_sticky(cudaError_t e);
cudaError_t sticky(void);
bool setting(const char *name, bool fallback);
long setting_number(const char *name, long fallback);

} // namespace hm_emu

#endif
