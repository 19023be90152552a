/*
 * modes.c -- gradients on or off and autocast, as scopes that belong to a coroutine.
 *
 * Each coroutine has a mode of its own (a userdata in a table with weak keys): gradients on, autocast off at first.  A
 * scope is a guard, a userdata that remembers what it replaced.  The open guards of a coroutine form a stack for each
 * kind (gradients, autocast); a guard that is
 * closed out of order hands what it remembers to the guard above it, so that any order of closing ends in the right
 * state.  A guard that is dropped unclosed does the same in its finalizer, and warns if its coroutine still lives.
 *
 * The function form runs its function with a guard in a to-be-closed slot: an error or a dead coroutine closes it.
 */
#include <stdio.h>
#include <string.h>

#include "bind.h"

#define HB_GUARD "halfmoon.Scope"

typedef enum kind { KIND_GRAD, KIND_AUTOCAST, KIND_ANOMALY, KIND_REGION, KIND_COUNT } kind;

/* What a scope is called in messages. */
static const char *const kind_name[] = {"no_grad or enable_grad", "autocast", "detect_anomaly", "checkpoint"};

typedef struct guard guard;

/* First member: what core reads. */
typedef struct hb_mode {
  hm_mode mode;
  guard *top[KIND_COUNT];
} hb_mode;

struct guard {
  hb_mode *owner; /* kept alive by user value 1 */
  kind kind;
  bool open;
  bool lent;             /* of hb_protected_inside: the mode is that of another place meanwhile */
  hm_mode former;        /* the fields of this kind are restored */
  guard *below, *above;  /* open guards of the same kind and coroutine; borrowed */
  hm_region *region;     /* KIND_REGION: kept alive by user value 2 */
  hm_fp8_recipe *fp8;    /* KIND_AUTOCAST: what it has put into the mode, held; or NULL */
  char cls[HM_OP_COUNT]; /* classes of ops inside, where they are overridden */
};

/* ====== A coroutine's mode ====== */

hm_mode *hb_push_mode(lua_State *L, hb_state *st) {
  hb_push_ref(L, st, HB_REF_MODES);
  lua_pushthread(L);
  if (lua_rawget(L, -2) != LUA_TUSERDATA) {
    lua_pop(L, 1);
    hb_mode *m = lua_newuserdatauv(L, sizeof *m, 0);
    *m = (hb_mode){
        .mode = {
            .grad = true, .autocast = false, .cache = true, .low = HM_F16, .backward_dtype = HM_NONE, .cls = NULL}};
    lua_pushthread(L);
    lua_pushvalue(L, -2);
    lua_rawset(L, -4);
  }
  lua_remove(L, -2);
  return lua_touserdata(L, -1);
}

/* ====== Guards ====== */

/* Copies the fields of one kind. */
static void restore(hm_mode *to, const hm_mode *from, kind k) {
  if (k == KIND_GRAD) to->grad = from->grad;
  if (k == KIND_ANOMALY) to->anomaly = from->anomaly;
  if (k == KIND_REGION) to->region = from->region;
  if (k != KIND_AUTOCAST) return;
  to->autocast = from->autocast;
  to->cache = from->cache;
  to->low = from->low;
  to->backward_dtype = from->backward_dtype;
  to->cls = from->cls;
  to->fp8 = from->fp8;
  to->fp8_position = from->fp8_position;
}

/* The innermost scope from g on that was entered inside a region of this recipe; NULL: there is none. */
static guard *entered_inside(guard *g, const hm_fp8_recipe *recipe) {
  while (g && g->former.fp8 != recipe) g = g->below;
  return g;
}

/* The count of products goes on in the region around. */
static void hand_back_position(guard *g, const hm_mode *m) {
  guard *inside = m->fp8 && g->kind == KIND_AUTOCAST ? entered_inside(g, m->fp8) : NULL;
  if (inside) inside->former.fp8_position = m->fp8_position;
}

