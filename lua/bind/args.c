/*
 * args.c -- small arguments: options, dtypes, devices, numbers, sizes, dims and positions, and the messages about them.
 *
 * Everything here reads the Lua stack and raises by hb_error; nothing is acquired, so an error leaks nothing.
 */
#include <string.h>

#include "bind.h"

/* ====== What came, for messages ====== */

const char *hb_came(lua_State *L, int idx) {
  if (lua_type(L, idx) == LUA_TSTRING) return lua_pushfstring(L, "\"%s\"", lua_tostring(L, idx));
  if (lua_type(L, idx) == LUA_TNUMBER) return lua_pushfstring(L, "the number %s", luaL_tolstring(L, idx, NULL));
  if (luaL_getmetafield(L, idx, "__name") == LUA_TSTRING) return lua_tostring(L, -1);
  return luaL_typename(L, idx);
}

/* ====== Closest known name ====== */

enum { MAX_NAME = 40 };

/* Edit distance (insert, delete, replace, swap of neighbours) of two short names. */
static int distance(const char *a, const char *b) {
  const int n = (int)strlen(a), m = (int)strlen(b);
  if (n > MAX_NAME || m > MAX_NAME) return MAX_NAME;
  int row[3][MAX_NAME + 1];
  for (int j = 0; j <= m; j++) row[0][j] = j;
  for (int i = 1; i <= n; i++) {
    int *now = row[i % 3], *up = row[(i - 1) % 3], *up2 = row[(i + 1) % 3];
    now[0] = i;
    for (int j = 1; j <= m; j++) {
      int best = up[j - 1] + (a[i - 1] != b[j - 1]);
      if (up[j] + 1 < best) best = up[j] + 1;
      if (now[j - 1] + 1 < best) best = now[j - 1] + 1;
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && up2[j - 2] + 1 < best)
        best = up2[j - 2] + 1;
      now[j] = best;
    }
  }
  return row[n % 3][m];
}

const char *hb_closest(const char *name, const char *const *list) {
  const char *best = NULL;
  const int length = (int)strlen(name);
  int limit = (length < 6 ? 2 : length / 3) + 1;
  for (; *list; list++) {
    const int d = distance(name, *list);
    if (d < limit) {
      limit = d;
      best = *list;
    }
  }
  return best;
}

const char *hb_push_suggestion(lua_State *L, const char *name, const char *const *list) {
  const char *best = hb_closest(name, list);
  if (best) return lua_pushfstring(L, "; did you mean \"%s\"?", best);
  luaL_Buffer b;
  luaL_buffinit(L, &b);
  for (int i = 0; list[i]; i++) {
    luaL_addstring(&b, i == 0 ? "; known: " : ", ");
    luaL_addstring(&b, list[i]);
  }
  luaL_pushresult(&b);
  return lua_tostring(L, -1);
}

/* ====== Options ====== */

bool hb_is_options(lua_State *L, int idx) {
  if (lua_type(L, idx) != LUA_TTABLE) return false;
  idx = lua_absindex(L, idx);
  if (lua_rawlen(L, idx) > 0) return false;
  lua_pushnil(L);
  if (!lua_next(L, idx)) return false;
  const bool options = lua_type(L, -2) == LUA_TSTRING;
  lua_pop(L, 2);
  return options;
}

/* "option dtype": the label of an option in messages. */
static const char *label(lua_State *L, const char *name) { return lua_pushfstring(L, "option %s", name); }

static void read_option(lua_State *L, const char *who, const hb_option *o) {
  const int idx = lua_gettop(L);
  switch (o->type) {
  case HB_BOOL: *(bool *)o->value = hb_bool(L, idx, who, label(L, o->name), false); break;
  case HB_INT: *(int64_t *)o->value = hb_integer(L, idx, who, label(L, o->name)); break;
  case HB_NUMBER: *(double *)o->value = hb_number(L, idx, who, label(L, o->name)); break;
  case HB_DTYPE: *(int *)o->value = hb_dtype(L, idx, who); break;
  case HB_DEVICE: *(int *)o->value = hb_device(L, idx, who); break;
  case HB_ANY: break;
  }
  lua_settop(L, idx);
}

