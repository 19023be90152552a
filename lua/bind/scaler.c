/*
 * scaler.c -- the gradient scaler: a userdata around hm_scaler, and policies written in Lua.
 *
 * The policy's function is user value 1 of the scaler, not a registry entry: a policy that refers to its scaler is
 * collected with it. Core calls a policy inside update() and hear() only, where the scaler stands at index 1 of the
 * running C function.
 *
 * A step of an asynchronous scaler gives a promise, a userdata with the optimizer as user value 1: what it says of
 * parameters needs the optimizer alive.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "bind.h"

#define HB_PROMISE "halfmoon.Promise"

typedef struct hb_promise {
  hm_promise *p;
} hb_promise;

typedef struct hb_scaler {
  hm_scaler *s;
  bool async;
  struct hb_scaler *next, **link; /* list of live scalers in the state */
  char stop[512];                 /* what the policy said when it asked to stop */
} hb_scaler;

static hb_scaler *self(lua_State *L, const char *who) {
  hb_scaler *u = luaL_testudata(L, 1, HB_SCALER);
  if (!u || !u->s) hb_error(L, "%s: self must be a scaler, got %s", who, hb_came(L, 1));
  return u;
}

/* core.scaler_new{init_scale, min_scale, max_scale, enabled, allow_f16_grads, async} */
static int l_new(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_scaler_options o = {.init_scale = NAN, .min_scale = NAN, .max_scale = NAN, .enabled = true};
  hb_options(L, 1, "GradScaler",
             (const hb_option[]){{"init_scale", HB_NUMBER, &o.init_scale},
                                 {"min_scale", HB_NUMBER, &o.min_scale},
                                 {"max_scale", HB_NUMBER, &o.max_scale},
                                 {"enabled", HB_BOOL, &o.enabled},
                                 {"allow_f16_grads", HB_BOOL, &o.allow_f16_grads},
                                 {"async", HB_BOOL, &o.async},
                                 {0}});
  hb_scaler *u = lua_newuserdatauv(L, sizeof *u, 1);
  memset(u, 0, sizeof *u);
  luaL_setmetatable(L, HB_SCALER);
  hb_check(L, st, hm_scaler_new(&o, &u->s));
  u->async = o.async && o.enabled;
  u->next = st->scalers;
  u->link = &st->scalers;
  if (u->next) u->next->link = &u->next;
  st->scalers = u;
  return 1;
}

static int l_gc(lua_State *L) {
  hb_scaler *u = lua_touserdata(L, 1);
  if (!u->s) return 0;
  *u->link = u->next;
  if (u->next) u->next->link = u->link;
  hm_scaler_free(u->s);
  u->s = NULL;
  return 0;
}

void hb_scalers_forget(hb_state *st, const hm_optim *o) {
  for (hb_scaler *u = st->scalers; u; u = u->next) hm_scaler_forget(u->s, o);
}

/* ====== Policies ====== */

typedef struct policy_call {
  hb_scaler *scaler;
  const hm_scaler_event *event;
  double scale;
  bool stop;
} policy_call;

/* {[e] = count for each exponent from -126 to 127 that has any, zeros, subnormals} */
static void push_histogram(lua_State *L, const int64_t *histogram) {
  lua_createtable(L, 0, 32);
  for (int b = 1; b < HM_HISTOGRAM_SUBNORMALS; b++) {
    if (histogram[b] == 0) continue;
    lua_pushinteger(L, histogram[b]);
    lua_rawseti(L, -2, b - 127);
  }
  hb_set_integer(L, "zeros", histogram[HM_HISTOGRAM_ZEROS]);
  hb_set_integer(L, "subnormals", histogram[HM_HISTOGRAM_SUBNORMALS]);
}

