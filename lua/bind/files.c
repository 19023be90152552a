/*
 * files.c -- safetensors, npy, npz, IDX and the batch loader.
 *
 * "The world refused" (no such file, damaged data) gives nil, message, code from the functions that save and load;
 * everything else, and core.idx, raises.  Open files and loaders are userdata, so that an error in the middle closes
 * them.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bind.h"

#define HB_FILE "halfmoon.Safetensors"
#define HB_NPZ "halfmoon.Npz"
#define HB_LOADER "halfmoon.Loader"

static const char *errno_name(int e) {
  static const struct {
    int value;
    const char *name;
  } known[] = {{ENOENT, "ENOENT"},
               {EACCES, "EACCES"},
               {EPERM, "EPERM"},
               {EISDIR, "EISDIR"},
               {ENOTDIR, "ENOTDIR"},
               {ENOSPC, "ENOSPC"},
               {EROFS, "EROFS"},
               {EEXIST, "EEXIST"},
               {EMFILE, "EMFILE"},
               {ENFILE, "ENFILE"},
               {ENAMETOOLONG, "ENAMETOOLONG"},
               {ELOOP, "ELOOP"},
               {EDQUOT, "EDQUOT"},
               {EFBIG, "EFBIG"},
               {EBUSY, "EBUSY"},
               {ENODEV, "ENODEV"},
               {ENXIO, "ENXIO"},
               {EINTR, "EINTR"},
               {EINVAL, "EINVAL"}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i].value == e) return known[i].name;
  return "EIO";
}

int hb_refused(lua_State *L, int status, int saved_errno) {
  if (status != HM_ERR_IO && status != HM_ERR_FORMAT) return hb_raise(L, status);
  lua_pushnil(L);
  lua_pushstring(L, hm_error_message());
  lua_pushstring(L, status == HM_ERR_FORMAT ? "EFORMAT" : errno_name(saved_errno));
  return 3;
}

int hb_read_tensor(lua_State *L, const char *who, int (*read)(const char *path, hm_tensor **out)) {
  hb_state *st = hb_enter(L);
  const char *path = hb_string(L, 1, who, "the path");
  hm_tensor **slot = hb_shell(L, st);
  errno = 0;
  const int status = read(path, slot);
  return status ? hb_refused(L, status, errno) : 1;
}

/* ====== safetensors ====== */

/* Entries at idx: array of {name, tensor}.  Pushes the buffer; names and tensors are borrowed from the table. */
static hm_named *read_entries(lua_State *L, hb_state *st, int idx, const char *who, int *n) {
  if (lua_type(L, idx) != LUA_TTABLE)
    hb_error(L, "%s: the entries must be an array of {name, tensor}, got %s", who, hb_came(L, idx));
  *n = (int)lua_rawlen(L, idx);
  hm_named *list = lua_newuserdatauv(L, (size_t)*n * sizeof *list + 1, 0);
  for (int i = 0; i < *n; i++) {
    if (lua_rawgeti(L, idx, i + 1) != LUA_TTABLE)
      hb_error(L, "%s: entry %d must be {name, tensor}, got %s", who, i + 1, hb_came(L, -1));
    lua_rawgeti(L, -1, 1);
    lua_rawgeti(L, -2, 2);
    if (lua_type(L, -2) != LUA_TSTRING)
      hb_error(L, "%s: the name of entry %d must be a string, got %s", who, i + 1, hb_came(L, -2));
    list[i].name = lua_tostring(L, -2);
    list[i].tensor = hb_tensor(L, st, -1, who, list[i].name);
    lua_pop(L, 3);
  }
  return list;
}

static int compare_pairs(const void *a, const void *b) {
  return strcmp(((const hm_pair *)a)->key, ((const hm_pair *)b)->key);
}

