/*
 * optim.c -- optimizers: a userdata around hm_optim.  Groups and parameters count from 1 in Lua.
 *
 * Owner: the userdata owns the hm_optim, which retains the parameters.
 */
#include <stddef.h>
#include <string.h>

#include "bind.h"

typedef struct hb_optimizer {
  hm_optim *o;
  hm_optim_kind kind;
} hb_optimizer;

static const char *const kinds[] = {"sgd", "adam", "adamw", NULL};

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

/* core.optim_new("sgd" | "adam" | "adamw") */
static int l_new(lua_State *L) {
  hb_state *st = hb_enter(L);
  const char *name = hb_string(L, 1, "optim_new", "the kind");
  int kind = 0;
  while (kinds[kind] && strcmp(kinds[kind], name) != 0) kind++;
  if (!kinds[kind]) return hb_error(L, "optim_new: unknown kind \"%s\"%s", name, hb_push_suggestion(L, name, kinds));
  hb_optimizer *u = lua_newuserdatauv(L, sizeof *u, 0);
  *u = (hb_optimizer){NULL, (hm_optim_kind)kind};
  luaL_setmetatable(L, HB_OPTIM);
  hb_check(L, st, hm_optim_new((hm_optim_kind)kind, &u->o));
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

/* PyTorch's defaults. */
static hm_optim_options defaults(hm_optim_kind kind) {
  return (hm_optim_options){
      .lr = 1e-3, .weight_decay = kind == HM_OPTIM_ADAMW ? 1e-2 : 0, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8};
}

static const struct {
  const char *name;
  bool flag; /* else a double */
  size_t offset;
} fields[] = {{"lr", false, offsetof(hm_optim_options, lr)},
              {"weight_decay", false, offsetof(hm_optim_options, weight_decay)},
              {"momentum", false, offsetof(hm_optim_options, momentum)},
              {"dampening", false, offsetof(hm_optim_options, dampening)},
              {"beta1", false, offsetof(hm_optim_options, beta1)},
              {"beta2", false, offsetof(hm_optim_options, beta2)},
              {"eps", false, offsetof(hm_optim_options, eps)},
              {"nesterov", true, offsetof(hm_optim_options, nesterov)},
              {"maximize", true, offsetof(hm_optim_options, maximize)}};
enum { FIELDS = sizeof fields / sizeof *fields };

/* o:add_group(params, {lr, weight_decay, ...}) -> group */
static int l_add_group(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_optimizer *u = self(L, "add_group");
  hm_optim_options o = defaults(u->kind);
  hb_option list[FIELDS + 1] = {{0}};
  for (int i = 0; i < FIELDS; i++)
    list[i] = (hb_option){fields[i].name, fields[i].flag ? HB_BOOL : HB_NUMBER, (char *)&o + fields[i].offset};
  hb_options(L, 3, kinds[u->kind], list);
  int n, group = 0;
  hm_tensor **params = hb_tensor_list(L, st, 2, kinds[u->kind], "the list of parameters", true, &n);
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

/* Index in fields of the name at 3. */
static int field_at(lua_State *L, const char *who) {
  const char *name = hb_string(L, 3, who, "the option's name");
  const char *names[FIELDS + 1] = {NULL};
  for (int i = 0; i < FIELDS; i++) {
    if (strcmp(name, fields[i].name) == 0) return i;
    names[i] = fields[i].name;
  }
  return hb_error(L, "%s: unknown option \"%s\"%s", who, name, hb_push_suggestion(L, name, names));
}

/* o:get(group, name) */
static int l_get(lua_State *L) {
  hb_enter(L);
  const char *at = (const char *)group_at(L, self(L, "get"), "get");
  const int i = field_at(L, "get");
  if (fields[i].flag) lua_pushboolean(L, *(const bool *)(at + fields[i].offset));
  else lua_pushnumber(L, *(const double *)(at + fields[i].offset));
  return 1;
}

/* o:set(group, name, value) */
static int l_set(lua_State *L) {
  hb_enter(L);
  char *at = (char *)group_at(L, self(L, "set"), "set");
  const int i = field_at(L, "set");
  if (fields[i].flag) *(bool *)(at + fields[i].offset) = hb_bool(L, 4, "set", fields[i].name, false);
  else *(double *)(at + fields[i].offset) = hb_number(L, 4, "set", fields[i].name);
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
  hb_enter(L);
  hb_optimizer *u = self(L, "param_step");
  lua_pushinteger(L, hm_optim_param_step(u->o, param_at(L, u, "param_step")));
  return 1;
}

static int l_set_param_step(lua_State *L) {
  hb_enter(L);
  hb_optimizer *u = self(L, "set_param_step");
  const int i = param_at(L, u, "set_param_step");
  const int64_t n = hb_integer(L, 3, "set_param_step", "the step");
  if (n < 0) return hb_error(L, "set_param_step: the step must not be negative, got %I", (LUAI_UACINT)n);
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

/* core.grad_scale(params, coef) */
static int l_grad_scale(lua_State *L) {
  hb_state *st = hb_enter(L);
  int n;
  const double coef = hb_number(L, 2, "grad_scale", "the coefficient");
  hm_tensor **params = hb_tensor_list(L, st, 1, "grad_scale", "the list of parameters", false, &n);
  hb_check(L, st, hm_grad_scale(params, n, coef));
  return 0;
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
                                       {"grad_norm", l_grad_norm},
                                       {"grad_scale", l_grad_scale},
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