/* [{name, amax, norm, inf_count, nan_count}] */
static void push_params(lua_State *L, hb_state *st, const hm_scaler_event *e) {
  lua_createtable(L, e->n_params, 0);
  for (int i = 0; i < e->n_params; i++) {
    const hm_param_finding *f = &e->param[i];
    lua_createtable(L, 0, 5);
    hb_push(L, st, f->param);
    hb_push_name(L, st, -1);
    if (lua_isnil(L, -1)) {
      lua_pop(L, 1);
      lua_pushfstring(L, "parameter %d", f->index + 1);
    }
    lua_setfield(L, -3, "name");
    lua_pop(L, 1);
    hb_set_number(L, "amax", f->amax);
    hb_set_number(L, "norm", f->norm);
    hb_set_integer(L, "inf_count", f->inf_count);
    hb_set_integer(L, "nan_count", f->nan_count);
    lua_rawseti(L, -2, i + 1);
  }
}

/* Protected: argument 2 is the policy's function, called as fn(event) -> new scale [, stop message]. */
static int run_policy(lua_State *L) {
  policy_call *call = lua_touserdata(L, 1);
  const hm_scaler_event *e = call->event;
  lua_createtable(L, 0, 9);
  hb_set_bool(L, "found_inf", e->found_inf);
  hb_set_integer(L, "inf_count", e->inf_count);
  hb_set_integer(L, "nan_count", e->nan_count);
  hb_set_integer(L, "step", e->step);
  hb_set_number(L, "scale", e->scale);
  hb_set_number(L, "amax", e->amax);
  hb_set_number(L, "norm", e->norm);
  if (e->histogram) {
    push_histogram(L, e->histogram);
    lua_setfield(L, -2, "histogram");
  }
  if (e->param) {
    push_params(L, hb_enter(L), e);
    lua_setfield(L, -2, "per_param");
  }
  lua_call(L, 1, 2);
  if (lua_type(L, -2) != LUA_TNUMBER)
    return luaL_error(L, "the policy returned %s, not a number", lua_isnil(L, -2) ? "nothing" : luaL_typename(L, -2));
  call->scale = lua_tonumber(L, -2);
  if (lua_type(L, -1) == LUA_TSTRING) {
    call->stop = true;
    snprintf(call->scaler->stop, sizeof call->scaler->stop, "%s", lua_tostring(L, -1));
  } else if (!lua_isnil(L, -1)) {
    return luaL_error(L, "the policy's second result must be a stop message or nothing, got a %s",
                      luaL_typename(L, -1));
  }
  return 0;
}

static int on_update(void *ud, const hm_scaler_event *event, double *scale, const char **stop) {
  policy_call call = {.scaler = ud, .event = event};
  lua_State *L = hb_now.L;
  lua_getiuservalue(L, 1, 1);
  const int status = hb_protected(L, run_policy, &call, 1, false);
  if (status) return status;
  *scale = call.scale;
  if (call.stop) *stop = call.scaler->stop;
  return HM_OK;
}

/* s:set_policy(fn): fn(event) -> new scale [, stop message] */
static int l_set_policy(lua_State *L) {
  hb_enter(L);
  hb_scaler *u = self(L, "set_policy");
  if (lua_type(L, 2) != LUA_TFUNCTION)
    return hb_error(L, "set_policy: the policy must be a function, got %s", hb_came(L, 2));
  lua_settop(L, 2);
  lua_setiuservalue(L, 1, 1);
  hm_scaler_set_policy(u->s, on_update, u, NULL);
  return 0;
}

/* s:want(histogram, per_param): what else events tell from the next check on */
static int l_want(lua_State *L) {
  hb_enter(L);
  hm_scaler_want(self(L, "want")->s, lua_toboolean(L, 2), lua_toboolean(L, 3));
  return 0;
}

/* ====== The three acts ====== */

