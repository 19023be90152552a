/*
 * autograd.c -- backward, grad, hooks, and functions whose backward is written in Lua.
 *
 * Who keeps the Lua functions
 *   - A hook on a leaf stands in a table with weak keys, under the tensor's userdata: a hook that refers to its own
 *   parameter is collected with it.  (Lua must hold the parameter, as a module does, for the hook to live.)
 *   - A hook on any other tensor, and a custom backward, stand in the registry and go when core frees the graph's node.
 */
#include <string.h>

#include "bind.h"

/* ====== backward and grad ====== */

typedef struct walk_options {
  bool retain, create, allow_unused;
  bool retain_given;
} walk_options;

/* Reads the options of backward or grad at idx. */
static walk_options read_options(lua_State *L, int idx, const char *who, bool grad) {
  walk_options o = {0};
  const hb_option all[] = {{"retain_graph", HB_BOOL, &o.retain},
                           {"create_graph", HB_BOOL, &o.create},
                           {"allow_unused", HB_BOOL, &o.allow_unused},
                           {"grad_outputs", HB_ANY, NULL},
                           {0}};
  const hb_option some[] = {{"retain_graph", HB_BOOL, &o.retain}, {"create_graph", HB_BOOL, &o.create}, {0}};
  hb_options(L, idx, who, grad ? all : some);
  if (lua_istable(L, idx)) {
    o.retain_given = lua_getfield(L, idx, "retain_graph") != LUA_TNIL;
    lua_pop(L, 1);
  }
  if (!o.retain_given) o.retain = o.create;
  return o;
}

/* t:backward([gradient][, {retain_graph, create_graph}]) */
static int l_backward(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *root = hb_tensor(L, st, 1, "backward", "self"), *grad = NULL;
  int next = 2;
  if (hb_test(L, st, 2)) {
    grad = hb_tensor(L, st, 2, "backward", "the gradient");
    hb_publish(L, st, 2);
    next = 3;
  } else if (lua_isnil(L, 2)) {
    next = 3;
  }
  if (lua_gettop(L) > next)
    return hb_error(L, "backward: expected [gradient][, options], got %d arguments", lua_gettop(L) - 1);
  const walk_options o = read_options(L, next, "backward", false);
  hb_callbacks_sweep(L, st);
  hb_pressure_backward(L);
  hb_walk_begin(L, 1, 0);
  const int end = lua_gettop(L), status = hm_backward(&root, &grad, 1, o.retain, o.create);
  hb_walk_end(L, end);
  hb_check(L, st, status);
  return 0;
}

/* Makes the value at idx an array table if it is a single tensor. */
static void as_list(lua_State *L, hb_state *st, int idx) {
  if (!hb_test(L, st, idx)) return;
  lua_createtable(L, 1, 0);
  lua_pushvalue(L, idx);
  lua_rawseti(L, -2, 1);
  lua_replace(L, idx);
}

/* The list of grad_outputs in the options at idx: pushed (as pointers, NULL for ones), n of them. */
static hm_tensor **grad_outputs(lua_State *L, hb_state *st, int idx, int n) {
  hm_tensor **list = lua_newuserdatauv(L, (size_t)n * sizeof *list + 1, 0);
  for (int i = 0; i < n; i++) list[i] = NULL;
  if (!lua_istable(L, idx) || lua_getfield(L, idx, "grad_outputs") == LUA_TNIL) return list;
  as_list(L, st, lua_gettop(L));
  if (lua_type(L, -1) != LUA_TTABLE)
    hb_error(L, "grad: grad_outputs must be a tensor or an array table, got %s", hb_came(L, -1));
  for (int i = 0; i < n; i++) {
    if (lua_rawgeti(L, -1, i + 1) != LUA_TNIL) {
      list[i] = hb_tensor(L, st, -1, "grad", "an entry of grad_outputs");
      hb_publish(L, st, -1);
    }
    lua_pop(L, 1);
  }
  return list;
}

/* core.grad(outputs, inputs[, {grad_outputs, retain_graph, create_graph, allow_unused}]) -> array of gradients (nil
 * where unused) */
