/*
 * module.c -- the C module halfmoon.core: opening it, which coroutine runs, how errors reach Lua, how core calls Lua.
 *
 * The state of the binding is a userdata in the registry, made before anything else with a finalizer, so that Lua
 * closes it last.
 */
#include <stdlib.h>
#include <string.h>

#include "bind.h"

hb_running hb_now;

static const char state_key; /* its address is the registry key of the state */

/* ====== Which coroutine runs ====== */

static hb_state *find_state(lua_State *L) {
  lua_rawgetp(L, LUA_REGISTRYINDEX, &state_key);
  hb_state *st = lua_touserdata(L, -1);
  lua_pop(L, 1);
  return st;
}

/* Nothing here allocates when L was current before, so a return to it cannot fail. */
hb_state *hb_enter_other(lua_State *L) {
  luaL_checkstack(L, 6, NULL);
  hb_state *st = find_state(L);
  hm_mode *mode = hb_push_mode(L, st);
  lua_pop(L, 1);
  lua_pushthread(L);
  hb_set_ref(L, st, HB_REF_THREAD);
  hb_now = (hb_running){L, st};
  hm_mode_switch(mode);
  return st;
}

/* ====== Errors ====== */

/* Pushes "file:line: " of the innermost Lua function outside the Lua library; else of the caller. */
static void push_where(lua_State *L, const hb_state *st) {
  const size_t n = strlen(st->library);
  lua_Debug ar;
  for (int level = 1; level < 64 && lua_getstack(L, level, &ar); level++) {
    lua_getinfo(L, "Sl", &ar);
    if (ar.currentline <= 0 || (n > 0 && strncmp(ar.source, st->library, n) == 0)) continue;
    lua_pushfstring(L, "%s:%d: ", ar.short_src, ar.currentline);
    return;
  }
  luaL_where(L, 1);
}

/* Pushes "\n  in <module path>", or "". */
static void push_path(lua_State *L, hb_state *st) {
  if (hb_push_ref(L, st, HB_REF_PATH) == LUA_TFUNCTION && lua_pcall(L, 0, 1, 0) == LUA_OK &&
      lua_type(L, -1) == LUA_TSTRING) {
    lua_pushfstring(L, "\n  in %s", lua_tostring(L, -1));
    lua_remove(L, -2);
    return;
  }
  lua_pop(L, 1);
  lua_pushliteral(L, "");
}

void hb_push_place(lua_State *L, hb_state *st) {
  push_where(L, st);
  size_t n;
  const char *where = lua_tolstring(L, -1, &n);
  lua_pushlstring(L, n > 2 ? where : "?", n > 2 ? n - 2 : 1); /* without ": " */
  lua_remove(L, -2);
  push_path(L, st);
  lua_concat(L, 2);
}

int hb_error(lua_State *L, const char *format, ...) {
  luaL_checkstack(L, 10, NULL);
  hb_state *st = hb_enter(L);
  push_where(L, st);
  va_list args;
  va_start(args, format);
  lua_pushvfstring(L, format, args);
  va_end(args);
  push_path(L, st);
  lua_concat(L, 3);
  return lua_error(L);
}

int hb_raise(lua_State *L, int status) {
  hb_state *st = hb_enter(L);
  if (st->failed) {
    luaL_checkstack(L, 4, NULL);
    st->failed = false;
    hb_push_ref(L, st, HB_REF_ERROR);
    lua_pushboolean(L, false);
    hb_set_ref(L, st, HB_REF_ERROR);
    return lua_error(L);
  }
  const char *message = hm_error_message();
  return hb_error(L, "%s", *message ? message : hm_status_text(status));
}

/* ====== Calls from core into Lua ====== */

/* Keeps the error value on top of the stack (popped) for hb_raise, if asked, and fills core's message. */
static int keep_error(lua_State *L, hb_state *st, bool keep) {
  if (lua_type(L, -1) == LUA_TSTRING) hm_fail(HM_ERR_CALLBACK, "%s", lua_tostring(L, -1));
  else hm_fail(HM_ERR_CALLBACK, "callback raised a %s value", luaL_typename(L, -1));
  if (keep && !st->failed) {
    hb_set_ref(L, st, HB_REF_ERROR);
    st->failed = true;
  } else {
    lua_pop(L, 1);
  }
  return HM_ERR_CALLBACK;
}

int hb_protected(lua_State *L, lua_CFunction fn, void *argument, int extra, bool keep) {
  hb_state *st = hb_now.state;
  if (!lua_checkstack(L, LUA_MINSTACK)) {
    lua_pop(L, extra);
    return hm_fail(HM_ERR_CALLBACK, "callback: the Lua stack is full");
  }
  lua_pushcfunction(L, fn);
  lua_pushlightuserdata(L, argument);
  lua_rotate(L, -(extra + 2), 2);
  const int rc = lua_pcall(L, extra + 1, 0, 0);
  if (hb_now.L != L) hb_enter_other(L); /* the callback ran another coroutine */
  return rc == LUA_OK ? HM_OK : keep_error(L, st, keep);
}

hb_callback *hb_callback_new(lua_State *L, hb_state *st, int idx) {
  hb_callbacks_sweep(L, st);
  lua_pushvalue(L, idx);
  const int ref = luaL_ref(L, LUA_REGISTRYINDEX);
  hb_callback *c = hm_alloc(sizeof *c);
  if (!c) {
    luaL_unref(L, LUA_REGISTRYINDEX, ref);
    hb_raise(L, HM_ERR_MEMORY);
  }
  *c = (hb_callback){.state = st, .ref = ref};
  return c;
}

