/*
 * alloc.h -- private to core: what alloc.c, device.c, tensor.c and shadow.c share about memory and threads.
 */
#ifndef HM_CORE_ALLOC_H
#define HM_CORE_ALLOC_H

#include "halfmoon.h"

/* Thread-local data that hot paths read: initial-exec spares a function call in a library loaded at run time. */
#define HM_FAST_TLS _Thread_local __attribute__((tls_model("initial-exec")))

/* True on the thread that called hm_init: the only one that may run the pressure hook, purge shadows, or use free lists
 * of structs. */
extern HM_FAST_TLS bool hm__mutator;
static inline bool hm__is_mutator(void) { return hm__mutator; }

/* Opens the block pool of a device over a backend's raw memory; `index` is the backend's own number of the device.
 * Called once by hm__device_register. */
void hm__pool_open(int device, const hm_backend *backend, int index);

extern _Atomic int64_t hm__alloc_countdown; /* of hm_alloc_fail_at; 0: off */
/* The counted path of hm__alloc_injected. */
bool hm__alloc_count_down(void);
/* True if the test hook says that this allocation is the one to fail.  For code that serves allocations from a list of
 * its own; hm_alloc and hm__device_alloc ask by themselves. */
static inline bool hm__alloc_injected(void) {
  return atomic_load_explicit(&hm__alloc_countdown, memory_order_relaxed) > 0 && hm__alloc_count_down();
}

/* Structs of tensors and storages that wait for reuse.  Mutator thread. (tensor.c) */
int64_t hm__spare_structs(void);

/* Makes the devices of an opened backend known: ids first .. first + device_count() - 1.  HM_ERR_INTERNAL if it was
 * built against another kernels.h, HM_ERR_DEVICE if there is no room.  This is where a plug-in joins. (device.c) */
int hm__device_register(const hm_backend *backend, int first);

/* Loads the plug-in for CUDA as HALFMOON_CUDA says; `host` must outlive it.  HM_ERR_DEVICE says why there is none. (plugin.c) */
int hm__plugin_load(const hm_host *host, const hm_backend **out);

#endif
