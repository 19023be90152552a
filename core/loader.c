/*
 * loader.c -- batches of rows, gathered ahead of the training loop by one C thread, delivered on the CPU or on a GPU.
 *
 * A loader holds row tensors of equal length (images and labels, say).  An epoch is a permutation of the rows, a
 * function of (seed, epoch) alone; batch k takes the rows at its k-th stretch.  The first tensor may be converted on
 * the way: x * scale + shift in float32, rounded once.
 *
 * Threads.  The mutator thread makes all tensors: it hands empty batches to the worker through a ring of `prefetch`
 * slots and takes full ones out, in order. The worker sees raw memory only; it never allocates, and never enters OpenMP
 * or oneDNN.  A slot belongs to the worker while it is QUEUED, else to the mutator; the mutex guards the states.
 * `abandon` tells the worker to drop what it is doing: it looks after every few rows, so that free and start return at
 * once.  The rows' storages are held by aliases of the loader's own, so releasing a tensor in the script does not pull
 * memory away from under the worker; writing to it during an epoch is the script's own affair.
 *
 * To a GPU.  Each slot owns a buffer of pinned memory, where the worker gathers, and a transfer.  The mutator thread begins the upload of batch
 * k + 1 when it hands out batch k, so that it runs beside the step that batch k is for; when batch k + 1 is handed out, the device's later work is
 * told to come behind the upload.  A buffer goes to the worker again when its upload is seen to be done.  There is one buffer more than `prefetch`:
 * next() waits for the device only when that has fallen behind by as many batches as there are buffers.
 *
 * Called by lua/bind through halfmoon.h, on the mutator thread only.
 */
#include "op.h"

#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"

enum { HM_MAX_PREFETCH = 1024, HM_ROWS_AT_ONCE = 64, HM_CHUNK_ELEMENTS = 256 };

typedef enum hm_slot_state { HM_SLOT_EMPTY, HM_SLOT_QUEUED, HM_SLOT_READY } hm_slot_state;

/* One batch under way. */
typedef struct hm_slot {
  hm_slot_state state;
  int64_t first, rows; /* its stretch of the permutation */
  hm_tensor **tensor;  /* n of them, owned; touched by the mutator only.  For a GPU: from the upload's beginning on */
  void **data;         /* where the worker writes: the tensors' memory, or parts of `pinned` */
  void *pinned;        /* for a GPU, owned */
  hm_transfer *upload; /* for a GPU, owned: out of pinned into the tensors */
} hm_slot;

/* One source tensor, as the worker sees it. */
typedef struct hm_source {
  hm_tensor *tensor; /* owned alias */
  const char *data;
  int64_t row_elements;
  size_t row_bytes;
  int dtype, out_dtype; /* they differ, or scale and shift apply, where `convert` is set */
  bool convert;
} hm_source;

struct hm_loader {
  hm_loader_options options;
  hm_source *source;
  int n;
  int64_t rows, batches;
  int64_t *order;      /* the permutation of this epoch */
  uint32_t table[256]; /* converted values of every byte, for u8 sources */

  const hm_backend *backend; /* of the GPU that batches go to; NULL: they stay on the CPU */
  hm_piece *piece;           /* n of them, for an upload */
  size_t pinned_bytes;       /* of each slot */

  hm_slot *slot; /* the ring; batch k goes through slot k % n_slots */
  int n_slots;
  int64_t next_batch; /* that next() will give */
  int64_t taken;      /* batches whose tensors hold, or are getting, their values: next_batch, or one more */
  int64_t queued;     /* batches given to the worker; taken .. queued - 1 are QUEUED or READY */
  bool started;

  pthread_t thread;
  bool has_thread;
  pthread_mutex_t lock;
  pthread_cond_t work, done; /* something was queued, or stop; something became ready, or the worker went idle */
  int64_t next_work;         /* the batch that the worker takes next */
  bool busy, stop;           /* worker is filling; worker shall end */
  _Atomic bool abandon;
};

/* ====== Order ====== */

