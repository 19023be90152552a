/*
 * alloc.c -- memory: host memory for the engine's own structures, and a caching pool of blocks for each device's
 * tensors.
 *
 * A training loop asks for the same sizes again and again, so a freed block is kept for the next taker; in its steady
 * state a loop asks the system for nothing.  Sizes are rounded up to classes: steps of 64 bytes up to 1 KB, then eight
 * steps for each power of two (at most 12.5 % of waste).  A pool has two parts:
 *
 *   small   up to 256 KB.  A block serves its class only: one stack of free blocks for each class.
 *   large   above.  A segment is what came from the system in one piece; it is split when a smaller block is wanted,
 *           and neighbours that are free join again, so that one piece of memory serves a step's forward activations
 *           and then its gradients.  Blocks are described by structs on the host (device memory cannot hold them),
 *           found by address when they are freed.  A taker gets the first block of the smallest class that fits; what
 *           it does not need is split off, or left where that is at most a quarter.
 *
 * All of it is O(1).  Each pool has a mutex: threads that prepare batches allocate too.  The system and the pressure
 * hook are called outside it, the hook and the purge of shadows on the mutator thread only.
 *
 * Statistics count requested bytes as live and whole blocks as reserved.  The pool's own bookkeeping (stacks, block
 * structs) uses libc directly: when that fails a block goes back to the system or stays unsplit, so there is no error
 * to test.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "alloc.h"
#include "op.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

/* ====== Failing on purpose ====== */

_Atomic int64_t hm__alloc_countdown;

int64_t hm_alloc_fail_at(int64_t n) { return atomic_exchange(&hm__alloc_countdown, n > 0 ? n : 0); }

bool hm__alloc_count_down(void) {
  int64_t n = atomic_load(&hm__alloc_countdown);
  while (n > 0) {
    if (atomic_compare_exchange_weak(&hm__alloc_countdown, &n, n - 1)) return n == 1;
  }
  return false;
}

/* ====== Host memory ====== */

/* Counting begins when a test asks: the rest pays for a look at a flag. */
static _Atomic bool counting;
static _Atomic int64_t blocks;

static inline void count_block(int delta) {
  if (atomic_load_explicit(&counting, memory_order_relaxed)) atomic_fetch_add(&blocks, delta);
}

int64_t hm_host_blocks(void) {
  static int64_t spare_at_first;
  if (!atomic_exchange(&counting, true)) spare_at_first = hm__spare_structs();
  return atomic_load(&blocks) - (hm__spare_structs() - spare_at_first);
}

/* Keeps the message of a host allocation that failed. */
static void *host_failed(size_t bytes) {
  hm_fail(HM_ERR_MEMORY, "out of memory: %zu bytes of host memory were refused", bytes);
  return NULL;
}

void *hm_alloc(size_t bytes) {
  void *p = hm__alloc_injected() ? NULL : malloc(bytes ? bytes : 1);
  if (!p) return host_failed(bytes);
  count_block(1);
  return p;
}

void *hm_calloc(size_t bytes) {
  void *p = hm__alloc_injected() ? NULL : calloc(1, bytes ? bytes : 1);
  if (!p) return host_failed(bytes);
  count_block(1);
  return p;
}

void *hm_realloc(void *p, size_t bytes) {
  void *q = hm__alloc_injected() ? NULL : realloc(p, bytes ? bytes : 1);
  if (!q) return host_failed(bytes);
  if (!p) count_block(1);
  return q;
}

void hm_free(void *p) {
  const int saved = errno;
  if (p) count_block(-1);
  free(p);
  errno = saved;
}

/* ====== Size classes ====== */

enum {
  CLASS_STEP = 64,
  FINE_LOG2 = 9,    /* up to 2^9 bytes in steps of CLASS_STEP */
  FINE_CLASSES = 8, /* 512 / 64 */
  MAX_LOG2 = 48,    /* no block above 2^48 bytes */
  CLASSES = FINE_CLASSES + (MAX_LOG2 - FINE_LOG2) * 8,
  CLASS_WORDS = (CLASSES + 63) / 64,
  SMALL_MAX = 256 * 1024,
  SMALL_CLASSES = FINE_CLASSES + (18 - FINE_LOG2) * 8, /* classes up to SMALL_MAX = 2^18 */
  BUCKETS = 1024
};