/* Takes g off its stack and undoes it.  Idempotent, never raises. */
static void close_guard(guard *g) {
  if (!g->open) return;
  g->open = false;
  if (g->region) hm_region_close(g->region);
  hb_mode *m = g->owner;
  if (g->above) {
    g->above->below = g->below;
    restore(&g->above->former, &g->former, g->kind);
  } else {
    m->top[g->kind] = g->below;
    if (!g->lent) hand_back_position(g, &m->mode);
    restore(&m->mode, &g->former, g->kind);
  }
  if (g->below) g->below->above = g->above;
  hm_fp8_recipe_release(g->fp8);
  g->fp8 = NULL;
}

/* Makes g the innermost open guard of its kind; the mode is still as it was. */
static void open_guard(guard *g, hb_mode *m, kind k) {
  g->kind = k;
  g->lent = false;
  g->region = NULL;
  g->fp8 = NULL;
  g->owner = m;
  g->former = m->mode;
  g->below = m->top[k];
  g->above = NULL;
  if (g->below) g->below->above = g;
  m->top[k] = g;
  g->open = true;
}

/* Pushes an open guard on the current coroutine; its mode is still as it was. */
static guard *push_guard(lua_State *L, hb_state *st, kind k) {
  luaL_checkstack(L, 8, NULL);
  guard *g = lua_newuserdatauv(L, sizeof *g, k == KIND_REGION ? 2 : 1);
  memset(g, 0, sizeof *g);
  luaL_setmetatable(L, HB_GUARD);
  hb_mode *m = (hb_mode *)hb_push_mode(L, st);
  lua_setiuservalue(L, -2, 1);
  open_guard(g, m, k);
  return g;
}

int hb_protected_inside(lua_State *L, lua_CFunction fn, void *argument) {
  hm_mode *const inside = hm_mode_current();
  if (!lua_checkstack(L, LUA_MINSTACK)) return hm_fail(HM_ERR_CALLBACK, "callback: the Lua stack is full");
  hb_mode *m = (hb_mode *)hb_push_mode(L, hb_now.state); /* there already, so nothing is allocated */
  guard lent[KIND_COUNT];
  const bool lend = &m->mode != inside;
  for (int k = 0; lend && k < KIND_COUNT; k++) {
    open_guard(&lent[k], m, (kind)k);
    lent[k].lent = true;
  }
  if (lend) {
    m->mode = *inside;
    hm_mode_switch(&m->mode);
  }
  const int status = hb_protected(L, fn, argument, 0, true);
  if (lend && m->mode.fp8 == inside->fp8) inside->fp8_position = m->mode.fp8_position;
  for (int k = 0; lend && k < KIND_COUNT; k++) close_guard(&lent[k]);
  hm_mode_switch(inside);
  lua_pop(L, 1);
  return status;
}

static int l_guard_close(lua_State *L) {
  close_guard(luaL_checkudata(L, 1, HB_GUARD));
  return 0;
}

