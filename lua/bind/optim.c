/*
 * optim.c -- optimizers: a userdata around hm_optim.  Groups and parameters count from 1 in Lua.
 *
 * Owner: the userdata owns the hm_optim, which retains the parameters.
 */
#include <string.h>

#include "bind.h"

typedef struct hb_optimizer {
  hm_optim *o;
  hm_optim_kind kind;
} hb_optimizer;

enum { HB_OPTIM_FIELDS = 32 }; /* room for the options of a kind */

static hb_optimizer *self(lua_State *L, const char *who) {
  hb_optimizer *u = luaL_testudata(L, 1, HB_OPTIM);
  if (!u || !u->o) hb_error(L, "%s: self must be an optimizer, got %s", who, hb_came(L, 1));
  return u;
}

hm_optim *hb_optim(lua_State *L, int idx, const char *who) {
  hb_optimizer *u = luaL_testudata(L, idx, HB_OPTIM);
  if (!u || !u->o) hb_error(L, "%s: argument %d must be an optimizer, got %s", who, idx - 1, hb_came(L, idx));
  return u->o;
}

/* The kind whose name is at 1. */
static hm_optim_kind kind_at(lua_State *L, const char *who) {
  const char *name = hb_string(L, 1, who, "the kind"), *known[HM_OPTIM_KINDS + 1] = {NULL};
  for (int kind = 0; kind < HM_OPTIM_KINDS; kind++) {
    known[kind] = hm_optim_kind_name((hm_optim_kind)kind);
    if (strcmp(name, known[kind]) == 0) return (hm_optim_kind)kind;
  }
  return (hm_optim_kind)hb_error(L, "%s: unknown kind \"%s\"%s", who, name, hb_push_suggestion(L, name, known));
}

/* core.optim_new("sgd" | "adam" | ...) */
static int l_new(lua_State *L) {
  hb_state *st = hb_enter(L);
  const hm_optim_kind kind = kind_at(L, "optim_new");
  hb_optimizer *u = lua_newuserdatauv(L, sizeof *u, 0);
  *u = (hb_optimizer){NULL, kind};
  luaL_setmetatable(L, HB_OPTIM);
  hb_check(L, st, hm_optim_new(kind, &u->o));
  return 1;
}

/* __gc.  Upvalue 1: the state.  Scalers forget it first. */
static int l_gc(lua_State *L) {
  hb_optimizer *u = lua_touserdata(L, 1);
  if (!u->o) return 0;
  hb_scalers_forget(lua_touserdata(L, lua_upvalueindex(1)), u->o);
  hm_optim_free(u->o);
  u->o = NULL;
  return 0;
}

/* ====== Groups and their options ====== */

/* The options that a kind has: their number. */
static int fields_of(hm_optim_kind kind, const hm_optim_field *list[HB_OPTIM_FIELDS]) {
  int all, n = 0;
  const hm_optim_field *f = hm_optim_fields(&all);
  for (int i = 0; i < all; i++)
    if (f[i].kinds >> kind & 1) list[n++] = &f[i];
  return n;
}

static void push_field(lua_State *L, const hm_optim_options *o, const hm_optim_field *f) {
  const char *at = (const char *)o + f->offset;
  if (f->flag) lua_pushboolean(L, *(const bool *)at);
  else lua_pushnumber(L, *(const double *)at);
}

/* core.optim_kind(name) -> {options = {lr = {default, low, high}, nesterov = {false}, ...}, states = {name, ...}} */
static int l_kind(lua_State *L) {
  hb_enter(L);
  const hm_optim_kind kind = kind_at(L, "optim_kind");
  const hm_optim_field *list[HB_OPTIM_FIELDS];
  const int n = fields_of(kind, list);
  hm_optim_options defaults;
  hm_optim_defaults(kind, &defaults);
  lua_createtable(L, 0, 2);
  lua_createtable(L, 0, n);
  for (int i = 0; i < n; i++) {
    lua_createtable(L, 3, 0);
    push_field(L, &defaults, list[i]);
    lua_rawseti(L, -2, 1);
    lua_pushnumber(L, list[i]->low);
    lua_rawseti(L, -2, 2);
    lua_pushnumber(L, list[i]->high);
    lua_rawseti(L, -2, 3);
    lua_setfield(L, -2, list[i]->name);
  }
  lua_setfield(L, -2, "options");
  lua_newtable(L);
  for (int slot = 0, count = 0; slot < HM_MAX_STATE; slot++) {
    const char *name = hm_optim_state_name(kind, slot);
    if (!name) continue;
    lua_pushstring(L, name);
    lua_rawseti(L, -2, ++count);
  }
  lua_setfield(L, -2, "states");
  return 1;
}

