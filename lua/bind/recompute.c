/*
 * recompute.c -- regions of the forward that backward computes again, for lua/halfmoon/recompute.lua (hm.checkpoint).
 *
 * Owner: a userdata owns one reference of its region; the graph owns others.  The function that computes the region again stands in the
 * registry and goes with the region.
 */
#include "bind.h"

#define HB_REGION "halfmoon.Region"

typedef struct again {
  hb_callback *fn;
  int n;
  hm_tensor *const *args;
} again;

/* Protected: fn(tensor1, tensor2, ...). */
static int run_again(lua_State *L) {
  const again *call = lua_touserdata(L, 1);
  hb_state *st = hb_enter(L);
  luaL_checkstack(L, call->n + 10, "too many tensors");
  lua_rawgeti(L, LUA_REGISTRYINDEX, call->fn->ref);
  for (int i = 0; i < call->n; i++) hb_push(L, st, call->args[i]);
  lua_call(L, call->n, 0);
  return 0;
}

static int on_again(void *ud, int n, hm_tensor *const *args) {
  again call = {ud, n, args};
  return hb_protected_inside(hb_now.L, run_again, &call);
}

static int l_region_gc(lua_State *L) {
  hm_region **r = lua_touserdata(L, 1);
  hm_region_release(*r);
  *r = NULL;
  return 0;
}

/* core.region_new(tensors, fn, random, check) -> region */
static int l_region_new(lua_State *L) {
  hb_state *st = hb_enter(L);
  lua_settop(L, 4);
  const hm_region_options options = {.random = lua_toboolean(L, 3), .check = lua_toboolean(L, 4)};
  if (lua_type(L, 2) != LUA_TFUNCTION)
    return hb_error(L, "region_new: argument 2 must be a function, got %s", hb_came(L, 2));
  hm_region **r = lua_newuserdatauv(L, sizeof *r, 0);
  *r = NULL;
  luaL_setmetatable(L, HB_REGION);
  int n;
  hm_tensor **args = hb_tensor_list(L, st, 1, "checkpoint", "the arguments", true, &n);
  hb_callback *fn = hb_callback_new(L, st, 2);
  hb_check(L, st, hm_region_new(args, n, &options, on_again, fn, hb_callback_drop, r));
  lua_pushvalue(L, 5);
  return 1;
}

/* core.region_run(region, fn, ...) -> what fn returns */
static int l_region_run(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_region **r = luaL_checkudata(L, 1, HB_REGION);
  return hb_inside_region(L, st, *r);
}

/* core.is_recomputing(): true while hm.checkpoint runs a function again. */
static int l_is_recomputing(lua_State *L) {
  hb_enter(L);
  lua_pushboolean(L, hm_region_recomputing());
  return 1;
}

void hb_open_recompute(lua_State *L) {
  static const luaL_Reg functions[] = {{"region_new", l_region_new},
                                       {"region_run", l_region_run},
                                       {"is_recomputing", l_is_recomputing},
                                       {NULL, NULL}};
  hb_metatable(L, HB_REGION, l_region_gc, false, NULL);
  hb_functions(L, functions);
}
