/*
 * fiber.cpp -- stacks for the threads of a kernel, and switching between them.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Used by exec.cpp alone.  On x86-64 a switch saves the six registers
 * that a call preserves; elsewhere (or with HM_EMU_UCONTEXT) it is ucontext's.  AddressSanitizer and ThreadSanitizer are told of each.
 * A fiber lives as long as the process.
 */
#include "emu.h"

#include <sys/mman.h>
#include <unistd.h>

#if HM_EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if HM_EMU_TSAN
extern "C" {
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *fiber);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void *__tsan_get_current_fiber(void);
}
#endif

#if !defined(__x86_64__) && !defined(HM_EMU_UCONTEXT)
#define HM_EMU_UCONTEXT 1
#endif

namespace hm_emu {

static const size_t GUARD = 64u << 10; /* a multiple of every page size in use */
static const size_t STACK = 256u << 10;

} // namespace hm_emu

#ifdef HM_EMU_UCONTEXT

#include <ucontext.h>

static void swap_stacks(hm_emu::fiber *from, hm_emu::fiber *to) {
  if (!from->sp) from->sp = new ucontext_t;
  swapcontext((ucontext_t *)from->sp, (ucontext_t *)to->sp);
}

static void prepare(hm_emu::fiber *f, void (*entry)(void)) {
  if (!f->sp) f->sp = new ucontext_t;
  ucontext_t *const u = (ucontext_t *)f->sp;
  getcontext(u);
  u->uc_stack.ss_sp = f->stack;
  u->uc_stack.ss_size = f->bytes;
  u->uc_link = nullptr;
  makecontext(u, entry, 0);
}

#else

extern "C" void hm_emu_swap(void **save, void *to);
asm(".text\n"
    ".globl hm_emu_swap\n"
    ".hidden hm_emu_swap\n"
    ".type hm_emu_swap,@function\n"
    "hm_emu_swap:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n"
    ".size hm_emu_swap, .-hm_emu_swap\n");

static void swap_stacks(hm_emu::fiber *from, hm_emu::fiber *to) { hm_emu_swap(&from->sp, to->sp); }

/* The first switch pops six registers and returns into entry, which sees the stack as after a call. */
static void prepare(hm_emu::fiber *f, void (*entry)(void)) {
  void **sp = (void **)(f->stack + f->bytes);
  *--sp = nullptr;
  *--sp = (void *)entry;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  f->sp = sp;
}

#endif

namespace hm_emu {

fiber *fiber_new(void (*entry)(void)) {
  void *const m =
      mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return nullptr;
  mprotect(m, GUARD, PROT_NONE);
  fiber *const f = new fiber{nullptr, (char *)m + GUARD, STACK, nullptr, nullptr};
  fiber_rewind(f, entry);
  return f;
}

void fiber_rewind(fiber *f, void (*entry)(void)) {
#if HM_EMU_ASAN
  __asan_unpoison_memory_region(f->stack, f->bytes);
  f->asan = nullptr;
#endif
#if HM_EMU_TSAN /* a new thread on a new stack: nothing orders it after the one before */
  if (f->tsan) {
    __tsan_destroy_fiber(f->tsan);
    mmap(f->stack, f->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }
  f->tsan = __tsan_create_fiber(0);
#endif
  prepare(f, entry);
}

static fiber *came_from; /* who switched last: AddressSanitizer tells the bounds of its stack on arrival */

static void arrived(void *asan) {
#if HM_EMU_ASAN
  const void *bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(asan, &bottom, &bytes);
  if (came_from->bytes == 0) { /* the host's own stack */
    came_from->stack = (char *)bottom;
    came_from->bytes = bytes;
  }
#else
  (void)asan;
#endif
}

void fiber_switch(fiber *from, fiber *to, bool dying) {
#if HM_EMU_ASAN
  __sanitizer_start_switch_fiber(dying ? nullptr : &from->asan, to->stack, to->bytes);
#endif
#if HM_EMU_TSAN
  if (!from->tsan) from->tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to->tsan, 1 /* no order is implied */);
#endif
  (void)dying;
  came_from = from;
  swap_stacks(from, to);
  arrived(from->asan);
}

void fiber_entered(void) { arrived(nullptr); }

bool fiber_overflowed(const fiber *f, const void *address) {
  return (const char *)address < f->stack && (const char *)address >= f->stack - GUARD;
}

} // namespace hm_emu