/* o:add_group(params, {lr, weight_decay, ...}) -> group */
static int l_add_group(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_optimizer *u = self(L, "add_group");
  const char *who = hm_optim_kind_name(u->kind);
  const hm_optim_field *field[HB_OPTIM_FIELDS];
  hb_option list[HB_OPTIM_FIELDS + 1] = {{0}};
  const int fields = fields_of(u->kind, field);
  hm_optim_options o;
  hm_optim_defaults(u->kind, &o);
  for (int i = 0; i < fields; i++)
    list[i] = (hb_option){field[i]->name, field[i]->flag ? HB_BOOL : HB_NUMBER, (char *)&o + field[i]->offset};
  hb_options(L, 3, who, list);
  int n, group = 0;
  hm_tensor **params = hb_tensor_list(L, st, 2, who, "the list of parameters", true, &n);
  hb_check(L, st, hm_optim_add_group(u->o, params, n, &o, &group));
  lua_pushinteger(L, group + 1);
  return 1;
}

/* The group whose number is at 2. */
static hm_optim_options *group_at(lua_State *L, hb_optimizer *u, const char *who) {
  const int n = hm_optim_group_count(u->o);
  const int64_t i = hb_integer(L, 2, who, "the group");
  if (i < 1 || i > n) hb_error(L, "%s: there is no group %I: the optimizer has %d", who, (LUAI_UACINT)i, n);
  return hm_optim_group_options(u->o, (int)i - 1);
}

/* The option of the kind whose name is at 3. */
static const hm_optim_field *field_at(lua_State *L, const hb_optimizer *u, const char *who) {
  const char *name = hb_string(L, 3, who, "the option's name"), *names[HB_OPTIM_FIELDS + 1] = {NULL};
  const hm_optim_field *list[HB_OPTIM_FIELDS];
  const int n = fields_of(u->kind, list);
  for (int i = 0; i < n; i++) {
    if (strcmp(name, list[i]->name) == 0) return list[i];
    names[i] = list[i]->name;
  }
  hb_error(L, "%s: unknown option \"%s\"%s", who, name, hb_push_suggestion(L, name, names));
  return NULL;
}

/* o:get(group, name) */
static int l_get(lua_State *L) {
  hb_enter(L);
  hb_optimizer *u = self(L, "get");
  const hm_optim_options *group = group_at(L, u, "get");
  push_field(L, group, field_at(L, u, "get"));
  return 1;
}

/* o:set(group, name, value) */
static int l_set(lua_State *L) {
  hb_enter(L);
  hb_optimizer *u = self(L, "set");
  char *at = (char *)group_at(L, u, "set");
  const hm_optim_field *f = field_at(L, u, "set");
  if (f->flag) *(bool *)(at + f->offset) = hb_bool(L, 4, "set", f->name, false);
  else *(double *)(at + f->offset) = hb_number(L, 4, "set", f->name);
  return 0;
}

/* o:group_count() */
static int l_group_count(lua_State *L) {
  hb_enter(L);
  lua_pushinteger(L, hm_optim_group_count(self(L, "group_count")->o));
  return 1;
}

/* ====== Work ====== */

static int l_step(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_check(L, st, hm_optim_step(self(L, "step")->o));
  return 0;
}

static int l_zero_grad(lua_State *L) {
  hb_enter(L);
  hm_optim_zero_grad(self(L, "zero_grad")->o);
  return 0;
}

/* ====== Parameters and their state ====== */

/* 0-based index of the parameter whose number is at 2. */
static int param_at(lua_State *L, const hb_optimizer *u, const char *who) {
  const int n = hm_optim_param_count(u->o);
  const int64_t i = hb_integer(L, 2, who, "the parameter");
  if (i < 1 || i > n) hb_error(L, "%s: there is no parameter %I: the optimizer has %d", who, (LUAI_UACINT)i, n);
  return (int)i - 1;
}

static int l_count(lua_State *L) {
  hb_enter(L);
  lua_pushinteger(L, hm_optim_param_count(self(L, "count")->o));
  return 1;
}

static int l_param(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_optimizer *u = self(L, "param");
  hb_push(L, st, hm_optim_param(u->o, param_at(L, u, "param")));
  return 1;
}

static int l_param_group(lua_State *L) {
  hb_enter(L);
  hb_optimizer *u = self(L, "param_group");
  lua_pushinteger(L, hm_optim_param_group(u->o, param_at(L, u, "param_group")) + 1);
  return 1;
}

/* o:state(i, name) -> tensor or nil */
static int l_state(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_optimizer *u = self(L, "state");
  hb_check(L, st, hm_optim_settle(u->o));
  hb_push(L, st, hm_optim_state(u->o, param_at(L, u, "state"), hb_string(L, 3, "state", "the name")));
  return 1;
}