/* The smallest class that holds `bytes` (1 .. 2^MAX_LOG2). */
static int class_of(size_t bytes) {
  if (bytes <= (1u << FINE_LOG2)) return (int)((bytes - 1) / CLASS_STEP);
  int log2 = 63 - __builtin_clzll((unsigned long long)(bytes - 1));
  int eighth = (int)((bytes - 1 - ((size_t)1 << log2)) >> (log2 - 3));
  return FINE_CLASSES + (log2 - FINE_LOG2) * 8 + eighth;
}

/* Bytes of a block of a class. */
static size_t class_bytes(int cls) {
  if (cls < FINE_CLASSES) return (size_t)(cls + 1) * CLASS_STEP;
  int log2 = FINE_LOG2 + (cls - FINE_CLASSES) / 8;
  int eighth = (cls - FINE_CLASSES) % 8;
  return ((size_t)1 << log2) + ((size_t)(eighth + 1) << (log2 - 3));
}

/* ====== Pools ====== */

/* Free blocks of one small class. */
typedef struct stack {
  void **item;
  int32_t n, room;
} stack;

/* A large block.  In use: in the table of addresses.  Free: in the list of the largest class that it holds in full. */
typedef struct block {
  char *data;
  size_t bytes;
  struct block *before, *after; /* neighbours in the segment */
  struct block *prev, *next;    /* free list; `next` also links the table's buckets */
  bool is_free;
} block;

typedef struct pool {
  pthread_mutex_t lock;
  const hm_backend *backend; /* NULL: no such device */
  int index;                 /* the backend's own number of the device */
  hm_memory_stats stats;     /* `reserved` is kept here, too */
  stack small[SMALL_CLASSES];
  block *large[CLASSES];           /* free lists */
  uint64_t large_set[CLASS_WORDS]; /* bit c: large[c] is not empty */
  block *used[BUCKETS];            /* large blocks in use, by address */
  int64_t mark;                    /* live bytes that a look for garbage could not avoid; mutator thread only */
} pool;

static pool pools[HM_MAX_DEVICES];
static hm_pressure_fn pressure_fn;
static void *pressure_ud;
static bool pressure_running; /* mutator thread only */

void hm__pool_open(int device, const hm_backend *backend, int index) {
  pool *p = &pools[device];
  pthread_mutex_init(&p->lock, NULL);
  p->backend = backend;
  p->index = index;
}

void hm_set_pressure_hook(hm_pressure_fn fn, void *ud) {
  pressure_fn = fn;
  pressure_ud = ud;
}

static int device_of(const pool *p) { return (int)(p - pools); }

/* Marks a block's memory as out of bounds / in use for the address sanitizer. */
static void poison(const pool *p, void *data, size_t bytes) {
  if (device_of(p) == HM_CPU) ASAN_POISON_MEMORY_REGION(data, bytes);
}
static void unpoison(const pool *p, void *data, size_t bytes) {
  if (device_of(p) == HM_CPU) ASAN_UNPOISON_MEMORY_REGION(data, bytes);
}

/* Gives memory back to the system.  The pool's lock is held or nobody else knows the memory. */
static void system_free(pool *p, void *data, size_t bytes) {
  unpoison(p, data, bytes);
  p->backend->mem_free(p->index, data, bytes);
}

/* ---- small blocks; the lock is held ---- */

static void *small_take(pool *p, int cls) {
  stack *s = &p->small[cls];
  if (s->n == 0) return NULL;
  p->stats.cached -= (int64_t)class_bytes(cls);
  return s->item[--s->n];
}

static void small_put(pool *p, int cls, void *data) {
  stack *s = &p->small[cls];
  size_t bytes = class_bytes(cls);
  if (s->n == s->room) {
    int32_t room = s->room ? 2 * s->room : 8;
    void **item = realloc(s->item, (size_t)room * sizeof *item);
    if (!item) {
      p->stats.reserved -= (int64_t)bytes;
      system_free(p, data, bytes);
      return;
    }
    s->item = item;
    s->room = room;
  }
  s->item[s->n++] = data;
  p->stats.cached += (int64_t)bytes;
}

/* ---- large blocks; the lock is held ---- */

/* The free list of a block: the largest class that the block holds in full. */
static int list_of(const block *b) {
  int cls = class_of(b->bytes);
  return class_bytes(cls) > b->bytes ? cls - 1 : cls;
}

static void list_add(pool *p, block *b) {
  int cls = list_of(b);
  b->is_free = true;
  b->prev = NULL;
  b->next = p->large[cls];
  if (b->next) b->next->prev = b;
  p->large[cls] = b;
  p->large_set[cls / 64] |= UINT64_C(1) << (cls % 64);
}

