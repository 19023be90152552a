/*
 * fp8.c -- recipes of amp.autocast("fp8"): a userdata around hm_fp8_recipe, and what a checkpoint needs of it.
 *
 * lua/halfmoon/amp/fp8.lua gives the userdata its methods beyond these.  The default recipe lies in the registry: one for
 * each Lua state.
 */
#include <math.h>

#include "bind.h"

#define HB_FP8 "halfmoon.DelayedScaling"

typedef struct hb_fp8 {
  hm_fp8_recipe *r;
} hb_fp8;

static const char default_key;

hm_fp8_recipe *hb_fp8_test(lua_State *L, int idx) {
  const hb_fp8 *u = luaL_testudata(L, idx, HB_FP8);
  return u ? u->r : NULL;
}

static hm_fp8_recipe *self(lua_State *L, const char *who) {
  hm_fp8_recipe *r = hb_fp8_test(L, 1);
  if (!r) hb_error(L, "%s: self must be a DelayedScaling recipe, got %s", who, hb_came(L, 1));
  return r;
}

static void push_new(lua_State *L, hb_state *st, const hm_fp8_options *options) {
  hb_fp8 *u = lua_newuserdatauv(L, sizeof *u, 0);
  u->r = NULL;
  luaL_setmetatable(L, HB_FP8);
  hb_check(L, st, hm_fp8_recipe_new(options, &u->r));
}

hm_fp8_recipe *hb_fp8_default(lua_State *L, hb_state *st) {
  if (lua_rawgetp(L, LUA_REGISTRYINDEX, &default_key) != LUA_TUSERDATA) {
    lua_pop(L, 1);
    push_new(L, st, &(hm_fp8_options){.margin = 0, .history = 1024, .hybrid = true});
    lua_pushvalue(L, -1);
    lua_rawsetp(L, LUA_REGISTRYINDEX, &default_key);
  }
  return hb_fp8_test(L, -1);
}

static int l_gc(lua_State *L) {
  hb_fp8 *u = lua_touserdata(L, 1);
  hm_fp8_recipe_release(u->r);
  u->r = NULL;
  return 0;
}

/* core.fp8_new(margin, amax_history_len, hybrid, most_recent) */
static int l_new(lua_State *L) {
  hb_state *st = hb_enter(L);
  const int64_t margin = hb_integer(L, 1, "DelayedScaling", "margin"),
                history = hb_integer(L, 2, "DelayedScaling", "amax_history_len");
  hm_fp8_options o = {.hybrid = hb_bool(L, 3, "DelayedScaling", "hybrid", true),
                      .most_recent = hb_bool(L, 4, "DelayedScaling", "most_recent", false)};
  o.margin = (int)(margin < -1000 ? -1000 : margin > 1000 ? 1000 : margin); /* core says what may be */
  o.history = (int)(history < 0 ? 0 : history > INT32_MAX ? INT32_MAX : history);
  push_new(L, st, &o);
  return 1;
}

/* core.fp8_default() */
static int l_default(lua_State *L) {
  hb_fp8_default(L, hb_enter(L));
  return 1;
}

static void push_slot(lua_State *L, const hm_fp8_slot *s) {
  lua_createtable(L, 0, 6);
  hb_set_string(L, "name", s->name);
  hb_set_string(L, "format", s->e5m2 ? "e5m2" : "e4m3");
  hb_set_number(L, "scale", s->scale);
  hb_set_number(L, "amax", s->amax);
  hb_set_bool(L, "recorded", s->recorded);
  lua_createtable(L, s->n, 0);
  for (int i = 0; i < s->n; i++) {
    lua_pushnumber(L, s->history[i]);
    lua_rawseti(L, -2, i + 1);
  }
  lua_setfield(L, -2, "history");
}

/* r:sites() -> {{op, name?, weighted, position, slots = {{name, format, scale, amax, recorded, history}, ...}}, ...}: the products that came by,
 * then those that expect() told of */
static int l_sites(lua_State *L) {
  hb_state *st = hb_enter(L);
  const hm_fp8_recipe *r = self(L, "sites");
  const int n = hm_fp8_site_count(r);
  lua_createtable(L, n, 0);
  for (int i = 0; i < hm_fp8_site_count(r); i++) {
    const hm_fp8_site *s = hm_fp8_site_get(r, i);
    lua_createtable(L, 0, 5);
    hb_set_string(L, "op", hm_op_get(s->op)->name);
    hb_set_bool(L, "weighted", s->weighted);
    lua_pushinteger(L, s->position);
    lua_setfield(L, -2, "position");
    if (s->weight && s->weight->in_lua) { /* else it has no Lua object that a name could hang on */
      hb_push(L, st, s->weight);
      hb_push_name(L, st, -1);
      lua_setfield(L, -3, "name");
      lua_pop(L, 1);
    }
    lua_createtable(L, s->n_slots, 0);
    for (int k = 0; k < s->n_slots; k++) {
      push_slot(L, &s->slot[k]);
      lua_rawseti(L, -2, k + 1);
    }
    lua_setfield(L, -2, "slots");
    lua_rawseti(L, -2, i + 1);
  }
  return 1;
}