/* o:set_state(i, name, tensor): keeps a copy */
static int l_set_state(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_optimizer *u = self(L, "set_state");
  const int i = param_at(L, u, "set_state");
  const char *name = hb_string(L, 3, "set_state", "the name");
  hb_check(L, st, hm_optim_set_state(u->o, i, name, hb_tensor(L, st, 4, "set_state", "the value")));
  return 0;
}

static int l_param_step(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_optimizer *u = self(L, "param_step");
  hb_check(L, st, hm_optim_settle(u->o));
  lua_pushinteger(L, hm_optim_param_step(u->o, param_at(L, u, "param_step")));
  return 1;
}

static int l_set_param_step(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_optimizer *u = self(L, "set_param_step");
  const int i = param_at(L, u, "set_param_step");
  const int64_t n = hb_integer(L, 3, "set_param_step", "the step");
  if (n < 0) return hb_error(L, "set_param_step: the step must not be negative, got %I", (LUAI_UACINT)n);
  hb_check(L, st, hm_optim_settle(u->o));
  hm_optim_set_param_step(u->o, i, n);
  return 0;
}

static int l_state_bytes(lua_State *L) {
  hb_enter(L);
  lua_pushinteger(L, hm_optim_state_bytes(self(L, "state_bytes")->o));
  return 1;
}

/* ====== Gradients of a list of tensors together ====== */

/* core.grad_norm(params) -> number */
static int l_grad_norm(lua_State *L) {
  hb_state *st = hb_enter(L);
  int n;
  double norm = 0;
  hm_tensor **params = hb_tensor_list(L, st, 1, "grad_norm", "the list of parameters", false, &n);
  hb_check(L, st, hm_grad_norm(params, n, &norm));
  lua_pushnumber(L, norm);
  return 1;
}

/* fn(the gradients of the parameters in argument 1, the number in argument 2); who and what name them in errors. */
static int change_grads(lua_State *L, int (*fn)(hm_tensor *const *, int, double), const char *who, const char *what) {
  hb_state *st = hb_enter(L);
  int n;
  const double by = hb_number(L, 2, who, what);
  hm_tensor **params = hb_tensor_list(L, st, 1, who, "the list of parameters", false, &n);
  hb_check(L, st, fn(params, n, by));
  return 0;
}

/* core.grad_scale(params, coef) */
static int l_grad_scale(lua_State *L) { return change_grads(L, hm_grad_scale, "grad_scale", "the coefficient"); }

/* core.grad_clamp(params, limit) */
static int l_grad_clamp(lua_State *L) { return change_grads(L, hm_grad_clamp, "grad_clamp", "the limit"); }

/* core.grad_clip(params, max_norm) -> norm as a tensor on the gradients' device; nil: not to be had without a wait */
static int l_grad_clip(lua_State *L) {
  hb_state *st = hb_enter(L);
  int n;
  const double max_norm = hb_number(L, 2, "grad_clip", "max_norm");
  hm_tensor **params = hb_tensor_list(L, st, 1, "grad_clip", "the list of parameters", false, &n);
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_grad_clip(params, n, max_norm, slot));
  if (*slot) hb_settle_shared(L, st, -1, *slot);
  else lua_pushnil(L);
  return 1;
}

void hb_open_optim(lua_State *L, hb_state *st) {
  static const luaL_Reg methods[] = {{"add_group", l_add_group},
                                     {"group_count", l_group_count},
                                     {"get", l_get},
                                     {"set", l_set},
                                     {"step", l_step},
                                     {"zero_grad", l_zero_grad},
                                     {"count", l_count},
                                     {"param", l_param},
                                     {"param_group", l_param_group},
                                     {"state", l_state},
                                     {"set_state", l_set_state},
                                     {"param_step", l_param_step},
                                     {"set_param_step", l_set_param_step},
                                     {"state_bytes", l_state_bytes},
                                     {NULL, NULL}};
  static const luaL_Reg functions[] = {{"optim_new", l_new},
                                       {"optim_kind", l_kind},
                                       {"grad_norm", l_grad_norm},
                                       {"grad_scale", l_grad_scale},
                                       {"grad_clamp", l_grad_clamp},
                                       {"grad_clip", l_grad_clip},
                                       {NULL, NULL}};
  luaL_newmetatable(L, HB_OPTIM);
  lua_pushlightuserdata(L, st);
  lua_pushcclosure(L, l_gc, 1);
  lua_setfield(L, -2, "__gc");
  luaL_newlib(L, methods);
  lua_setfield(L, -2, "__index");
  lua_pop(L, 1);
  hb_functions(L, functions);
}