static int l_grad(lua_State *L) {
  hb_state *st = hb_enter(L);
  lua_settop(L, 3);
  const walk_options o = read_options(L, 3, "grad", true);
  as_list(L, st, 1);
  as_list(L, st, 2);
  int n, m;
  hm_tensor **roots = hb_tensor_list(L, st, 1, "grad", "outputs", false, &n);
  hm_tensor **inputs = hb_tensor_list(L, st, 2, "grad", "inputs", false, &m);
  hm_tensor **grads = grad_outputs(L, st, 3, n);
  hm_tensor ***slots = lua_newuserdatauv(L, (size_t)m * sizeof *slots + 1, 0);
  hm_tensor **out = lua_newuserdatauv(L, (size_t)m * sizeof *out + 1, 0);
  lua_createtable(L, m, 0);
  for (int i = 0; i < m; i++) {
    out[i] = NULL;
    slots[i] = hb_shell(L, st);
    lua_rawseti(L, -2, i + 1);
  }
  hb_walk_begin(L, 1, 2);
  const int end = lua_gettop(L),
            status = hm_autograd_grad(roots, grads, n, inputs, m, o.retain, o.create, o.allow_unused, out);
  for (int i = 0; i < m; i++) *slots[i] = out[i];
  hb_walk_end(L, end);
  lua_settop(L, end - 1);
  hb_check(L, st, status);
  for (int i = 0; i < m; i++) {
    if (out[i]) {
      lua_rawgeti(L, -1, i + 1);
      hb_settle_shared(L, st, -1, out[i]);
    } else {
      lua_pushnil(L);
    }
    lua_rawseti(L, -2, i + 1);
  }
  return 1;
}

static int l_retain_grad(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_check(L, st, hm_retain_grad(hb_tensor(L, st, 1, "retain_grad", "self")));
  return 0;
}

/* ====== Hooks ====== */

typedef struct hook_call {
  hb_callback *hook;
  hm_tensor *grad;
  hm_tensor *result; /* new reference */
} hook_call;

/* Pushes the hook's function; nil if it is gone. */
static void push_hook(lua_State *L, hb_state *st, hb_callback *hook) {
  if (!hook->leaf) {
    lua_rawgeti(L, LUA_REGISTRYINDEX, hook->ref);
    return;
  }
  hb_push_ref(L, st, HB_REF_HOOKS);
  hb_push(L, st, hook->leaf);
  if (lua_rawget(L, -2) == LUA_TTABLE) lua_rawgetp(L, -1, hook);
}

/* Protected: calls the hook with the gradient. */
static int run_hook(lua_State *L) {
  hook_call *call = lua_touserdata(L, 1);
  hb_state *st = hb_enter(L);
  push_hook(L, st, call->hook);
  if (lua_isnil(L, -1)) return 0;
  hb_push(L, st, call->grad);
  lua_call(L, 1, 1);
  if (lua_isnil(L, -1)) return 0;
  hb_enter(L);
  hm_tensor *t = hb_tensor(L, st, -1, "register_hook", "the hook's result");
  hb_publish(L, st, -1);
  call->result = hm_tensor_retain(t);
  return 0;
}

static int on_gradient(void *ud, hm_tensor *grad, hm_tensor **replacement) {
  hook_call call = {ud, grad, NULL};
  const int status = hb_protected_inside(hb_now.L, run_hook, &call);
  if (!status && call.result) *replacement = call.result;
  return status;
}

/* A handle: its user value 1 is the tensor. */
typedef struct hook_handle {
  int64_t id; /* 0: removed */
} hook_handle;

/* Keeps fn (at 2) in the weak table of leaf hooks under the tensor at 1. */
static void keep_leaf_hook(lua_State *L, hb_state *st, hb_callback *hook) {
  hb_push_ref(L, st, HB_REF_HOOKS);
  lua_pushvalue(L, 1);
  if (lua_rawget(L, -2) != LUA_TTABLE) {
    lua_pop(L, 1);
    lua_newtable(L);
    lua_pushvalue(L, 1);
    lua_pushvalue(L, -2);
    lua_rawset(L, -4);
  }
  lua_pushvalue(L, 2);
  lua_rawsetp(L, -2, hook);
  lua_pop(L, 2);
}

