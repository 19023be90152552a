/*
 * sys.c -- the machine as Lua sees it: random seeds, memory statistics, threads, features, devices, clock and terminal.
 */
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bind.h"

/* The device at idx; the default device when absent. */
static int optional_device(lua_State *L, int idx, const char *who) {
  hb_enter(L);
  return lua_isnoneornil(L, idx) ? hb_default_device() : hb_device(L, idx, who);
}

/* ====== Random numbers ====== */

/* core.manual_seed(n) */
static int l_manual_seed(lua_State *L) {
  hb_enter(L);
  hm_seed((uint64_t)hb_integer(L, 1, "manual_seed", "the seed"));
  return 0;
}

/* core.rng_state([device]) -> {seed, offset} */
static int l_rng_state(lua_State *L) {
  uint64_t seed = 0, offset = 0;
  hm_random_get(optional_device(L, 1, "rng_state"), &seed, &offset);
  lua_createtable(L, 0, 2);
  hb_set_integer(L, "seed", (int64_t)seed);
  hb_set_integer(L, "offset", (int64_t)offset);
  return 1;
}

/* core.set_rng_state({seed, offset}[, device]) */
static int l_set_rng_state(lua_State *L) {
  hb_enter(L);
  int64_t seed = 0, offset = 0;
  if (lua_type(L, 1) != LUA_TTABLE) return hb_error(L, "set_rng_state: expected {seed, offset}, got %s", hb_came(L, 1));
  hb_options(L, 1, "set_rng_state", (const hb_option[]){{"seed", HB_INT, &seed}, {"offset", HB_INT, &offset}, {0}});
  hm_random_set(optional_device(L, 2, "set_rng_state"), (uint64_t)seed, (uint64_t)offset);
  return 0;
}

/* ====== Memory ====== */

/* core.memory_stats([device]) */
static int l_memory_stats(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_memory_stats s = {0};
  hb_check(L, st, hm_memory_get_stats(optional_device(L, 1, "memory_stats"), &s));
  lua_createtable(L, 0, 8);
  hb_set_integer(L, "live", s.live);
  hb_set_integer(L, "peak", s.peak);
  hb_set_integer(L, "cached", s.cached);
  hb_set_integer(L, "reserved", s.reserved);
  hb_set_integer(L, "allocs", s.allocs);
  hb_set_integer(L, "system_allocs", s.system_allocs);
  hb_set_integer(L, "layout_copies", s.layout_copies);
  hb_set_integer(L, "shadow_bytes", s.shadow_bytes);
  hb_set_integer(L, "pinned", s.pinned);
  return 1;
}

/* core.reset_peak([device]).  Collects first: what is dead but not found yet would count as live. */
static int l_reset_peak(lua_State *L) {
  hb_enter(L);
  const int device = optional_device(L, 1, "reset_peak");
  lua_gc(L, LUA_GCCOLLECT);
  lua_gc(L, LUA_GCCOLLECT); /* what finalizers let go */
  hm_memory_reset_peak(device);
  hb_pressure_forget();
  return 0;
}

static int l_trim(lua_State *L) {
  hm_memory_trim(optional_device(L, 1, "trim"));
  return 0;
}

/* core.pause(): a model is about to be called from outside */
static int l_pause(lua_State *L) {
  hb_enter(L);
  hb_pressure_pause(L, false);
  return 0;
}

/* core.collect_stats() -> {count, seconds} of the pressure hook */
static int l_collect_stats(lua_State *L) {
  int64_t count;
  double seconds;
  hb_pressure_stats(&count, &seconds);
  lua_createtable(L, 0, 2);
  hb_set_integer(L, "count", count);
  lua_pushnumber(L, seconds);
  lua_setfield(L, -2, "seconds");
  return 1;
}

/* ====== Processor and devices ====== */

static int l_set_num_threads(lua_State *L) {
  hb_state *st = hb_enter(L);
  const int64_t n = hb_integer(L, 1, "set_num_threads", "the number of threads");
  if (n < 1 || n > 4096)
    return hb_error(L, "set_num_threads: the number must be from 1 to 4096, got %I", (LUAI_UACINT)n);
  hb_check(L, st, hm_cpu_set_threads((int)n));
  return 0;
}

static int l_get_num_threads(lua_State *L) {
  lua_pushinteger(L, hm_cpu_get_features()->threads);
  return 1;
}

/* core.use_deterministic(on) */
static int l_use_deterministic(lua_State *L) {
  hb_enter(L);
  hm_cpu_set_deterministic(hb_bool(L, 1, "use_deterministic", "on", true));
  return 0;
}

static int l_is_deterministic(lua_State *L) {
  lua_pushboolean(L, hm_cpu_is_deterministic());
  return 1;
}

