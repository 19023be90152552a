/*
 * expression.c -- elementwise functions made at run time, for lua/halfmoon/elementwise.lua.
 *
 * An expression is a userdata that owns its hm_expression.  The Lua side parses the formula, makes the list of steps, and records gradients.
 */
#include "bind.h"
#include "expression.h"

#define HB_EXPRESSION "halfmoon.Expression"

static void push_step(lua_State *L, int kind, const char *name, int operands, bool whole) {
  lua_createtable(L, 0, 3);
  lua_pushstring(L, name);
  lua_setfield(L, -2, "name");
  lua_pushinteger(L, operands);
  lua_setfield(L, -2, "operands");
  lua_pushboolean(L, whole);
  lua_setfield(L, -2, "whole");
  lua_rawseti(L, -2, kind + 1);
}

/* core.expression_steps() -> array of {name, operands, whole (integers stay integers)}; its positions are the kinds of
 * steps, from 1 */
static int l_steps(lua_State *L) {
  lua_createtable(L, HM_STEP_COUNT, 0);
#define X(id, name, operands, value) push_step(L, HM_STEP_##id, name, operands, HM_STEP_##id < HM_STEP_DIV);
  HM_STEP_ANY_MAP(X)
  HM_STEP_FLOAT_MAP(X)
#undef X
  return 1;
}

/* Integer i of the array at idx, from 1. */
static int64_t entry(lua_State *L, int idx, lua_Integer i, int64_t most) {
  if (lua_rawgeti(L, idx, i) != LUA_TNUMBER) hb_error(L, "expression_new: a list of numbers is wanted");
  const int64_t value = lua_tointeger(L, -1);
  lua_pop(L, 1);
  if (value < 0 || value > most) hb_error(L, "expression_new: a step is out of range");
  return value;
}

/* The steps at idx: five numbers each, the kind (from 1), where to, from where. */
static const hm_step *read_steps(lua_State *L, int idx, int *n) {
  *n = (int)(lua_rawlen(L, idx) / 5);
  hm_step *step = lua_newuserdatauv(L, sizeof *step * (size_t)*n + 1, 0);
  for (int s = 0; s < *n; s++) {
    step[s].kind = (uint16_t)(entry(L, idx, 5 * s + 1, HM_STEP_COUNT) - 1);
    step[s].to = (uint16_t)entry(L, idx, 5 * s + 2, UINT16_MAX);
    for (int i = 0; i < 3; i++) step[s].from[i] = (uint16_t)entry(L, idx, 5 * s + 3 + i, UINT16_MAX);
  }
  return step;
}

static const double *read_constants(lua_State *L, int idx, int *n) {
  *n = (int)lua_rawlen(L, idx);
  double *constant = lua_newuserdatauv(L, sizeof *constant * (size_t)*n + 1, 0);
  for (int i = 0; i < *n; i++) {
    lua_rawgeti(L, idx, i + 1);
    constant[i] = lua_tonumber(L, -1);
    lua_pop(L, 1);
  }
  return constant;
}

/* core.expression_new(name, inputs, class, gives_bool, constants, registers, steps) -> expression */
static int l_new(lua_State *L) {
  hb_state *st = hb_enter(L);
  const char *in_name[HM_MAX_IN];
  hm_program p = {.n_registers = (int)hb_integer(L, 6, "expression_new", "the number of registers")};
  hm_expression_spec spec = {.name = hb_string(L, 1, "expression_new", "the name"),
                             .in_name = in_name,
                             .cls = hb_string(L, 3, "expression_new", "the class")[0],
                             .gives_bool = lua_toboolean(L, 4),
                             .program = &p};
  const int tables[] = {2, 5, 7};
  for (int i = 0; i < 3; i++) luaL_checktype(L, tables[i], LUA_TTABLE);
  p.n_in = (int)lua_rawlen(L, 2);
  for (int i = 0; i < p.n_in && i < HM_MAX_IN; i++) {
    lua_rawgeti(L, 2, i + 1); /* the table keeps the string */
    in_name[i] = hb_string(L, -1, "expression_new", "the name of an input");
    lua_pop(L, 1);
  }
  p.constant = read_constants(L, 5, &p.n_constants);
  p.step = read_steps(L, 7, &p.n_steps);
  hm_expression **slot = lua_newuserdatauv(L, sizeof *slot, 0);
  *slot = NULL;
  luaL_setmetatable(L, HB_EXPRESSION);
  hb_check(L, st, hm_expression_new(&spec, slot));
  return 1;
}

static hm_arg read_operand(lua_State *L, const hb_state *st, const hm_expression *e, int i, int idx) {
  if (lua_isinteger(L, idx)) return hm_i(lua_tointeger(L, idx));
  if (lua_type(L, idx) == LUA_TNUMBER) return hm_f(lua_tonumber(L, idx));
  hm_tensor **t = hb_test(L, st, idx);
  if (!t)
    hb_error(L, "%s: input %d (%s) must be a tensor or a number, got %s", hm_expression_name(e), i + 1,
             hm_expression_input(e, i), hb_came(L, idx));
  if (!*t) hb_error(L, "%s: input %d (%s) was released", hm_expression_name(e), i + 1, hm_expression_input(e, i));
  return hm_t(*t);
}

/* core.expression_call(expression, inputs...) -> tensor, not recorded; whether it should be: some input wants a gradient */
static int l_call(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_expression **e = luaL_checkudata(L, 1, HB_EXPRESSION);
  hm_arg in[HM_MAX_IN];
  if (!*e) return hb_error(L, "elementwise: it was freed");
  const int n = hm_expression_count(*e);
  if (lua_gettop(L) - 1 != n)
    return hb_error(L, "%s: %d inputs are wanted, got %d", hm_expression_name(*e), n, lua_gettop(L) - 1);
  for (int i = 0; i < n; i++) in[i] = read_operand(L, st, *e, i, i + 2);
  bool wanted = false;
  for (int i = 0; i < n; i++) wanted = wanted || (in[i].kind == HM_ARG_TENSOR && in[i].t->requires_grad);
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_expression_call(*e, in, slot));
  lua_pushboolean(L, wanted && hm_mode_current()->grad && hm_dtype_is_float((*slot)->dtype));
  return 2;
}

/* core.expression_version(t) -> how often t's memory was written to */
static int l_version(lua_State *L) {
  hb_state *st = hb_enter(L);
  lua_pushinteger(L, hm_tensor_version(hb_tensor(L, st, 1, "elementwise", "the input")));
  return 1;
}

static int l_gc(lua_State *L) {
  hm_expression **e = lua_touserdata(L, 1);
  hm_expression_free(*e);
  *e = NULL;
  return 0;
}

void hb_open_expression(lua_State *L, hb_state *st) {
  (void)st;
  static const luaL_Reg functions[] = {{"expression_steps", l_steps},
                                       {"expression_new", l_new},
                                       {"expression_call", l_call},
                                       {"expression_version", l_version},
                                       {NULL, NULL}};
  hb_metatable(L, HB_EXPRESSION, l_gc, false, NULL);
  hb_functions(L, functions);
}