/* Core may drop a callback inside a finalizer, so Lua is not touched here. */
void hb_callback_drop(void *ud) {
  hb_callback *c = ud;
  c->next = c->state->dead;
  c->state->dead = c;
}

void hb_callbacks_sweep(lua_State *L, hb_state *st) {
  while (st->dead) {
    hb_callback *c = st->dead;
    st->dead = c->next;
    luaL_unref(L, LUA_REGISTRYINDEX, c->ref);
    hm_free(c);
  }
}

/* ====== Opening ====== */

void hb_functions(lua_State *L, const luaL_Reg *list) { luaL_setfuncs(L, list, 0); }

void hb_metatable(lua_State *L, const char *name, lua_CFunction gc, bool close, const luaL_Reg *methods) {
  luaL_newmetatable(L, name);
  lua_pushcfunction(L, gc);
  if (close) {
    lua_pushvalue(L, -1);
    lua_setfield(L, -3, "__close");
  }
  lua_setfield(L, -2, "__gc");
  if (methods) {
    lua_newtable(L);
    luaL_setfuncs(L, methods, 0);
    lua_setfield(L, -2, "__index");
  }
  lua_pop(L, 1);
}

void hb_methods(lua_State *L, hb_state *st, const luaL_Reg *list) {
  hb_push_ref(L, st, HB_REF_METHODS);
  luaL_setfuncs(L, list, 0);
  lua_pop(L, 1);
}

/* Finalizer of the state: runs last of all. */
static int l_state_gc(lua_State *L) {
  hb_state *st = lua_touserdata(L, 1);
  hb_fault_off(L);
  if (hb_now.state == st) {
    hm_mode_switch(NULL);
    hm_set_op_log(NULL, NULL);
    hm_set_op_watch(NULL, NULL);
    hm_set_gradient_watch(NULL, NULL);
    hb_now = (hb_running){NULL, NULL};
  }
  while (st->dead) {
    hb_callback *c = st->dead;
    st->dead = c->next;
    hm_free(c);
  }
  return 0;
}

/* Makes the registry place `which` a table with the given weakness ("k", "v" or NULL). */
static void make_table(lua_State *L, hb_state *st, int which, const char *weak) {
  lua_newtable(L);
  if (weak) {
    lua_createtable(L, 0, 1);
    lua_pushstring(L, weak);
    lua_setfield(L, -2, "__mode");
    lua_setmetatable(L, -2);
  }
  hb_set_ref(L, st, which);
}

static hb_state *new_state(lua_State *L) {
  hb_state *st = lua_newuserdatauv(L, sizeof *st, 0);
  memset(st, 0, sizeof *st);
  lua_createtable(L, 0, 1);
  lua_pushcfunction(L, l_state_gc);
  lua_setfield(L, -2, "__gc");
  lua_setmetatable(L, -2);
  for (int i = 0; i < HB_REF_COUNT; i++) {
    lua_pushboolean(L, false);
    st->refs[i] = luaL_ref(L, LUA_REGISTRYINDEX);
  }
  lua_rawgeti(L, LUA_REGISTRYINDEX, LUA_RIDX_MAINTHREAD);
  st->main = lua_tothread(L, -1);
  lua_pop(L, 1);
  make_table(L, st, HB_REF_METHODS, NULL);
  make_table(L, st, HB_REF_OPS, NULL);
  make_table(L, st, HB_REF_MAP, "v");
  make_table(L, st, HB_REF_MODES, "k");
  make_table(L, st, HB_REF_NAMES, "k");
  make_table(L, st, HB_REF_HOOKS, "k");
  lua_rawsetp(L, LUA_REGISTRYINDEX, &state_key);
  return st;
}

/* The library is what requires this module: .../halfmoon/init.lua.  Its directory is what error positions skip. */
static void find_library(lua_State *L, hb_state *st) {
  static const char tail[] = "halfmoon/init.lua";
  lua_Debug ar;
  for (int level = 1; level < 16 && lua_getstack(L, level, &ar); level++) {
    lua_getinfo(L, "S", &ar);
    const size_t n = strlen(ar.source);
    if (n < sizeof tail || n >= sizeof st->library || strcmp(ar.source + n - (sizeof tail - 1), tail) != 0) continue;
    const size_t keep = n - strlen("init.lua");
    memcpy(st->library, ar.source, keep);
    st->library[keep] = '\0';
    return;
  }
}

int luaopen_halfmoon_core(lua_State *L) {
  luaL_checkversion(L);
  hb_state *st = find_state(L);
  if (st) {
    hb_push_ref(L, st, HB_REF_MODULE);
    return 1;
  }
  if (hm_init() != HM_OK) return luaL_error(L, "halfmoon: %s", hm_error_message());
  st = new_state(L);
  find_library(L, st);
  hb_enter(L);
  hb_pressure_install();
  lua_newtable(L);
  hb_open_tensor(L, st);
  hb_open_index(L, st);
  hb_open_ops(L, st);
  hb_open_factory(L, st);
  hb_open_autograd(L, st);
  hb_open_modes(L, st);
  hb_open_optim(L, st);
  hb_open_scaler(L, st);
  hb_open_sandbox(L, st);
  hb_open_files(L, st);
  hb_open_sys(L, st);
  hb_open_cuda(L, st);
  hb_open_expression(L, st);
  lua_pushvalue(L, -1);
  hb_set_ref(L, st, HB_REF_MODULE);
  return 1;
}
