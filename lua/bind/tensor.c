/*
 * tensor.c -- the tensor userdata: its life, identity, fields, and the methods that read, convert or copy a whole
 * tensor.
 *
 * Owner: the userdata owns one reference of its tensor, given back by release(), __close or __gc, whichever comes
 * first.
 */
#include <string.h>

#include "bind.h"

/* ====== Userdata and identity ====== */

hm_tensor *hb_tensor(lua_State *L, const hb_state *st, int idx, const char *who, const char *what) {
  hm_tensor **slot = hb_test(L, st, idx);
  if (!slot)
    hb_error(L, "%s: %s must be a tensor, got %s", who, what, lua_isnone(L, idx) ? "nothing" : hb_came(L, idx));
  if (!*slot) hb_error(L, "%s: %s was released", who, what);
  return *slot;
}

/* A userdata with a finalizer is freed a cycle after it died, and Lua sizes its next cycle by the dead as well: with
 * pause 200 the heap of a loop that makes nothing but tensors grows without bound.  Telling the collector of the memory
 * in C that hangs on each (some 400 bytes) keeps it bounded. */
enum { CHARGE_EVERY = 32, CHARGE_KB = 12 };

static void charge_collector(lua_State *L) {
  if (lua_gc(L, LUA_GCISRUNNING)) lua_gc(L, LUA_GCSTEP, CHARGE_KB);
}

hm_tensor **hb_shell(lua_State *L, const hb_state *st) {
  static unsigned made;
  if (++made % CHARGE_EVERY == 0) charge_collector(L);
  hm_tensor **slot = lua_newuserdatauv(L, sizeof *slot, 0);
  *slot = NULL;
  hb_push_ref(L, st, HB_REF_METATABLE);
  lua_setmetatable(L, -2);
  if (hb_now.L != L) hb_enter_other(L); /* a finalizer ran another coroutine */
  return slot;
}

/* Pushes the object that stands for t in the identity map; false (and nothing pushed) if there is none. */
static bool push_known(lua_State *L, const hb_state *st, const hm_tensor *t) {
  hb_push_ref(L, st, HB_REF_MAP);
  lua_rawgetp(L, -1, t);
  lua_remove(L, -2);
  hm_tensor **slot = lua_touserdata(L, -1);
  if (slot && *slot == t) return true;
  lua_pop(L, 1);
  return false;
}

void hb_publish(lua_State *L, hb_state *st, int idx) {
  idx = lua_absindex(L, idx);
  hm_tensor *t = *(hm_tensor **)lua_touserdata(L, idx);
  hb_push_ref(L, st, HB_REF_MAP);
  lua_pushvalue(L, idx);
  lua_rawsetp(L, -2, t);
  lua_pop(L, 1);
  t->in_lua = true;
}

void hb_settle(lua_State *L, hb_state *st, int idx) {
  idx = lua_absindex(L, idx);
  hm_tensor **slot = lua_touserdata(L, idx);
  if ((*slot)->in_lua && push_known(L, st, *slot)) {
    hm_tensor_release(*slot);
    *slot = NULL;
    lua_replace(L, idx);
  } else {
    hb_publish(L, st, idx);
  }
}

void hb_push(lua_State *L, hb_state *st, hm_tensor *t) {
  luaL_checkstack(L, 6, NULL);
  if (!t) {
    lua_pushnil(L);
  } else if (!t->in_lua || !push_known(L, st, t)) {
    hm_tensor **slot = hb_shell(L, st);
    *slot = hm_tensor_retain(t);
    hb_publish(L, st, -1);
  }
}

hm_tensor **hb_tensor_list(lua_State *L, hb_state *st, int idx, const char *who, const char *what, bool publish,
                           int *n) {
  if (lua_type(L, idx) != LUA_TTABLE)
    hb_error(L, "%s: %s must be an array table of tensors, got %s", who, what, hb_came(L, idx));
  luaL_checkstack(L, 10, NULL);
  idx = lua_absindex(L, idx);
  const lua_Unsigned count = lua_rawlen(L, idx);
  if (count > INT32_MAX / 2) hb_error(L, "%s: %s has too many entries", who, what);
  hm_tensor **list = lua_newuserdatauv(L, (size_t)count * sizeof *list + 1, 0);
  for (int i = 0; i < (int)count; i++) {
    lua_rawgeti(L, idx, i + 1);
    hm_tensor **slot = hb_test(L, st, -1);
    if (!slot || !*slot)
      hb_error(L, "%s: entry %d of %s must be a tensor, got %s", who, i + 1, what,
               slot ? "a released one" : hb_came(L, -1));
    list[i] = *slot;
    if (publish) hb_publish(L, st, -1);
    lua_pop(L, 1);
  }
  *n = (int)count;
  return list;
}

