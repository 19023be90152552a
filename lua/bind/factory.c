/*
 * factory.c -- tensors from nothing, from Lua tables, and from other tensors: tensor empty zeros ones full rand randn
 * randint arange linspace eye cat stack.
 *
 * Sizes come first (numbers or one table), options {dtype, device, requires_grad} last.  Without a device they are made
 * on the default device, which belongs to the process.
 */
#include <math.h>
#include <string.h>

#include "bind.h"

typedef struct options {
  int dtype; /* HM_NONE: not given */
  int device;
  bool requires_grad;
} options;

/* ====== The default device ====== */

static int default_device = HM_CPU; /* only Lua's thread reads and writes it */

int hb_default_device(void) { return default_device; }

/* set_default_device(name) */
static int l_set_default_device(lua_State *L) {
  hb_enter(L);
  default_device = hb_device(L, 1, "set_default_device");
  return 0;
}

/* get_default_device() -> name */
static int l_get_default_device(lua_State *L) {
  lua_pushstring(L, hm_device_name(default_device));
  return 1;
}

/* ====== Arguments ====== */

/* Reads the options table if there is one at the top; returns the index of the last argument before it. */
static int read_options(lua_State *L, const char *who, options *o) {
  *o = (options){HM_NONE, default_device, false};
  const int last = lua_gettop(L);
  if (last == 0 ||
      !(hb_is_options(L, last) || (last > 1 && lua_type(L, last) == LUA_TTABLE && lua_rawlen(L, last) == 0)))
    return last;
  const hb_option list[] = {{"dtype", HB_DTYPE, &o->dtype},
                            {"device", HB_DEVICE, &o->device},
                            {"requires_grad", HB_BOOL, &o->requires_grad},
                            {0}};
  hb_options(L, last, who, list);
  return last - 1;
}

/* Sizes at idx .. last. */
static void read_shape(lua_State *L, int idx, int last, const char *who, hm_attr *shape) {
  const int next = hb_sizes(L, idx, last, who, "the shape", shape);
  if (next <= last)
    hb_error(L, "%s: argument %d is %s: expected a shape and a table of options", who, next, hb_came(L, next));
  for (int k = 0; k < shape->n; k++)
    if (shape->v[k] < 0) hb_error(L, "%s: size %d of the shape is negative: %I", who, k + 1, (LUAI_UACINT)shape->v[k]);
}

/* ====== From sizes ====== */

/* Raises unless a tensor was made; where there is no memory or the device is lost, the message begins with the
 * factory's name. */
static void check_made(lua_State *L, const hb_state *st, int status, const char *who) {
  if (!st->failed && (status == HM_ERR_MEMORY || status == HM_ERR_DEVICE))
    hb_error(L, "%s: %s", who, hm_error_message());
  hb_check(L, st, status);
}

/* Pushes a new tensor; fill (an op that writes to its first operand) runs on it unless it is negative. */
static int make(lua_State *L, hb_state *st, const char *who, const options *o, int dtype, const hm_attr *shape,
                int fill, const hm_arg *value, const hm_attr *attr) {
  hm_tensor **slot = hb_shell(L, st), *same = NULL;
  check_made(L, st, hm_empty(shape->n, shape->v, o->dtype == HM_NONE ? dtype : o->dtype, o->device, slot), who);
  if (fill >= 0) {
    hm_arg in[3] = {hm_t(*slot)};
    for (int i = 1; i < hm_op_get(fill)->n_in; i++) in[i] = value[i - 1];
    const int status = hm_call(fill, in, attr, &same);
    hm_tensor_release(same);
    hb_check(L, st, status);
  }
  if (o->requires_grad) hb_check(L, st, hm_set_requires_grad(*slot, true));
  return 1;
}

/* Factories of a shape alone. */
static int from_shape(lua_State *L, const char *who, int fill, const hm_arg *value, const hm_attr *attr) {
  hb_state *st = hb_enter(L);
  options o;
  hm_attr shape;
  read_shape(L, 1, read_options(L, who, &o), who, &shape);
  return make(L, st, who, &o, HM_F32, &shape, fill, value, attr);
}

static int l_empty(lua_State *L) { return from_shape(L, "empty", -1, NULL, NULL); }
static int l_zeros(lua_State *L) { return from_shape(L, "zeros", HM_OP_FILL_, (const hm_arg[]){hm_i(0)}, NULL); }
static int l_ones(lua_State *L) { return from_shape(L, "ones", HM_OP_FILL_, (const hm_arg[]){hm_i(1)}, NULL); }

/* Attributes (low, high, rng) or (mean, std, rng); core fills rng. */
static int l_rand(lua_State *L) {
  return from_shape(L, "rand", HM_OP_UNIFORM_, NULL, (const hm_attr[]){{.f = 0}, {.f = 1}, {.n = 0}});
}
static int l_randn(lua_State *L) {
  return from_shape(L, "randn", HM_OP_NORMAL_, NULL, (const hm_attr[]){{.f = 0}, {.f = 1}, {.n = 0}});
}

