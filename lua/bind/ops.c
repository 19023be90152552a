/*
 * ops.c -- every row of the op table as Lua functions, methods, operators and in-place forms; core.call, core.ops,
 * core.op_log.
 *
 * A bound op is a C closure with the op id as its upvalue.  Operands and attributes are read from the Lua stack into
 * arrays on the C stack; the result goes into a userdata made before the call.  Unary and binary rows without
 * attributes have an entry of their own.
 *
 * Lua counts dims from 1; a dim leaves here 0-based and not negative wherever the number of dims is known.
 */
#include <string.h>

#include "bind.h"

/* ====== Operands ====== */

static int operand_error(lua_State *L, const hm_op_info *info, int i, int idx) {
  if (lua_type(L, idx) == LUA_TUSERDATA && hb_test(L, hb_now.state, idx))
    return hb_error(L, "%s: operand %d (%s) was released", info->name, i + 1, info->in[i].name);
  return hb_error(L, "%s: operand %d (%s) must be a tensor or a number, got %s\n  %s", info->name, i + 1,
                  info->in[i].name, lua_isnone(L, idx) ? "nothing" : hb_came(L, idx), info->signature);
}

/* Reads operand i from idx. */
static inline void read_operand(lua_State *L, const hb_state *st, const hm_op_info *info, int i, int idx, hm_arg *arg) {
  switch (lua_type(L, idx)) {
  case LUA_TUSERDATA: {
    hm_tensor **slot = hb_test(L, st, idx);
    if (!slot || !*slot) break;
    *arg = (hm_arg){HM_ARG_TENSOR, {.t = *slot}};
    return;
  }
  case LUA_TNUMBER: *arg = lua_isinteger(L, idx) ? hm_i(lua_tointeger(L, idx)) : hm_f(lua_tonumber(L, idx)); return;
  case LUA_TBOOLEAN: *arg = hm_i(lua_toboolean(L, idx)); return;
  case LUA_TNIL:
  case LUA_TNONE:
    if (!info->in[i].optional) break;
    *arg = (hm_arg){HM_ARG_NONE, {.t = NULL}};
    return;
  default: break;
  }
  operand_error(L, info, i, idx);
}

/* ====== Attributes ====== */

typedef struct reader {
  lua_State *L;
  const hm_op_info *info;
  hm_attr *attr;
  int ndim;        /* dims that a dim may name; -1: unknown, taken as written */
  bool zero_based; /* core.call: dims as in C */
  int out_dtype;
  uint32_t given;
} reader;

static int dims_of(const hm_op_info *info, const hm_arg *in) {
  if (in[0].kind != HM_ARG_TENSOR) return -1;
  return in[0].t->ndim + (info == hm_op_get(HM_OP_UNSQUEEZE));
}

static int64_t read_dim(const reader *r, int64_t dim) {
  if (!r->zero_based) return hb_dim_value(r->L, dim, r->ndim < 0 ? HM_MAX_NDIM : r->ndim, r->info->name);
  return dim < 0 && r->ndim > 0 && dim >= -r->ndim ? dim + r->ndim : dim;
}

static int64_t read_enum(const reader *r, const hm_attr_info *a, int idx) {
  lua_State *L = r->L;
  const char *name = hb_string(L, idx, r->info->name, a->name);
  for (int i = 0; a->choices[i]; i++)
    if (strcmp(name, a->choices[i]) == 0) return i;
  return hb_error(L, "%s: unknown %s \"%s\"%s", r->info->name, a->name, name, hb_push_suggestion(L, name, a->choices));
}

