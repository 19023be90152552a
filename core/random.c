/*
 * random.c -- the host side of random numbers: one Philox stream (seed, offset) for each device.
 *
 * The numbers themselves are made by the backends from the seed and offset that hm_random_take writes into an op's rng
 * attribute.  A counter of Philox yields four values, so an op over numel elements takes ceil(numel / 4) counters,
 * whatever the threads or instruction set.  Called on the mutator thread only.
 */
#include "halfmoon.h"

/* Every run starts with the same stream, so that a script gives the same numbers twice without asking for it. */
#define DEFAULT_SEED UINT64_C(20240117)

typedef struct stream {
  uint64_t seed, offset;
} stream;

static stream streams[HM_MAX_DEVICES] = {[0 ... HM_MAX_DEVICES - 1] = {DEFAULT_SEED, 0}};

/* The stream of a device; the CPU's for an id that is out of range (the caller has checked devices long before). */
static stream *stream_of(int device) { return &streams[device >= 0 && device < HM_MAX_DEVICES ? device : HM_CPU]; }

void hm_seed(uint64_t seed) {
  for (int device = 0; device < HM_MAX_DEVICES; device++) streams[device] = (stream){seed, 0};
}

void hm_random_get(int device, uint64_t *seed, uint64_t *offset) {
  const stream *s = stream_of(device);
  *seed = s->seed;
  *offset = s->offset;
}

void hm_random_set(int device, uint64_t seed, uint64_t offset) { *stream_of(device) = (stream){seed, offset}; }

void hm_random_take(int device, int64_t numel, hm_attr *rng) {
  stream *s = stream_of(device);
  rng->i = 0;
  rng->n = 2;
  rng->v[0] = (int64_t)s->seed;
  rng->v[1] = (int64_t)s->offset;
  if (numel > 0) s->offset += ((uint64_t)numel + 3) / 4;
}