/* t:register_hook(fn) -> handle with :remove().  fn(grad) may return a gradient to use instead. */
static int l_register_hook(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = hb_tensor(L, st, 1, "register_hook", "self");
  if (lua_type(L, 2) != LUA_TFUNCTION)
    return hb_error(L, "register_hook: argument 1 must be a function, got %s", hb_came(L, 2));
  lua_settop(L, 2);
  hook_handle *handle = lua_newuserdatauv(L, sizeof *handle, 1);
  handle->id = 0;
  luaL_setmetatable(L, "halfmoon.Hook");
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, 1);
  const bool leaf = hm_tensor_is_leaf(t);
  if (leaf) {
    hb_publish(L, st, 1);
    lua_pushnil(L); /* takes no registry place: luaL_ref gives LUA_REFNIL */
  } else {
    lua_pushvalue(L, 2);
  }
  hb_callback *hook = hb_callback_new(L, st, lua_gettop(L));
  lua_pop(L, 1);
  if (leaf) hook->leaf = t;
  const int status = hm_add_hook(t, on_gradient, hook, hb_callback_drop, &handle->id);
  if (status) hb_callback_drop(hook);
  hb_check(L, st, status);
  if (leaf) keep_leaf_hook(L, st, hook);
  return 1;
}

/* handle:remove(): may be called again. */
static int l_hook_remove(lua_State *L) {
  hb_state *st = hb_enter(L);
  hook_handle *handle = luaL_checkudata(L, 1, "halfmoon.Hook");
  if (handle->id == 0) return 0;
  lua_getiuservalue(L, 1, 1);
  hm_tensor **slot = hb_test(L, st, -1);
  if (slot && *slot) hm_remove_hook(*slot, handle->id);
  handle->id = 0;
  hb_callbacks_sweep(L, st);
  return 0;
}

/* ====== Functions with a backward of their own ====== */

typedef struct custom_call {
  hb_callback *fn;
  int n_out, n_in;
  hm_tensor *const *grad;
  hm_tensor **grad_in;
} custom_call;

/* Protected: fn(grad1, grad2, ...) -> gradient of each input, or nil. */
static int run_custom(lua_State *L) {
  custom_call *call = lua_touserdata(L, 1);
  hb_state *st = hb_enter(L);
  luaL_checkstack(L, call->n_out + call->n_in + 10, "too many inputs");
  lua_rawgeti(L, LUA_REGISTRYINDEX, call->fn->ref);
  for (int i = 0; i < call->n_out; i++) hb_push(L, st, call->grad[i]);
  lua_call(L, call->n_out, call->n_in);
  hb_enter(L);
  const int base = lua_gettop(L) - call->n_in;
  for (int i = 0; i < call->n_in; i++) {
    if (lua_isnil(L, base + 1 + i)) continue;
    hb_tensor(L, st, base + 1 + i, "backward", lua_pushfstring(L, "gradient %d of a Function", i + 1));
    lua_pop(L, 1);
    hb_publish(L, st, base + 1 + i);
  }
  for (int i = 0; i < call->n_in; i++) /* nothing raises from here on */
    if (!lua_isnil(L, base + 1 + i))
      call->grad_in[i] = hm_tensor_retain(*(hm_tensor **)lua_touserdata(L, base + 1 + i));
  return 0;
}

static int on_custom(void *ud, int n_out, hm_tensor *const *grad, int n_in, hm_tensor **grad_in) {
  custom_call call = {ud, n_out, n_in, grad, grad_in};
  return hb_protected_inside(hb_now.L, run_custom, &call);
}

/* An array of n booleans at idx, pushed as C's; NULL (nothing pushed) where there is none. */
static bool *read_flags(lua_State *L, int idx, int n) {
  if (!lua_istable(L, idx)) return NULL;
  bool *flags = lua_newuserdatauv(L, (size_t)n * sizeof *flags + 1, 0);
  for (int i = 0; i < n; i++) {
    lua_rawgeti(L, idx, i + 1);
    flags[i] = lua_toboolean(L, -1);
    lua_pop(L, 1);
  }
  return flags;
}

/* core.record_custom(name, inputs, outputs, backward[, saved[, plain]]): saved: tensors for core.custom_saved; plain[i]: output i carries no
 * gradient */
