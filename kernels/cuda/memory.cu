/*
 * memory.cu -- device memory and everything that crosses between host and device.
 *
 * Memory is ordered by the compute stream: a block that core's allocator hands on may still be read by work queued there, and the next user's work
 * comes behind it.  Copies run on the copy stream, behind the compute stream's work so far; uploads go through pinned buffers of our own, two of
 * them in turn, so that the host copies the next piece while the device fetches the last, and does not wait for the device at all unless both are
 * in use.  A download goes the same way and waits, since its caller wants the values.  Owns the pinned buffers, for the life of the process.
 *
 * A transfer copies out of pinned memory that its user owns: it too runs on the copy stream, but the compute stream waits for it only from the
 * place where it is joined, so that kernels queued in between run beside it.
 */
#include <stdlib.h>
#include <string.h>

#include "backend.h"

#ifdef HALFMOON_EMU
#include <emu_stats.h>
#endif

/* ====== Counting ====== */

static hm_device_counters counted;

void hm_cuda_count_wait(void) { counted.synchronisations++; }
void hm_cuda_count_launch(void) { counted.launches++; }
void hm_cuda_count_copy(size_t bytes) {
  counted.copies++;
  counted.bytes += (int64_t)bytes;
}

void hm_cuda_counters(hm_device_counters *out) {
#ifdef HALFMOON_EMU
  emu_stats s;
  emu_get_stats(&s);
  out->launches = (int64_t)(s.launches + s.gemms);
  out->synchronisations = (int64_t)s.synchronisations;
  out->copies = (int64_t)(s.copies_h2d + s.copies_d2h + s.copies_d2d);
  out->bytes = (int64_t)(s.bytes_h2d + s.bytes_d2h + s.bytes_d2d);
#else
  *out = counted;
#endif
}

/* ====== Allocation ====== */

static cudaError_t take(hm_cuda_device *d, void **data, size_t bytes) {
  return d->pools ? cudaMallocAsync(data, bytes, d->compute) : cudaMalloc(data, bytes);
}

/* Gives what the driver's pool keeps back to it, so that it can be cut anew. */
static void trim(hm_cuda_device *d) {
  cudaMemPool_t pool;
  (void)cudaStreamSynchronize(d->compute);
  if (cudaDeviceGetDefaultMemPool(&pool, d->index) == cudaSuccess) (void)cudaMemPoolTrimTo(pool, 0);
  (void)cudaGetLastError();
}

void *hm_cuda_mem_alloc(int device, size_t bytes) {
  hm_cuda_device *d = hm_cuda_use(device);
  if (!d || d->lost) return NULL;
  void *data = NULL;
  cudaError_t e = take(d, &data, bytes);
  if (e == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    if (d->pools) {
      trim(d);
      e = take(d, &data, bytes);
    }
  }
  if (e == cudaSuccess) return data;
  if (e == cudaErrorMemoryAllocation) (void)cudaGetLastError();
  else hm_cuda_device_status(d, e, "allocating memory"); /* a lost device is told by the next call, too */
  return NULL;
}

void hm_cuda_mem_free(int device, void *data, size_t bytes) {
  (void)bytes;
  hm_cuda_device *d = data ? hm_cuda_use(device) : NULL;
  if (!d || d->lost) return;
  const cudaError_t e = d->pools ? cudaFreeAsync(data, d->compute) : cudaFree(data);
  if (e != cudaSuccess) hm_cuda_device_status(d, e, "freeing memory");
}

/* ====== Order between the streams ====== */

/* Lets `later` wait for what `earlier` has been given so far. */
static cudaError_t order(cudaStream_t earlier, cudaStream_t later, cudaEvent_t event) {
  const cudaError_t e = cudaEventRecord(event, earlier);
  return e == cudaSuccess ? cudaStreamWaitEvent(later, event, 0) : e;
}

/* ====== Host to device ====== */

/* The next pinned buffer, once the device has read it; makes it on first use. */
static cudaError_t next_stage(hm_cuda_device *d, hm_cuda_stage **out) {
  hm_cuda_stage *s = &d->stage[d->next_stage];
  d->next_stage = (d->next_stage + 1) % HM_CUDA_STAGES;
  *out = s;
  if (s->pinned) {
    const cudaError_t ready = cudaEventQuery(s->done);
    if (ready != cudaErrorNotReady) return ready;
    (void)cudaGetLastError();
    hm_cuda_count_wait();
    return cudaEventSynchronize(s->done);
  }
  cudaError_t e = cudaEventCreateWithFlags(&s->done, cudaEventDisableTiming);
  if (e == cudaSuccess) e = cudaHostAlloc(&s->pinned, HM_CUDA_STAGE_BYTES, cudaHostAllocDefault);
  return e;
}