/* s:scale(loss) -> scaled loss */
static int l_scale(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_scaler *u = self(L, "scale");
  hm_tensor *loss = hb_tensor(L, st, 2, "scale", "the loss");
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_scaler_scale(u->s, loss, slot));
  if (*slot == loss) {
    hm_tensor_release(*slot);
    *slot = NULL;
    lua_pushvalue(L, 2);
  } else {
    hb_settle_shared(L, st, -1, *slot);
  }
  return 1;
}

/* s:unscale(optimizer) */
static int l_unscale(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_scaler *u = self(L, "unscale_");
  hb_check(L, st, hm_scaler_unscale(u->s, hb_optim(L, 2, "unscale_")));
  return 0;
}

static void push_culprits(lua_State *L, hb_state *st, const hm_step_record *r) {
  lua_createtable(L, r->n_culprits, 0);
  for (int i = 0; i < r->n_culprits; i++) {
    const hm_culprit *c = &r->culprits[i];
    lua_createtable(L, 0, 5);
    hb_push(L, st, c->param);
    hb_push_name(L, st, -1);
    lua_setfield(L, -3, "name");
    lua_setfield(L, -2, "param");
    hb_set_integer(L, "index", c->index + 1);
    hb_set_integer(L, "inf_count", c->inf_count);
    hb_set_integer(L, "nan_count", c->nan_count);
    lua_rawseti(L, -2, i + 1);
  }
}

static int push_record(lua_State *L, hb_state *st, const hm_step_record *r) {
  lua_createtable(L, 0, 9);
  hb_set_bool(L, "stepped", r->stepped);
  hb_set_bool(L, "found_inf", r->found_inf);
  if (r->empty) hb_set_bool(L, "empty", true);
  hb_set_integer(L, "inf_count", r->inf_count);
  hb_set_integer(L, "nan_count", r->nan_count);
  if (!isnan(r->scale)) hb_set_number(L, "scale", r->scale);
  hb_set_number(L, "norm", r->norm);
  hb_set_number(L, "amax", r->amax);
  push_culprits(L, st, r);
  lua_setfield(L, -2, "culprits");
  return 1;
}

/* p:read() -> record; waits for the device the first time */
static int l_promise_read(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_promise *u = luaL_checkudata(L, 1, HB_PROMISE);
  hm_step_record r = {0};
  if (!u->p) return hb_error(L, "the record of a step that failed");
  hb_check(L, st, hm_promise_read(u->p, &r));
  return push_record(L, st, &r);
}

static int l_promise_gc(lua_State *L) {
  hb_promise *u = lua_touserdata(L, 1);
  hm_promise_free(u->p);
  u->p = NULL;
  return 0;
}

/* An empty promise about the optimizer at 2. */
static hb_promise *push_promise(lua_State *L) {
  hb_promise *u = lua_newuserdatauv(L, sizeof *u, 1);
  u->p = NULL;
  luaL_setmetatable(L, HB_PROMISE);
  lua_pushvalue(L, 2);
  lua_setiuservalue(L, -2, 1);
  return u;
}

/* s:step(optimizer[, max_norm]) -> stepped, record; or nil, promise */
static int l_step(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_scaler *u = self(L, "step");
  hm_optim *o = hb_optim(L, 2, "step");
  const double max_norm = lua_isnoneornil(L, 3) ? 0 : hb_number(L, 3, "step", "max_norm");
  hm_step_record r = {0};
  hb_promise *promise = NULL;
  if (u->async) {
    lua_pushnil(L);
    promise = push_promise(L);
  }
  hb_check(L, st, hm_scaler_step(u->s, o, max_norm, &r));
  if (r.promise) {
    promise->p = r.promise;
    return 2;
  }
  lua_pushboolean(L, r.stepped);
  push_record(L, st, &r);
  return 2;
}

/* s:checked(optimizer) -> record of what the last check found; nil if there was none since update() */
static int l_checked(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_scaler *u = self(L, "checked");
  hm_step_record r = {0};
  if (!hm_scaler_checked(u->s, hb_optim(L, 2, "checked"), &r)) return 0;
  return push_record(L, st, &r);
}

