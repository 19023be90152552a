/*
 * tables.c -- data sets that are text or plain bytes: CSV, CIFAR-10, any file as bytes; and the random state as a whole,
 * for checkpoints.
 *
 * What the world refuses (no such file, damaged data) gives nil, message, code; the rest raises.  An open table is a
 * userdata that Lua's collector closes.
 */
#include <errno.h>
#include <string.h>

#include "bind.h"

#define HB_CSV "halfmoon.Csv"

/* ====== CSV ====== */

/* core.csv_open(path, delimiter, header) -> table | nil, message, code; header: true, false, or nil to look */
static int l_csv_open(lua_State *L) {
  hb_enter(L);
  lua_settop(L, 3);
  const char *path = hb_string(L, 1, "csv", "the path"), *delimiter = hb_string(L, 2, "csv", "the delimiter");
  if (strlen(delimiter) != 1) return hb_error(L, "csv: the delimiter must be one character, got \"%s\"", delimiter);
  const hm_csv_options o = {delimiter[0], lua_isnil(L, 3) ? -1 : lua_toboolean(L, 3)};
  hm_csv **c = lua_newuserdatauv(L, sizeof *c, 0);
  *c = NULL;
  luaL_setmetatable(L, HB_CSV);
  errno = 0;
  const int status = hm_csv_open(path, &o, c);
  return status ? hb_refused(L, status, errno) : 1;
}

static hm_csv *csv(lua_State *L) {
  hm_csv **c = luaL_checkudata(L, 1, HB_CSV);
  if (!*c) hb_error(L, "csv: the table was closed");
  return *c;
}

/* c:names() -> {name, ...} or nil without a header, and how many columns there are */
static int l_csv_names(lua_State *L) {
  hb_enter(L);
  const hm_csv *c = csv(L);
  const int n = hm_csv_columns(c);
  if (hm_csv_name(c, 0)) {
    lua_createtable(L, n, 0);
    for (int i = 0; i < n; i++) {
      lua_pushstring(L, hm_csv_name(c, i));
      lua_rawseti(L, -2, i + 1);
    }
  } else {
    lua_pushnil(L);
  }
  lua_pushinteger(L, n);
  return 2;
}

/* c:read({column from 1, ...}, dtype) -> tensor | nil, message, code */
static int l_csv_read(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_csv *c = csv(L);
  if (lua_type(L, 2) != LUA_TTABLE) return hb_error(L, "csv: expected an array of columns, got %s", hb_came(L, 2));
  const int n = (int)lua_rawlen(L, 2), dtype = hb_dtype(L, 3, "csv");
  int *columns = lua_newuserdatauv(L, (size_t)n * sizeof *columns + 1, 0);
  for (int i = 0; i < n; i++) {
    lua_rawgeti(L, 2, i + 1);
    const int64_t column = hb_integer(L, -1, "csv", "a column");
    if (column < 1 || column > hm_csv_columns(c))
      return hb_error(L, "csv: there is no column %I, only %d of them", (LUAI_UACINT)column, hm_csv_columns(c));
    columns[i] = (int)column - 1;
    lua_pop(L, 1);
  }
  hm_tensor **slot = hb_shell(L, st);
  errno = 0;
  const int status = hm_csv_read(c, columns, n, dtype, slot);
  return status ? hb_refused(L, status, errno) : 1;
}

/* c:close(), __close and __gc */
static int l_csv_close(lua_State *L) {
  hm_csv **slot = luaL_checkudata(L, 1, HB_CSV);
  hm_csv *c = *slot;
  *slot = NULL;
  hm_csv_close(c);
  return 0;
}

/* ====== Bytes ====== */

/* core.bytes(path) -> u8 tensor | nil, message, code */
static int l_bytes(lua_State *L) { return hb_read_tensor(L, "bytes", hm_bytes_read); }

/* core.cifar({path, ...}) -> images, labels | nil, message, code */
static int l_cifar(lua_State *L) {
  hb_state *st = hb_enter(L);
  if (lua_type(L, 1) != LUA_TTABLE || lua_rawlen(L, 1) == 0)
    return hb_error(L, "cifar10: expected an array of paths, got %s", hb_came(L, 1));
  const int n = (int)lua_rawlen(L, 1);
  const char **paths = lua_newuserdatauv(L, (size_t)n * sizeof *paths, 0);
  for (int i = 0; i < n; i++) {
    if (lua_rawgeti(L, 1, i + 1) != LUA_TSTRING) return hb_error(L, "cifar10: path %d must be a string", i + 1);
    paths[i] = lua_tostring(L, -1); /* the table keeps it */
    lua_pop(L, 1);
  }
  hm_tensor **images = hb_shell(L, st), **labels = hb_shell(L, st);
  errno = 0;
  const int status = hm_cifar_read(paths, n, images, labels);
  return status ? hb_refused(L, status, errno) : 2;
}

/* ====== Random state ====== */

/* core.random_states() -> {{seed, offset}, ...}: of every device that there may be, the CPU first; opens none */
static int l_random_states(lua_State *L) {
  hb_enter(L);
  lua_createtable(L, HM_MAX_DEVICES, 0);
  for (int device = 0; device < HM_MAX_DEVICES; device++) {
    uint64_t seed, offset;
    hm_random_get(device, &seed, &offset);
    lua_createtable(L, 2, 0);
    lua_pushinteger(L, (lua_Integer)seed);
    lua_rawseti(L, -2, 1);
    lua_pushinteger(L, (lua_Integer)offset);
    lua_rawseti(L, -2, 2);
    lua_rawseti(L, -2, device + 1);
  }
  return 1;
}

/* core.set_random_states(what random_states gave); devices that it does not name keep theirs */
static int l_set_random_states(lua_State *L) {
  hb_enter(L);
  if (lua_type(L, 1) != LUA_TTABLE) return hb_error(L, "set_random_states: expected a table, got %s", hb_came(L, 1));
  uint64_t state[HM_MAX_DEVICES][2];
  int n = (int)lua_rawlen(L, 1);
  if (n > HM_MAX_DEVICES) n = HM_MAX_DEVICES;
  for (int device = 0; device < n; device++) {
    if (lua_rawgeti(L, 1, device + 1) != LUA_TTABLE)
      return hb_error(L, "set_random_states: entry %d must be {seed, offset}, got %s", device + 1, hb_came(L, -1));
    for (int i = 0; i < 2; i++) {
      lua_rawgeti(L, -1, i + 1);
      state[device][i] = (uint64_t)hb_integer(L, -1, "set_random_states", i == 0 ? "a seed" : "an offset");
      lua_pop(L, 1);
    }
    lua_pop(L, 1);
  }
  for (int device = 0; device < n; device++) hm_random_set(device, state[device][0], state[device][1]);
  return 0;
}

void hb_open_tables(lua_State *L) {
  static const luaL_Reg functions[] = {{"csv_open", l_csv_open},
                                       {"bytes", l_bytes},
                                       {"cifar", l_cifar},
                                       {"random_states", l_random_states},
                                       {"set_random_states", l_set_random_states},
                                       {NULL, NULL}};
  static const luaL_Reg methods[] = {{"names", l_csv_names},
                                     {"read", l_csv_read},
                                     {"close", l_csv_close},
                                     {NULL, NULL}};
  hb_metatable(L, HB_CSV, l_csv_close, true, methods);
  hb_functions(L, functions);
}