/* One piece, at most a buffer long. */
static cudaError_t upload_piece(hm_cuda_device *d, void *data, const void *host, size_t bytes) {
  hm_cuda_stage *s;
  cudaError_t e = next_stage(d, &s);
  if (e != cudaSuccess) return e;
  memcpy(s->pinned, host, bytes);
  hm_cuda_count_copy(bytes);
  e = cudaMemcpyAsync(data, s->pinned, bytes, cudaMemcpyHostToDevice, d->copy);
  return e == cudaSuccess ? cudaEventRecord(s->done, d->copy) : e;
}

int hm_cuda_mem_from_host(void *data, const void *host, size_t bytes, void *stream) {
  (void)stream;
  if (bytes == 0) return HM_OK;
  hm_cuda_device *d = hm_cuda_device_of(data, "copy to the device");
  if (!d) return HM_ERR_DEVICE;
  if (d->lost) return hm_cuda_wait(d, "copy to the device");
  cudaError_t e = order(d->compute, d->copy, d->fork);
  for (size_t at = 0; at < bytes && e == cudaSuccess; at += HM_CUDA_STAGE_BYTES) {
    const size_t left = bytes - at, piece = left < HM_CUDA_STAGE_BYTES ? left : (size_t)HM_CUDA_STAGE_BYTES;
    e = upload_piece(d, (char *)data + at, (const char *)host + at, piece);
  }
  if (e == cudaSuccess) e = order(d->copy, d->compute, d->join);
  return hm_cuda_device_status(d, e, "copy to the device");
}

/* ====== Transfers ====== */

struct hm_transfer {
  int device;
  cudaEvent_t done; /* behind the copies */
  bool begun;       /* copies were queued that nobody has seen done */
};

void *hm_cuda_host_alloc(int device, size_t bytes) {
  hm_cuda_device *d = hm_cuda_use(device);
  void *data = NULL;
  if (!d || d->lost) return NULL;
  const cudaError_t e = cudaHostAlloc(&data, bytes, cudaHostAllocDefault);
  if (e == cudaSuccess) return data;
  hm_cuda_device_status(d, e, "allocating pinned memory"); /* a lost device is told by the next call, too */
  return NULL;
}

void hm_cuda_host_free(int device, void *data, size_t bytes) {
  (void)bytes;
  hm_cuda_device *d = data ? hm_cuda_use(device) : NULL;
  if (!d) return;
  const cudaError_t e = cudaFreeHost(data);
  if (e != cudaSuccess && !d->lost) hm_cuda_device_status(d, e, "freeing pinned memory");
}

int hm_cuda_transfer_new(int device, hm_transfer **out) {
  *out = NULL;
  hm_cuda_device *d = hm_cuda_use(device);
  if (!d) return HM_ERR_DEVICE;
  if (d->lost) return hm_cuda_wait(d, "transfer");
  hm_transfer *t = (hm_transfer *)calloc(1, sizeof *t);
  if (!t) return hm_cuda_fail(HM_ERR_MEMORY, "out of memory: %zu bytes of host memory were refused", sizeof *t);
  t->device = device;
  const int status = hm_cuda_device_status(d, cudaEventCreateWithFlags(&t->done, cudaEventDisableTiming), "transfer");
  if (status) free(t);
  else *out = t;
  return status;
}

void hm_cuda_transfer_free(hm_transfer *t) {
  bool ready;
  if (!t) return;
  (void)hm_cuda_transfer_ready(t, true, &ready);
  (void)cudaEventDestroy(t->done);
  (void)cudaGetLastError();
  free(t);
}

int hm_cuda_transfer_start(hm_transfer *t, const hm_piece *piece, int n) {
  hm_cuda_device *d = hm_cuda_use(t->device);
  if (!d) return HM_ERR_DEVICE;
  if (d->lost) return hm_cuda_wait(d, "copy to the device");
  cudaError_t e = order(d->compute, d->copy, d->fork);
  for (int i = 0; i < n && e == cudaSuccess; i++) {
    if (piece[i].bytes == 0) continue;
    hm_cuda_count_copy(piece[i].bytes);
    e = cudaMemcpyAsync(piece[i].data, piece[i].host, piece[i].bytes, cudaMemcpyHostToDevice, d->copy);
  }
  const cudaError_t marked = cudaEventRecord(t->done, d->copy);
  t->begun = marked == cudaSuccess;
  if (e == cudaSuccess) e = marked;
  const int status = hm_cuda_device_status(d, e, "copy to the device");
  if (status) (void)order(d->copy, d->compute, d->join); /* the memory of what was begun may be given away now */
  return status;
}