/* s:assume(scale): the gradients at hand were made with it; 1: they are unscaled already */
static int l_assume(lua_State *L) {
  hb_enter(L);
  hb_scaler *u = self(L, "assume");
  const double scale = hb_number(L, 2, "assume", "the scale");
  if (!(scale > 0) || isinf(scale)) return hb_error(L, "assume: the scale must be positive and finite, got %f", scale);
  hm_scaler_assume(u->s, scale);
  return 0;
}

/* s:tell(inf_count, nan_count, amax, norm): a check that was made elsewhere, before update() */
static int l_tell(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_scaler *u = self(L, "tell");
  const double inf = hb_number(L, 2, "tell", "inf_count"), nan = hb_number(L, 3, "tell", "nan_count");
  const double amax = hb_number(L, 4, "tell", "amax"), norm = hb_number(L, 5, "tell", "norm");
  if (!(inf >= 0 && inf <= 0x1p62) || !(nan >= 0 && nan <= 0x1p62))
    return hb_error(L, "tell: the counts must not be negative, got %f and %f", inf, nan);
  hb_check(L, st, hm_scaler_tell(u->s, (int64_t)inf, (int64_t)nan, amax, norm));
  return 0;
}

static void push_update(lua_State *L, const hm_update_record *r) {
  lua_createtable(L, 0, 8);
  hb_set_number(L, "old_scale", r->old_scale);
  hb_set_number(L, "new_scale", r->new_scale);
  lua_pushstring(L, hm_scale_change_name(r->event));
  lua_setfield(L, -2, "event");
  if (r->event == HM_SCALE_FAULT || r->event == HM_SCALE_STOP) {
    lua_pushstring(L, hm_error_message());
    lua_setfield(L, -2, "message");
  }
}

/* s:update([new_scale]) -> {old_scale, new_scale, event[, message]}, or a ticket: hear() tells later */
static int l_update(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_scaler *u = self(L, "update");
  double new_scale = 0;
  if (!lua_isnoneornil(L, 2)) {
    new_scale = hb_number(L, 2, "update", "the new scale");
    if (!(new_scale > 0) || isinf(new_scale))
      return hb_error(L, "update: the new scale must be positive and finite, got %f", new_scale);
  }
  hm_update_record r = {0};
  hb_check(L, st, hm_scaler_update(u->s, new_scale, &r));
  if (r.ticket) lua_pushinteger(L, r.ticket);
  else push_update(L, &r);
  return 1;
}

/* ====== Without waits ====== */

/* s:hear(all) -> {ticket, step, told, old_scale, new_scale, event, message, found_inf, inf_count, nan_count} of the
 * oldest update that is untold; nothing if there is none, or it has not come and need not be waited for */
static int l_hear(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_scaler *u = self(L, "hear");
  bool heard = false;
  hm_heard h = {0};
  const int status = hm_scaler_hear(u->s, lua_toboolean(L, 2), &heard, &h);
  const bool stop = status == HM_ERR_CALLBACK && heard && h.record.event == HM_SCALE_STOP;
  if (!stop) hb_check(L, st, status);
  if (!heard) return 0;
  push_update(L, &h.record);
  hb_set_integer(L, "ticket", h.ticket);
  hb_set_integer(L, "step", h.step);
  hb_set_bool(L, "told", h.told);
  hb_set_bool(L, "found_inf", h.found_inf);
  hb_set_integer(L, "inf_count", h.inf_count);
  hb_set_integer(L, "nan_count", h.nan_count);
  return 1;
}

/* s:set_rule(alone, growth_factor, backoff_factor, growth_interval); interval 0: no growth */
static int l_set_rule(lua_State *L) {
  hb_enter(L);
  hb_scaler *u = self(L, "set_rule");
  const hm_scaler_rule rule = {
      .alone = lua_toboolean(L, 2),
      .growth = hb_number(L, 3, "set_rule", "growth_factor"),
      .backoff = hb_number(L, 4, "set_rule", "backoff_factor"),
      .interval = hb_integer(L, 5, "set_rule", "growth_interval"),
  };
  hm_scaler_set_rule(u->s, &rule);
  return 0;
}