/* ====== Life ====== */

/* __gc.  Upvalue 1: the state.  Releases and nothing else. */
static int l_gc(lua_State *L) {
  hm_tensor **slot = lua_touserdata(L, 1);
  hb_state *st = lua_touserdata(L, lua_upvalueindex(1));
  hm_tensor *t = *slot;
  *slot = NULL;
  hm_tensor_release(t);
  if (st->dead) hb_callbacks_sweep(L, st);
  return 0;
}

/* t:release() and __close: gives this handle's reference back now.  Whatever else holds the tensor (a graph, a view)
 * keeps it alive. */
static int l_release(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor **slot = hb_test(L, st, 1);
  if (!slot) hb_tensor(L, st, 1, "release", "self");
  hm_tensor *t = *slot;
  *slot = NULL;
  hm_tensor_release(t);
  return 0;
}

static int l_is_tensor(lua_State *L) {
  lua_pushboolean(L, hb_test(L, hb_enter(L), 1) != NULL);
  return 1;
}

/* ====== Names ====== */

void hb_push_name(lua_State *L, hb_state *st, int idx) {
  idx = lua_absindex(L, idx);
  hb_push_ref(L, st, HB_REF_NAMES);
  lua_pushvalue(L, idx);
  lua_rawget(L, -2);
  lua_remove(L, -2);
}

/* core.get_name(t) */
static int l_get_name(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_tensor(L, st, 1, "get_name", "argument 1");
  hb_push_name(L, st, 1);
  return 1;
}

/* core.set_name(t, name or nil) */
static int l_set_name(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_tensor(L, st, 1, "set_name", "argument 1");
  if (!lua_isnoneornil(L, 2)) hb_string(L, 2, "set_name", "the name");
  lua_settop(L, 2);
  hb_push_ref(L, st, HB_REF_NAMES);
  lua_insert(L, 1);
  lua_rawset(L, 1);
  return 0;
}

/* ====== Fields ====== */

enum {
  FIELD_SHAPE,
  FIELD_DTYPE,
  FIELD_DEVICE,
  FIELD_GRAD,
  FIELD_REQUIRES_GRAD,
  FIELD_IS_LEAF,
  FIELD_NDIM,
  FIELD_GRAD_FN,
  FIELD_COUNT
};
static const char *const field_names[] = {"shape",   "dtype", "device",  "grad", "requires_grad",
                                          "is_leaf", "ndim",  "grad_fn", NULL};

static int push_field(lua_State *L, hb_state *st, int field) {
  hm_tensor *t = hb_tensor(L, st, 1, field_names[field], "self");
  switch (field) {
  case FIELD_SHAPE: hb_push_ints(L, t->ndim, t->shape); break;
  case FIELD_DTYPE: lua_pushstring(L, hm_dtype_name(t->dtype)); break;
  case FIELD_DEVICE: lua_pushstring(L, hm_device_name(hm_tensor_device(t))); break;
  case FIELD_GRAD: hb_push(L, st, t->grad); break;
  case FIELD_REQUIRES_GRAD: lua_pushboolean(L, t->requires_grad); break;
  case FIELD_IS_LEAF: lua_pushboolean(L, hm_tensor_is_leaf(t)); break;
  case FIELD_NDIM: lua_pushinteger(L, t->ndim); break;
  case FIELD_GRAD_FN: lua_pushstring(L, hm_grad_fn(t)); break; /* nil for NULL */
  default: lua_pushnil(L);
  }
  return 1;
}