/* Reads attribute k from idx; a list of numbers may go on up to `last`.  Returns the next index. */
static int read_attr(reader *r, int k, int idx, int last) {
  lua_State *L = r->L;
  const hm_attr_info *a = &r->info->attr[k];
  hm_attr *v = &r->attr[k];
  const char *who = r->info->name;
  if (lua_isnil(L, idx)) return idx + 1;
  r->given |= 1u << k;
  switch (a->type) {
  case HM_ATTR_INT: v->i = hb_integer(L, idx, who, a->name); break;
  case HM_ATTR_FLOAT: v->f = hb_number(L, idx, who, a->name); break;
  case HM_ATTR_BOOL: v->i = hb_bool(L, idx, who, a->name, false); break;
  case HM_ATTR_DTYPE: v->i = hb_dtype(L, idx, who); break;
  case HM_ATTR_ENUM: v->i = read_enum(r, a, idx); break;
  case HM_ATTR_DIM: v->i = read_dim(r, hb_integer(L, idx, who, a->name)); break;
  case HM_ATTR_INTS: hb_sizes(L, idx, idx, who, a->name, v); break;
  case HM_ATTR_SHAPE: return hb_sizes(L, idx, last, who, a->name, v);
  case HM_ATTR_DIMS: {
    const int next = hb_sizes(L, idx, last, who, a->name, v);
    for (int i = 0; i < v->n; i++) v->v[i] = read_dim(r, v->v[i]);
    return next;
  }
  default: break;
  }
  return idx + 1;
}

static int unknown_attr(reader *r, const char *name) {
  const char *names[HM_MAX_ATTR + 2];
  int n = 0;
  for (int k = 0; k < r->info->n_attr; k++)
    if (r->info->attr[k].type != HM_ATTR_RNG) names[n++] = r->info->attr[k].name;
  if (n == 0) names[n++] = "out_dtype";
  names[n] = NULL;
  return hb_error(r->L, "%s: unknown option \"%s\"%s", r->info->name, name, hb_push_suggestion(r->L, name, names));
}

/* True if the row may take the option `dtype`: the dtype to compute and answer in. */
static bool takes_dtype(const hm_op_info *info, const char *name) {
  return strcmp(name, "out_dtype") == 0 ||
         (strcmp(name, "dtype") == 0 &&
          (info->family == HM_FAMILY_REDUCE || info->family == HM_FAMILY_NORM || info->family == HM_FAMILY_SCAN));
}

/* Reads the options table at idx. */
static void read_named(reader *r, int idx) {
  lua_State *L = r->L;
  luaL_checkstack(L, 12, NULL);
  lua_pushnil(L);
  while (lua_next(L, idx)) {
    if (lua_type(L, -2) != LUA_TSTRING)
      hb_error(L, "%s: options must have names as keys, got the key %s", r->info->name, hb_came(L, -2));
    const char *name = lua_tostring(L, -2);
    const int value = lua_gettop(L);
    int k = 0;
    while (k < r->info->n_attr && (strcmp(name, r->info->attr[k].name) != 0 || r->info->attr[k].type == HM_ATTR_RNG))
      k++;
    if (k < r->info->n_attr) {
      if (r->given & 1u << k) hb_error(L, "%s: %s is given twice", r->info->name, name);
      read_attr(r, k, value, value);
    } else if (takes_dtype(r->info, name)) {
      r->out_dtype = hb_dtype(L, value, r->info->name);
    } else {
      unknown_attr(r, name);
    }
    lua_settop(L, value - 1);
  }
}

static void check_required(reader *r) {
  for (int k = 0; k < r->info->n_attr; k++) {
    const hm_attr_info *a = &r->info->attr[k];
    if (!a->optional && a->type != HM_ATTR_RNG && !(r->given & 1u << k))
      hb_error(r->L, "%s: %s is missing\n  %s", r->info->name, a->name, r->info->signature);
  }
}

static void too_many(lua_State *L, const hm_op_info *info, int idx) {
  hb_error(L, "%s: too many arguments: argument %d is %s\n  %s", info->name, idx, hb_came(L, idx), info->signature);
}

/* Reads attributes at idx .. top: by position, and by name in a last table. */
static void read_attrs(reader *r, int idx) {
  lua_State *L = r->L;
  int last = lua_gettop(L);
  const bool named = idx <= last && hb_is_options(L, last);
  if (named) last--;
  for (int k = 0; k < r->info->n_attr; k++) r->attr[k] = r->info->attr[k].dflt;
  for (int k = 0; k < r->info->n_attr && idx <= last; k++)
    if (r->info->attr[k].type != HM_ATTR_RNG) idx = read_attr(r, k, idx, last);
  if (idx <= last) too_many(L, r->info, idx);
  if (named) read_named(r, last + 1);
  check_required(r);
}