int hm_cuda_transfer_join(hm_transfer *t) {
  hm_cuda_device *d = hm_cuda_use(t->device);
  if (!d) return HM_ERR_DEVICE;
  if (d->lost) return hm_cuda_wait(d, "copy to the device");
  if (!t->begun) return HM_OK;
  return hm_cuda_device_status(d, cudaStreamWaitEvent(d->compute, t->done, 0), "copy to the device");
}

int hm_cuda_transfer_ready(hm_transfer *t, bool wait, bool *ready) {
  *ready = !t->begun;
  if (*ready) return HM_OK;
  hm_cuda_device *d = hm_cuda_use(t->device);
  if (!d) return HM_ERR_DEVICE;
  cudaError_t e = cudaEventQuery(t->done);
  if (e == cudaErrorNotReady) {
    (void)cudaGetLastError();
    if (!wait) return HM_OK;
    hm_cuda_count_wait();
    e = cudaEventSynchronize(t->done);
  }
  if (e == cudaSuccess) t->begun = false;
  *ready = e == cudaSuccess;
  return hm_cuda_device_status(d, e, "copy to the device");
}

/* ====== Device to host ====== */

/* A piece on its way: copied out of its buffer when the device has filled it. */
typedef struct hm_cuda_piece {
  hm_cuda_stage *stage;
  void *host;
  size_t bytes;
} hm_cuda_piece;

static cudaError_t begin_piece(hm_cuda_device *d, hm_cuda_piece *p, void *host, const void *data, size_t bytes) {
  cudaError_t e = next_stage(d, &p->stage);
  if (e != cudaSuccess) return e;
  p->host = host;
  p->bytes = bytes;
  hm_cuda_count_copy(bytes);
  e = cudaMemcpyAsync(p->stage->pinned, data, bytes, cudaMemcpyDeviceToHost, d->copy);
  return e == cudaSuccess ? cudaEventRecord(p->stage->done, d->copy) : e;
}

static cudaError_t end_piece(const hm_cuda_piece *p) {
  if (!p->bytes) return cudaSuccess;
  hm_cuda_count_wait();
  const cudaError_t e = cudaEventSynchronize(p->stage->done);
  if (e == cudaSuccess) memcpy(p->host, p->stage->pinned, p->bytes);
  return e;
}

/* The device fills one buffer while the host empties the other. */
static cudaError_t download(hm_cuda_device *d, void *host, const void *data, size_t bytes) {
  hm_cuda_piece piece[2] = {{NULL, NULL, 0}, {NULL, NULL, 0}};
  cudaError_t e = cudaSuccess;
  int turn = 0;
  for (size_t at = 0; at < bytes && e == cudaSuccess; at += HM_CUDA_STAGE_BYTES, turn ^= 1) {
    const size_t left = bytes - at, n = left < HM_CUDA_STAGE_BYTES ? left : (size_t)HM_CUDA_STAGE_BYTES;
    e = begin_piece(d, &piece[turn], (char *)host + at, (const char *)data + at, n);
    if (e == cudaSuccess) e = end_piece(&piece[turn ^ 1]);
    piece[turn ^ 1].bytes = 0;
  }
  return e == cudaSuccess ? end_piece(&piece[turn ^ 1]) : e;
}

int hm_cuda_mem_to_host(void *host, const void *data, size_t bytes, void *stream) {
  (void)stream;
  if (bytes == 0) return HM_OK;
  hm_cuda_device *d = hm_cuda_device_of(data, "copy to the host");
  if (!d) return HM_ERR_DEVICE;
  if (d->lost) return hm_cuda_wait(d, "copy to the host");
  cudaError_t e = order(d->compute, d->copy, d->fork);
  if (e == cudaSuccess) e = download(d, host, data, bytes);
  const int status = hm_cuda_device_status(d, e, "copy to the host");
  return status ? status : hm_cuda_waited(d);
}

/* ====== On the device ====== */

int hm_cuda_zero(void *data, size_t bytes, const char *what) {
  if (bytes == 0) return HM_OK;
  return hm_cuda_status(cudaMemsetAsync(data, 0, bytes, hm_cuda_current()->compute), what);
}

int hm_cuda_copy_view(const hm_view *src, const hm_view *dst) {
  hm_attr attr[2];
  hm_kernel_call copy;
  memset(attr, 0, sizeof attr);
  attr[0].i = dst->dtype; /* of the row cast: dtype, layout */
  copy.op = HM_OP_CAST;
  copy.compute = src->dtype == HM_F64 || dst->dtype == HM_F64 ? HM_F64 : HM_F32;
  copy.n_in = copy.n_out = 1;
  copy.attr = attr;
  copy.workspace = NULL;
  copy.workspace_bytes = 0;
  copy.stream = hm_cuda_current()->compute;
  copy.in[0] = *src;
  copy.out[0] = *dst;
  return hm_cuda_copy(&copy);
}