/* t[key].  Upvalues: 1 the methods, 2 name -> field.  An unknown name gives nil. */
static int l_index(lua_State *L) {
  if (lua_type(L, 2) == LUA_TSTRING) {
    lua_pushvalue(L, 2);
    if (lua_rawget(L, lua_upvalueindex(1)) != LUA_TNIL) return 1;
    lua_pushvalue(L, 2);
    if (lua_rawget(L, lua_upvalueindex(2)) == LUA_TNIL) return 1;
    return push_field(L, hb_enter(L), (int)lua_tointeger(L, -1));
  }
  return hb_index(L, hb_enter(L));
}

static void set_requires_grad(lua_State *L, hb_state *st, bool on) {
  hm_tensor *t = hb_tensor(L, st, 1, "requires_grad", "self");
  hb_check(L, st, hm_set_requires_grad(t, on));
}

/* t[key] = value: grad, requires_grad, or elements. */
static int l_newindex(lua_State *L) {
  hb_state *st = hb_enter(L);
  if (lua_type(L, 2) != LUA_TSTRING) return hb_newindex(L, st);
  const char *name = lua_tostring(L, 2);
  if (strcmp(name, "requires_grad") == 0) {
    if (lua_type(L, 3) != LUA_TBOOLEAN)
      return hb_error(L, "requires_grad must be true or false, got %s", hb_came(L, 3));
    set_requires_grad(L, st, lua_toboolean(L, 3));
  } else if (strcmp(name, "grad") == 0) {
    hm_tensor *t = hb_tensor(L, st, 1, "grad", "self"), *grad = NULL;
    if (!lua_isnil(L, 3)) {
      grad = hb_tensor(L, st, 3, "grad", "the value");
      hb_publish(L, st, 3);
    }
    hb_check(L, st, hm_set_grad(t, grad));
  } else {
    static const char *const writable[] = {"requires_grad", "grad", NULL};
    for (int i = 0; field_names[i]; i++)
      if (strcmp(name, field_names[i]) == 0) return hb_error(L, "tensor field \"%s\" cannot be assigned", name);
    return hb_error(L, "a tensor has no field \"%s\" to assign%s", name, hb_push_suggestion(L, name, writable));
  }
  return 0;
}

/* t:requires_grad_([on = true]) -> t */
static int l_requires_grad_(lua_State *L) {
  hb_state *st = hb_enter(L);
  set_requires_grad(L, st, hb_bool(L, 2, "requires_grad_", "argument 1", true));
  lua_settop(L, 1);
  return 1;
}

static int l_tostring(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor **slot = hb_test(L, st, 1);
  if (!slot || !*slot) {
    lua_pushliteral(L, "tensor (released)");
    return 1;
  }
  hb_push_ref(L, st, HB_REF_METHODS);
  if (lua_getfield(L, -1, "__tostring_impl") == LUA_TFUNCTION) {
    lua_pushvalue(L, 1);
    lua_call(L, 1, 1);
    return 1;
  }
  char text[256];
  lua_pushfstring(L, "tensor %s", hm_describe(*slot, text, sizeof text));
  return 1;
}

static int l_len(lua_State *L) {
  hm_tensor *t = hb_tensor(L, hb_enter(L), 1, "#", "the operand");
  if (t->ndim == 0) return hb_error(L, "#: a 0-dim tensor has no length");
  lua_pushinteger(L, t->shape[0]);
  return 1;
}

static int l_lt(lua_State *L) {
  return hb_error(L, "< on tensors has no single answer\n  hint: a:lt(b) compares element by element");
}
static int l_le(lua_State *L) {
  return hb_error(L, "<= on tensors has no single answer\n  hint: a:le(b) compares element by element");
}

/* ====== Geometry ====== */

static int l_dim(lua_State *L) {
  lua_pushinteger(L, hb_tensor(L, hb_enter(L), 1, "dim", "self")->ndim);
  return 1;
}

static int l_numel(lua_State *L) {
  lua_pushinteger(L, hb_tensor(L, hb_enter(L), 1, "numel", "self")->numel);
  return 1;
}

/* t:size() -> table; t:size(d) -> integer */
static int l_size(lua_State *L) {
  hm_tensor *t = hb_tensor(L, hb_enter(L), 1, "size", "self");
  if (lua_isnoneornil(L, 2)) {
    hb_push_ints(L, t->ndim, t->shape);
  } else {
    const int64_t d = hb_dim(L, 2, t->ndim, "size", "the dim");
    if (t->ndim == 0) return hb_error(L, "size: a 0-dim tensor has no dims");
    lua_pushinteger(L, t->shape[d]);
  }
  return 1;
}