/* ====== Calling ====== */

/* Runs a row whose operands came from the stack at first .. ; pushes its results. */
static int run(lua_State *L, hb_state *st, int op, const hm_op_info *info, const hm_arg *in, int first,
               const hm_attr *attr, int out_dtype) {
  luaL_checkstack(L, 2 * HM_MAX_OUT + 6, NULL);
  hm_tensor **slot[HM_MAX_OUT], *out[HM_MAX_OUT] = {NULL};
  const int n = info->n_out;
  for (int k = 0; k < n; k++) slot[k] = hb_shell(L, st);
  const int status = out_dtype == HM_NONE ? hm_call(op, in, attr, out) : hm_call_as(op, in, attr, out_dtype, out);
  const int base = lua_gettop(L) - n;
  for (int k = 0; k < n; k++) *slot[k] = out[k];
  hb_check(L, st, status);
  for (int k = 0; k < n; k++) {
    if (!out[k] || out[k]->refs == 1) continue;
    int same = 0; /* an operand that came back is the operand's own object */
    while (same < info->n_in && !(in[same].kind == HM_ARG_TENSOR && in[same].t == out[k])) same++;
    if (same == info->n_in) {
      hb_settle(L, st, base + 1 + k);
      continue;
    }
    *slot[k] = NULL;
    hm_tensor_release(out[k]);
    lua_pushvalue(L, first + same);
    lua_replace(L, base + 1 + k);
  }
  return n;
}

/* gather(x, dim, index, ...): the dim, given second, moves behind the operands, where attributes are read. */
static void move_dim(lua_State *L, const hm_op_info *info) {
  if (lua_type(L, 2) != LUA_TNUMBER) return; /* it comes by name */
  if (lua_gettop(L) <= info->n_in) lua_settop(L, info->n_in + 1);
  lua_pushvalue(L, 2);
  lua_remove(L, 2);
  lua_insert(L, info->n_in + 1);
}

/* Any row: upvalue 1 is the op. */
static int l_op(lua_State *L) {
  hb_state *st = hb_enter(L);
  const int op = (int)lua_tointeger(L, lua_upvalueindex(1));
  const hm_op_info *info = hm_op_get(op);
  if (info->dim_first) move_dim(L, info);
  hm_arg in[HM_MAX_IN];
  hm_attr attr[HM_MAX_ATTR];
  for (int i = 0; i < info->n_in; i++) read_operand(L, st, info, i, i + 1, &in[i]);
  reader r = {.L = L, .info = info, .attr = attr, .ndim = dims_of(info, in), .out_dtype = HM_NONE};
  read_attrs(&r, info->n_in + 1);
  return run(L, st, op, info, in, 1, attr, r.out_dtype);
}

/* One operand, one fresh result, no attributes. */
static int l_unary(lua_State *L) {
  hb_state *st = hb_enter(L);
  const int op = (int)lua_tointeger(L, lua_upvalueindex(1));
  hm_arg in;
  if (lua_gettop(L) > 1) too_many(L, hm_op_get(op), 2);
  read_operand(L, st, hm_op_get(op), 0, 1, &in);
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_call(op, &in, NULL, slot));
  return 1;
}

/* As l_unary, for __unm: Lua passes the operand twice. */
static int l_unary_meta(lua_State *L) {
  lua_settop(L, 1);
  return l_unary(L);
}

/* Two operands, one fresh result, no attributes. */
static int l_binary(lua_State *L) {
  hb_state *st = hb_enter(L);
  const int op = (int)lua_tointeger(L, lua_upvalueindex(1));
  const hm_op_info *info = hm_op_get(op);
  hm_arg in[2];
  if (lua_gettop(L) > 2) too_many(L, info, 3);
  read_operand(L, st, info, 0, 1, &in[0]);
  read_operand(L, st, info, 1, 2, &in[1]);
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_call(op, in, NULL, slot));
  return 1;
}

