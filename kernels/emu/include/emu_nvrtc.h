/*
 * emu_nvrtc.h -- what stands in front of source that is compiled at run time, and what stands behind it.
 *
 * Part of kernels/emu, a test double: it shows no speed, no memory model, no real cuBLAS.  Used by nvrtc.cpp alone, in the shared object that
 * it makes.  A module has its own threadIdx and shared memory; hm_emu_attach() tells them to the scheduler and is told the scheduler's services.
 *
 * __shared__ variables lie in a section of their own, which is filled with NaN for each block; they have no redzones.
 */
#ifndef HM_EMU_NVRTC_PRELUDE_H
#define HM_EMU_NVRTC_PRELUDE_H

#define HM_EMU_MODULE 1
#include "emu_device.h"

#define __CUDACC_RTC__ 1
#define __shared__ static __attribute__((section("hm_emu_shared"), aligned(16)))
#define __constant__ static

extern "C" {
extern unsigned char __start_hm_emu_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_hm_emu_shared[] __attribute__((weak, visibility("hidden")));
}

namespace hm_emu {

/* A kernel as cuModuleGetFunction finds it. */
struct entry {
  const char *name;
  const void *kernel;
  int parameters;
  void *(*pack)(void **values, pointer_argument *list, int *n_pointers); /* a frame with these arguments */
  void (*drop)(void *frame);
  void (*call)(const void *frame);
};

/* What a module gives away. */
struct module_face {
  indices where;
  unsigned char *shared_begin, *shared_end;
};

#ifdef HM_EMU_MODULE_SOURCE

template <class... P, size_t... I> void *pack_frame(void (*kernel)(P...), void **values, std::index_sequence<I...>) {
  (void)values;
  return new frame<P...>{kernel, std::tuple<P...>(*static_cast<P *>(values[I])...)};
}

template <auto kernel> struct kernel_of;
template <class... P, void (*kernel)(P...)> struct kernel_of<kernel> {
  static void *pack(void **values, pointer_argument *list, int *n_pointers) {
    static_assert(sizeof...(P) <= MAX_ARGUMENTS && sizeof(std::tuple<P...>) <= MAX_ARGUMENT_BYTES,
                  "too many parameters");
    void *const f = pack_frame(kernel, values, std::index_sequence_for<P...>());
    *n_pointers = static_cast<frame<P...> *>(f)->pointers(list);
    return f;
  }
  static void drop(void *f) { delete static_cast<frame<P...> *>(f); }
  static entry make(const char *name) {
    return {name, (const void *)kernel, (int)sizeof...(P), pack, drop, frame<P...>::call};
  }
};

#endif

} // namespace hm_emu

#endif
