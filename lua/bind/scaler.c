/*
 * scaler.c -- the gradient scaler: a userdata around hm_scaler, and policies written in Lua.
 *
 * The policy's function is user value 1 of the scaler, not a registry entry: a policy that refers to its scaler is
 * collected with it. Core calls a policy inside update() only, where the scaler stands at index 1 of the running C
 * function.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "bind.h"

typedef struct hb_scaler {
  hm_scaler *s;
  struct hb_scaler *next, **link; /* list of live scalers in the state */
  char stop[512];                 /* what the policy said when it asked to stop */
} hb_scaler;

static hb_scaler *self(lua_State *L, const char *who) {
  hb_scaler *u = luaL_testudata(L, 1, HB_SCALER);
  if (!u || !u->s) hb_error(L, "%s: self must be a scaler, got %s", who, hb_came(L, 1));
  return u;
}

/* core.scaler_new{init_scale, min_scale, max_scale, enabled, allow_f16_grads} */
static int l_new(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_scaler_options o = {.init_scale = NAN, .min_scale = NAN, .max_scale = NAN, .enabled = true};
  hb_options(L, 1, "GradScaler",
             (const hb_option[]){{"init_scale", HB_NUMBER, &o.init_scale},
                                 {"min_scale", HB_NUMBER, &o.min_scale},
                                 {"max_scale", HB_NUMBER, &o.max_scale},
                                 {"enabled", HB_BOOL, &o.enabled},
                                 {"allow_f16_grads", HB_BOOL, &o.allow_f16_grads},
                                 {0}});
  hb_scaler *u = lua_newuserdatauv(L, sizeof *u, 1);
  memset(u, 0, sizeof *u);
  luaL_setmetatable(L, HB_SCALER);
  hb_check(L, st, hm_scaler_new(&o, &u->s));
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

static void set_number(lua_State *L, const char *key, double value) {
  lua_pushnumber(L, value);
  lua_setfield(L, -2, key);
}

static void set_integer(lua_State *L, const char *key, int64_t value) {
  lua_pushinteger(L, value);
  lua_setfield(L, -2, key);
}

static void set_bool(lua_State *L, const char *key, bool value) {
  lua_pushboolean(L, value);
  lua_setfield(L, -2, key);
}

/* Protected: argument 2 is the policy's function, called as fn(event) -> new scale [, stop message]. */
static int run_policy(lua_State *L) {
  policy_call *call = lua_touserdata(L, 1);
  const hm_scaler_event *e = call->event;
  lua_createtable(L, 0, 7);
  set_bool(L, "found_inf", e->found_inf);
  set_integer(L, "inf_count", e->inf_count);
  set_integer(L, "nan_count", e->nan_count);
  set_integer(L, "step", e->step);
  set_number(L, "scale", e->scale);
  set_number(L, "amax", e->amax);
  set_number(L, "norm", e->norm);
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
    set_integer(L, "index", c->index + 1);
    set_integer(L, "inf_count", c->inf_count);
    set_integer(L, "nan_count", c->nan_count);
    lua_rawseti(L, -2, i + 1);
  }
}

/* s:step(optimizer[, max_norm]) -> stepped, record */
static int l_step(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_scaler *u = self(L, "step");
  hm_optim *o = hb_optim(L, 2, "step");
  const double max_norm = lua_isnoneornil(L, 3) ? 0 : hb_number(L, 3, "step", "max_norm");
  hm_step_record r = {0};
  hb_check(L, st, hm_scaler_step(u->s, o, max_norm, &r));
  lua_pushboolean(L, r.stepped);
  lua_createtable(L, 0, 9);
  set_bool(L, "stepped", r.stepped);
  set_bool(L, "found_inf", r.found_inf);
  if (r.empty) set_bool(L, "empty", true);
  set_integer(L, "inf_count", r.inf_count);
  set_integer(L, "nan_count", r.nan_count);
  set_number(L, "scale", r.scale);
  set_number(L, "norm", r.norm);
  set_number(L, "amax", r.amax);
  push_culprits(L, st, &r);
  lua_setfield(L, -2, "culprits");
  return 2;
}

/* s:update([new_scale]) -> {old_scale, new_scale, event[, message]} */
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
  lua_createtable(L, 0, 4);
  set_number(L, "old_scale", r.old_scale);
  set_number(L, "new_scale", r.new_scale);
  lua_pushstring(L, hm_scale_change_name(r.event));
  lua_setfield(L, -2, "event");
  if (r.event == HM_SCALE_FAULT) {
    lua_pushstring(L, hm_error_message());
    lua_setfield(L, -2, "message");
  }
  return 1;
}

/* ====== Asking ====== */

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
                                     {"update", l_update},
                                     {"set_policy", l_set_policy},
                                     {"get_scale", l_get_scale},
                                     {"set_scale", l_set_scale},
                                     {"is_enabled", l_is_enabled},
                                     {"bounds", l_bounds},
                                     {NULL, NULL}};
  static const luaL_Reg functions[] = {{"scaler_new", l_new}, {NULL, NULL}};
  luaL_newmetatable(L, HB_SCALER);
  lua_pushcfunction(L, l_gc);
  lua_setfield(L, -2, "__gc");
  luaL_newlib(L, methods);
  lua_setfield(L, -2, "__index");
  lua_pop(L, 1);
  hb_functions(L, functions);
}