/* True if the coroutine of this mode is still there. */
static bool is_alive(lua_State *L, const hb_state *st, const hb_mode *m) {
  bool alive = false;
  hb_push_ref(L, st, HB_REF_MODES);
  lua_pushnil(L);
  while (lua_next(L, -2)) {
    alive = alive || lua_touserdata(L, -1) == m;
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
  return alive;
}

/* __gc.  Upvalue 1: the state. */
static int l_guard_gc(lua_State *L) {
  guard *g = lua_touserdata(L, 1);
  if (!g->open) return 0;
  const char *name = kind_name[g->kind];
  close_guard(g);
  if (is_alive(L, lua_touserdata(L, lua_upvalueindex(1)), g->owner)) {
    lua_warning(L, "halfmoon: a scope of ", 1);
    lua_warning(L, name, 1);
    lua_warning(L, " was dropped without being closed\n  hint: local _ <close> = ..., or give it a function", 0);
  }
  return 0;
}

static int l_guard_tostring(lua_State *L) {
  const guard *g = luaL_checkudata(L, 1, HB_GUARD);
  lua_pushfstring(L, "%s scope (%s)", g->kind == KIND_GRAD ? "gradient" : kind_name[g->kind],
                  g->open ? "open" : "closed");
  return 1;
}

/* ====== Entering ====== */

static int finish(lua_State *L, int status, lua_KContext base) {
  (void)status;
  return lua_gettop(L) - (int)base;
}

/* With the guard on top and a function at fn: runs it inside and returns its results; without one, returns the guard.
 * */
static int enter(lua_State *L, int fn) {
  if (lua_gettop(L) <= fn || lua_isnil(L, fn)) {
    lua_settop(L, lua_gettop(L)); /* the guard is the result */
    return 1;
  }
  lua_insert(L, fn);
  lua_toclose(L, fn);
  lua_callk(L, lua_gettop(L) - fn - 1, LUA_MULTRET, fn, finish);
  return finish(L, LUA_OK, fn);
}

/* Raises unless the value at fn is nothing or may be called: before the scope is open. */
static void check_function(lua_State *L, int fn, const char *who) {
  if (lua_isnoneornil(L, fn) || lua_isfunction(L, fn)) return;
  if (luaL_getmetafield(L, fn, "__call") == LUA_TNIL)
    hb_error(L, "%s: argument %d must be a function, got %s", who, fn, hb_came(L, fn));
  lua_pop(L, 1);
}

static int grad_scope(lua_State *L, bool on) {
  hb_state *st = hb_enter(L);
  check_function(L, 1, on ? "enable_grad" : "no_grad");
  guard *g = push_guard(L, st, KIND_GRAD);
  g->owner->mode.grad = on;
  return enter(L, 1);
}

/* no_grad([fn, ...]), enable_grad([fn, ...]) */
static int l_no_grad(lua_State *L) { return grad_scope(L, false); }
static int l_enable_grad(lua_State *L) { return grad_scope(L, true); }

/* set_grad_enabled(on[, fn, ...]) */
static int l_set_grad_enabled(lua_State *L) {
  hb_state *st = hb_enter(L);
  const bool on = hb_bool(L, 1, "set_grad_enabled", "argument 1", false);
  luaL_checkany(L, 1);
  check_function(L, 2, "set_grad_enabled");
  guard *g = push_guard(L, st, KIND_GRAD);
  g->owner->mode.grad = on;
  return enter(L, 2);
}

/* detect_anomaly([{inf = bool}][, fn, ...]); {places = true}: ops only note where they are recorded, which a scope around it does, too */
static int l_detect_anomaly(lua_State *L) {
  hb_state *st = hb_enter(L);
  bool inf = false, places = false;
  int fn = 1;
  if (lua_isnoneornil(L, 1) || (lua_type(L, 1) == LUA_TTABLE && luaL_getmetafield(L, 1, "__call") == LUA_TNIL)) {
    hb_options(L, 1, "detect_anomaly", (const hb_option[]){{"inf", HB_BOOL, &inf}, {"places", HB_BOOL, &places}, {0}});
    fn = 2;
  } else if (lua_type(L, 1) == LUA_TTABLE) {
    lua_pop(L, 1); /* the metafield */
  }
  check_function(L, fn, "detect_anomaly");
  guard *g = push_guard(L, st, KIND_ANOMALY);
  if (!places) g->owner->mode.anomaly = inf ? HM_ANOMALY_INF : HM_ANOMALY_NAN;
  else if (!g->owner->mode.anomaly) g->owner->mode.anomaly = HM_ANOMALY_PLACES;
  return enter(L, fn);
}

int hb_inside_region(lua_State *L, hb_state *st, hm_region *r) {
  guard *g = push_guard(L, st, KIND_REGION);
  g->region = r;
  g->owner->mode.region = r;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, 2);
  return enter(L, 2);
}

/* ====== autocast ====== */

typedef struct region {
  bool enabled, cache;
  int dtype, backward;
  bool fp8;
  hm_fp8_recipe *recipe; /* of an fp8 region, borrowed; NULL: the default one, if need be */
} region;