static void list_remove(pool *p, block *b) {
  int cls = list_of(b);
  b->is_free = false;
  if (b->next) b->next->prev = b->prev;
  if (b->prev) {
    b->prev->next = b->next;
  } else {
    p->large[cls] = b->next;
    if (!b->next) p->large_set[cls / 64] &= ~(UINT64_C(1) << (cls % 64));
  }
}

/* The first block of the smallest class >= cls that has one, or NULL. */
static block *list_first(const pool *p, int cls) {
  int word = cls / 64;
  uint64_t set = p->large_set[word] & (~UINT64_C(0) << (cls % 64));
  while (!set) {
    if (++word == CLASS_WORDS) return NULL;
    set = p->large_set[word];
  }
  return p->large[word * 64 + __builtin_ctzll(set)];
}

static block **bucket_of(pool *p, const void *data) {
  uint64_t h = (uint64_t)(uintptr_t)data * UINT64_C(0x9e3779b97f4a7c15);
  return &p->used[h >> 54]; /* the top 10 bits: BUCKETS */
}

static void used_add(pool *p, block *b) {
  block **bucket = bucket_of(p, b->data);
  b->next = *bucket;
  *bucket = b;
}

/* Takes the block at an address out of the table; NULL if there is none. */
static block *used_remove(pool *p, const void *data) {
  for (block **at = bucket_of(p, data); *at; at = &(*at)->next) {
    if ((*at)->data == data) {
      block *b = *at;
      *at = b->next;
      return b;
    }
  }
  return NULL;
}

/* Is there enough left over to be worth a block of its own? */
static bool worth_splitting(size_t rest, size_t want) { return rest >= SMALL_MAX && rest > want / 8; }

/* Cuts what b has beyond `want` off into a free block.  Without memory for its struct, b stays whole. */
static void split(pool *p, block *b, size_t want) {
  block *rest = malloc(sizeof *rest);
  if (!rest) return;
  *rest = (block){.data = b->data + want, .bytes = b->bytes - want, .before = b, .after = b->after};
  if (b->after) b->after->before = rest;
  b->after = rest;
  b->bytes = want;
  list_add(p, rest);
}

/* A free block for `want` bytes (a class size), or NULL. */
static void *large_take(pool *p, int cls) {
  size_t want = class_bytes(cls);
  block *b = list_first(p, cls);
  if (b && !worth_splitting(b->bytes - want, want) && b->bytes - want > want / 4)
    b = list_first(p, class_of(want + SMALL_MAX)); /* too big to hand over, too small to split */
  if (!b) return NULL;
  list_remove(p, b);
  if (worth_splitting(b->bytes - want, want)) split(p, b, want);
  p->stats.cached -= (int64_t)b->bytes;
  used_add(p, b);
  return b->data;
}

/* Joins b with the free block behind it. */
static void join_after(pool *p, block *b) {
  block *dead = b->after;
  list_remove(p, dead);
  b->bytes += dead->bytes;
  b->after = dead->after;
  if (b->after) b->after->before = b;
  free(dead);
}

static void large_put(pool *p, block *b) {
  p->stats.cached += (int64_t)b->bytes;
  poison(p, b->data, b->bytes);
  if (b->after && b->after->is_free) join_after(p, b);
  if (b->before && b->before->is_free) {
    b = b->before;
    block *right = b->after;
    list_remove(p, b);
    b->bytes += right->bytes;
    b->after = right->after;
    if (b->after) b->after->before = b;
    free(right);
  }
  list_add(p, b);
}

/* ====== Allocating ====== */

/* Takes a block from the cache and counts it; NULL is a miss. */
static void *take(pool *p, int cls, size_t bytes) {
  pthread_mutex_lock(&p->lock);
  void *data = cls < SMALL_CLASSES ? small_take(p, cls) : large_take(p, cls);
  if (data) {
    p->stats.allocs++;
    p->stats.live += (int64_t)bytes;
    if (p->stats.live > p->stats.peak) p->stats.peak = p->stats.live;
  }
  pthread_mutex_unlock(&p->lock);
  return data;
}

/* Asks the system for a block of a class, counts it, and (large) describes it; NULL: refused. */
static void *system_take(pool *p, int cls, size_t bytes) {
  size_t want = class_bytes(cls);
  block *b = NULL;
  if (cls >= SMALL_CLASSES && !(b = malloc(sizeof *b))) return NULL;
  void *data = p->backend->mem_alloc(p->index, want);
  if (!data) {
    free(b);
    return NULL;
  }
  poison(p, data, want);
  pthread_mutex_lock(&p->lock);
  if (b) {
    *b = (block){.data = data, .bytes = want};
    used_add(p, b);
  }
  p->stats.allocs++;
  p->stats.system_allocs++;
  p->stats.reserved += (int64_t)want;
  p->stats.live += (int64_t)bytes;
  if (p->stats.live > p->stats.peak) p->stats.peak = p->stats.live;
  pthread_mutex_unlock(&p->lock);
  return data;
}