static int unknown_option(lua_State *L, const char *who, const char *name, const hb_option *list) {
  const char *names[32];
  int n = 0;
  for (; list[n].name && n < 31; n++) names[n] = list[n].name;
  names[n] = NULL;
  return hb_error(L, "%s: unknown option \"%s\"%s", who, name, hb_push_suggestion(L, name, names));
}

void hb_options(lua_State *L, int idx, const char *who, const hb_option *list) {
  if (lua_isnoneornil(L, idx)) return;
  if (lua_type(L, idx) != LUA_TTABLE) hb_error(L, "%s: options must be a table, got %s", who, hb_came(L, idx));
  luaL_checkstack(L, 12, NULL);
  idx = lua_absindex(L, idx);
  lua_pushnil(L);
  while (lua_next(L, idx)) {
    if (lua_type(L, -2) != LUA_TSTRING)
      hb_error(L, "%s: options must have names as keys, got the key %s", who, hb_came(L, -2));
    const char *name = lua_tostring(L, -2);
    const hb_option *o = list;
    while (o->name && strcmp(o->name, name) != 0) o++;
    if (!o->name) unknown_option(L, who, name, list);
    read_option(L, who, o);
    lua_pop(L, 1);
  }
}

/* ====== dtypes and devices ====== */

int hb_dtype_by_name(const char *name) {
  for (int i = 0; i < HM_DTYPE_COUNT; i++)
    if (strcmp(name, hm_dtype_name(i)) == 0 || strcmp(name, hm_dtype_short(i)) == 0) return i;
  static const struct {
    const char *name;
    int dtype;
  } also[] = {{"float8_e4m3fn", HM_F8_E4M3}, {"f8e4m3", HM_F8_E4M3}, {"f8e5m2", HM_F8_E5M2}}; /* PyTorch's, and short */
  for (size_t i = 0; i < sizeof also / sizeof also[0]; i++)
    if (strcmp(name, also[i].name) == 0) return also[i].dtype;
  return HM_NONE;
}

int hb_dtype(lua_State *L, int idx, const char *who) {
  if (lua_type(L, idx) != LUA_TSTRING)
    hb_error(L, "%s: a dtype must be a string like \"float16\", got %s", who, hb_came(L, idx));
  const char *name = lua_tostring(L, idx);
  const int dtype = hb_dtype_by_name(name);
  if (dtype != HM_NONE) return dtype;
  static const char *const names[] = {
#define X(id, long_name, short_name, bytes, kind) long_name,
      HM_DTYPE_MAP(X)
#undef X
          NULL};
  static const char *const both[] = {
#define X(id, long_name, short_name, bytes, kind) long_name, short_name,
      HM_DTYPE_MAP(X)
#undef X
          NULL};
  return hb_error(L, "%s: unknown dtype \"%s\"%s", who, name,
                  hb_push_suggestion(L, name, hb_closest(name, both) ? both : names));
}

int hb_device(lua_State *L, int idx, const char *who) {
  if (lua_type(L, idx) != LUA_TSTRING)
    hb_error(L, "%s: a device must be a string like \"cpu\", got %s", who, hb_came(L, idx));
  int device = HM_CPU;
  const int status = hm_device_parse(lua_tostring(L, idx), &device);
  if (status) hb_error(L, "%s: %s", who, hm_error_message());
  return device;
}

/* ====== Scalars ====== */

int64_t hb_integer(lua_State *L, int idx, const char *who, const char *what) {
  int ok = 0;
  const lua_Integer i = lua_type(L, idx) == LUA_TNUMBER ? lua_tointegerx(L, idx, &ok) : 0;
  if (!ok) hb_error(L, "%s: %s must be an integer, got %s", who, what, hb_came(L, idx));
  return i;
}

double hb_number(lua_State *L, int idx, const char *who, const char *what) {
  if (lua_type(L, idx) != LUA_TNUMBER) hb_error(L, "%s: %s must be a number, got %s", who, what, hb_came(L, idx));
  return lua_tonumber(L, idx);
}