/* The dtype at idx; "fp8" is none, but what autocast calls products on 8-bit operands. */
static void read_dtype(lua_State *L, int idx, region *r) {
  r->fp8 = lua_type(L, idx) == LUA_TSTRING && strcmp(lua_tostring(L, idx), "fp8") == 0;
  r->dtype = r->fp8 ? HM_F8_E4M3 : hb_dtype(L, idx, "autocast");
}

static void check_region(lua_State *L, const region *r) {
  if (r->dtype != HM_F16 && r->dtype != HM_BF16 && !r->fp8)
    hb_error(L, "autocast: dtype must be float16 or bfloat16, got %s\n  hint: %s", hm_dtype_name(r->dtype),
             hm_dtype_is_f8(r->dtype) ? "\"fp8\" for products on 8-bit operands"
                                      : "{enabled = false} for a run in float32");
  if (r->recipe && !r->fp8) hb_error(L, "autocast: a recipe is for dtype = \"fp8\", got %s", hm_dtype_name(r->dtype));
  if (r->backward != HM_NONE && r->backward != HM_F32)
    hb_error(L, "autocast: backward must be \"float32\" or nothing, got %s", hm_dtype_name(r->backward));
}

/* The letter of a class name at the top of the stack. */
static char read_class(lua_State *L) {
  static const char *const names[] = {"low", "f32", "promote", "follow", "float32", NULL};
  const char *name = hb_string(L, -1, "autocast", "a class in ops");
  for (int i = 0; names[i]; i++)
    if (strcmp(name, names[i]) == 0) return "LFPTF"[i];
  hb_error(L, "autocast: unknown class \"%s\"%s", name, hb_push_suggestion(L, name, names));
  return 0;
}

static int unknown_op(lua_State *L, const char *name) {
  const char *names[HM_OP_COUNT + 1];
  int n = 0;
  for (int op = 0; op < HM_OP_COUNT; op++)
    if (!hm_op_get(op)->generated) names[n++] = hm_op_get(op)->name;
  names[n] = NULL;
  const char *best = hb_closest(name, names);
  return hb_error(L, "autocast: there is no op \"%s\"%s%s", name, best ? "; did you mean " : "", best ? best : "");
}

/* What a table of ops says of linear counts for linear with an activation, too, unless the table names that. */
static void share_linear(lua_State *L, int idx, char *cls) {
  static const int fused[] = {HM_OP_LINEAR_RELU, HM_OP_LINEAR_GELU_TANH};
  lua_pushstring(L, hm_op_get(HM_OP_LINEAR)->name);
  const bool said = lua_rawget(L, idx) != LUA_TNIL;
  lua_pop(L, 1);
  for (size_t i = 0; said && i < sizeof fused / sizeof *fused; i++) {
    lua_pushstring(L, hm_op_get(fused[i])->name);
    if (lua_rawget(L, idx) == LUA_TNIL) cls[fused[i]] = cls[HM_OP_LINEAR];
    lua_pop(L, 1);
  }
}

/* Reads {op = class, ...} at idx into letters; true if there is any. */
static bool read_classes(lua_State *L, int idx, char *cls) {
  bool any = false;
  if (lua_type(L, idx) != LUA_TTABLE)
    hb_error(L, "autocast: ops must be a table like {exp = \"low\"}, got %s", hb_came(L, idx));
  lua_pushnil(L);
  while (lua_next(L, idx)) {
    const char *name = hb_string(L, -2, "autocast", "a key of ops");
    const int op = hm_op_find(name);
    if (op < 0) unknown_op(L, name);
    cls[op] = read_class(L);
    any = true;
    lua_pop(L, 1);
  }
  share_linear(L, idx, cls);
  return any;
}

