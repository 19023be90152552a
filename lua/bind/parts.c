/*
 * parts.c -- a function that hears of every backward before it begins, and the parts of a graph: for amp.layer_scale.
 *
 * The function stands in the registry under a key of its own.  It is called on the coroutine that calls backward or grad, before the walk,
 * and what it returns, if it is a function, after it: also when the walk failed, before the error is raised.
 */
#include "bind.h"

static const char watch_key; /* its address is the registry key of the function */

/* ====== Watching walks ====== */

/* core.on_backward(fn or nil): fn(roots, inputs) is called before each walk; inputs: of autograd.grad, else nil */
static int l_on_backward(lua_State *L) {
  hb_enter(L);
  if (!lua_isnoneornil(L, 1) && lua_type(L, 1) != LUA_TFUNCTION)
    return hb_error(L, "on_backward: argument 1 must be a function or nil, got %s", hb_came(L, 1));
  lua_settop(L, 1);
  lua_rawsetp(L, LUA_REGISTRYINDEX, &watch_key);
  return 0;
}

void hb_walk_begin(lua_State *L, int root, int inputs) {
  if (lua_rawgetp(L, LUA_REGISTRYINDEX, &watch_key) != LUA_TFUNCTION) return;
  if (lua_istable(L, root)) {
    lua_pushvalue(L, root);
  } else {
    lua_createtable(L, 1, 0);
    lua_pushvalue(L, root);
    lua_rawseti(L, -2, 1);
  }
  if (inputs) lua_pushvalue(L, inputs);
  else lua_pushnil(L);
  lua_call(L, 2, 1);
  hb_enter(L);
}

void hb_walk_end(lua_State *L, int end) {
  if (lua_type(L, end) != LUA_TFUNCTION) return;
  lua_pushvalue(L, end);
  lua_call(L, 0, 0);
  hb_enter(L);
}

/* ====== Parts ====== */

#define PARTS_NAME "halfmoon.GraphParts"

static int parts_gc(lua_State *L) {
  hm_parts_free(lua_touserdata(L, 1));
  return 0;
}

/* {backward function, part above, part below, ...} */
static void push_cuts(lua_State *L, const hm_parts *p) {
  lua_createtable(L, 3 * p->n_cuts, 0);
  for (int i = 0; i < p->n_cuts; i++) {
    const hb_callback *fn = p->cut[i].ud;
    lua_rawgeti(L, LUA_REGISTRYINDEX, fn->ref);
    lua_rawseti(L, -2, 3 * i + 1);
    lua_pushinteger(L, p->cut[i].above);
    lua_rawseti(L, -2, 3 * i + 2);
    lua_pushinteger(L, p->cut[i].below);
    lua_rawseti(L, -2, 3 * i + 3);
  }
}

/* Pushes an array of integers. */
static void push_integers(lua_State *L, const int *list, int n) {
  lua_createtable(L, n, 0);
  for (int i = 0; i < n; i++) {
    lua_pushinteger(L, list[i]);
    lua_rawseti(L, -2, i + 1);
  }
}

/* The tensors of an array at idx, as pointers in a new userdata; NULL for those that were released: weak tables still have them for a while. */
static hm_tensor **read_asked(lua_State *L, hb_state *st, int idx, int *n) {
  if (!lua_istable(L, idx)) hb_error(L, "graph_parts: asked must be an array of tensors, got %s", hb_came(L, idx));
  *n = (int)lua_rawlen(L, idx);
  hm_tensor **list = lua_newuserdatauv(L, (size_t)*n * sizeof *list + 1, 0);
  for (int i = 0; i < *n; i++) {
    lua_rawgeti(L, idx, i + 1);
    hm_tensor **slot = hb_test(L, st, -1);
    if (!slot) hb_error(L, "graph_parts: entry %d of asked must be a tensor, got %s", i + 1, hb_came(L, -1));
    list[i] = *slot;
    lua_pop(L, 1);
  }
  return list;
}

/* core.graph_parts(name, roots[, asked]) -> {n, cuts = {backward, above, below, ...}, leaves = {part, ...}, asked = {part, ...}}: the
 * parts, from 1, into which Functions of that name cut the graph below the roots; asked: parts of these tensors (0: not in the graph); leaves: parts of
 * all leaves but those */
static int l_graph_parts(lua_State *L) {
  hb_state *st = hb_enter(L);
  lua_settop(L, 3);
  const char *name = hb_string(L, 1, "graph_parts", "the name");
  int n_roots, n_asked = 0;
  hm_tensor **roots = hb_tensor_list(L, st, 2, "graph_parts", "roots", false, &n_roots);
  hm_tensor **asked = lua_isnil(L, 3) ? NULL : read_asked(L, st, 3, &n_asked);
  hm_parts *p = lua_newuserdatauv(L, sizeof *p, 0);
  *p = (hm_parts){0};
  luaL_setmetatable(L, PARTS_NAME);
  hb_check(L, st, hm_graph_parts(roots, n_roots, name, asked, n_asked, p));
  lua_createtable(L, 0, 4);
  lua_pushinteger(L, p->n_parts);
  lua_setfield(L, -2, "n");
  push_cuts(L, p);
  lua_setfield(L, -2, "cuts");
  push_integers(L, p->leaf, p->n_leaves);
  lua_setfield(L, -2, "leaves");
  push_integers(L, p->asked, n_asked);
  lua_setfield(L, -2, "asked");
  hm_parts_free(p);
  return 1;
}

void hb_open_parts(lua_State *L) {
  static const luaL_Reg functions[] = {{"on_backward", l_on_backward}, {"graph_parts", l_graph_parts}, {NULL, NULL}};
  hb_metatable(L, PARTS_NAME, parts_gc, false, NULL);
  hb_functions(L, functions);
}