/* t:stride() -> table; t:stride(d) -> integer */
static int l_stride(lua_State *L) {
  hm_tensor *t = hb_tensor(L, hb_enter(L), 1, "stride", "self");
  if (lua_isnoneornil(L, 2)) {
    hb_push_ints(L, t->ndim, t->stride);
  } else {
    const int64_t d = hb_dim(L, 2, t->ndim, "stride", "the dim");
    if (t->ndim == 0) return hb_error(L, "stride: a 0-dim tensor has no dims");
    lua_pushinteger(L, t->stride[d]);
  }
  return 1;
}

/* True when idx holds "channels_last", false for "row_major" or nothing. */
static bool wants_channels_last(lua_State *L, int idx, const char *who) {
  if (lua_isnoneornil(L, idx)) return false;
  static const char *const layouts[] = {"row_major", "channels_last", NULL};
  const char *layout = hb_string(L, idx, who, "the layout");
  for (int i = 0; layouts[i]; i++)
    if (strcmp(layout, layouts[i]) == 0) return i == 1;
  return hb_error(L, "%s: unknown layout \"%s\"%s", who, layout, hb_push_suggestion(L, layout, layouts));
}

/* t:is_contiguous([layout]) */
static int l_is_contiguous(lua_State *L) {
  hm_tensor *t = hb_tensor(L, hb_enter(L), 1, "is_contiguous", "self");
  lua_pushboolean(L, wants_channels_last(L, 2, "is_contiguous") ? hm_is_channels_last(t) : hm_is_contiguous(t));
  return 1;
}

/* Address of the first element, to see whether two tensors share memory. */
static int l_data_ptr(lua_State *L) {
  lua_pushinteger(L, (lua_Integer)(intptr_t)hm_tensor_data(hb_tensor(L, hb_enter(L), 1, "data_ptr", "self")));
  return 1;
}

static int l_element_size(lua_State *L) {
  lua_pushinteger(L, hm_dtype_size(hb_tensor(L, hb_enter(L), 1, "element_size", "self")->dtype));
  return 1;
}

static int l_is_floating_point(lua_State *L) {
  lua_pushboolean(L, hm_dtype_is_float(hb_tensor(L, hb_enter(L), 1, "is_floating_point", "self")->dtype));
  return 1;
}

/* How often the storage was written to. */
static int l_version(lua_State *L) {
  lua_pushinteger(L, hm_tensor_version(hb_tensor(L, hb_enter(L), 1, "version", "self")));
  return 1;
}

/* ====== Values ====== */

static void push_value(lua_State *L, int dtype, double f, int64_t i) {
  switch (hm_dtype_kind(dtype)) {
  case HM_KIND_FLOAT: lua_pushnumber(L, f); break;
  case HM_KIND_BOOL: lua_pushboolean(L, i != 0); break;
  default: lua_pushinteger(L, i);
  }
}

/* t:item() -> the one element as integer, float or boolean */
static int l_item(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = hb_tensor(L, st, 1, "item", "self");
  double f = 0;
  int64_t i = 0;
  hb_check(L, st, hm_item(t, &f, &i));
  push_value(L, t->dtype, f, i);
  return 1;
}

typedef struct nest {
  const hm_tensor *t;
  const char *data; /* next element: double or int64_t */
} nest;

/* Pushes dims d and below as nested tables. */
static void push_nested(lua_State *L, nest *n, int d) {
  if (d == n->t->ndim) {
    double f = 0;
    int64_t i = 0;
    if (hm_dtype_is_float(n->t->dtype)) memcpy(&f, n->data, sizeof f);
    else memcpy(&i, n->data, sizeof i);
    n->data += 8;
    push_value(L, n->t->dtype, f, i);
    return;
  }
  const int64_t size = n->t->shape[d];
  lua_createtable(L, (int)(size < INT32_MAX ? size : INT32_MAX), 0);
  for (int64_t k = 1; k <= size; k++) {
    push_nested(L, n, d + 1);
    lua_rawseti(L, -2, k);
  }
}