/* name_(x, ...): the result goes into x, which is returned. */
static int l_inplace(lua_State *L) {
  hb_state *st = hb_enter(L);
  const int op = (int)lua_tointeger(L, lua_upvalueindex(1));
  const hm_op_info *info = hm_op_get(op);
  hm_arg in[HM_MAX_IN];
  hm_attr attr[HM_MAX_ATTR];
  for (int i = 0; i < info->n_in; i++) read_operand(L, st, info, i, i + 1, &in[i]);
  if (in[0].kind != HM_ARG_TENSOR) return hb_error(L, "%s_: self must be a tensor, got %s", info->name, hb_came(L, 1));
  reader r = {.L = L, .info = info, .attr = attr, .ndim = dims_of(info, in), .out_dtype = HM_NONE};
  read_attrs(&r, info->n_in + 1);
  if (r.out_dtype != HM_NONE) return hb_error(L, "%s_: an in-place form keeps its tensor's dtype", info->name);
  hb_check(L, st, hm_call_inplace(op, in, attr));
  lua_settop(L, 1);
  return 1;
}

/* copy_(x, src) and fill_(x, value): a number goes to fill_, a tensor to copy_. */
static int l_copy_(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_arg in[2] = {hm_t(hb_tensor(L, st, 1, "copy_", "self"))};
  lua_settop(L, 2);
  const hm_op_info *info = hm_op_get(HM_OP_COPY_);
  read_operand(L, st, info, 1, 2, &in[1]);
  const int op = in[1].kind == HM_ARG_TENSOR ? HM_OP_COPY_ : HM_OP_FILL_;
  return run(L, st, op, hm_op_get(op), in, 1, NULL, HM_NONE);
}

static int l_zero_(lua_State *L) {
  hb_state *st = hb_enter(L);
  const hm_arg in[2] = {hm_t(hb_tensor(L, st, 1, "zero_", "self")), hm_i(0)};
  lua_settop(L, 1);
  return run(L, st, HM_OP_FILL_, hm_op_get(HM_OP_FILL_), in, 1, NULL, HM_NONE);
}

/* max and min.  Upvalues: whole, along a dim, elementwise.  x:max() -> value; x:max(dim[, keepdim]) -> values, indices;
 * x:max(y) -> the larger. */
static int l_extreme(lua_State *L) {
  hb_state *st = hb_enter(L);
  const char *who = hm_op_get((int)lua_tointeger(L, lua_upvalueindex(2)))->name;
  hb_tensor(L, st, 1, who, "operand 1");
  int which = 1;
  if (hb_test(L, st, 2)) {
    which = 3;
  } else if (hb_is_options(L, 2)) {
    which = lua_getfield(L, 2, "dim") == LUA_TNIL ? 1 : 2;
    lua_pop(L, 1);
  } else if (!lua_isnoneornil(L, 2)) {
    which = 2;
  }
  const int op = (int)lua_tointeger(L, lua_upvalueindex(which));
  const hm_op_info *info = hm_op_get(op);
  hm_arg in[HM_MAX_IN];
  hm_attr attr[HM_MAX_ATTR];
  for (int i = 0; i < info->n_in; i++) read_operand(L, st, info, i, i + 1, &in[i]);
  reader r = {.L = L, .info = info, .attr = attr, .ndim = dims_of(info, in), .out_dtype = HM_NONE};
  read_attrs(&r, info->n_in + 1);
  return run(L, st, op, info, in, 1, attr, r.out_dtype);
}

/* ====== core.call ====== */

static int unknown_op(lua_State *L, const char *name) {
  const char *names[HM_OP_COUNT + 1];
  int n = 0;
  for (int op = 0; op < HM_OP_COUNT; op++)
    if (!hm_op_get(op)->generated) names[n++] = hm_op_get(op)->name;
  names[n] = NULL;
  const char *best = hb_closest(name, names);
  if (best) return hb_error(L, "call: there is no op \"%s\"; did you mean \"%s\"?", name, best);
  return hb_error(L, "call: there is no op \"%s\"\n  hint: core.ops() lists them", name);
}

