/*
 * pressure.c -- the pressure hook: when tensor memory misses its cache, Lua may hold dead tensors that its collector
 * does not hurry to find.
 *
 * Core calls the hook on the mutator thread, outside its locks.  Collecting is a bet: a full collection costs time in
 * proportion to the Lua heap, and gives back the memory of tensors that nothing refers to.  The rule:
 *   - a look happens where at least MIN_GROWTH bytes and MIN_SHARE of the live bytes were missed since the last useful one.
 *   It is a young collection: that takes microseconds whatever the heap holds, and finds what a training step drops.  The
 *   collector is set to generational mode for it.  What lives through two of them counts as old;
 *   - if it gave back less than half of what was missed, either more memory is needed or old tensors are dead.  A full
 *   collection tells, but makes old whatever lives, so it is put off until a place to rest, unless the peak would rise, or
 *   there were PATIENCE such looks;
 *   - a place to rest is where little lives: backward begins; or, with no backward since the last, a loader is asked for the
 *   next batch or a model is called that is no part of another.  A young collection runs there, and a full one if one was
 *   put off, or if SLACK more bytes live there than did before;
 *   - all full collections together, the one about to run included at its usual price, stay under BUDGET of the time
 *   since the module was opened, plus CREDIT for the start;
 *   - looks keep a distance, in tensors made, so that a temporary lives through one at most: SPACING where full collections
 *   are DEAR; one more, up to MOST_SPACING, each time that the budget refused one for what looks had made old;
 *   - out of memory: always.
 *
 * Never inside a finalizer (Lua refuses to collect there) or lua_Alloc (core is not called from there).
 */
#include <string.h>
#include <time.h>

#include "bind.h"

#define MIN_GROWTH ((int64_t)1 << 20)
#define MIN_SHARE 0.02
#define BUDGET 0.03
#define CREDIT 0.25 /* seconds */
#define DEAR 0.005  /* seconds */
#define SPACING 4   /* tensor allocations */
#define MOST_SPACING 8
#define PATIENCE 8 /* looks */
#define SLACK 0.03 /* of the live bytes */

enum place { BACKWARD, BATCH, MODEL, PLACES }; /* to rest */

static struct {
  double opened;        /* clock when the module was opened */
  double spent;         /* seconds in full collections */
  double full_cost;     /* usual price of one */
  int64_t count;        /* collections */
  int64_t missed;       /* bytes since the last useful one */
  int64_t young_at;     /* tensor allocations served when the last young collection ran */
  int64_t spacing;      /* so many must lie between two looks */
  int64_t looks;        /* since the last full collection, and since a place to rest */
  int64_t records;      /* full collections since then that stood before a new peak */
  int64_t base[PLACES]; /* bytes that live there; 0: not known */
  bool due;             /* a full collection was put off */
  bool pressed;         /* memory ran short since the last pause */
  bool walked;          /* backward began since then */
  bool rested;          /* the last pause was a loader's: a model's has nothing to add */
  bool busy;
} pressure;