/* Metadata at idx: {string = string} or nothing, sorted: the same table gives the same file.  Pushes the buffer. */
static hm_pair *read_metadata(lua_State *L, int idx, int *n) {
  *n = 0;
  if (lua_isnoneornil(L, idx)) return NULL;
  if (lua_type(L, idx) != LUA_TTABLE)
    hb_error(L, "safetensors_save: metadata must be a table of strings, got %s", hb_came(L, idx));
  int count = 0;
  for (lua_pushnil(L); lua_next(L, idx); lua_pop(L, 1)) count++;
  hm_pair *list = lua_newuserdatauv(L, (size_t)count * sizeof *list + 1, 0);
  for (lua_pushnil(L); lua_next(L, idx); lua_pop(L, 1)) {
    if (lua_type(L, -2) != LUA_TSTRING || lua_type(L, -1) != LUA_TSTRING)
      hb_error(L, "safetensors_save: metadata must have strings as keys and values, got the pair %s, %s",
               hb_came(L, -2), hb_came(L, -1));
    list[(*n)++] = (hm_pair){lua_tostring(L, -2), lua_tostring(L, -1)};
  }
  if (*n > 1) qsort(list, (size_t)*n, sizeof *list, compare_pairs);
  return list;
}

/* core.safetensors_save(path, {{name, tensor}, ...}[, {k = v}]) -> true | nil, message, code */
static int l_save(lua_State *L) {
  hb_state *st = hb_enter(L);
  lua_settop(L, 3);
  const char *path = hb_string(L, 1, "safetensors_save", "the path");
  int n, n_meta;
  hm_named *entries = read_entries(L, st, 2, "safetensors_save", &n);
  hm_pair *meta = read_metadata(L, 3, &n_meta);
  errno = 0;
  const int status = hm_safetensors_save(path, entries, n, meta, n_meta);
  if (status) return hb_refused(L, status, errno);
  lua_pushboolean(L, true);
  return 1;
}

static int l_file_gc(lua_State *L) {
  hm_safetensors **file = lua_touserdata(L, 1);
  hm_safetensors *f = *file;
  *file = NULL;
  if (f) hm_safetensors_close(f);
  return 0;
}

/* Pushes the array of {name, tensor}; a status ends it. */
static int push_entries(lua_State *L, hb_state *st, hm_safetensors *f, int device) {
  const int n = hm_safetensors_count(f);
  lua_createtable(L, n, 0);
  for (int i = 0; i < n; i++) {
    lua_createtable(L, 2, 0);
    lua_pushstring(L, hm_safetensors_name(f, i));
    lua_rawseti(L, -2, 1);
    hm_tensor **slot = hb_shell(L, st);
    const int status = hm_safetensors_read(f, i, device, slot);
    if (status) return status;
    lua_rawseti(L, -2, 2);
    lua_rawseti(L, -2, i + 1);
  }
  return HM_OK;
}

/* core.safetensors_load(path[, device]) -> {{name, tensor}, ...}, metadata | nil, message, code */
static int l_load(lua_State *L) {
  hb_state *st = hb_enter(L);
  lua_settop(L, 2);
  const char *path = hb_string(L, 1, "safetensors_load", "the path");
  const int device = lua_isnil(L, 2) ? HM_CPU : hb_device(L, 2, "safetensors_load");
  hm_safetensors **file = lua_newuserdatauv(L, sizeof *file, 0);
  *file = NULL;
  luaL_setmetatable(L, HB_FILE);
  errno = 0;
  int status = hm_safetensors_open(path, file);
  if (status) return hb_refused(L, status, errno);
  errno = 0;
  status = push_entries(L, st, *file, device);
  if (status) {
    const int saved = errno;
    hm_safetensors_close(*file);
    *file = NULL;
    return hb_refused(L, status, saved);
  }
  lua_newtable(L);
  for (int i = 0; i < hm_safetensors_metadata_count(*file); i++) {
    const hm_pair p = hm_safetensors_metadata(*file, i);
    lua_pushstring(L, p.value);
    lua_setfield(L, -2, p.key);
  }
  hm_safetensors_close(*file);
  *file = NULL;
  return 2;
}