static int l_record_custom(lua_State *L) {
  hb_state *st = hb_enter(L);
  lua_settop(L, 6);
  const char *name = hb_string(L, 1, "record_custom", "the name");
  int n_in, n_out;
  if (lua_type(L, 4) != LUA_TFUNCTION)
    return hb_error(L, "record_custom: backward must be a function, got %s", hb_came(L, 4));
  hm_tensor **in = hb_tensor_list(L, st, 2, "record_custom", "inputs", false, &n_in);
  hm_tensor **out = hb_tensor_list(L, st, 3, "record_custom", "outputs", false, &n_out);
  hm_custom_options options = {.plain = read_flags(L, 6, n_out)};
  if (!lua_isnil(L, 5)) options.save = hb_tensor_list(L, st, 5, "record_custom", "saved", false, &options.n_save);
  hb_callback *fn = hb_callback_new(L, st, 4);
  hb_check(L, st, hm_record_custom_with(name, in, n_in, out, n_out, &options, on_custom, fn, hb_callback_drop));
  return 0;
}

/* core.custom_saved() -> array of the tensors that the running function's node keeps */
static int l_custom_saved(lua_State *L) {
  hb_state *st = hb_enter(L);
  int n;
  hb_check(L, st, hm_custom_saved(&n, NULL));
  hm_tensor ***slots = lua_newuserdatauv(L, (size_t)n * sizeof *slots + 1, 0);
  hm_tensor **out = lua_newuserdatauv(L, (size_t)n * sizeof *out + 1, 0);
  lua_createtable(L, n, 0);
  for (int i = 0; i < n; i++) {
    slots[i] = hb_shell(L, st);
    lua_rawseti(L, -2, i + 1);
  }
  hb_check(L, st, hm_custom_saved(&n, out));
  for (int i = 0; i < n; i++) *slots[i] = out[i];
  return 1;
}

/* ====== Where ops were recorded ====== */

/* Protected: copies the place into the char * that the argument points to. */
static int copy_place(lua_State *L) {
  char **text = lua_touserdata(L, 1);
  hb_push_place(L, hb_now.state);
  size_t n;
  const char *place = lua_tolstring(L, -1, &n);
  *text = hm_alloc(n + 1);
  if (*text) memcpy(*text, place, n + 1);
  return 0;
}

/* For hm_set_trace. */
static char *trace_place(void) {
  char *text = NULL;
  hm_mode *const mode = hm_mode_current();
  if (!hb_now.L || hb_protected(hb_now.L, copy_place, &text, 0, false) != HM_OK) text = NULL;
  hm_mode_switch(mode);
  return text;
}

/* graph_has_dtype(tensor, dtype): whether the tensor, or one that carries its gradient to the leaves, has a dtype. */
static int l_graph_has_dtype(lua_State *L) {
  const hm_tensor *t = hb_tensor(L, hb_enter(L), 1, "graph_has_dtype", "tensor");
  const int dtype = hb_dtype(L, 2, "graph_has_dtype");
  lua_pushboolean(L, hm_graph_dtypes(t) >> dtype & 1);
  return 1;
}

void hb_open_autograd(lua_State *L, hb_state *st) {
  static const luaL_Reg functions[] = {{"grad", l_grad},
                                       {"graph_has_dtype", l_graph_has_dtype},
                                       {"record_custom", l_record_custom},
                                       {"custom_saved", l_custom_saved},
                                       {NULL, NULL}};
  static const luaL_Reg methods[] = {{"backward", l_backward},
                                     {"retain_grad", l_retain_grad},
                                     {"register_hook", l_register_hook},
                                     {NULL, NULL}};
  luaL_newmetatable(L, "halfmoon.Hook");
  lua_createtable(L, 0, 1);
  lua_pushcfunction(L, l_hook_remove);
  lua_setfield(L, -2, "remove");
  lua_setfield(L, -2, "__index");
  lua_pop(L, 1);
  hb_functions(L, functions);
  hb_methods(L, st, methods);
  hb_open_recompute(L);
  hb_open_parts(L);
  hm_set_trace(trace_place);
}