/* SplitMix64: a fine enough generator for permutations, the same on every machine. */
static uint64_t next_random(uint64_t *state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

/* A number in [0, n), all equally likely. */
static uint64_t random_below(uint64_t *state, uint64_t n) {
  const uint64_t unfair = (0 - n) % n; /* 2^64 mod n */
  for (;;) {
    const uint64_t x = next_random(state);
    const unsigned __int128 product = (unsigned __int128)x * n;
    if ((uint64_t)product >= unfair) return (uint64_t)(product >> 64);
  }
}

/* Fills order for an epoch: Fisher-Yates from a stream of its own for each (seed, epoch). */
static void make_order(hm_loader *l, int64_t epoch) {
  for (int64_t i = 0; i < l->rows; i++) l->order[i] = i;
  if (!l->options.shuffle) return;
  uint64_t seed = l->options.seed, number = (uint64_t)epoch;
  uint64_t state = next_random(&seed) ^ (next_random(&number) * 0xd6e8feb86659fd93u);
  for (int64_t i = l->rows - 1; i > 0; i--) {
    const int64_t j = (int64_t)random_below(&state, (uint64_t)i + 1);
    const int64_t held = l->order[i];
    l->order[i] = l->order[j];
    l->order[j] = held;
  }
}

/* ====== Conversion ====== */

/* n elements from `at` on, as float32. */
static void load_f32(const hm_source *s, const char *src, int64_t at, int n, float *out) {
#define LOAD(type, value)                                                                                              \
  for (int i = 0; i < n; i++) {                                                                                        \
    const type v = ((const type *)src)[at + i];                                                                        \
    out[i] = value;                                                                                                    \
  }                                                                                                                    \
  break
  switch (s->dtype) {
  case HM_I32: LOAD(int32_t, (float)v);
  case HM_I64: LOAD(int64_t, (float)v);
  case HM_F16: LOAD(uint16_t, hm_f16_to_f32(v));
  case HM_BF16: LOAD(uint16_t, hm_bf16_to_f32(v));
  case HM_F32: LOAD(float, v);
  case HM_F64: LOAD(double, (float)v);
  case HM_F8_E4M3: LOAD(uint8_t, hm_e4m3_to_f32(v));
  case HM_F8_E5M2: LOAD(uint8_t, hm_e5m2_to_f32(v));
  default: LOAD(uint8_t, (float)v);
  }
#undef LOAD
}

/* Two roundings, never a fused one. */
static float affine(float x, float scale, float shift) {
  const float scaled = x * scale;
  return scaled + shift;
}

/* The converted value of every byte. */
static void make_table(hm_loader *l) {
  const float scale = (float)l->options.scale, shift = (float)l->options.shift;
  const int dtype = l->options.convert_to;
  for (int i = 0; i < 256; i++) {
    const float y = affine((float)i, scale, shift);
    l->table[i] = dtype == HM_F32 ? hm_f32_bits(y) : dtype == HM_F16 ? hm_f32_to_f16(y) : hm_f32_to_bf16(y);
  }
}

/* n bytes by the table. */
static void convert_bytes(const uint32_t *table, const uint8_t *src, void *dst, int dtype, int64_t n) {
  if (dtype == HM_F32) {
    uint32_t *out = dst;
    for (int64_t i = 0; i < n; i++) out[i] = table[src[i]];
  } else {
    uint16_t *out = dst;
    for (int64_t i = 0; i < n; i++) out[i] = (uint16_t)table[src[i]];
  }
}

/* n elements of any dtype, a chunk at a time. */
static void convert_any(const hm_loader *l, const hm_source *s, const char *src, void *dst, int64_t n) {
  const float scale = (float)l->options.scale, shift = (float)l->options.shift;
  const int dtype = s->out_dtype;
  float chunk[HM_CHUNK_ELEMENTS];
  for (int64_t at = 0; at < n; at += HM_CHUNK_ELEMENTS) {
    const int m = n - at < HM_CHUNK_ELEMENTS ? (int)(n - at) : HM_CHUNK_ELEMENTS;
    load_f32(s, src, at, m, chunk);
    if (dtype == HM_F32) {
      for (int i = 0; i < m; i++) ((float *)dst)[at + i] = affine(chunk[i], scale, shift);
    } else if (dtype == HM_F16) {
      for (int i = 0; i < m; i++) ((uint16_t *)dst)[at + i] = hm_f32_to_f16(affine(chunk[i], scale, shift));
    } else {
      for (int i = 0; i < m; i++) ((uint16_t *)dst)[at + i] = hm_f32_to_bf16(affine(chunk[i], scale, shift));
    }
  }
}

/* ====== Gathering: on the worker, or on the caller when prefetch is 0 ====== */

/* Copies rows [from, to) of a batch. */
static void gather_rows(const hm_loader *l, const hm_slot *slot, int64_t from, int64_t to) {
  for (int k = 0; k < l->n; k++) {
    const hm_source *s = &l->source[k];
    const size_t out_bytes = (size_t)s->row_elements * (size_t)hm_dtype_size(s->out_dtype);
    char *dst = (char *)slot->data[k] + (size_t)from * out_bytes;
    for (int64_t r = from; r < to; r++, dst += out_bytes) {
      const char *src = s->data + (size_t)l->order[slot->first + r] * s->row_bytes;
      if (!s->convert) {
        memcpy(dst, src, s->row_bytes);
      } else if (s->dtype == HM_U8 || s->dtype == HM_BOOL) {
        convert_bytes(l->table, (const uint8_t *)src, dst, s->out_dtype, s->row_elements);
      } else {
        convert_any(l, s, src, dst, s->row_elements);
      }
    }
  }
}

/* Fills a batch; false when told to abandon it. */
static bool gather(hm_loader *l, const hm_slot *slot) {
  for (int64_t r = 0; r < slot->rows; r += HM_ROWS_AT_ONCE) {
    if (atomic_load_explicit(&l->abandon, memory_order_relaxed)) return false;
    gather_rows(l, slot, r, r + HM_ROWS_AT_ONCE < slot->rows ? r + HM_ROWS_AT_ONCE : slot->rows);
  }
  return true;
}

/* The worker: takes queued batches in order until told to stop. */
static void *work(void *arg) {
  hm_loader *l = arg;
  pthread_mutex_lock(&l->lock);
  while (!l->stop) {
    hm_slot *slot = &l->slot[l->next_work % l->n_slots];
    if (slot->state != HM_SLOT_QUEUED || atomic_load_explicit(&l->abandon, memory_order_relaxed)) {
      pthread_cond_wait(&l->work, &l->lock);
      continue;
    }
    l->busy = true;
    pthread_mutex_unlock(&l->lock);
    const bool full = gather(l, slot);
    pthread_mutex_lock(&l->lock);
    l->busy = false;
    if (full) {
      slot->state = HM_SLOT_READY;
      l->next_work++;
    }
    pthread_cond_signal(&l->done);
  }
  pthread_mutex_unlock(&l->lock);
  return NULL;
}

/* ====== Pinned buffers, for a GPU ====== */

enum { HM_PINNED_ALIGN = 256 };

/* Bytes of source k's part of a buffer: a full batch, or all rows where that is less. */
static size_t part_bytes(const hm_loader *l, int k) {
  const int64_t rows = l->options.batch_size < l->rows ? l->options.batch_size : l->rows;
  const hm_source *s = &l->source[k];
  const size_t bytes = (size_t)rows * (size_t)s->row_elements * (size_t)hm_dtype_size(s->out_dtype);
  return (bytes + HM_PINNED_ALIGN - 1) / HM_PINNED_ALIGN * HM_PINNED_ALIGN;
}

/* Gives every slot its buffer and its transfer, if it has none. */
static int make_buffers(hm_loader *l) {
  if (!l->backend || l->pinned_bytes == 0) return HM_OK;
  for (int i = 0; i < l->n_slots; i++) {
    hm_slot *slot = &l->slot[i];
    int rc = slot->pinned ? HM_OK : hm__pinned_alloc(l->options.device, l->pinned_bytes, &slot->pinned);
    if (rc) return hm_fail(rc, "loader: %s", hm_error_message());
    if (!slot->upload) rc = l->backend->transfer_new(l->options.device - 1, &slot->upload);
    if (rc) return rc;
    size_t at = 0;
    for (int k = 0; k < l->n; at += part_bytes(l, k++)) slot->data[k] = (char *)slot->pinned + at;
  }
  return HM_OK;
}

/* Gives a slot's buffer back, once its upload is done. */
static void free_buffer(hm_loader *l, hm_slot *slot) {
  if (slot->upload) l->backend->transfer_free(slot->upload);
  hm__pinned_free(l->options.device, slot->pinned, l->pinned_bytes);
  slot->upload = NULL;
  slot->pinned = NULL;
}

/* ====== The ring, on the mutator thread ====== */

static void release_all(hm_tensor **tensors, int n) {
  for (int k = 0; k < n; k++) {
    hm_tensor_release(tensors[k]);
    tensors[k] = NULL;
  }
}

static hm_slot *slot_of(const hm_loader *l, int64_t batch) { return &l->slot[batch % l->n_slots]; }

/* Makes the tensors of a batch of `rows` rows. */
static int make_tensors(const hm_loader *l, int64_t rows, hm_tensor **out) {
  memset(out, 0, (size_t)l->n * sizeof *out);
  for (int k = 0; k < l->n; k++) {
    const hm_tensor *t = l->source[k].tensor;
    int64_t shape[HM_MAX_NDIM];
    memcpy(shape, t->shape, sizeof shape);
    shape[0] = rows;
    int rc = hm_empty(t->ndim, shape, l->source[k].out_dtype, l->options.device, &out[k]);
    if (rc) {
      release_all(out, l->n);
      return rc;
    }
  }
  return HM_OK;
}

static int64_t batch_rows(const hm_loader *l, int64_t batch) {
  const int64_t left = l->rows - batch * l->options.batch_size;
  return left < l->options.batch_size ? left : l->options.batch_size;
}

/* May the worker write to the slot's buffer?  With `wait` it may when this returns HM_OK. */
static int buffer_ready(const hm_loader *l, hm_slot *slot, bool wait, bool *ready) {
  *ready = true;
  return slot->upload ? l->backend->transfer_ready(slot->upload, wait, ready) : HM_OK;
}

/* Hands the next batch of the epoch to the worker, with tensors to write to where it stays on the CPU.  One must be left, a slot free, and its
 * buffer ready. */
static int queue_batch(hm_loader *l) {
  hm_slot *slot = slot_of(l, l->queued);
  const int64_t rows = batch_rows(l, l->queued);
  if (!l->backend) {
    int rc = make_tensors(l, rows, slot->tensor);
    if (rc) return rc;
    for (int k = 0; k < l->n; k++) slot->data[k] = hm_tensor_data(slot->tensor[k]);
  }
  slot->first = l->queued * l->options.batch_size;
  slot->rows = rows;
  pthread_mutex_lock(&l->lock);
  slot->state = HM_SLOT_QUEUED;
  pthread_cond_signal(&l->work);
  pthread_mutex_unlock(&l->lock);
  l->queued++;
  return HM_OK;
}

/* Gives the tensors of a slot up.  An upload may still write to them: what gets their memory next comes behind it. */
static void drop_tensors(hm_loader *l, hm_slot *slot) {
  if (l->n > 0 && slot->tensor[0] && slot->upload) (void)l->backend->transfer_join(slot->upload);
  release_all(slot->tensor, l->n);
}

/* Makes the worker let go of every slot, and empties them. */
static void clear_ring(hm_loader *l, int64_t first) {
  atomic_store_explicit(&l->abandon, true, memory_order_relaxed);
  pthread_mutex_lock(&l->lock);
  while (l->busy) pthread_cond_wait(&l->done, &l->lock);
  for (int i = 0; i < l->n_slots; i++) l->slot[i].state = HM_SLOT_EMPTY;
  l->next_work = first;
  atomic_store_explicit(&l->abandon, false, memory_order_relaxed);
  pthread_mutex_unlock(&l->lock);
  for (int i = 0; i < l->n_slots; i++) drop_tensors(l, &l->slot[i]);
  l->next_batch = first;
  l->taken = first;
  l->queued = first;
}

/* Starts the worker, deaf to signals: those are the main thread's. */
static int start_thread(hm_loader *l) {
  if (l->has_thread || l->options.prefetch == 0) return HM_OK;
  sigset_t every, before;
  sigfillset(&every);
  pthread_sigmask(SIG_SETMASK, &every, &before);
  const int code = pthread_create(&l->thread, NULL, work, l);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (code != 0) return hm_fail(HM_ERR_MEMORY, "loader: cannot start a thread: %s", strerror(code));
  l->has_thread = true;
  return HM_OK;
}

/* Queues as many batches as there are slots to write to.  When memory is out, fewer lie ahead for a while: the batch
 * that next() must give is tried again there, and its failure reported. */
static void refill(hm_loader *l) {
  bool ready;
  while (l->has_thread && l->queued < l->batches && l->queued - l->taken < l->n_slots) {
    if (buffer_ready(l, slot_of(l, l->queued), false, &ready) || !ready || queue_batch(l)) return;
  }
}

/* Waits until a queued batch is ready, or gathers it here. */
static void await_batch(hm_loader *l, hm_slot *slot) {
  if (l->has_thread) {
    pthread_mutex_lock(&l->lock);
    while (slot->state != HM_SLOT_READY) pthread_cond_wait(&l->done, &l->lock);
    pthread_mutex_unlock(&l->lock);
  } else if (slot->state == HM_SLOT_QUEUED) {
    gather(l, slot);
    slot->state = HM_SLOT_READY;
  }
}

/* Makes the tensors of a gathered batch on the GPU and begins to copy it there. */
static int begin_upload(hm_loader *l, hm_slot *slot) {
  int rc = make_tensors(l, slot->rows, slot->tensor);
  if (rc || !slot->upload) return rc; /* no upload: rows without elements */
  for (int k = 0; k < l->n; k++) {
    const hm_tensor *t = slot->tensor[k];
    const size_t bytes = (size_t)t->numel * (size_t)hm_dtype_size(t->dtype);
    l->piece[k] = (hm_piece){hm_tensor_data(t), slot->data[k], bytes};
  }
  rc = l->backend->transfer_start(slot->upload, l->piece, l->n);
  if (rc) release_all(slot->tensor, l->n);
  return rc;
}

/* Turns the gathered batch `taken` into tensors.  When it fails the batch stays, to be tried again. */
static int take_batch(hm_loader *l) {
  hm_slot *slot = slot_of(l, l->taken);
  const int rc = l->backend ? begin_upload(l, slot) : HM_OK;
  if (rc) return rc;
  pthread_mutex_lock(&l->lock);
  slot->state = HM_SLOT_EMPTY;
  pthread_mutex_unlock(&l->lock);
  l->taken++;
  return HM_OK;
}

/* Takes the batch that next() must give, waiting for it. */
static int take_now(hm_loader *l) {
  hm_slot *slot = slot_of(l, l->taken);
  bool ready;
  if (l->queued == l->taken) {
    int rc = buffer_ready(l, slot, true, &ready);
    if (!rc) rc = queue_batch(l);
    if (rc) return rc;
  }
  await_batch(l, slot);
  return take_batch(l);
}

/* For a GPU: takes the batch after it too, if it is gathered.  Where it cannot be taken next() tries again. */
static void take_ahead(hm_loader *l) {
  if (!l->backend || !l->has_thread || l->taken != l->next_batch || l->taken == l->queued) return;
  pthread_mutex_lock(&l->lock);
  const bool gathered = slot_of(l, l->taken)->state == HM_SLOT_READY;
  pthread_mutex_unlock(&l->lock);
  if (gathered) (void)take_batch(l);
}

int hm_loader_start(hm_loader *l, int64_t epoch, int64_t first) {
  if (first < 0 || first > l->batches) {
    return hm_fail(HM_ERR_ARG, "loader: an epoch has %lld batches, it cannot begin behind batch %lld",
                   (long long)l->batches, (long long)first);
  }
  int rc = make_buffers(l);
  if (!rc) rc = start_thread(l);
  if (rc) return rc;
  clear_ring(l, first);
  make_order(l, epoch);
  l->started = true;
  refill(l);
  return HM_OK;
}

int hm_loader_next(hm_loader *l, hm_tensor **out, bool *done) {
  int rc = HM_OK;
  *done = false;
  if (!l->started) return hm_fail(HM_ERR_STATE, "loader: next was called before start");
  if (l->next_batch == l->batches) {
    *done = true;
    return HM_OK;
  }
  hm_slot *head = slot_of(l, l->next_batch);
  if (l->taken == l->next_batch) rc = take_now(l);
  if (!rc && head->upload) rc = l->backend->transfer_join(head->upload);
  if (rc) return rc;
  memcpy(out, head->tensor, (size_t)l->n * sizeof *out);
  memset(head->tensor, 0, (size_t)l->n * sizeof *out);
  l->next_batch++;
  take_ahead(l);
  refill(l);
  return HM_OK;
}

int64_t hm_loader_batches(const hm_loader *l) { return l->batches; }

/* ====== Life ====== */

static int check_options(const hm_loader_options *o) {
  if (o->batch_size < 1)
    return hm_fail(HM_ERR_ARG, "loader: batch_size must be at least 1, got %lld", (long long)o->batch_size);
  if (o->prefetch < 0 || o->prefetch > HM_MAX_PREFETCH) {
    return hm_fail(HM_ERR_ARG, "loader: prefetch must be 0 to %d, got %d", (int)HM_MAX_PREFETCH, o->prefetch);
  }
  if (o->convert_to == HM_NONE) return HM_OK;
  if (o->convert_to != HM_F32 && o->convert_to != HM_F16 && o->convert_to != HM_BF16) {
    return hm_fail(HM_ERR_DTYPE, "loader: batches can be converted to float32, float16 or bfloat16, not to %s",
                   hm_dtype_name(o->convert_to));
  }
  if (!isfinite(o->scale) || !isfinite(o->shift)) {
    return hm_fail(HM_ERR_ARG, "loader: scale and shift must be finite, got %g and %g", o->scale, o->shift);
  }
  return HM_OK;
}

static int check_tensor(hm_tensor *const *tensors, int i) {
  const hm_tensor *t = tensors[i];
  char a[128], b[128];
  hm_describe(t, a, sizeof a);
  if (t->ndim < 1)
    return hm_fail(HM_ERR_SHAPE, "loader: tensor %d has no dims, it is %s: rows along dim 1 were expected", i + 1, a);
  if (hm_tensor_device(t) != HM_CPU)
    return hm_fail(HM_ERR_DEVICE,
                   "loader: tensor %d must be on the cpu, where batches are gathered, it is %s\n"
                   "  hint: give it :cpu(); option device says where batches go",
                   i + 1, a);
  if (!hm_is_contiguous(t))
    return hm_fail(HM_ERR_ARG, "loader: tensor %d must be contiguous, it is %s\n  hint: contiguous()", i + 1, a);
  if (t->shape[0] != tensors[0]->shape[0]) {
    return hm_fail(HM_ERR_SHAPE, "loader: tensors have different numbers of rows: tensor 1 is %s, tensor %d is %s",
                   hm_describe(tensors[0], b, sizeof b), i + 1, a);
  }
  return HM_OK;
}

/* Describes source k and takes hold of its storage. */
static int open_source(hm_loader *l, int k, hm_tensor *t) {
  hm_source *s = &l->source[k];
  int rc = hm_alias(t, &s->tensor);
  if (rc) return rc;
  s->data = hm_tensor_data(t);
  s->row_elements = t->shape[0] ? t->numel / t->shape[0] : 0;
  s->row_bytes = (size_t)s->row_elements * (size_t)hm_dtype_size(t->dtype);
  s->dtype = t->dtype;
  s->convert = k == 0 && l->options.convert_to != HM_NONE;
  s->out_dtype = s->convert ? l->options.convert_to : t->dtype;
  return HM_OK;
}

/* Opens the device that batches go to. */
static int open_device(hm_loader *l) {
  if (l->options.device == HM_CPU) return HM_OK;
  l->backend = hm_device_backend(l->options.device);
  if (!l->backend) return HM_ERR_DEVICE;
  if (!l->backend->transfer_start)
    return hm_fail(HM_ERR_UNSUPPORTED, "loader: %s has no uploads that nobody waits for",
                   hm_device_name(l->options.device));
  for (int k = 0; k < l->n; k++) l->pinned_bytes += part_bytes(l, k);
  l->piece = hm_calloc((size_t)l->n * sizeof *l->piece);
  return l->piece ? HM_OK : HM_ERR_MEMORY;
}

/* Allocates the permutation and the ring. */
static int make_ring(hm_loader *l) {
  l->n_slots = (l->options.prefetch > 0 ? l->options.prefetch : 1) + (l->backend ? 1 : 0);
  l->order = hm_alloc(((size_t)l->rows + 1) * sizeof *l->order);
  l->slot = hm_calloc((size_t)l->n_slots * sizeof *l->slot);
  if (!l->order || !l->slot) return HM_ERR_MEMORY;
  for (int i = 0; i < l->n_slots; i++) {
    l->slot[i].tensor = hm_calloc((size_t)l->n * sizeof(hm_tensor *));
    l->slot[i].data = hm_calloc((size_t)l->n * sizeof(void *));
    if (!l->slot[i].tensor || !l->slot[i].data) return HM_ERR_MEMORY;
  }
  return HM_OK;
}

int hm_loader_new(hm_tensor *const *tensors, int n, const hm_loader_options *options, hm_loader **out) {
  if (n < 1) return hm_fail(HM_ERR_ARG, "loader: at least one tensor was expected");
  int rc = check_options(options);
  for (int i = 0; i < n && !rc; i++) rc = check_tensor(tensors, i);
  if (rc) return rc;
  hm_loader *l = hm_calloc(sizeof *l);
  if (!l) return HM_ERR_MEMORY;
  pthread_mutex_init(&l->lock, NULL);
  pthread_cond_init(&l->work, NULL);
  pthread_cond_init(&l->done, NULL);
  l->options = *options;
  l->rows = tensors[0]->shape[0];
  const int64_t size = options->batch_size;
  l->batches = l->rows / size + (!options->drop_last && l->rows % size != 0);
  l->source = hm_calloc((size_t)n * sizeof *l->source);
  rc = l->source ? HM_OK : HM_ERR_MEMORY;
  if (!rc) l->n = n;
  for (int k = 0; k < n && !rc; k++) rc = open_source(l, k, tensors[k]);
  if (!rc) rc = open_device(l);
  if (!rc) rc = make_ring(l);
  if (rc) {
    hm_loader_free(l);
    return rc;
  }
  if (options->convert_to != HM_NONE) make_table(l);
  *out = l;
  return HM_OK;
}

void hm_loader_free(hm_loader *l) {
  if (!l) return;
  if (l->has_thread) {
    atomic_store_explicit(&l->abandon, true, memory_order_relaxed);
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_cond_signal(&l->work);
    pthread_mutex_unlock(&l->lock);
    pthread_join(l->thread, NULL);
  }
  for (int i = 0; i < l->n_slots && l->slot; i++) {
    if (l->slot[i].tensor) drop_tensors(l, &l->slot[i]);
    free_buffer(l, &l->slot[i]);
    hm_free(l->slot[i].tensor);
    hm_free(l->slot[i].data);
  }
  for (int k = 0; k < l->n; k++) hm_tensor_release(l->source[k].tensor);
  hm_free(l->slot);
  hm_free(l->piece);
  hm_free(l->order);
  hm_free(l->source);
  pthread_cond_destroy(&l->done);
  pthread_cond_destroy(&l->work);
  pthread_mutex_destroy(&l->lock);
  hm_free(l);
}