/* ====== npy and npz ====== */

/* core.npy_save(path, tensor) -> true | nil, message, code */
static int l_npy_save(lua_State *L) {
  hb_state *st = hb_enter(L);
  const char *path = hb_string(L, 1, "npy_save", "the path");
  hm_tensor *t = hb_tensor(L, st, 2, "npy_save", "the array");
  errno = 0;
  const int status = hm_npy_save(path, t);
  if (status) return hb_refused(L, status, errno);
  lua_pushboolean(L, true);
  return 1;
}

/* core.npy_load(path) -> tensor | nil, message, code */
static int l_npy_load(lua_State *L) { return hb_read_tensor(L, "npy_load", hm_npy_read); }

/* core.npz_save(path, {{name, tensor}, ...}) -> true | nil, message, code */
static int l_npz_save(lua_State *L) {
  hb_state *st = hb_enter(L);
  lua_settop(L, 2);
  const char *path = hb_string(L, 1, "npz_save", "the path");
  int n;
  hm_named *entries = read_entries(L, st, 2, "npz_save", &n);
  errno = 0;
  const int status = hm_npz_save(path, entries, n);
  if (status) return hb_refused(L, status, errno);
  lua_pushboolean(L, true);
  return 1;
}

static int l_npz_gc(lua_State *L) {
  hm_npz **slot = lua_touserdata(L, 1);
  hm_npz *z = *slot;
  *slot = NULL;
  hm_npz_close(z);
  return 0;
}

/* core.npz_load(path) -> {{name, tensor}, ...} | nil, message, code */
static int l_npz_load(lua_State *L) {
  hb_state *st = hb_enter(L);
  const char *path = hb_string(L, 1, "npz_load", "the path");
  hm_npz **z = lua_newuserdatauv(L, sizeof *z, 0);
  *z = NULL;
  luaL_setmetatable(L, HB_NPZ);
  errno = 0;
  int status = hm_npz_open(path, z);
  if (status) return hb_refused(L, status, errno);
  const int n = hm_npz_count(*z);
  lua_createtable(L, n, 0);
  for (int i = 0; i < n && !status; i++) {
    lua_createtable(L, 2, 0);
    lua_pushstring(L, hm_npz_name(*z, i));
    lua_rawseti(L, -2, 1);
    hm_tensor **slot = hb_shell(L, st);
    errno = 0;
    status = hm_npz_read(*z, i, slot);
    lua_rawseti(L, -2, 2);
    lua_rawseti(L, -2, i + 1);
  }
  const int saved = errno;
  hm_npz_close(*z);
  *z = NULL;
  return status ? hb_refused(L, status, saved) : 1;
}

/* core.idx(path) -> tensor */
static int l_idx(lua_State *L) {
  hb_state *st = hb_enter(L);
  const char *path = hb_string(L, 1, "idx", "the path");
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_idx_read(path, slot));
  return 1;
}

/* ====== The loader ====== */

typedef struct hb_loader {
  hm_loader *l;
  int n; /* tensors in a batch */
} hb_loader;

static hb_loader *loader(lua_State *L, const char *who) {
  hb_loader *u = luaL_testudata(L, 1, HB_LOADER);
  if (!u) hb_error(L, "%s: self must be a loader, got %s", who, hb_came(L, 1));
  if (!u->l) hb_error(L, "%s: the loader was closed", who);
  return u;
}