/* Runs the pressure hook, unless it is running already or this is not its thread. */
static bool press(size_t bytes, bool desperate) {
  if (!pressure_fn || pressure_running || !hm__is_mutator()) return false;
  pressure_running = true;
  const bool looked = pressure_fn(pressure_ud, bytes, desperate);
  pressure_running = false;
  return looked;
}

/* Live bytes, as the lock shows them. */
static int64_t live_bytes(pool *p) {
  pthread_mutex_lock(&p->lock);
  const int64_t live = p->stats.live;
  pthread_mutex_unlock(&p->lock);
  return live;
}

/* A large allocation that would pass the mark: dead tensors may be what stands in the way.  Without this, garbage would fill the
 * cache unseen, because only a miss asks the collector.  What gave back next to nothing is not worth asking for again: then the mark
 * admits it. */
static void keep_below_mark(pool *p, size_t bytes) {
  if (!hm__is_mutator()) return;
  const int64_t before = live_bytes(p) + (int64_t)bytes;
  if (before <= p->mark || !press(bytes, false)) return;
  const int64_t after = live_bytes(p) + (int64_t)bytes, needed = before - after < before / 64 ? before : after;
  if (needed > p->mark) p->mark = needed + needed / 256;
}

/* "1.50 GB" for messages. */
static const char *human(int64_t bytes, char buffer[32]) {
  static const char *const units[] = {"B", "KB", "MB", "GB", "TB", "PB", "EB"};
  double x = (double)bytes;
  int unit = 0;
  for (; x >= 1000 && unit < 6; unit++) x /= 1000;
  snprintf(buffer, 32, unit ? "%.2f %s" : "%.0f %s", x, units[unit]);
  return buffer;
}

/* Keeps the message of a refused allocation. */
static int out_of_memory(pool *p, size_t bytes) {
  char want[32], live[32], cached[32];
  pthread_mutex_lock(&p->lock);
  hm_memory_stats s = p->stats;
  pthread_mutex_unlock(&p->lock);
  return hm_fail(HM_ERR_MEMORY,
                 "out of memory on %s: wanted %s; %s are live, %s cached\n"
                 "  hint: a smaller batch or a half dtype needs less; release tensors that are no longer used",
                 hm_device_name(device_of(p)), human((int64_t)bytes, want), human(s.live, live),
                 human(s.cached, cached));
}

/* A miss: the collector may know of garbage; then the system; then everything that can be spared is given up for one
 * more try. */
static void *refill(pool *p, int cls, size_t bytes) {
  press(bytes, false);
  void *data = take(p, cls, bytes);
  if (!data) data = system_take(p, cls, bytes);
  if (data) return data;
  if (hm__is_mutator()) hm__shadow_purge();
  press(bytes, true);
  data = take(p, cls, bytes);
  if (data) return data;
  hm_memory_trim(device_of(p));
  return system_take(p, cls, bytes);
}

/* The pool of a device, or NULL with a message. */
static pool *pool_of(int device) {
  if (device >= 0 && device < HM_MAX_DEVICES && pools[device].backend) return &pools[device];
  hm_device_backend(device); /* says why */
  return NULL;
}

int hm__device_alloc(int device, size_t bytes, void **out) {
  *out = NULL;
  pool *p = pool_of(device);
  if (!p) return HM_ERR_DEVICE;
  if (bytes == 0) return HM_OK;
  if (hm__alloc_injected() || bytes > (size_t)1 << MAX_LOG2) return out_of_memory(p, bytes);
  int cls = class_of(bytes);
  if (cls >= SMALL_CLASSES) keep_below_mark(p, bytes);
  void *data = take(p, cls, bytes);
  if (!data) data = refill(p, cls, bytes);
  if (!data) {
    /* A device that is lost, or does not open, refuses too: then that is what is told. */
    if (device != HM_CPU && p->backend->synchronize(p->index)) return HM_ERR_DEVICE;
    return out_of_memory(p, bytes);
  }
  unpoison(p, data, bytes);
  *out = data;
  return HM_OK;
}