static hm_arg read_number(lua_State *L, int idx, const char *who, const char *what) {
  if (lua_type(L, idx) == LUA_TBOOLEAN) return hm_i(lua_toboolean(L, idx));
  const double f = hb_number(L, idx, who, what);
  return lua_isinteger(L, idx) ? hm_i(lua_tointeger(L, idx)) : hm_f(f);
}

/* full(shape, value[, options]) */
static int l_full(lua_State *L) {
  hb_state *st = hb_enter(L);
  options o;
  hm_attr shape;
  const int last = read_options(L, "full", &o);
  if (last != 2)
    return hb_error(L, "full: expected a shape and a value, got %d arguments\n  hint: full({2, 3}, 1.5)", last);
  read_shape(L, 1, 1, "full", &shape);
  const hm_arg value = read_number(L, 2, "full", "the value");
  return make(L, st, "full", &o, lua_type(L, 2) == LUA_TBOOLEAN ? HM_BOOL : HM_F32, &shape, HM_OP_FILL_, &value, NULL);
}

/* randint(low, high, shape[, options]): high excluded */
static int l_randint(lua_State *L) {
  hb_state *st = hb_enter(L);
  options o;
  hm_attr shape;
  const int last = read_options(L, "randint", &o);
  const int64_t low = hb_integer(L, 1, "randint", "low"), high = hb_integer(L, 2, "randint", "high");
  if (high <= low)
    return hb_error(L, "randint: high (%I, excluded) must be above low (%I)", (LUAI_UACINT)high, (LUAI_UACINT)low);
  read_shape(L, 3, last, "randint", &shape);
  return make(L, st, "randint", &o, HM_I64, &shape, HM_OP_RANDOM_, NULL,
              (const hm_attr[]){{.i = low}, {.i = high}, {.n = 0}});
}

/* How many numbers arange gives. */
static int64_t arange_count(lua_State *L, hm_arg start, hm_arg stop, hm_arg step) {
  if (start.kind == HM_ARG_INT && stop.kind == HM_ARG_INT && step.kind == HM_ARG_INT) {
    if (step.i == 0) hb_error(L, "arange: the step must not be 0");
    const bool up = step.i > 0;
    if (up ? stop.i <= start.i : stop.i >= start.i) return 0;
    const uint64_t span = up ? (uint64_t)stop.i - (uint64_t)start.i : (uint64_t)start.i - (uint64_t)stop.i;
    const uint64_t size = up ? (uint64_t)step.i : 0 - (uint64_t)step.i;
    return (int64_t)((span - 1) / size + 1);
  }
  const double a = start.kind == HM_ARG_INT ? (double)start.i : start.f,
               b = stop.kind == HM_ARG_INT ? (double)stop.i : stop.f;
  const double s = step.kind == HM_ARG_INT ? (double)step.i : step.f;
  const double n = ceil((b - a) / s);
  if (s == 0 || !isfinite(n) || n > 1e15)
    hb_error(L, "arange: start, stop and step must be finite, and the step not 0");
  return n > 0 ? (int64_t)n : 0;
}

/* arange([start = 0,] stop[, step = 1][, options]) */
static int l_arange(lua_State *L) {
  hb_state *st = hb_enter(L);
  options o;
  const int last = read_options(L, "arange", &o);
  if (last < 1 || last > 3) return hb_error(L, "arange: expected [start,] stop[, step], got %d numbers", last);
  const hm_arg start = last > 1 ? read_number(L, 1, "arange", "start") : hm_i(0);
  const hm_arg stop = read_number(L, last > 1 ? 2 : 1, "arange", "stop");
  const hm_arg step = last > 2 ? read_number(L, 3, "arange", "step") : hm_i(1);
  const bool ints = start.kind == HM_ARG_INT && stop.kind == HM_ARG_INT && step.kind == HM_ARG_INT;
  const hm_attr shape = {.n = 1, .v = {arange_count(L, start, stop, step)}};
  return make(L, st, "arange", &o, ints ? HM_I64 : HM_F32, &shape, HM_OP_ARANGE_, (const hm_arg[]){start, step}, NULL);
}