/* s:restart(scale, clean) */
static int l_restart(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_scaler *u = self(L, "restart");
  hb_check(L, st,
           hm_scaler_restart(u->s, hb_number(L, 2, "restart", "the scale"), hb_integer(L, 3, "restart", "clean")));
  return 0;
}

/* s:read() -> scale, clean; waits for the device */
static int l_read(lua_State *L) {
  hb_state *st = hb_enter(L);
  double scale = 0;
  int64_t clean = 0;
  hb_check(L, st, hm_scaler_read(self(L, "get_scale")->s, &scale, &clean));
  lua_pushnumber(L, scale);
  lua_pushinteger(L, clean);
  return 2;
}

/* s:late() -> does it work without waits now? */
static int l_late(lua_State *L) {
  hb_enter(L);
  lua_pushboolean(L, hm_scaler_late(self(L, "late")->s));
  return 1;
}

/* ====== Asking ====== */

/* s:step_count() -> events handed to policies so far */
static int l_step_count(lua_State *L) {
  hb_enter(L);
  lua_pushinteger(L, hm_scaler_get_step(self(L, "step_count")->s));
  return 1;
}

/* s:set_step_count(n) */
static int l_set_step_count(lua_State *L) {
  hb_enter(L);
  hb_scaler *u = self(L, "set_step_count");
  hm_scaler_set_step(u->s, hb_integer(L, 2, "set_step_count", "the count"));
  return 0;
}

static int l_get_scale(lua_State *L) {
  hb_enter(L);
  lua_pushnumber(L, hm_scaler_get_scale(self(L, "get_scale")->s));
  return 1;
}

static int l_set_scale(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_check(L, st, hm_scaler_set_scale(self(L, "set_scale")->s, hb_number(L, 2, "set_scale", "the scale")));
  return 0;
}

static int l_is_enabled(lua_State *L) {
  hb_enter(L);
  lua_pushboolean(L, hm_scaler_enabled(self(L, "is_enabled")->s));
  return 1;
}

/* s:bounds() -> min, max */
static int l_bounds(lua_State *L) {
  hb_enter(L);
  double low = 0, high = 0;
  hm_scaler_bounds(self(L, "bounds")->s, &low, &high);
  lua_pushnumber(L, low);
  lua_pushnumber(L, high);
  return 2;
}

void hb_open_scaler(lua_State *L, hb_state *st) {
  (void)st;
  static const luaL_Reg methods[] = {{"scale", l_scale},
                                     {"unscale", l_unscale},
                                     {"step", l_step},
                                     {"checked", l_checked},
                                     {"assume", l_assume},
                                     {"tell", l_tell},
                                     {"update", l_update},
                                     {"set_policy", l_set_policy},
                                     {"want", l_want},
                                     {"hear", l_hear},
                                     {"set_rule", l_set_rule},
                                     {"restart", l_restart},
                                     {"read", l_read},
                                     {"late", l_late},
                                     {"get_scale", l_get_scale},
                                     {"set_scale", l_set_scale},
                                     {"is_enabled", l_is_enabled},
                                     {"bounds", l_bounds},
                                     {"step_count", l_step_count},
                                     {"set_step_count", l_set_step_count},
                                     {NULL, NULL}};
  static const luaL_Reg functions[] = {{"scaler_new", l_new}, {NULL, NULL}};
  static const luaL_Reg promise[] = {{"read", l_promise_read}, {NULL, NULL}};
  hb_metatable(L, HB_PROMISE, l_promise_gc, false, promise);
  hb_metatable(L, HB_SCALER, l_gc, false, methods);
  hb_functions(L, functions);
}