/* core.loader_new({tensors}, {batch_size, drop_last, shuffle, seed, prefetch, dtype, scale, shift, device}) */
static int l_loader_new(lua_State *L) {
  hb_state *st = hb_enter(L);
  lua_settop(L, 2);
  hm_loader_options o = {.batch_size = 1, .convert_to = HM_NONE, .scale = 1};
  int64_t seed = 0, prefetch = 2;
  hb_options(L, 2, "loader",
             (const hb_option[]){{"batch_size", HB_INT, &o.batch_size},
                                 {"drop_last", HB_BOOL, &o.drop_last},
                                 {"shuffle", HB_BOOL, &o.shuffle},
                                 {"seed", HB_INT, &seed},
                                 {"prefetch", HB_INT, &prefetch},
                                 {"dtype", HB_DTYPE, &o.convert_to},
                                 {"scale", HB_NUMBER, &o.scale},
                                 {"shift", HB_NUMBER, &o.shift},
                                 {"device", HB_DEVICE, &o.device},
                                 {0}});
  if (prefetch < 0 || prefetch > 1024)
    return hb_error(L, "loader: prefetch must be from 0 to 1024, got %I", (LUAI_UACINT)prefetch);
  o.seed = (uint64_t)seed;
  o.prefetch = (int)prefetch;
  int n;
  hm_tensor **list = hb_tensor_list(L, st, 1, "loader", "the list of tensors", false, &n);
  hb_loader *u = lua_newuserdatauv(L, sizeof *u, 0);
  *u = (hb_loader){NULL, n};
  luaL_setmetatable(L, HB_LOADER);
  hb_check(L, st, hm_loader_new(list, n, &o, &u->l));
  return 1;
}

/* l:close(), __close and __gc: stops the thread. */
static int l_loader_close(lua_State *L) {
  hb_loader *u = luaL_checkudata(L, 1, HB_LOADER);
  hm_loader *l = u->l;
  u->l = NULL;
  if (l) hm_loader_free(l);
  return 0;
}

/* l:batches() -> how many an epoch has */
static int l_loader_batches(lua_State *L) {
  hb_enter(L);
  lua_pushinteger(L, hm_loader_batches(loader(L, "batches")->l));
  return 1;
}

/* l:start(epoch[, first]): first: batches of the epoch that are passed over */
static int l_loader_start(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_loader *u = loader(L, "start");
  const int64_t first = lua_isnoneornil(L, 3) ? 0 : hb_integer(L, 3, "start", "the first batch");
  hb_check(L, st, hm_loader_start(u->l, hb_integer(L, 2, "start", "the epoch"), first));
  return 0;
}

/* l:next() -> tensors..., or nothing at the end of the epoch */
static int l_loader_next(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_loader *u = loader(L, "next");
  hb_pressure_pause(L, true);
  lua_settop(L, 1);
  luaL_checkstack(L, u->n + 8, "too many tensors");
  hm_tensor **out = lua_newuserdatauv(L, (size_t)u->n * sizeof *out + 1, 0);
  for (int i = 0; i < u->n; i++) {
    out[i] = NULL;
    hb_shell(L, st);
  }
  bool done = false;
  const int status = hm_loader_next(u->l, out, &done);
  for (int i = 0; i < u->n; i++) *(hm_tensor **)lua_touserdata(L, 3 + i) = out[i];
  hb_check(L, st, status);
  return done ? 0 : u->n;
}

void hb_open_files(lua_State *L, hb_state *st) {
  (void)st;
  static const luaL_Reg functions[] = {{"safetensors_save", l_save},
                                       {"safetensors_load", l_load},
                                       {"npy_save", l_npy_save},
                                       {"npy_load", l_npy_load},
                                       {"npz_save", l_npz_save},
                                       {"npz_load", l_npz_load},
                                       {"idx", l_idx},
                                       {"loader_new", l_loader_new},
                                       {NULL, NULL}};
  static const luaL_Reg methods[] = {{"start", l_loader_start},
                                     {"next", l_loader_next},
                                     {"batches", l_loader_batches},
                                     {"close", l_loader_close},
                                     {NULL, NULL}};
  hb_metatable(L, HB_FILE, l_file_gc, false, NULL);
  hb_metatable(L, HB_NPZ, l_npz_gc, false, NULL);
  hb_metatable(L, HB_LOADER, l_loader_close, true, methods);
  hb_functions(L, functions);
  hb_open_tables(L);
}