void hm__device_free(int device, void *data, size_t bytes) {
  if (!data) return;
  const int saved = errno;
  pool *p = &pools[device];
  int cls = class_of(bytes);
  pthread_mutex_lock(&p->lock);
  p->stats.live -= (int64_t)bytes;
  if (cls < SMALL_CLASSES) {
    poison(p, data, class_bytes(cls));
    small_put(p, cls, data);
  } else {
    block *b = used_remove(p, data);
    if (b) large_put(p, b);
  }
  pthread_mutex_unlock(&p->lock);
  errno = saved;
}

/* ====== Pinned host memory ====== */

static void count_pinned(pool *p, int64_t delta) {
  pthread_mutex_lock(&p->lock);
  p->stats.pinned += delta;
  pthread_mutex_unlock(&p->lock);
}

/* Not pooled: those who use it keep it for long.  When it is out, the collector may know of some. */
int hm__pinned_alloc(int device, size_t bytes, void **out) {
  char want[32], held[32];
  *out = NULL;
  pool *p = pool_of(device);
  if (!p) return HM_ERR_DEVICE;
  if (!p->backend->host_alloc)
    return hm_fail(HM_ERR_UNSUPPORTED, "%s has no pinned host memory", hm_device_name(device));
  void *data = NULL;
  if (!hm__alloc_injected()) {
    data = p->backend->host_alloc(p->index, bytes);
    if (!data && press(bytes, true)) data = p->backend->host_alloc(p->index, bytes);
    if (!data && p->backend->synchronize(p->index)) return HM_ERR_DEVICE; /* it is lost, or does not open */
  }
  if (!data)
    return hm_fail(HM_ERR_MEMORY,
                   "out of pinned host memory for %s: wanted %s, %s are held\n"
                   "  hint: a smaller batch_size or prefetch needs less; close() loaders that are no longer used",
                   hm_device_name(device), human((int64_t)bytes, want), human(p->stats.pinned, held));
  count_pinned(p, (int64_t)bytes);
  *out = data;
  return HM_OK;
}

void hm__pinned_free(int device, void *data, size_t bytes) {
  if (!data) return;
  pool *p = &pools[device];
  p->backend->host_free(p->index, data, bytes);
  count_pinned(p, -(int64_t)bytes);
}

/* ====== Giving back ====== */

/* Gives back every free block that is a whole segment.  The lock is held. */
static void trim_large(pool *p) {
  for (int cls = SMALL_CLASSES; cls < CLASSES; cls++) {
    for (block *b = p->large[cls], *next; b; b = next) {
      next = b->next;
      if (b->before || b->after) continue;
      list_remove(p, b);
      p->stats.cached -= (int64_t)b->bytes;
      p->stats.reserved -= (int64_t)b->bytes;
      system_free(p, b->data, b->bytes);
      free(b);
    }
  }
}

void hm_memory_trim(int device) {
  pool *p = pool_of(device);
  if (!p) return;
  pthread_mutex_lock(&p->lock);
  for (int cls = 0; cls < SMALL_CLASSES; cls++) {
    stack *s = &p->small[cls];
    size_t bytes = class_bytes(cls);
    p->stats.cached -= (int64_t)bytes * s->n;
    p->stats.reserved -= (int64_t)bytes * s->n;
    while (s->n > 0) system_free(p, s->item[--s->n], bytes);
    free(s->item);
    *s = (stack){NULL, 0, 0};
  }
  trim_large(p);
  pthread_mutex_unlock(&p->lock);
}

/* ====== Statistics ====== */

int hm_memory_get_stats(int device, hm_memory_stats *out) {
  pool *p = pool_of(device);
  if (!p) return HM_ERR_DEVICE;
  pthread_mutex_lock(&p->lock);
  *out = p->stats;
  pthread_mutex_unlock(&p->lock);
  return HM_OK;
}

void hm_memory_reset_peak(int device) {
  pool *p = pool_of(device);
  if (!p) return;
  pthread_mutex_lock(&p->lock);
  p->stats.peak = p->mark = p->stats.live;
  pthread_mutex_unlock(&p->lock);
}

void hm__count_shadow_bytes(int device, int64_t delta) {
  pool *p = &pools[device];
  pthread_mutex_lock(&p->lock);
  p->stats.shadow_bytes += delta;
  pthread_mutex_unlock(&p->lock);
}

void hm__count_layout_copy(int device) {
  pool *p = &pools[device];
  pthread_mutex_lock(&p->lock);
  p->stats.layout_copies++;
  pthread_mutex_unlock(&p->lock);
}
