/*
 * fetch.cu -- small pieces of device memory on their way to the host, which nobody waits for.
 *
 * A fetch is a copy into a slot of pinned memory, queued on the compute stream behind all work asked for so far, with
 * an event behind it that can be asked.  Slots are made by the page, go back into their device's list when they are
 * given up, and live as long as the process.  A slot that is given up before its copy has run may be taken again at
 * once: the next copy into it comes behind the first.
 *
 * Called through hm_backend by core, on its mutator thread.
 */
#include <new>

#include "backend.h"

extern "C" {
struct hm_fetch {
  hm_cuda_device *device;
  hm_fetch *next; /* in the list of free ones */
  void *pinned;
  size_t bytes; /* of the copy under way */
  cudaEvent_t come;
};
}

enum { SLOTS = 32 };

static hm_fetch *free_slots[HM_CUDA_MAX_DEVICES];

/* Adds a page of slots to a device's list. */
static int make_slots(hm_cuda_device *d) {
  void *page = NULL;
  hm_fetch *slots = new (std::nothrow) hm_fetch[SLOTS]();
  if (!slots) return hm_cuda_fail(HM_ERR_MEMORY, "out of memory for copies from the device");
  cudaError_t e = cudaHostAlloc(&page, SLOTS * HM_FETCH_BYTES, cudaHostAllocDefault);
  int made = 0;
  for (; made < SLOTS && e == cudaSuccess; made++) {
    e = cudaEventCreateWithFlags(&slots[made].come, cudaEventDisableTiming);
    slots[made].device = d;
    slots[made].pinned = (char *)page + (size_t)made * HM_FETCH_BYTES;
  }
  if (e != cudaSuccess) { /* what was made stays unused: the process has met its end, or will */
    while (--made > 0) (void)cudaEventDestroy(slots[made - 1].come);
    if (page) (void)cudaFreeHost(page);
    delete[] slots;
    return hm_cuda_device_status(d, e, "copy to the host");
  }
  for (int i = 0; i < SLOTS; i++) {
    slots[i].next = free_slots[d->index];
    free_slots[d->index] = &slots[i];
  }
  return HM_OK;
}

static void give(hm_fetch *f) {
  f->next = free_slots[f->device->index];
  free_slots[f->device->index] = f;
}

int hm_cuda_fetch_begin(int device, const void *data, size_t bytes, hm_fetch **out) {
  hm_cuda_device *d = hm_cuda_use(device);
  if (!d) return HM_ERR_DEVICE;
  if (d->lost) return hm_cuda_wait(d, "copy to the host");
  if (bytes > HM_FETCH_BYTES)
    return hm_cuda_fail(HM_ERR_ARG, "a fetch takes %d bytes at most, got %zu", (int)HM_FETCH_BYTES, bytes);
  if (!free_slots[device]) {
    const int status = make_slots(d);
    if (status) return status;
  }
  hm_fetch *const f = free_slots[device];
  f->bytes = bytes;
  hm_cuda_count_copy(bytes);
  cudaError_t e = cudaMemcpyAsync(f->pinned, data, bytes, cudaMemcpyDeviceToHost, d->compute);
  if (e == cudaSuccess) e = cudaEventRecord(f->come, d->compute);
  if (e != cudaSuccess) return hm_cuda_device_status(d, e, "copy to the host");
  free_slots[device] = f->next;
  *out = f;
  return HM_OK;
}

int hm_cuda_fetch_end(hm_fetch *f, void *host, bool wait, bool *done) {
  hm_cuda_device *d = hm_cuda_use(f->device->index);
  if (!d) return HM_ERR_DEVICE;
  if (d->lost) return hm_cuda_wait(d, "copy to the host");
  *done = false;
  cudaError_t e = cudaEventQuery(f->come);
  if (e == cudaErrorNotReady) {
    (void)cudaGetLastError();
    if (!wait) return HM_OK;
    hm_cuda_count_wait();
    e = cudaEventSynchronize(f->come);
  }
  if (e != cudaSuccess) return hm_cuda_device_status(d, e, "copy to the host");
  memcpy(host, f->pinned, f->bytes);
  give(f);
  *done = true;
  return HM_OK;
}

void hm_cuda_fetch_drop(hm_fetch *f) {
  if (f) give(f);
}