/* core.features() -> {isa, avx2, f16c, avx512, avx512_bf16, amx, native_bf16, threads, onednn} */
static int l_features(lua_State *L) {
  const hm_cpu_features *f = hm_cpu_get_features();
  lua_createtable(L, 0, 9);
  hb_set_string(L, "isa", f->isa);
  hb_set_bool(L, "avx2", f->avx2);
  hb_set_bool(L, "f16c", f->f16c);
  hb_set_bool(L, "avx512", f->avx512);
  hb_set_bool(L, "avx512_bf16", f->avx512_bf16);
  hb_set_bool(L, "amx", f->amx);
  hb_set_bool(L, "native_bf16", f->native_bf16);
  hb_set_integer(L, "threads", f->threads);
  lua_pushfstring(L, "%d.%d.%d", f->onednn_version[0], f->onednn_version[1], f->onednn_version[2]);
  lua_setfield(L, -2, "onednn");
  return 1;
}

/* core.devices() -> array of {name, kind, detail} */
static int l_devices(lua_State *L) {
  lua_newtable(L);
  int n = 0;
  for (int id = 0; id < HM_MAX_DEVICES; id++) {
    const hm_backend *b = hm_device_backend(id);
    hm_device_info info = {0};
    if (!b || b->device_info(id == HM_CPU ? 0 : id - 1, &info) != HM_OK) continue;
    lua_createtable(L, 0, 4);
    hb_set_string(L, "name", hm_device_name(id));
    hb_set_string(L, "kind", info.name);
    hb_set_string(L, "detail", info.detail);
    hb_set_integer(L, "memory", (int64_t)info.memory_bytes);
    lua_rawseti(L, -2, ++n);
  }
  return 1;
}

/* ====== Clock, files, terminal ====== */

static int l_now(lua_State *L) {
  lua_pushnumber(L, hb_clock());
  return 1;
}

/* core.isatty(fd) */
static int l_isatty(lua_State *L) {
  hb_enter(L);
  lua_pushboolean(L, isatty((int)hb_integer(L, 1, "isatty", "the file descriptor")));
  return 1;
}

/* core.mtime(path) -> seconds since 1970, or nil */
static int l_mtime(lua_State *L) {
  hb_enter(L);
  struct stat s;
  if (stat(hb_string(L, 1, "mtime", "the path"), &s) != 0) lua_pushnil(L);
  else lua_pushnumber(L, (double)s.st_mtim.tv_sec + (double)s.st_mtim.tv_nsec * 1e-9);
  return 1;
}

static int l_exists(lua_State *L) {
  hb_enter(L);
  lua_pushboolean(L, access(hb_string(L, 1, "exists", "the path"), F_OK) == 0);
  return 1;
}

/* core.term_width() -> columns: of the terminal on standard output, else COLUMNS, else 80 */
static int l_term_width(lua_State *L) {
  struct winsize w;
  int columns = 0;
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &w) == 0) columns = w.ws_col;
  const char *env = getenv("COLUMNS");
  if (columns <= 0 && env) columns = atoi(env);
  lua_pushinteger(L, columns > 0 ? columns : 80);
  return 1;
}

/* core.set_path_provider(fn or nil): fn() -> module path for error messages, or nil */
static int l_set_path_provider(lua_State *L) {
  hb_state *st = hb_enter(L);
  if (!lua_isnoneornil(L, 1) && lua_type(L, 1) != LUA_TFUNCTION)
    return hb_error(L, "set_path_provider: argument 1 must be a function or nil, got %s", hb_came(L, 1));
  lua_settop(L, 1);
  hb_set_ref(L, st, HB_REF_PATH);
  return 0;
}

void hb_open_sys(lua_State *L, hb_state *st) {
  (void)st;
  static const luaL_Reg functions[] = {{"manual_seed", l_manual_seed},
                                       {"rng_state", l_rng_state},
                                       {"set_rng_state", l_set_rng_state},
                                       {"memory_stats", l_memory_stats},
                                       {"reset_peak", l_reset_peak},
                                       {"trim", l_trim},
                                       {"pause", l_pause},
                                       {"collect_stats", l_collect_stats},
                                       {"set_num_threads", l_set_num_threads},
                                       {"use_deterministic", l_use_deterministic},
                                       {"is_deterministic", l_is_deterministic},
                                       {"get_num_threads", l_get_num_threads},
                                       {"features", l_features},
                                       {"devices", l_devices},
                                       {"now", l_now},
                                       {"isatty", l_isatty},
                                       {"mtime", l_mtime},
                                       {"exists", l_exists},
                                       {"term_width", l_term_width},
                                       {"set_path_provider", l_set_path_provider},
                                       {NULL, NULL}};
  hb_functions(L, functions);
  lua_pushliteral(L, HM_VERSION);
  lua_setfield(L, -2, "version");
  lua_pushliteral(L, LUA_RELEASE);
  lua_setfield(L, -2, "lua_release");
  hb_open_fault(L);
  hb_open_telemetry(L);
}