/* core.call(name, inputs..., {attributes}): any row, as core has it (dims from 0). */
static int l_call(lua_State *L) {
  hb_state *st = hb_enter(L);
  const char *name = hb_string(L, 1, "call", "the op's name");
  hb_push_ref(L, st, HB_REF_OPS);
  lua_pushvalue(L, 1);
  const bool known = lua_rawget(L, -2) == LUA_TNUMBER;
  const int op = (int)lua_tointeger(L, -1);
  lua_pop(L, 2);
  if (!known) return unknown_op(L, name);
  const hm_op_info *info = hm_op_get(op);
  int last = lua_gettop(L);
  const bool named = last > 1 && lua_type(L, last) == LUA_TTABLE;
  if (named) last--;
  if (last - 1 > info->n_in) too_many(L, info, last);
  hm_arg in[HM_MAX_IN];
  hm_attr attr[HM_MAX_ATTR];
  for (int i = 0; i < info->n_in; i++) {
    if (i + 2 <= last) read_operand(L, st, info, i, i + 2, &in[i]);
    else if (info->in[i].optional) in[i] = (hm_arg){HM_ARG_NONE, {.t = NULL}};
    else return hb_error(L, "%s: operand %d (%s) is missing\n  %s", name, i + 1, info->in[i].name, info->signature);
  }
  for (int k = 0; k < info->n_attr; k++) attr[k] = info->attr[k].dflt;
  reader r = {.L = L, .info = info, .attr = attr, .ndim = dims_of(info, in), .zero_based = true, .out_dtype = HM_NONE};
  if (named) read_named(&r, last + 1);
  check_required(&r);
  return run(L, st, op, info, in, 2, attr, r.out_dtype);
}

/* ====== core.ops: the table as Lua data ====== */

static void set_class(lua_State *L, char cls) {
  lua_pushlstring(L, &cls, 1);
  lua_setfield(L, -2, "cls");
}

static void push_default(lua_State *L, const hm_attr_info *a) {
  switch (a->type) {
  case HM_ATTR_FLOAT: lua_pushnumber(L, a->dflt.f); break;
  case HM_ATTR_BOOL: lua_pushboolean(L, a->dflt.i != 0); break;
  case HM_ATTR_ENUM: lua_pushstring(L, a->choices[a->dflt.i]); break;
  case HM_ATTR_INT: lua_pushinteger(L, a->dflt.i); break;
  case HM_ATTR_DIM:
    if (a->dflt.i == HM_NONE) lua_pushnil(L);
    else lua_pushinteger(L, a->dflt.i);
    break;
  case HM_ATTR_INTS:
  case HM_ATTR_SHAPE:
  case HM_ATTR_DIMS:
    if (a->dflt.n == 0) lua_pushnil(L);
    else hb_push_ints(L, a->dflt.n, a->dflt.v);
    break;
  default: lua_pushnil(L);
  }
}

static void push_attr(lua_State *L, const hm_attr_info *a) {
  static const char *const types[] = {"int", "ints", "float", "bool", "dtype", "shape", "enum", "dim", "dims", "rng"};
  lua_createtable(L, 0, 5);
  hb_set_string(L, "name", a->name);
  hb_set_string(L, "type", types[a->type]);
  hb_set_bool(L, "optional", a->optional);
  if (a->optional) {
    push_default(L, a);
    lua_setfield(L, -2, "default");
  }
  if (a->choices) {
    lua_newtable(L);
    for (int i = 0; a->choices[i]; i++) {
      lua_pushstring(L, a->choices[i]);
      lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "choices");
  }
}

static void push_operands(lua_State *L, const hm_op_info *info) {
  lua_createtable(L, info->n_in, 0);
  for (int i = 0; i < info->n_in; i++) {
    lua_createtable(L, 0, 5);
    hb_set_string(L, "name", info->in[i].name);
    set_class(L, info->in[i].cls);
    hb_set_bool(L, "optional", info->in[i].optional);
    hb_set_bool(L, "mutated", info->in[i].mutated);
    hb_set_bool(L, "differentiable", (info->diff_in >> i & 1) != 0);
    lua_rawseti(L, -2, i + 1);
  }
  lua_setfield(L, -2, "inputs");
  lua_createtable(L, info->n_attr, 0);
  for (int k = 0; k < info->n_attr; k++) {
    push_attr(L, &info->attr[k]);
    lua_rawseti(L, -2, k + 1);
  }
  lua_setfield(L, -2, "attrs");
  lua_createtable(L, info->n_out, 0);
  for (int k = 0; k < info->n_out; k++) {
    lua_createtable(L, 0, 2);
    hb_set_string(L, "name", info->out[k].name);
    set_class(L, info->out[k].cls);
    lua_rawseti(L, -2, k + 1);
  }
  lua_setfield(L, -2, "outputs");
}

