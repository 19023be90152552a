/*
 * telemetry.c -- what tensors hold, and the watches on kernel calls and gradients, for amp.histogram, amp.report, amp.debug and
 * amp.record_gradients.
 *
 * Each watch's function stands in the registry under a key of its own.  It is called from the middle of a call into core, on the
 * coroutine that made that call, so that debug.getinfo and the module path tell where it came from.
 */
#include <math.h>

#include "bind.h"

static const char watch_key, tap_key; /* their addresses are the registry keys of the watches' functions */

/* ====== core.census ====== */

/* {[e] = count for each exponent from -126 to 127 that has any}: what scaler.c gives policies, without zeros and subnormals */
static void push_bins(lua_State *L, const int64_t *histogram) {
  lua_createtable(L, 0, 32);
  for (int b = 1; b < HM_HISTOGRAM_SUBNORMALS; b++) {
    if (histogram[b] == 0) continue;
    lua_pushinteger(L, histogram[b]);
    lua_rawseti(L, -2, b - 127);
  }
}

/* core.census(t[, scale]) -> {count, zeros, subnormals, inf_count, nan_count, amax, norm, bins, flushed, f16_subnormal, overflow} */
static int l_census(lua_State *L) {
  hb_state *st = hb_enter(L);
  const hm_tensor *t = hb_tensor(L, st, 1, "census", "argument 1");
  const double scale = lua_isnoneornil(L, 2) ? 1 : hb_number(L, 2, "census", "the scale");
  int64_t histogram[HM_HISTOGRAM];
  hm_census c;
  hb_check(L, st, hm_take_census(t, scale, &c, histogram));
  lua_createtable(L, 0, 11);
  hb_set_integer(L, "count", c.n);
  hb_set_integer(L, "zeros", c.zeros);
  hb_set_integer(L, "subnormals", histogram[HM_HISTOGRAM_SUBNORMALS]);
  hb_set_integer(L, "inf_count", c.inf + c.minus_inf);
  hb_set_integer(L, "nan_count", c.nan);
  hb_set_number(L, "amax", c.amax);
  hb_set_number(L, "norm", sqrt(c.sum_sq));
  hb_set_integer(L, "flushed", c.flushed);
  hb_set_integer(L, "f16_subnormal", c.subnormal);
  hb_set_integer(L, "overflow", c.overflow);
  push_bins(L, histogram);
  lua_setfield(L, -2, "bins");
  return 1;
}

/* ====== core.op_watch ====== */

static void push_shape(lua_State *L, const hm_tensor *t) {
  hb_set_string(L, "dtype", hm_dtype_name(t->dtype));
  hb_push_ints(L, t->ndim, t->shape);
  lua_setfield(L, -2, "shape");
  lua_pushlightuserdata(L, (void *)hm_tensor_storage_id(t));
  lua_setfield(L, -2, "storage");
}

static void push_counts(lua_State *L, const hm_census *c) {
  hb_set_number(L, "amax", c->amax);
  hb_set_integer(L, "nan", c->nan);
  hb_set_integer(L, "inf", c->inf);
  hb_set_integer(L, "minus_inf", c->minus_inf);
}

/* The name that somebody gave to a tensor that Lua has, e.g. "fc1.weight". */
static void push_given_name(lua_State *L, hb_state *st, hm_tensor *t) {
  hb_push(L, st, t);
  hb_push_name(L, st, -1);
  lua_setfield(L, -3, "given_name");
  lua_pop(L, 1);
}

static void push_operands(lua_State *L, hb_state *st, const hm_op_sight *s) {
  lua_createtable(L, s->info->n_in, 0);
  for (int i = 0, k = 0; i < s->info->n_in; i++) {
    const hm_arg *a = &s->in[i];
    if (a->kind == HM_ARG_NONE) continue;
    lua_createtable(L, 0, 8);
    hb_set_string(L, "name", s->info->in[i].name);
    if (a->kind == HM_ARG_TENSOR) {
      push_shape(L, a->t);
      push_counts(L, &s->in_census[i]);
      push_given_name(L, st, a->t);
    } else {
      hb_set_number(L, "value", a->kind == HM_ARG_FLOAT ? a->f : (double)a->i);
    }
    lua_rawseti(L, -2, ++k);
  }
}

static void push_results(lua_State *L, const hm_op_sight *s) {
  lua_createtable(L, s->n_results, 0);
  for (int i = 0; i < s->n_results; i++) {
    const hm_op_result *r = &s->result[i];
    lua_createtable(L, 0, 8);
    hb_set_string(L, "name", r->name);
    push_shape(L, r->t);
    push_counts(L, r->census);
    lua_rawseti(L, -2, i + 1);
  }
}