/* t:totable() -> nested array tables (a plain value for a 0-dim tensor) */
static int l_totable(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = hb_tensor(L, st, 1, "totable", "self");
  lua_settop(L, 1);
  luaL_checkstack(L, 2 * HM_MAX_NDIM + 8, NULL);
  void *data = lua_newuserdatauv(L, (size_t)t->numel * 8 + 8, 0);
  hb_check(L, st, hm_to_host(t, data, hm_dtype_is_float(t->dtype) ? HM_F64 : HM_I64));
  nest n = {t, data};
  push_nested(L, &n, 0);
  return 1;
}

/* ====== Conversions and copies ====== */

/* After core wrote a new reference to slot (the userdata on top): self if it is the same tensor. */
static int give(lua_State *L, hb_state *st, hm_tensor **slot, const hm_tensor *self) {
  if (*slot == self) {
    hm_tensor_release(*slot);
    *slot = NULL;
    lua_pushvalue(L, 1);
  } else {
    hb_settle_shared(L, st, -1, *slot);
  }
  return 1;
}

static int convert(lua_State *L, hb_state *st, hm_tensor *t, int dtype, int device, bool copy) {
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_to(t, dtype, device, copy, slot));
  return give(L, st, slot, t);
}

/* One positional argument of to(): a dtype, a device, or a tensor to be like. */
static void read_target(lua_State *L, hb_state *st, int idx, int *dtype, int *device) {
  hm_tensor **like = hb_test(L, st, idx);
  if (like) {
    const hm_tensor *t = hb_tensor(L, st, idx, "to", "the argument");
    *dtype = t->dtype;
    *device = hm_tensor_device(t);
    return;
  }
  const char *name = hb_string(L, idx, "to", "the target");
  const int found = hb_dtype_by_name(name);
  if (found != HM_NONE) *dtype = found;
  else if (strncmp(name, "cpu", 3) == 0 || strncmp(name, "cuda", 4) == 0) *device = hb_device(L, idx, "to");
  else hb_dtype(L, idx, "to");
}

/* The conversion to an 8-bit float that limits to its largest number, infinities too; NaN stays. */
static int convert_saturated(lua_State *L, hb_state *st, hm_tensor *t, int dtype, int device) {
  if (!hm_dtype_is_f8(dtype))
    return hb_error(L, "to: saturate is for float8_e4m3 and float8_e5m2, got %s",
                    dtype == HM_NONE ? "no dtype" : hm_dtype_name(dtype));
  if (hm_dtype_is_f8(t->dtype)) {
    hm_tensor **wide = hb_shell(L, st);
    hb_check(L, st, hm_to(t, HM_F32, -1, false, wide));
    t = *wide;
  }
  const double most = dtype == HM_F8_E4M3 ? 448 : 57344;
  hm_tensor **held = hb_shell(L, st);
  hb_check(L, st, hm_op_clamp(hm_t(t), -most, most, held));
  return convert(L, st, *held, dtype, device, false);
}

/* t:to(dtype | device | tensor, ... | {dtype, device, copy, saturate}) */
static int l_to(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = hb_tensor(L, st, 1, "to", "self");
  int dtype = HM_NONE, device = -1;
  bool copy = false, saturate = false;
  int last = lua_gettop(L);
  if (lua_type(L, last) == LUA_TTABLE) {
    hb_options(L, last, "to",
               (const hb_option[]){{"dtype", HB_DTYPE, &dtype},
                                   {"device", HB_DEVICE, &device},
                                   {"copy", HB_BOOL, &copy},
                                   {"saturate", HB_BOOL, &saturate},
                                   {0}});
    last--;
  } else if (last < 2) {
    return hb_error(L, "to: a dtype, a device or a tensor is missing");
  }
  for (int i = 2; i <= last; i++) read_target(L, st, i, &dtype, &device);
  if (saturate) return convert_saturated(L, st, t, dtype, device);
  return convert(L, st, t, dtype, device, copy);
}

/* float half bfloat16 double long int bool byte: upvalue 1 is the dtype. */
static int l_convert(lua_State *L) {
  hb_state *st = hb_enter(L);
  const int dtype = (int)lua_tointeger(L, lua_upvalueindex(1));
  return convert(L, st, hb_tensor(L, st, 1, hm_dtype_name(dtype), "self"), dtype, -1, false);
}