/* linspace(start, stop, n[, options]): both ends exact */
static int l_linspace(lua_State *L) {
  hb_state *st = hb_enter(L);
  options o;
  const int last = read_options(L, "linspace", &o);
  if (last != 3) return hb_error(L, "linspace: expected start, stop and n, got %d arguments", last);
  const double start = hb_number(L, 1, "linspace", "start"), stop = hb_number(L, 2, "linspace", "stop");
  const int64_t n = hb_integer(L, 3, "linspace", "n");
  if (n < 0 || n > INT64_MAX / 16) return hb_error(L, "linspace: n must not be negative, got %I", (LUAI_UACINT)n);
  double *data = lua_newuserdatauv(L, (size_t)n * sizeof *data + 1, 0);
  const double step = n > 1 ? (stop - start) / (double)(n - 1) : 0;
  for (int64_t i = 0; i < n; i++)
    data[i] = i < (n + 1) / 2 ? start + step * (double)i : stop - step * (double)(n - 1 - i);
  hm_tensor **slot = hb_shell(L, st);
  check_made(L, st, hm_from_host(data, HM_F64, 1, &n, o.dtype == HM_NONE ? HM_F32 : o.dtype, o.device, slot),
             "linspace");
  if (o.requires_grad) hb_check(L, st, hm_set_requires_grad(*slot, true));
  return 1;
}

/* eye(n[, m][, options]) */
static int l_eye(lua_State *L) {
  hb_state *st = hb_enter(L);
  options o;
  const int last = read_options(L, "eye", &o);
  if (last < 1 || last > 2) return hb_error(L, "eye: expected n[, m], got %d arguments", last);
  const int64_t n = hb_integer(L, 1, "eye", "n"), m = last > 1 ? hb_integer(L, 2, "eye", "m") : n;
  if (n < 0 || m < 0) return hb_error(L, "eye: sizes must not be negative");
  const hm_attr shape = {.n = 2, .v = {n, m}};
  return make(L, st, "eye", &o, HM_F32, &shape, HM_OP_EYE_, NULL, NULL);
}

/* ====== From nested tables ====== */

typedef struct nested {
  const char *who;
  int ndim;
  int64_t shape[HM_MAX_NDIM];
  bool floats, integers, booleans; /* what kinds of values there are */
  bool to_f64;                     /* the target is float64 */
  bool stage_float;                /* values go to `data` as doubles, else as int64_t */
  char *data;
} nested;

/* Shape of the table at the top, by its first entries. */
static void find_shape(lua_State *L, nested *n) {
  n->ndim = 0;
  lua_pushvalue(L, -1);
  while (lua_type(L, -1) == LUA_TTABLE) {
    if (n->ndim == HM_MAX_NDIM) hb_error(L, "%s: tables are nested more than %d deep", n->who, (int)HM_MAX_NDIM);
    n->shape[n->ndim++] = (int64_t)lua_rawlen(L, -1);
    lua_rawgeti(L, -1, 1);
    lua_remove(L, -2);
  }
  lua_pop(L, 1);
}

/* i as a double whose last bit is set if anything was lost (rounding to odd): rounding that once more, to float32 or
 * less, is exact. */
static double round_to_odd(int64_t i) {
  double f = (double)i;
  const bool past = f >= 0x1p63; /* rounded up beyond the range */
  if (!past && (int64_t)f == i) return f;
  if (past || (i > 0 ? (int64_t)f > i : (int64_t)f < i)) f = nextafter(f, 0);
  uint64_t bits;
  memcpy(&bits, &f, sizeof bits);
  bits |= 1;
  memcpy(&f, &bits, sizeof f);
  return f;
}

static void stage_value(lua_State *L, nested *n, int type) {
  if (n->stage_float) {
    double f;
    if (type == LUA_TBOOLEAN) f = lua_toboolean(L, -1);
    else if (lua_isinteger(L, -1)) f = n->to_f64 ? (double)lua_tointeger(L, -1) : round_to_odd(lua_tointeger(L, -1));
    else f = lua_tonumber(L, -1);
    memcpy(n->data, &f, sizeof f);
  } else {
    const int64_t i = type == LUA_TBOOLEAN ? lua_toboolean(L, -1) : lua_tointeger(L, -1);
    memcpy(n->data, &i, sizeof i);
  }
  n->data += 8;
}

/* Walks the table at the top from dim d: without data it checks the shape and notes the kinds of values, with data it
 * stores them. */
static void walk(lua_State *L, nested *n, int d) {
  const int type = lua_type(L, -1);
  if (d == n->ndim) {
    if (type == LUA_TTABLE) hb_error(L, "%s: tables are nested unevenly: a table where a number should be", n->who);
    if (type != LUA_TNUMBER && type != LUA_TBOOLEAN)
      hb_error(L, "%s: values must be numbers or booleans, got %s", n->who, hb_came(L, -1));
    if (n->data) stage_value(L, n, type);
    else if (type == LUA_TBOOLEAN) n->booleans = true;
    else if (lua_isinteger(L, -1)) n->integers = true;
    else n->floats = true;
    return;
  }
  if (type != LUA_TTABLE)
    hb_error(L, "%s: tables are nested unevenly: %s where a table of %I should be", n->who, hb_came(L, -1),
             (LUAI_UACINT)n->shape[d]);
  if ((int64_t)lua_rawlen(L, -1) != n->shape[d])
    hb_error(L, "%s: tables of unequal length in dim %d: %I and %I", n->who, d + 1, (LUAI_UACINT)n->shape[d],
             (LUAI_UACINT)lua_rawlen(L, -1));
  for (int64_t k = 1; k <= n->shape[d]; k++) {
    lua_rawgeti(L, -1, k);
    walk(L, n, d + 1);
    lua_pop(L, 1);
  }
}

