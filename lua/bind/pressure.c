/*
 * pressure.c -- the pressure hook: when tensor memory misses its cache, Lua may hold dead tensors that its collector does not hurry to find.
 *
 * Core calls the hook on the mutator thread, outside its locks.  Collecting is a bet: it costs time in proportion to the Lua heap, and gives back the
 * memory of tensors that nothing refers to.  The rule:
 *   - at least MIN_GROWTH bytes and MIN_SHARE of the live bytes were missed since the last collection (or the system is out of memory);
 *   - all collections together, this one included at the price of the last, stay under BUDGET of the time since the module was opened.
 * In generational mode a young collection comes first: it costs next to nothing and finds what a training step dropped.  A full one follows only
 * if that gave back less than half of what is wanted.
 *
 * Never inside a finalizer (Lua refuses to collect there) or lua_Alloc (core is not called from there).
 */
#include <time.h>

#include "bind.h"

#define MIN_GROWTH ((int64_t)1 << 20)
#define MIN_SHARE 0.02
#define BUDGET 0.03

static struct {
  double opened;      /* clock when the module was opened */
  double spent;       /* seconds in collections */
  double last_cost;   /* of the last full collection */
  int64_t count;      /* collections */
  int64_t missed;     /* bytes since the last one */
  bool busy;
} pressure;

double hb_clock(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void hb_pressure_stats(int64_t *count, double *seconds) {
  *count = pressure.count;
  *seconds = pressure.spent;
}

static int64_t live_bytes(void) {
  hm_memory_stats s = {0};
  hm_memory_get_stats(HM_CPU, &s);
  return s.live;
}

/* Runs one kind of collection with the running coroutine and its modes kept as they are; returns the seconds it took. */
static double collect(lua_State *L, int what) {
  hm_mode *mode = hm_mode_current();
  const double start = hb_clock();
  if (what == LUA_GCSTEP) lua_gc(L, LUA_GCSTEP, 0);
  else lua_gc(L, LUA_GCCOLLECT);
  if (hb_now.L != L) { /* a finalizer ran another coroutine */
    hb_enter_other(L);
    hm_mode_switch(mode);
  }
  const double cost = hb_clock() - start;
  pressure.spent += cost;
  return cost;
}

/* True if the rule allows a full collection now. */
static bool is_due(int64_t live) {
  const double share = MIN_SHARE * (double)live;
  if (pressure.missed < MIN_GROWTH || (double)pressure.missed < share) return false;
  return pressure.spent + pressure.last_cost < BUDGET * (hb_clock() - pressure.opened);
}

static void on_pressure(void *ud, size_t bytes, bool desperate) {
  (void)ud;
  lua_State *L = hb_now.L;
  pressure.missed += (int64_t)bytes;
  if (!L || pressure.busy) return;
  const int64_t live = live_bytes();
  if (!desperate && (!is_due(live) || !lua_gc(L, LUA_GCISRUNNING))) return;
  pressure.busy = true;
  pressure.count++;
  if (!desperate) collect(L, LUA_GCSTEP);
  if (desperate || live - live_bytes() < pressure.missed / 2) {
    pressure.last_cost = collect(L, LUA_GCCOLLECT);
    if (desperate) collect(L, LUA_GCCOLLECT); /* what finalizers revived */
  }
  pressure.missed = 0;
  pressure.busy = false;
}

void hb_pressure_install(void) {
  if (pressure.opened == 0) pressure.opened = hb_clock();
  hm_set_pressure_hook(on_pressure, NULL);
}