/* Protected: fn{op, backward, backward_of, place, recorded, constant, inputs, outputs} */
static int tell(lua_State *L) {
  const hm_op_sight *s = lua_touserdata(L, 1);
  hb_state *st = hb_enter(L);
  if (lua_rawgetp(L, LUA_REGISTRYINDEX, &watch_key) != LUA_TFUNCTION) return 0;
  lua_createtable(L, 0, 8);
  hb_set_string(L, "op", s->info->name);
  lua_pushboolean(L, s->backward);
  lua_setfield(L, -2, "backward");
  hb_set_string(L, "backward_of", s->backward_of);
  hb_set_string(L, "recorded", s->recorded);
  hb_push_place(L, st);
  lua_setfield(L, -2, "place");
  push_operands(L, st, s);
  lua_setfield(L, -2, "inputs");
  push_results(L, s);
  lua_setfield(L, -2, "outputs");
  lua_call(L, 1, 0);
  return 0;
}

/* An error of the watch's function is kept and raised when the running op is done. */
static void on_sight(void *ud, const hm_op_sight *sight) {
  (void)ud;
  if (hb_now.L) hb_protected_inside(hb_now.L, tell, (void *)sight);
}

/* core.op_watch(fn or nil) -> how many calls the last watch looked at */
static int l_op_watch(lua_State *L) {
  hb_enter(L);
  const bool on = !lua_isnoneornil(L, 1);
  if (on && lua_type(L, 1) != LUA_TFUNCTION)
    return hb_error(L, "op_watch: argument 1 must be a function or nil, got %s", hb_came(L, 1));
  lua_settop(L, 1);
  lua_rawsetp(L, LUA_REGISTRYINDEX, &watch_key);
  hm_set_op_watch(on ? on_sight : NULL, NULL);
  lua_pushinteger(L, hm_op_watch_calls());
  return 1;
}

/* ====== core.gradient_watch ====== */

/* Protected: fn{op, recorded, forward, foretold, dtype, count, amax, inf_count, nan_count, zeros, subnormals, bins} */
static int tell_gradient(lua_State *L) {
  const hm_gradient_sight *s = lua_touserdata(L, 1);
  hb_enter(L);
  if (lua_rawgetp(L, LUA_REGISTRYINDEX, &tap_key) != LUA_TFUNCTION) return 0;
  lua_createtable(L, 0, 12);
  hb_set_string(L, "op", s->op);
  hb_set_string(L, "recorded", s->recorded);
  lua_pushboolean(L, s->forward);
  lua_setfield(L, -2, "forward");
  lua_pushboolean(L, s->foretold);
  lua_setfield(L, -2, "foretold");
  hb_set_string(L, "dtype", hm_dtype_name(s->t->dtype));
  hb_set_integer(L, "count", s->census->n);
  hb_set_number(L, "amax", s->census->amax);
  hb_set_integer(L, "inf_count", s->census->inf + s->census->minus_inf);
  hb_set_integer(L, "nan_count", s->census->nan);
  hb_set_integer(L, "zeros", s->census->zeros);
  if (s->histogram) {
    hb_set_integer(L, "subnormals", s->histogram[HM_HISTOGRAM_SUBNORMALS]);
    push_bins(L, s->histogram);
    lua_setfield(L, -2, "bins");
  }
  lua_call(L, 1, 0);
  return 0;
}

static int on_gradient(void *ud, const hm_gradient_sight *sight) {
  (void)ud;
  return hb_now.L ? hb_protected_inside(hb_now.L, tell_gradient, (void *)sight) : HM_OK;
}

/* core.gradient_watch(fn or nil): fn hears of each gradient that float16 would hold, and of what forwards make */
static int l_gradient_watch(lua_State *L) {
  hb_enter(L);
  const bool on = !lua_isnoneornil(L, 1);
  if (on && lua_type(L, 1) != LUA_TFUNCTION)
    return hb_error(L, "gradient_watch: argument 1 must be a function or nil, got %s", hb_came(L, 1));
  lua_settop(L, 1);
  lua_rawsetp(L, LUA_REGISTRYINDEX, &tap_key);
  hm_set_gradient_watch(on ? on_gradient : NULL, NULL);
  return 0;
}

void hb_open_telemetry(lua_State *L) {
  static const luaL_Reg functions[] = {{"census", l_census},
                                       {"op_watch", l_op_watch},
                                       {"gradient_watch", l_gradient_watch},
                                       {NULL, NULL}};
  hb_functions(L, functions);
}