/* r:find(weight) -> the numbers of the sites that are known by it */
static int l_find(lua_State *L) {
  hb_state *st = hb_enter(L);
  const hm_fp8_recipe *r = self(L, "find");
  const hm_tensor *weight = hb_tensor(L, st, 2, "find", "the weight");
  int n = 0;
  lua_newtable(L);
  for (int i = 0; i < hm_fp8_site_count(r); i++) {
    if (hm_fp8_site_get(r, i)->weight != weight) continue;
    lua_pushinteger(L, i + 1);
    lua_rawseti(L, -2, ++n);
  }
  return 1;
}

/* r:options() -> {margin, format, amax_history_len, amax_compute_algo} */
static int l_options(lua_State *L) {
  hb_enter(L);
  const hm_fp8_options *o = hm_fp8_recipe_options(self(L, "options"));
  lua_createtable(L, 0, 4);
  lua_pushinteger(L, o->margin);
  lua_setfield(L, -2, "margin");
  lua_pushinteger(L, o->history);
  lua_setfield(L, -2, "amax_history_len");
  hb_set_string(L, "format", o->hybrid ? "hybrid" : "e4m3");
  hb_set_string(L, "amax_compute_algo", o->most_recent ? "most_recent" : "max");
  return 1;
}

static int l_forget(lua_State *L) {
  hb_enter(L);
  hm_fp8_forget(self(L, "forget"));
  return 0;
}

/* The slot on top of the stack; its history, of at most `room` numbers, goes to memory that belongs to the Lua stack. */
static void read_slot(lua_State *L, hm_fp8_slot *s, float *history, int room) {
  static const char who[] = "load_state_dict";
  if (lua_type(L, -1) != LUA_TTABLE) hb_error(L, "%s: a slot must be a table, got %s", who, hb_came(L, -1));
  lua_getfield(L, -1, "scale");
  s->scale = (float)hb_number(L, -1, who, "a scale");
  if (!(s->scale > 0) || s->scale == INFINITY) hb_error(L, "%s: a scale must be positive and finite", who);
  lua_getfield(L, -2, "amax");
  s->amax = (float)hb_number(L, -1, who, "an amax");
  lua_getfield(L, -3, "recorded");
  s->recorded = hb_bool(L, -1, who, "recorded", false);
  lua_pop(L, 3);
  if (lua_getfield(L, -1, "history") != LUA_TTABLE) hb_error(L, "%s: a history must be an array table", who);
  const int64_t n = (int64_t)lua_rawlen(L, -1);
  s->n = (int)(n < room ? n : room);
  s->history = history;
  for (int i = 0; i < s->n; i++) {
    lua_rawgeti(L, -1, i + 1);
    history[i] = (float)hb_number(L, -1, who, "an entry of a history");
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
}

/* r:expect{op, weighted, position, slots}: one entry of sites(), for a product that is still to come */
static int l_expect(lua_State *L) {
  static const char who[] = "load_state_dict";
  hb_state *st = hb_enter(L);
  hm_fp8_recipe *r = self(L, who);
  luaL_checktype(L, 2, LUA_TTABLE);
  lua_settop(L, 2);
  hm_fp8_site site = {0};
  lua_getfield(L, 2, "op");
  const char *name = hb_string(L, -1, who, "an op");
  site.op = hm_op_find(name);
  if (site.op < 0) return hb_error(L, "%s: there is no op \"%s\"", who, name);
  lua_getfield(L, 2, "weighted");
  site.weighted = hb_bool(L, -1, who, "weighted", false);
  lua_getfield(L, 2, "position");
  site.position = (int32_t)hb_integer(L, -1, who, "a position");
  if (lua_getfield(L, 2, "slots") != LUA_TTABLE) return hb_error(L, "%s: slots must be an array table", who);
  const int64_t n = (int64_t)lua_rawlen(L, -1);
  if (n < 1 || n > HM_FP8_MAX_SLOTS)
    return hb_error(L, "%s: %I slots, 1 to %d are possible", who, (LUAI_UACINT)n, HM_FP8_MAX_SLOTS);
  site.n_slots = (int)n;
  const int room = hm_fp8_recipe_options(r)->history;
  float *history = lua_newuserdatauv(L, sizeof(float) * (size_t)room * (size_t)n, 0);
  lua_insert(L, -2); /* below the slots */
  for (int k = 0; k < site.n_slots; k++) {
    lua_rawgeti(L, -1, k + 1);
    read_slot(L, &site.slot[k], history + (size_t)room * (size_t)k, room);
    lua_pop(L, 1);
  }
  hb_check(L, st, hm_fp8_expect(r, &site));
  return 0;
}

void hb_open_fp8(lua_State *L) {
  static const luaL_Reg methods[] = {{"sites", l_sites},   {"find", l_find},     {"options", l_options},
                                     {"forget", l_forget}, {"expect", l_expect}, {NULL, NULL}};
  static const luaL_Reg functions[] = {{"fp8_new", l_new}, {"fp8_default", l_default}, {NULL, NULL}};
  hb_functions(L, functions);
  luaL_newmetatable(L, HB_FP8);
  lua_pushcfunction(L, l_gc);
  lua_setfield(L, -2, "__gc");
  luaL_newlib(L, methods);
  lua_setfield(L, -2, "__index");
  lua_setfield(L, -2, "fp8_recipe"); /* the metatable: amp/fp8.lua adds methods */
}
