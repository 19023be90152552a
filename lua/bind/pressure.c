/*
 * pressure.c -- the pressure hook: when tensor memory misses its cache, Lua may hold dead tensors that its collector
 * does not hurry to find.
 *
 * Core calls the hook on the mutator thread, outside its locks.  Collecting is a bet: a full collection costs time in
 * proportion to the Lua heap, and gives back the memory of tensors that nothing refers to.  The rule:
 *   - at least MIN_GROWTH bytes and MIN_SHARE of the live bytes were missed since the last useful collection;
 *   - a young collection runs.  It takes microseconds whatever the heap holds, and finds what a training step drops;
 *   the collector is set to generational mode for it;
 *   - if that gave back less than half of what was missed, a full one follows: what outlives two young collections
 *   counts as old;
 *   - where a full one costs more than DEAR, it cannot follow often.  There young ones keep a distance of SPACING
 *   allocations, so that a temporary of a forward pass lives through one at most;
 *   - one more young collection runs when backward begins: what the forward pass alone used is dead by then;
 *   - all full collections together, the one about to run included at its usual price, stay under BUDGET of the time
 *   since the module was opened, plus CREDIT for the start;
 *   - out of memory: always.
 *
 * Never inside a finalizer (Lua refuses to collect there) or lua_Alloc (core is not called from there).
 */
#include <time.h>

#include "bind.h"

#define MIN_GROWTH ((int64_t)1 << 20)
#define MIN_SHARE 0.02
#define BUDGET 0.03
#define CREDIT 0.25 /* seconds */
#define DEAR 0.001  /* seconds */
#define SPACING 4   /* tensor allocations */

static struct {
  double opened;    /* clock when the module was opened */
  double spent;     /* seconds in full collections */
  double full_cost; /* usual price of one */
  int64_t count;    /* collections */
  int64_t missed;   /* bytes since the last useful one */
  int64_t young_at; /* tensor allocations served when the last young collection ran */
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
}

static bool fits_budget(double price) {
  return pressure.spent + price < CREDIT + BUDGET * (hb_clock() - pressure.opened);
}

/* A young collection, unless the last was too short a time ago.  True if it, or the full one that followed, gave back
 * what was missed. */
static bool collect_young(lua_State *L) {
  const hm_memory_stats before = all_stats();
  if (pressure.full_cost > DEAR && before.allocs - pressure.young_at < SPACING) return false;
  pressure.young_at = before.allocs;
  int answer;
  const double entered = collect(L, LUA_GCGEN, &answer);
  if (answer == LUA_GCINC) paid(entered); /* the mode was another: entering this one is a full collection */
  collect(L, LUA_GCSTEP, &answer);
  pressure.count++;
  if (before.live - all_stats().live >= pressure.missed / 2) return true;
  if (!fits_budget(pressure.full_cost)) return false;
  collect_all(L);
  return true;
}

void hb_pressure_backward(lua_State *L) {
  if (pressure.busy || pressure.count == 0 || !lua_gc(L, LUA_GCISRUNNING)) return;
  pressure.busy = true;
  collect_young(L);
  pressure.busy = false;
}

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
    done = collect_young(L);
  }
  if (done) pressure.missed = 0;
  pressure.busy = false;
  return done;
}

void hb_pressure_install(void) {
  if (pressure.opened == 0) pressure.opened = hb_clock();
  hm_set_pressure_hook(on_pressure, NULL);
}