/* Reads the options table at idx; letters go to cls. Returns true if ops are overridden. */
static bool read_region(lua_State *L, int idx, region *r, char *cls) {
  bool any = false;
  hb_options(L, idx, "autocast",
             (const hb_option[]){{"dtype", HB_ANY, NULL},
                                 {"enabled", HB_BOOL, &r->enabled},
                                 {"cache_enabled", HB_BOOL, &r->cache},
                                 {"backward", HB_DTYPE, &r->backward},
                                 {"ops", HB_ANY, NULL},
                                 {"recipe", HB_ANY, NULL},
                                 {0}});
  if (lua_getfield(L, idx, "dtype") != LUA_TNIL) read_dtype(L, lua_gettop(L), r);
  if (lua_getfield(L, idx, "recipe") != LUA_TNIL) {
    r->recipe = hb_fp8_test(L, -1);
    if (!r->recipe) hb_error(L, "autocast: recipe must be an amp.DelayedScaling, got %s", hb_came(L, -1));
  }
  lua_pop(L, 2);
  if (lua_getfield(L, idx, "ops") != LUA_TNIL) any = read_classes(L, lua_gettop(L), cls);
  lua_pop(L, 1);
  return any;
}

/* Is a device of CUDA in use? */
static bool in_use(int device) {
  hm_memory_stats s;
  return hm_cuda_opened() && device <= hm_cuda_device_count() && hm_memory_get_stats(device, &s) == HM_OK &&
         s.allocs > 0;
}

/* Holds a region's dtype against the GPUs in use: one without tensor cores gains nothing (a warning, once), one without bfloat16 cannot do it. */
static void check_devices(lua_State *L, hb_state *st, const region *r) {
  static bool warned;
  for (int device = 1; r->enabled && !r->fp8 && in_use(device); device++) {
    hb_check(L, st, hm_device_check_low(device, r->dtype));
    const hm_device_info *info = hm_device_get_info(device);
    if (!info || info->major >= 7 || warned) continue;
    warned = true;
    char text[320];
    snprintf(
        text, sizeof text,
        "halfmoon: autocast: %s (%s) has compute capability %d.%d: half precision saves memory there but no time; tensor cores came with 7.0",
        hm_device_name(device), info->name, info->major, info->minor);
    lua_warning(L, text, 0);
  }
}

/* Puts an fp8 region's recipe into the mode of g, the innermost scope.  A step begins where no region of the recipe is open around; computing
 * a region of hm.checkpoint again is still the same step. */
static void enter_fp8(guard *g, hm_fp8_recipe *recipe) {
  hm_mode *m = &g->owner->mode;
  const guard *inside = entered_inside(g, recipe);
  if (!inside && !hm_region_recomputing()) hm_fp8_begin(recipe);
  m->fp8_position = inside ? inside->former.fp8_position : 0;
  m->fp8 = g->fp8 = hm_fp8_recipe_retain(recipe);
}

/* autocast([dtype | options][, fn, ...]) */
static int l_autocast(lua_State *L) {
  hb_state *st = hb_enter(L);
  const hm_mode *now = hm_mode_current();
  region r = {true, now->cache, HM_F16, HM_NONE, false, NULL};
  char cls[HM_OP_COUNT] = {0};
  bool override = now->cls != NULL;
  if (override) memcpy(cls, now->cls, sizeof cls); /* inherited, and kept even if the outer guard goes first */
  int fn = 2;
  if (lua_type(L, 1) == LUA_TSTRING) read_dtype(L, 1, &r);
  else if (lua_type(L, 1) == LUA_TTABLE && luaL_getmetafield(L, 1, "__call") == LUA_TNIL)
    override |= read_region(L, 1, &r, cls);
  else if (lua_isnoneornil(L, 1)) fn = 2;
  else if (lua_type(L, 1) == LUA_TNUMBER || lua_type(L, 1) == LUA_TBOOLEAN)
    return hb_error(L, "autocast: argument 1 must be a dtype, a table of options or a function, got %s", hb_came(L, 1));
  else fn = 1;
  check_region(L, &r);
  check_devices(L, st, &r);
  if (fn == 1 && lua_type(L, 1) == LUA_TTABLE) lua_pop(L, 1); /* the metafield */
  check_function(L, fn, "autocast");
  if (r.fp8 && r.enabled && !r.recipe) {
    r.recipe = hb_fp8_default(L, st);
    lua_pop(L, 1); /* the registry has it */
  }
  guard *g = push_guard(L, st, KIND_AUTOCAST); /* nothing raises until the function runs */
  memcpy(g->cls, cls, sizeof cls);
  hm_mode *m = &g->owner->mode;
  m->autocast = r.enabled;
  m->cache = r.cache;
  m->low = (int8_t)r.dtype;
  m->backward_dtype = (int8_t)r.backward;
  m->cls = override ? g->cls : NULL;
  if (r.fp8 && r.enabled) enter_fp8(g, r.recipe);
  else m->fp8 = g->fp8 = hm_fp8_recipe_retain(m->fp8); /* held, even if the outer scope goes first */
  return enter(L, fn);
}