static int l_cpu(lua_State *L) {
  hb_state *st = hb_enter(L);
  return convert(L, st, hb_tensor(L, st, 1, "cpu", "self"), HM_NONE, HM_CPU, false);
}

/* t:cuda([index from 0]) */
static int l_cuda(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = hb_tensor(L, st, 1, "cuda", "self");
  const int64_t index = lua_isnoneornil(L, 2) ? 0 : hb_integer(L, 2, "cuda", "the device index");
  lua_settop(L, 1);
  lua_pushfstring(L, "cuda:%I", (LUAI_UACINT)index);
  return convert(L, st, t, HM_NONE, hb_device(L, 2, "cuda"), false);
}

static int l_clone(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = hb_tensor(L, st, 1, "clone", "self");
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_clone(t, slot));
  return 1;
}

/* t:contiguous([layout]) */
static int l_contiguous(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = hb_tensor(L, st, 1, "contiguous", "self");
  const bool last = wants_channels_last(L, 2, "contiguous");
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, last ? hm_channels_last(t, slot) : hm_contiguous(t, slot));
  return give(L, st, slot, t);
}

/* ====== Opening ====== */

static void open_metatable(lua_State *L, hb_state *st) {
  luaL_newmetatable(L, HB_TENSOR);
  st->metatable = lua_topointer(L, -1);
  lua_pushlightuserdata(L, st);
  lua_pushcclosure(L, l_gc, 1);
  lua_setfield(L, -2, "__gc");
  hb_push_ref(L, st, HB_REF_METHODS);
  lua_createtable(L, 0, FIELD_COUNT);
  for (int i = 0; field_names[i]; i++) {
    lua_pushinteger(L, i);
    lua_setfield(L, -2, field_names[i]);
  }
  lua_pushcclosure(L, l_index, 2);
  lua_setfield(L, -2, "__index");
  static const luaL_Reg meta[] = {{"__close", l_release},
                                  {"__newindex", l_newindex},
                                  {"__tostring", l_tostring},
                                  {"__len", l_len},
                                  {"__lt", l_lt},
                                  {"__le", l_le},
                                  {NULL, NULL}};
  hb_functions(L, meta);
  hb_set_ref(L, st, HB_REF_METATABLE);
}

static void open_conversions(lua_State *L, hb_state *st) {
  static const struct {
    const char *name;
    int dtype;
  } list[] = {{"float", HM_F32}, {"half", HM_F16}, {"bfloat16", HM_BF16}, {"double", HM_F64},
              {"long", HM_I64},  {"int", HM_I32},  {"bool", HM_BOOL},     {"byte", HM_U8}};
  hb_push_ref(L, st, HB_REF_METHODS);
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
    lua_pushinteger(L, list[i].dtype);
    lua_pushcclosure(L, l_convert, 1);
    lua_setfield(L, -2, list[i].name);
  }
  lua_pop(L, 1);
}

void hb_open_tensor(lua_State *L, hb_state *st) {
  static const luaL_Reg methods[] = {{"release", l_release},
                                     {"requires_grad_", l_requires_grad_},
                                     {"dim", l_dim},
                                     {"numel", l_numel},
                                     {"size", l_size},
                                     {"stride", l_stride},
                                     {"is_contiguous", l_is_contiguous},
                                     {"data_ptr", l_data_ptr},
                                     {"element_size", l_element_size},
                                     {"is_floating_point", l_is_floating_point},
                                     {"version", l_version},
                                     {"item", l_item},
                                     {"totable", l_totable},
                                     {"to", l_to},
                                     {"cpu", l_cpu},
                                     {"cuda", l_cuda},
                                     {"clone", l_clone},
                                     {"contiguous", l_contiguous},
                                     {NULL, NULL}};
  static const luaL_Reg functions[] = {{"is_tensor", l_is_tensor},
                                       {"get_name", l_get_name},
                                       {"set_name", l_set_name},
                                       {NULL, NULL}};
  open_metatable(L, st);
  open_conversions(L, st);
  hb_methods(L, st, methods);
  hb_functions(L, functions);
  hb_push_ref(L, st, HB_REF_METHODS);
  lua_setfield(L, -2, "Tensor");
}