void hb_table_to_tensor(lua_State *L, hb_state *st, int idx, int dtype, int device, const char *who) {
  luaL_checkstack(L, HM_MAX_NDIM + 16, NULL);
  nested n = {.who = who};
  lua_pushvalue(L, idx);
  find_shape(L, &n);
  walk(L, &n, 0);
  if (dtype == HM_NONE) dtype = n.booleans && !n.integers && !n.floats ? HM_BOOL : HM_F32;
  int64_t numel = 1;
  for (int d = 0; d < n.ndim; d++) numel *= n.shape[d];
  n.stage_float = n.floats;
  n.to_f64 = dtype == HM_F64;
  n.data = lua_newuserdatauv(L, (size_t)numel * 8 + 8, 0);
  char *start = n.data;
  lua_insert(L, -2);
  walk(L, &n, 0);
  lua_pop(L, 1);
  hm_tensor **slot = hb_shell(L, st);
  check_made(L, st, hm_from_host(start, n.stage_float ? HM_F64 : HM_I64, n.ndim, n.shape, dtype, device, slot), who);
  lua_remove(L, -2);
}

/* tensor(values[, options]): nested tables, a number, a boolean, or a tensor to copy, which stays on its device unless
 * one is given */
static int l_tensor(lua_State *L) {
  hb_state *st = hb_enter(L);
  options o = {HM_NONE, default_device, false};
  bool device_given = false;
  const int top = lua_gettop(L);
  if (top == 0 || top > 2) return hb_error(L, "tensor: expected values and a table of options, got %d arguments", top);
  if (top == 2) {
    const hb_option list[] = {{"dtype", HB_DTYPE, &o.dtype},
                              {"device", HB_DEVICE, &o.device},
                              {"requires_grad", HB_BOOL, &o.requires_grad},
                              {0}};
    hb_options(L, 2, "tensor", list);
    device_given = lua_istable(L, 2) && lua_getfield(L, 2, "device") != LUA_TNIL;
    lua_settop(L, 2);
  }
  if (hb_test(L, st, 1)) {
    hm_tensor *t = hb_tensor(L, st, 1, "tensor", "the value");
    hm_tensor **plain = hb_shell(L, st), **slot = hb_shell(L, st);
    hb_check(L, st, hm_op_detach(hm_t(t), plain));
    hb_check(L, st, hm_to(*plain, o.dtype, device_given ? o.device : -1, true, slot));
  } else {
    hb_table_to_tensor(L, st, 1, o.dtype, o.device, "tensor");
  }
  if (o.requires_grad) hb_check(L, st, hm_set_requires_grad(*(hm_tensor **)lua_touserdata(L, -1), true));
  return 1;
}

/* ====== cat and stack ====== */

static int join(lua_State *L, const char *who, bool stack) {
  hb_state *st = hb_enter(L);
  int n;
  lua_settop(L, 2);
  hm_tensor **list = hb_tensor_list(L, st, 1, who, "the list", false, &n);
  if (n == 0) return hb_error(L, "%s: the list is empty", who);
  const int64_t dim = lua_isnil(L, 2) ? 0 : hb_dim(L, 2, list[0]->ndim + stack, who, "the dim");
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, (stack ? hm_stack : hm_cat)(list, n, (int)dim, slot));
  hb_settle_shared(L, st, -1, *slot);
  return 1;
}

/* cat(list[, dim = 1]), stack(list[, dim = 1]) */
static int l_cat(lua_State *L) { return join(L, "cat", false); }
static int l_stack(lua_State *L) { return join(L, "stack", true); }

void hb_open_factory(lua_State *L, hb_state *st) {
  (void)st;
  static const luaL_Reg functions[] = {{"tensor", l_tensor},
                                       {"empty", l_empty},
                                       {"zeros", l_zeros},
                                       {"ones", l_ones},
                                       {"full", l_full},
                                       {"rand", l_rand},
                                       {"randn", l_randn},
                                       {"randint", l_randint},
                                       {"arange", l_arange},
                                       {"linspace", l_linspace},
                                       {"eye", l_eye},
                                       {"cat", l_cat},
                                       {"stack", l_stack},
                                       {"set_default_device", l_set_default_device},
                                       {"get_default_device", l_get_default_device},
                                       {NULL, NULL}};
  hb_functions(L, functions);
}
