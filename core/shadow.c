/*
 * shadow.c -- derived copies of a storage: its contents in another dtype, or packed by a backend.
 *
 * A shadow is a storage of its own, owned by the one it was derived from and stamped with that one's version; once the
 * version has moved on it is never served again, but its memory is used for the next one.  Whoever keeps a shadow
 * beyond the call (a saved operand, an op that goes on allocating) retains it: dropping one under memory pressure then
 * frees nothing that is in use.
 *
 * Called on the mutator thread, except hm__shadow_drop_all, which comes with the last release of a storage; the list of
 * all shadows has a mutex for that.
 */
#include <pthread.h>

#include "op.h"

typedef struct hm_shadow {
  uint64_t key;
  uint32_t version; /* of the owner when the copy was made */
  hm_storage *copy; /* one reference, ours */
  hm_storage *owner;
  struct hm_shadow *next;                /* of the same owner */
  struct hm_shadow *all_prev, *all_next; /* of all owners */
} hm_shadow;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static hm_shadow *all; /* under lock */
static _Atomic int64_t total_bytes;

/* Counts a shadow's bytes in or out. */
static void count(const hm_shadow *h, int sign) {
  int64_t bytes = sign * (int64_t)h->copy->bytes;
  atomic_fetch_add_explicit(&total_bytes, bytes, memory_order_relaxed);
  hm__count_shadow_bytes(h->copy->device, bytes);
}

static void list_add(hm_shadow *h) {
  pthread_mutex_lock(&lock);
  h->all_prev = NULL;
  h->all_next = all;
  if (all) all->all_prev = h;
  all = h;
  pthread_mutex_unlock(&lock);
}

static void list_remove(hm_shadow *h) {
  pthread_mutex_lock(&lock);
  if (h->all_prev) h->all_prev->all_next = h->all_next;
  else all = h->all_next;
  if (h->all_next) h->all_next->all_prev = h->all_prev;
  pthread_mutex_unlock(&lock);
}

/* The place in its owner's list where the shadow under key stands, or the list's end. */
static hm_shadow **find(hm_storage *s, uint64_t key) {
  hm_shadow **at = &s->shadows;
  while (*at && (*at)->key != key) at = &(*at)->next;
  return at;
}

/* Takes the shadow at a place out of all lists and frees it. */
static void drop(hm_shadow **at) {
  hm_shadow *h = *at;
  *at = h->next;
  list_remove(h);
  count(h, -1);
  hm__storage_release(h->copy);
  hm_free(h);
}

hm_storage *hm__shadow_get(hm_storage *s, uint64_t key) {
  const hm_shadow *h = *find(s, key);
  return h && h->version == s->version ? h->copy : NULL;
}

int hm__shadow_make(hm_storage *s, uint64_t key, size_t bytes, hm_storage **out) {
  *out = NULL;
  hm_shadow **at = find(s, key);
  if (*at) {
    hm_shadow *old = *at;
    if (old->copy->bytes == bytes && atomic_load_explicit(&old->copy->refs, memory_order_acquire) == 1) {
      old->version = s->version;
      *out = old->copy;
      return HM_OK;
    }
    drop(at); /* of another size, or kept by somebody who still reads it */
  }
  hm_shadow *h = hm_alloc(sizeof *h);
  if (!h) return HM_ERR_MEMORY;
  int status = hm__storage_new(bytes, s->device, &h->copy);
  if (status) {
    hm_free(h);
    return status;
  }
  h->key = key;
  h->version = s->version;
  h->owner = s;
  h->next = s->shadows;
  s->shadows = h;
  list_add(h);
  count(h, 1);
  *out = h->copy;
  return HM_OK;
}

void hm__shadow_drop_all(hm_storage *s) {
  while (s->shadows) drop(&s->shadows);
}

void hm__shadow_purge(void) {
  for (;;) {
    pthread_mutex_lock(&lock);
    hm_storage *owner = all ? all->owner : NULL;
    pthread_mutex_unlock(&lock);
    if (!owner) return;
    hm__shadow_drop_all(owner);
  }
}

int64_t hm__shadow_total_bytes(void) { return atomic_load_explicit(&total_bytes, memory_order_relaxed); }