static const char *family_name(int family) {
  static const char *const names[] = {
#define X(id, name) [HM_FAMILY_##id] = name,
      HM_FAMILY_MAP(X)
#undef X
          [HM_FAMILY_VIEW] = "view",
      [HM_FAMILY_COMPOSITE] = "composite"};
  return names[family] ? names[family] : "";
}

static void push_row(lua_State *L, const hm_op_info *info) {
  static const char *const lua_names[] = {"both", "function", "method", "no"}, *const ints[] = {"float", "keep", "no"};
  lua_createtable(L, 0, 16);
  hb_set_string(L, "name", info->name);
  hb_set_string(L, "signature", info->signature);
  hb_set_string(L, "doc", info->doc);
  hb_set_string(L, "meta", info->meta);
  hb_set_string(L, "family", family_name(info->family));
  hb_set_string(L, "ints", ints[info->ints]);
  hb_set_string(L, "lua", lua_names[info->lua]);
  hb_set_string(L, "domain", info->domain);
  hb_set_bool(L, "differentiable", info->differentiable);
  hb_set_bool(L, "partial", info->partial);
  hb_set_bool(L, "generated", info->generated);
  hb_set_bool(L, "dim_first", info->dim_first);
  lua_pushnumber(L, info->ulp);
  lua_setfield(L, -2, "ulp");
  push_operands(L, info);
}

/* core.ops() -> array of rows */
static int l_ops(lua_State *L) {
  lua_createtable(L, HM_OP_COUNT, 0);
  for (int op = 0; op < HM_OP_COUNT; op++) {
    push_row(L, hm_op_get(op));
    lua_rawseti(L, -2, op + 1);
  }
  return 1;
}

/* ====== core.op_log ====== */

static void push_view(lua_State *L, const hm_view *v) {
  lua_createtable(L, 0, 3);
  if (v->flags & HM_VIEW_ABSENT) {
    hb_set_bool(L, "absent", true);
    hb_set_string(L, "dtype", "none");
    lua_newtable(L);
  } else {
    hb_set_string(L, "dtype", hm_dtype_name(v->dtype));
    if (v->flags & HM_VIEW_SCALAR) hb_set_bool(L, "scalar", true);
    hb_push_ints(L, v->ndim, v->shape);
  }
  lua_setfield(L, -2, "shape");
}

static void push_views(lua_State *L, const char *key, int n, const hm_view *v) {
  lua_createtable(L, n, 0);
  for (int i = 0; i < n; i++) {
    push_view(L, &v[i]);
    lua_rawseti(L, -2, i + 1);
  }
  lua_setfield(L, -2, key);
}

static void push_saved(lua_State *L, int n, hm_tensor *const *saved) {
  lua_createtable(L, n, 0);
  for (int i = 0, k = 0; i < n; i++) {
    if (!saved[i]) continue;
    lua_createtable(L, 0, 2);
    hb_set_string(L, "dtype", hm_dtype_name(saved[i]->dtype));
    hb_push_ints(L, saved[i]->ndim, saved[i]->shape);
    lua_setfield(L, -2, "shape");
    lua_rawseti(L, -2, ++k);
  }
  lua_setfield(L, -2, "saved");
}

/* Protected: builds the record and calls the log function. */
static int log_call(lua_State *L) {
  const hm_op_event *event = lua_touserdata(L, 1);
  hb_push_ref(L, hb_now.state, HB_REF_LOG);
  lua_createtable(L, 0, 6);
  hb_set_string(L, "op", event->info->name);
  hb_set_string(L, "family", family_name(event->info->family));
  hb_set_bool(L, "backward", event->backward);
  push_views(L, "inputs", event->n_in, event->in);
  push_views(L, "outputs", event->n_out, event->out);
  push_saved(L, event->n_saved, event->saved);
  lua_call(L, 1, 0);
  return 0;
}