bool hb_bool(lua_State *L, int idx, const char *who, const char *what, bool absent) {
  if (lua_isnoneornil(L, idx)) return absent;
  if (lua_type(L, idx) != LUA_TBOOLEAN) hb_error(L, "%s: %s must be true or false, got %s", who, what, hb_came(L, idx));
  return lua_toboolean(L, idx);
}

const char *hb_string(lua_State *L, int idx, const char *who, const char *what) {
  if (lua_type(L, idx) != LUA_TSTRING) hb_error(L, "%s: %s must be a string, got %s", who, what, hb_came(L, idx));
  return lua_tostring(L, idx);
}

/* ====== Sizes, dims, positions ====== */

/* Entry k (from 0) of the array table at idx. */
static int64_t table_integer(lua_State *L, int idx, int k, const char *who, const char *what) {
  int ok = 0;
  const int type = lua_rawgeti(L, idx, k + 1);
  const lua_Integer i = type == LUA_TNUMBER ? lua_tointegerx(L, -1, &ok) : 0;
  if (!ok) hb_error(L, "%s: %s must hold integers, entry %d is %s", who, what, k + 1, hb_came(L, -1));
  lua_pop(L, 1);
  return i;
}

static void too_many(lua_State *L, const char *who, const char *what) {
  hb_error(L, "%s: %s has more than %d entries", who, what, (int)HM_MAX_NDIM);
}

int hb_sizes(lua_State *L, int idx, int last, const char *who, const char *what, hm_attr *attr) {
  attr->n = 0;
  if (lua_type(L, idx) == LUA_TTABLE) {
    const lua_Unsigned n = lua_rawlen(L, idx);
    if (n > HM_MAX_NDIM) too_many(L, who, what);
    for (int k = 0; k < (int)n; k++) attr->v[k] = table_integer(L, idx, k, who, what);
    attr->n = (int32_t)n;
    return idx + 1;
  }
  if (idx > last || lua_type(L, idx) != LUA_TNUMBER)
    hb_error(L, "%s: %s must be integers or an array table, got %s", who, what,
             idx > last ? "nothing" : hb_came(L, idx));
  for (; idx <= last && lua_type(L, idx) == LUA_TNUMBER; idx++) {
    if (attr->n == HM_MAX_NDIM) too_many(L, who, what);
    attr->v[attr->n++] = hb_integer(L, idx, who, what);
  }
  return idx;
}

int64_t hb_dim_value(lua_State *L, int64_t dim, int n, const char *who) {
  const int valid = n > 0 ? n : 1; /* a 0-dim tensor counts as having one */
  if (dim == 0)
    hb_error(L, "%s: dim 0 is out of range: a tensor with %d dims has 1 to %d, or -%d to -1\n  hint: dims count from 1",
             who, n, valid, valid);
  if (dim > valid || dim < -valid)
    hb_error(L, "%s: dim %I is out of range: a tensor with %d dims has 1 to %d, or -%d to -1", who, (LUAI_UACINT)dim, n,
             valid, valid);
  return dim > 0 ? dim - 1 : dim + valid;
}

int64_t hb_dim(lua_State *L, int idx, int n, const char *who, const char *what) {
  return hb_dim_value(L, hb_integer(L, idx, who, what), n, who);
}

int64_t hb_position(lua_State *L, int64_t i, int64_t size, int dim, const char *who) {
  if (i == 0)
    hb_error(L, "%s: position 0 is out of range for dim %d of size %I\n  hint: positions count from 1", who, dim + 1,
             (LUAI_UACINT)size);
  if (i > size || i < -size) {
    if (size == 0) hb_error(L, "%s: position %I is out of range: dim %d is empty", who, (LUAI_UACINT)i, dim + 1);
    hb_error(L, "%s: position %I is out of range for dim %d: 1 to %I, or -%I to -1", who, (LUAI_UACINT)i, dim + 1,
             (LUAI_UACINT)size, (LUAI_UACINT)size);
  }
  return i > 0 ? i - 1 : i + size;
}

void hb_push_ints(lua_State *L, int n, const int64_t *v) {
  lua_createtable(L, n, 0);
  for (int k = 0; k < n; k++) {
    lua_pushinteger(L, v[k]);
    lua_rawseti(L, -2, k + 1);
  }
}
