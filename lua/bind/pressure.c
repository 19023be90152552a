/*
 * pressure.c -- the pressure hook: when tensor memory misses its cache, Lua may hold dead tensors that its collector
 * does not hurry to find.
 *
 * Core calls the hook on the mutator thread, outside its locks.  Collecting is a bet: a full collection costs time in
 * proportion to the Lua heap, and gives back the memory of tensors that nothing refers to.  The rule:
 *   - at least MIN_GROWTH bytes and MIN_SHARE of the live bytes were missed since the last useful collection;
 *   - all collections together, the one about to run included at its usual price, stay under BUDGET of the time since
 *   the module was opened;
 *   - out of memory: always.
 * A single step comes first.  In generational mode that is a young collection, which costs next to nothing and finds
 * what a training step dropped; in incremental mode it finds little, and is then left out for a while.  A full
 * collection follows if the step gave back less than half
 * of what was missed.
 *
 * Never inside a finalizer (Lua refuses to collect there) or lua_Alloc (core is not called from there).
 */
#include <time.h>

#include "bind.h"

#define MIN_GROWTH ((int64_t)1 << 20)
#define MIN_SHARE 0.02
#define BUDGET 0.03

static struct {
  double opened;    /* clock when the module was opened */
  double spent;     /* seconds in collections */
  double full_cost; /* usual price of a full collection, and of a step */
  double step_cost;
  int64_t count;  /* collections */
  int64_t missed; /* bytes since the last useful one */
  int step_trust; /* below 0: steps found nothing lately, and that many hooks go by without one */
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

/* Runs one kind of collection (LUA_GCSTEP or LUA_GCCOLLECT), keeping the running coroutine and its modes.  Returns the
 * bytes that became free. */
static int64_t collect(lua_State *L, int what, double *price) {
  hm_mode *mode = hm_mode_current();
  const int64_t live = live_bytes();
  const double start = hb_clock();
  lua_gc(L, what, 0);
  if (hb_now.L != L) { /* a finalizer ran another coroutine */
    hb_enter_other(L);
    hm_mode_switch(mode);
  }
  const double cost = hb_clock() - start;
  pressure.spent += cost;
  pressure.count++;
  *price = *price == 0 ? cost : 0.5 * (*price + cost);
  return live - live_bytes();
}

static bool fits_budget(double price) { return pressure.spent + price < BUDGET * (hb_clock() - pressure.opened); }

/* One step, unless steps have been useless lately.  True if it gave back half of what was missed. */
static bool try_step(lua_State *L) {
  enum { TRUST = 4, PAUSE = 100 };
  if (pressure.step_trust < 0) {
    pressure.step_trust++;
    return false;
  }
  if (!fits_budget(pressure.step_cost)) return false;
  const bool useful = collect(L, LUA_GCSTEP, &pressure.step_cost) >= pressure.missed / 2;
  if (useful) pressure.step_trust = TRUST;
  else if (--pressure.step_trust < 0) pressure.step_trust = -PAUSE;
  return useful;
}

static bool on_pressure(void *ud, size_t bytes, bool desperate) {
  (void)ud;
  lua_State *L = hb_now.L;
  pressure.missed += (int64_t)bytes;
  if (!L || pressure.busy) return false;
  if (!desperate && (pressure.missed < MIN_GROWTH || (double)pressure.missed < MIN_SHARE * (double)live_bytes() ||
                     !lua_gc(L, LUA_GCISRUNNING)))
    return false;
  pressure.busy = true;
  bool done = !desperate && try_step(L);
  if (desperate || (!done && fits_budget(pressure.full_cost))) {
    collect(L, LUA_GCCOLLECT, &pressure.full_cost);
    if (desperate) collect(L, LUA_GCCOLLECT, &pressure.full_cost); /* what finalizers let go */
    done = true;
  }
  if (done) pressure.missed = 0;
  pressure.busy = false;
  return done;
}

void hb_pressure_install(void) {
  if (pressure.opened == 0) pressure.opened = hb_clock();
  hm_set_pressure_hook(on_pressure, NULL);
}