/* ====== Asking ====== */

static int l_is_grad_enabled(lua_State *L) {
  hb_enter(L);
  lua_pushboolean(L, hm_mode_current()->grad);
  return 1;
}

/* autocast_state() -> {enabled, dtype, cache_enabled, backward} */
static int l_autocast_state(lua_State *L) {
  hb_enter(L);
  const hm_mode *m = hm_mode_current();
  lua_createtable(L, 0, 4);
  lua_pushboolean(L, m->autocast);
  lua_setfield(L, -2, "enabled");
  lua_pushstring(L, m->low == HM_F8_E4M3 ? "fp8" : hm_dtype_name(m->low));
  lua_setfield(L, -2, "dtype");
  lua_pushboolean(L, m->cache);
  lua_setfield(L, -2, "cache_enabled");
  if (m->backward_dtype != HM_NONE) {
    lua_pushstring(L, hm_dtype_name(m->backward_dtype));
    lua_setfield(L, -2, "backward");
  }
  return 1;
}

/* core.autocast_splits(op) -> must linear and the activation `op` run as two ops here?  In a region of fp8, where the gradient of the product
 * itself is rounded, and in one that gives the activation a class of its own. */
static int l_autocast_splits(lua_State *L) {
  hb_enter(L);
  const hm_mode *m = hm_mode_current();
  bool splits = m->autocast && m->low == HM_F8_E4M3;
  if (m->autocast && m->cls && !splits) {
    const int op = hm_op_find(luaL_checkstring(L, 1));
    splits = op >= 0 && m->cls[op];
  }
  lua_pushboolean(L, splits);
  return 1;
}

/* cast_stats() -> {hits, misses, casts, bytes} */
static int l_cast_stats(lua_State *L) {
  hm_cast_stats s;
  hm_cast_get_stats(&s);
  lua_createtable(L, 0, 4);
  lua_pushinteger(L, s.hits);
  lua_setfield(L, -2, "hits");
  lua_pushinteger(L, s.misses);
  lua_setfield(L, -2, "misses");
  lua_pushinteger(L, s.casts);
  lua_setfield(L, -2, "casts");
  lua_pushinteger(L, s.bytes);
  lua_setfield(L, -2, "bytes");
  return 1;
}

void hb_open_modes(lua_State *L, hb_state *st) {
  static const luaL_Reg functions[] = {{"no_grad", l_no_grad},
                                       {"enable_grad", l_enable_grad},
                                       {"set_grad_enabled", l_set_grad_enabled},
                                       {"detect_anomaly", l_detect_anomaly},
                                       {"autocast", l_autocast},
                                       {"is_grad_enabled", l_is_grad_enabled},
                                       {"autocast_state", l_autocast_state},
                                       {"autocast_splits", l_autocast_splits},
                                       {"cast_stats", l_cast_stats},
                                       {NULL, NULL}};
  luaL_newmetatable(L, HB_GUARD);
  lua_pushlightuserdata(L, st);
  lua_pushcclosure(L, l_guard_gc, 1);
  lua_setfield(L, -2, "__gc");
  lua_pushcfunction(L, l_guard_close);
  lua_setfield(L, -2, "__close");
  lua_pushcfunction(L, l_guard_tostring);
  lua_setfield(L, -2, "__tostring");
  lua_createtable(L, 0, 1);
  lua_pushcfunction(L, l_guard_close);
  lua_setfield(L, -2, "close");
  lua_setfield(L, -2, "__index");
  lua_pop(L, 1);
  hb_functions(L, functions);
  hb_open_fp8(L);
}