double hb_clock(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Seconds of this thread's processor time: what a collection costs, whatever else the machine does. */
static double thread_clock(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void hb_pressure_stats(int64_t *count, double *seconds) {
  *count = pressure.count;
  *seconds = pressure.spent;
}

/* What is live and was served, on all devices together: a dead tensor on a GPU is found by the same collection. */
static hm_memory_stats all_stats(void) {
  hm_memory_stats s = {0};
  hm_memory_get_stats(HM_CPU, &s);
  for (int device = hm_cuda_opened() ? hm_cuda_device_count() : 0; device > 0; device--) {
    hm_memory_stats more = {0};
    hm_memory_get_stats(device, &more);
    s.live += more.live;
    s.peak += more.peak;
    s.allocs += more.allocs;
  }
  return s;
}

/* Runs the collector (LUA_GCSTEP, LUA_GCGEN or LUA_GCCOLLECT), keeping the running coroutine and its modes.  Returns
 * the seconds it took; *answer: what lua_gc returned. */
static double collect(lua_State *L, int what, int *answer) {
  hm_mode *mode = hm_mode_current();
  const double start = thread_clock();
  *answer = what == LUA_GCGEN ? lua_gc(L, LUA_GCGEN, 0, 0) : lua_gc(L, what, 0);
  if (hb_now.L != L) { /* a finalizer ran another coroutine */
    hb_enter_other(L);
    hm_mode_switch(mode);
  }
  return thread_clock() - start;
}

/* Notes what a full collection cost. */
static void paid(double cost) {
  pressure.spent += cost;
  pressure.count++;
  pressure.full_cost = pressure.full_cost == 0 ? cost : 0.5 * (pressure.full_cost + cost);
}

static void collect_all(lua_State *L) {
  int answer;
  paid(collect(L, LUA_GCCOLLECT, &answer));
  pressure.looks = 0;
  pressure.due = false;
}

static bool fits_budget(double price) {
  return pressure.spent + price < CREDIT + BUDGET * (hb_clock() - pressure.opened);
}

/* A young collection; returns the bytes that it gave back. */
static int64_t collect_young(lua_State *L, const hm_memory_stats *before) {
  int answer;
  pressure.young_at = before->allocs;
  const double entered = collect(L, LUA_GCGEN, &answer);
  if (answer == LUA_GCINC) paid(entered); /* the mode was another: entering this one is a full collection */
  collect(L, LUA_GCSTEP, &answer);
  pressure.count++;
  return before->live - all_stats().live;
}

/* Looks for what was missed; false if it is too early for that. */
static bool look(lua_State *L, size_t bytes) {
  const hm_memory_stats before = all_stats();
  if (before.allocs - pressure.young_at < pressure.spacing) return false;
  if (pressure.full_cost > DEAR && before.allocs - pressure.young_at < SPACING) return false;
  if (collect_young(L, &before) >= pressure.missed / 2) return true;
  pressure.due = true;
  const hm_memory_stats now = all_stats();
  const bool record = now.live + (int64_t)bytes > now.peak && pressure.records < PATIENCE;
  if ((record || ++pressure.looks >= PATIENCE) && fits_budget(pressure.full_cost)) {
    pressure.records += record;
    collect_all(L);
  }
  return true;
}

/* A place to rest. */
static void rest(lua_State *L, enum place place) {
  int64_t *base = &pressure.base[place];
  if (pressure.busy || pressure.count == 0 || !lua_gc(L, LUA_GCISRUNNING)) return;
  pressure.busy = true;
  pressure.looks = pressure.records = 0;
  const hm_memory_stats before = all_stats();
  int64_t live = before.live - collect_young(L, &before);
  const bool grown = *base > 0 && (double)(live - *base) > SLACK * (double)*base;
  const bool fits = fits_budget(pressure.full_cost);
  if ((pressure.due || grown) && fits) {
    collect_all(L);
    live = *base = all_stats().live;
  } else if (grown && pressure.spacing < MOST_SPACING) {
    pressure.spacing++; /* looks make old faster than full collections may follow */
  }
  if (*base == 0) *base = live;
  else if (live < *base) *base -= (*base - live) / 64; /* slowly: two models may take turns */
  pressure.busy = false;
}

void hb_pressure_backward(lua_State *L) {
  pressure.walked = true;
  rest(L, BACKWARD);
}

void hb_pressure_pause(lua_State *L, bool batch) {
  const bool again = pressure.rested && !batch; /* the loader has done it for this call */
  pressure.rested = false;
  if (again) return;
  if (!pressure.walked && pressure.pressed) {
    rest(L, batch ? BATCH : MODEL);
    pressure.rested = batch;
  }
  pressure.walked = pressure.pressed = false;
}

void hb_pressure_forget(void) { memset(pressure.base, 0, sizeof pressure.base); }

static bool on_pressure(void *ud, size_t bytes, bool desperate) {
  (void)ud;
  lua_State *L = hb_now.L;
  pressure.missed += (int64_t)bytes;
  if (!L || pressure.busy) return false;
  if (!desperate && (pressure.missed < MIN_GROWTH || (double)pressure.missed < MIN_SHARE * (double)all_stats().live ||
                     !lua_gc(L, LUA_GCISRUNNING)))
    return false;
  pressure.busy = true;
  bool done = true;
  if (desperate) {
    collect_all(L);
    collect_all(L); /* what finalizers let go */
  } else {
    pressure.pressed = true;
    done = look(L, bytes);
  }
  if (done) pressure.missed = 0;
  pressure.busy = false;
  return done;
}

void hb_pressure_install(void) {
  if (pressure.opened == 0) pressure.opened = hb_clock();
  hm_set_pressure_hook(on_pressure, NULL);
}