/* An error of the log function is kept and raised when the running op is done. */
static void log_event(void *ud, const hm_op_event *event) {
  (void)ud;
  hb_state *st = hb_now.state;
  if (!st || st->logging) return;
  st->logging = true; /* ops of the log function are not logged */
  hb_protected_inside(hb_now.L, log_call, (void *)event);
  st->logging = false;
}

/* core.op_log(fn or nil) */
static int l_op_log(lua_State *L) {
  hb_state *st = hb_enter(L);
  const bool on = !lua_isnoneornil(L, 1);
  if (on && lua_type(L, 1) != LUA_TFUNCTION)
    return hb_error(L, "op_log: argument 1 must be a function or nil, got %s", hb_came(L, 1));
  lua_settop(L, 1);
  hb_set_ref(L, st, HB_REF_LOG);
  hm_set_op_log(on ? log_event : NULL, NULL);
  return 0;
}

/* ====== Opening ====== */

static lua_CFunction entry(const hm_op_info *info) {
  if (info->family == HM_FAMILY_ELEMENTWISE && info->n_attr == 0 && info->n_out == 1) {
    if (info->n_in == 1) return l_unary;
    if (info->n_in == 2) return l_binary;
  }
  return l_op;
}

/* Sets table[name] at the given index to fn with the op as upvalue. */
static void bind_as(lua_State *L, int table, const char *name, lua_CFunction fn, int op) {
  lua_pushinteger(L, op);
  lua_pushcclosure(L, fn, 1);
  lua_setfield(L, table, name);
}

/* module, methods, metatable: stack indices. */
static void bind_row(lua_State *L, int op, int module, int methods, int metatable) {
  static const char *const events[] = {"__add", "__sub", "__mul", "__div", "__idiv", "__mod", "__pow", "__unm", NULL};
  const hm_op_info *info = hm_op_get(op);
  if (info->lua == HM_LUA_BOTH || info->lua == HM_LUA_FUNCTION) bind_as(L, module, info->name, entry(info), op);
  if (info->lua == HM_LUA_BOTH || info->lua == HM_LUA_METHOD) {
    bind_as(L, methods, info->name, entry(info), op);
    if (info->family == HM_FAMILY_ELEMENTWISE && info->out[0].cls != 'b') {
      bind_as(L, methods, lua_pushfstring(L, "%s_", info->name), l_inplace, op);
      lua_pop(L, 1);
    }
  }
  for (int i = 0; info->meta && events[i]; i++)
    if (strcmp(info->meta, events[i]) == 0)
      bind_as(L, metatable, info->meta, info->n_in == 1 ? l_unary_meta : entry(info), op);
}

static void bind_extreme(lua_State *L, int table, const char *name, int whole, int dim, int pairwise) {
  lua_pushinteger(L, whole);
  lua_pushinteger(L, dim);
  lua_pushinteger(L, pairwise);
  lua_pushcclosure(L, l_extreme, 3);
  lua_setfield(L, table, name);
}

void hb_open_ops(lua_State *L, hb_state *st) {
  static const luaL_Reg functions[] = {{"call", l_call}, {"ops", l_ops}, {"op_log", l_op_log}, {NULL, NULL}};
  static const luaL_Reg methods[] = {{"copy_", l_copy_}, {"zero_", l_zero_}, {NULL, NULL}};
  const int module = lua_gettop(L);
  hb_push_ref(L, st, HB_REF_METHODS);
  hb_push_ref(L, st, HB_REF_METATABLE);
  hb_push_ref(L, st, HB_REF_OPS);
  for (int op = 0; op < HM_OP_COUNT; op++) {
    bind_row(L, op, module, module + 1, module + 2);
    lua_pushinteger(L, op);
    lua_setfield(L, module + 3, hm_op_get(op)->name);
  }
  for (int table = module; table <= module + 1; table++) {
    bind_extreme(L, table, "max", HM_OP_AMAX, HM_OP_MAX_DIM, HM_OP_MAXIMUM);
    bind_extreme(L, table, "min", HM_OP_AMIN, HM_OP_MIN_DIM, HM_OP_MINIMUM);
  }
  lua_settop(L, module);
  hb_functions(L, functions);
  hb_methods(L, st, methods);
}
