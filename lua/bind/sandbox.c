/*
 * sandbox.c -- policy files in a Lua state of their own.
 *
 * What a file may cost: memory (an allocator that counts), VM instructions for each call, and 0.2 seconds of processor
 * time for each call (an instruction on a long string is one instruction).  What it may reach: math, table,
 * string.format, and the base functions that load
 * nothing.  Strings have no methods there, and there is no pcall, so that nothing catches the limits.
 *
 * Values cross as plain copies: numbers, strings, booleans, and tables of them, at most MAX_DEPTH deep.  Reading a
 * state never raises in it; writing runs protected by the state that is written to.
 *
 * Owner: the userdata owns the sandbox, the sandbox its Lua state.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <lualib.h>

#include "bind.h"

#define HB_SANDBOX "halfmoon.Sandbox"

enum { MAX_DEPTH = 16, HOOK_EVERY = 20, DEFAULT_MEMORY = 8 << 20, DEFAULT_INSTRUCTIONS = 1000000, MAX_MOVE = 1000000 };
#define MAX_SECONDS 0.2

typedef struct sandbox {
  lua_State *S;
  size_t used, limit;   /* bytes */
  int64_t instructions; /* for each call */
  int64_t left;         /* in this call */
  double deadline;      /* processor time of this thread */
} sandbox;

/* Registry keys inside the sandbox. */
static const char policy_key;

static double cpu_clock(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ====== Limits ====== */

static void *allocate(void *ud, void *p, size_t old, size_t size) {
  sandbox *b = ud;
  if (!p) old = 0; /* then it is a type tag */
  if (size == 0) {
    free(p);
    b->used -= old;
    return NULL;
  }
  if (size > old && size - old > b->limit - b->used) return NULL;
  void *q = realloc(p, size);
  if (!q) return NULL;
  b->used = b->used - old + size;
  return q;
}

/* Raises `message` at the line that runs; luaL_error would name its caller's. */
static void stop_here(lua_State *S, const char *message) {
  luaL_where(S, 0);
  lua_pushstring(S, message);
  lua_concat(S, 2);
  lua_error(S);
}

static void on_count(lua_State *S, lua_Debug *ar) {
  (void)ar;
  void *ud;
  lua_getallocf(S, &ud);
  sandbox *b = ud;
  b->left -= HOOK_EVERY;
  if (b->left <= 0) {
    lua_pushfstring(S, "the policy ran for more than %I instructions", (LUAI_UACINT)b->instructions);
    stop_here(S, lua_tostring(S, -1));
  }
  if (cpu_clock() > b->deadline) stop_here(S, "the policy ran for more than 0.2 seconds");
}

static void start_call(sandbox *b) {
  lua_settop(b->S, 0);
  b->left = b->instructions;
  b->deadline = cpu_clock() + MAX_SECONDS;
}

/* ====== Copying values ====== */

/* Pushes onto `to` a copy of the value of `from` at idx.  NULL, or what cannot be copied (then nothing useful is
 * pushed).  May raise in `to` only. */
static const char *copy_value(lua_State *from, int idx, lua_State *to, int depth) {
  if (depth > MAX_DEPTH) return "a table that is nested too deeply or contains itself";
  if (!lua_checkstack(from, 4)) return "more values than fit the stack";
  luaL_checkstack(to, 4, NULL);
  idx = lua_absindex(from, idx);
  switch (lua_type(from, idx)) {
  case LUA_TNIL: lua_pushnil(to); return NULL;
  case LUA_TBOOLEAN: lua_pushboolean(to, lua_toboolean(from, idx)); return NULL;
  case LUA_TNUMBER:
    if (lua_isinteger(from, idx)) lua_pushinteger(to, lua_tointeger(from, idx));
    else lua_pushnumber(to, lua_tonumber(from, idx));
    return NULL;
  case LUA_TSTRING: {
    size_t n;
    const char *s = lua_tolstring(from, idx, &n);
    lua_pushlstring(to, s, n);
    return NULL;
  }
  case LUA_TTABLE: break;
  default: return lua_typename(from, lua_type(from, idx));
  }
  lua_newtable(to);
  lua_pushnil(from);
  while (lua_next(from, idx)) {
    const char *bad = lua_type(from, -2) == LUA_TTABLE ? "a table as a key" : copy_value(from, -2, to, depth + 1);
    if (!bad) bad = copy_value(from, -1, to, depth + 1);
    if (bad) {
      lua_pop(from, 2);
      return bad;
    }
    lua_rawset(to, -3);
    lua_pop(from, 1);
  }
  return NULL;
}

/* ====== What runs inside, protected ====== */

/* One call into the sandbox. */
typedef struct request {
  lua_State *L;       /* the caller's state */
  int first, n;       /* its arguments to copy */
  const char *method; /* field of the policy; NULL: load source */
  const char *source, *chunkname;
  size_t length;
  int results;
} request;

/* table.move with a bound: the original loops outside the instruction count. */
static int l_move(lua_State *S) {
  const lua_Integer f = luaL_checkinteger(S, 2), e = luaL_checkinteger(S, 3);
  luaL_argcheck(S, e < f || (lua_Unsigned)e - (lua_Unsigned)f < MAX_MOVE, 3, "too many elements to move");
  const int n = lua_gettop(S);
  lua_pushvalue(S, lua_upvalueindex(1));
  lua_insert(S, 1);
  lua_call(S, n, 1);
  return 1;
}

/* Leaves only the named fields of the table at the top: a fresh table replaces it. */
static void keep_only(lua_State *S, const char *const *names) {
  lua_newtable(S);
  for (; *names; names++) {
    lua_getfield(S, -2, *names);
    lua_setfield(S, -2, *names);
  }
  lua_remove(S, -2);
}

static void open_libraries(lua_State *S) {
  static const char *const base[] = {"assert",   "error", "ipairs",   "next",   "pairs",  "select", "tonumber",
                                     "tostring", "type",  "rawequal", "rawget", "rawlen", "rawset", NULL};
  static const char *const string[] = {"format", NULL};
  luaL_requiref(S, "_G", luaopen_base, 0);
  keep_only(S, base);
  luaL_requiref(S, LUA_MATHLIBNAME, luaopen_math, 0);
  lua_getfield(S, -1, "randomseed"); /* the same numbers in every run */
  lua_pushinteger(S, 0);
  lua_call(S, 1, 0);
  lua_setfield(S, -2, "math");
  luaL_requiref(S, LUA_TABLIBNAME, luaopen_table, 0);
  lua_getfield(S, -1, "move");
  lua_pushcclosure(S, l_move, 1);
  lua_setfield(S, -2, "move");
  lua_setfield(S, -2, "table");
  luaL_requiref(S, LUA_STRLIBNAME, luaopen_string, 0);
  keep_only(S, string);
  lua_setfield(S, -2, "string");
  lua_pushliteral(S, ""); /* strings lose their methods */
  lua_pushnil(S);
  lua_setmetatable(S, -2);
  lua_pop(S, 1);
  lua_pushvalue(S, -1);
  lua_setfield(S, -2, "_G");
  lua_rawseti(S, LUA_REGISTRYINDEX, LUA_RIDX_GLOBALS);
}

/* Loads and runs the source, keeps the table that it returns. */
static int run_load(lua_State *S) {
  const request *q = lua_touserdata(S, 1);
  luaL_checkstack(S, 20, NULL);
  open_libraries(S);
  if (luaL_loadbufferx(S, q->source, q->length, q->chunkname, "t") != LUA_OK) return lua_error(S);
  lua_call(S, 0, 1);
  if (lua_type(S, -1) != LUA_TTABLE)
    return luaL_error(S, "a policy file must return a table, this one returned a %s", luaL_typename(S, -1));
  lua_getfield(S, -1, "update");
  if (lua_type(S, -1) != LUA_TFUNCTION) return luaL_error(S, "the policy has no function `update`");
  lua_pop(S, 1);
  lua_rawsetp(S, LUA_REGISTRYINDEX, &policy_key);
  return 0;
}

/* Calls a function of the policy with copies of the arguments.  Results stay on the stack: state, then what the
 * function returned. */
static int run_method(lua_State *S) {
  const request *q = lua_touserdata(S, 1);
  lua_settop(S, 0);
  lua_rawgetp(S, LUA_REGISTRYINDEX, &policy_key);
  if (lua_getfield(S, 1, q->method) != LUA_TFUNCTION)
    return luaL_error(S, "the policy has no function `%s`", q->method);
  lua_remove(S, 1);
  for (int i = 0; i < q->n; i++) {
    const char *bad = copy_value(q->L, q->first + i, S, 0);
    if (bad)
      return luaL_error(S, "argument %d of %s holds %s: only numbers, strings, booleans and plain tables cross", i + 1,
                        q->method, bad);
  }
  lua_pushvalue(S, 2); /* the state, which update may change in place */
  lua_insert(S, 1);
  lua_call(S, q->n, q->results);
  return q->results + 1;
}

/* Runs fn with the request; false: the message is on top of S. */
static bool run(sandbox *b, lua_CFunction fn, request *q, int results) {
  start_call(b);
  lua_pushcfunction(b->S, fn);
  lua_pushlightuserdata(b->S, q);
  return lua_pcall(b->S, 1, results, 0) == LUA_OK;
}

/* ====== The userdata ====== */

static sandbox *self(lua_State *L, const char *who) {
  sandbox *b = luaL_testudata(L, 1, HB_SANDBOX);
  if (!b || !b->S) hb_error(L, "%s: self must be a sandbox, got %s", who, hb_came(L, 1));
  return b;
}

/* nil and the message on top of the sandbox's stack. */
static int failed(lua_State *L, sandbox *b) {
  lua_pushnil(L);
  if (lua_type(b->S, -1) == LUA_TSTRING) lua_pushstring(L, lua_tostring(b->S, -1));
  else lua_pushfstring(L, "the policy raised a %s value", luaL_typename(b->S, -1));
  lua_settop(b->S, 0);
  return 2;
}

static int l_gc(lua_State *L) {
  sandbox *b = lua_touserdata(L, 1);
  if (b->S) lua_close(b->S);
  b->S = NULL;
  return 0;
}

/* core.sandbox(source, chunkname[, {memory, instructions}]) -> sandbox | nil, message */
static int l_new(lua_State *L) {
  hb_enter(L);
  int64_t memory = DEFAULT_MEMORY, instructions = DEFAULT_INSTRUCTIONS;
  const char *source = hb_string(L, 1, "sandbox", "the source");
  const char *name = hb_string(L, 2, "sandbox", "the chunk's name");
  hb_options(L, 3, "sandbox",
             (const hb_option[]){{"memory", HB_INT, &memory}, {"instructions", HB_INT, &instructions}, {0}});
  if (memory < 65536 || instructions < HOOK_EVERY)
    return hb_error(L, "sandbox: the limits must be at least 65536 bytes and %d instructions", (int)HOOK_EVERY);
  sandbox *b = lua_newuserdatauv(L, sizeof *b, 0);
  *b = (sandbox){.limit = (size_t)memory, .instructions = instructions};
  luaL_setmetatable(L, HB_SANDBOX);
  b->S = lua_newstate(allocate, b);
  if (!b->S) return hb_error(L, "sandbox: not enough memory");
  lua_sethook(b->S, on_count, LUA_MASKCOUNT, HOOK_EVERY);
  request q = {.source = source, .length = lua_rawlen(L, 1), .chunkname = name};
  if (!run(b, run_load, &q, 0)) return failed(L, b);
  return 1;
}

static bool has_function(lua_State *S, const char *name) {
  lua_pushstring(S, name);
  const bool yes = lua_rawget(S, -2) == LUA_TFUNCTION;
  lua_pop(S, 1);
  return yes;
}

/* Protected in the sandbox: the plain fields, has_init, has_update. */
static int run_fields(lua_State *S) {
  lua_settop(S, 0);
  lua_rawgetp(S, LUA_REGISTRYINDEX, &policy_key);
  lua_createtable(S, 0, 7);
  lua_pushvalue(S, 1);
  const bool init = has_function(S, "init"), update = has_function(S, "update");
  lua_pop(S, 1);
  static const char *const plain[] = {"name", "needs", "options", "min_scale", "max_scale"};
  for (size_t i = 0; i < sizeof plain / sizeof plain[0]; i++) {
    lua_pushstring(S, plain[i]);
    lua_rawget(S, 1);
    lua_setfield(S, 2, plain[i]);
  }
  lua_pushboolean(S, init);
  lua_setfield(S, 2, "has_init");
  lua_pushboolean(S, update);
  lua_setfield(S, 2, "has_update");
  return 1;
}

/* Pushes a copy of the sandbox's value at idx onto L; on failure pushes nil and a message and returns false. */
static bool take(lua_State *L, sandbox *b, int idx, const char *what) {
  const int top = lua_gettop(L);
  const char *bad = copy_value(b->S, idx, L, 0);
  if (!bad) return true;
  lua_settop(L, top);
  lua_pushnil(L);
  lua_pushfstring(L, "%s holds %s: only numbers, strings, booleans and plain tables cross", what, bad);
  return false;
}

/* sb:fields() -> {name, needs, options, min_scale, max_scale, has_init, has_update} | nil, message */
static int l_fields(lua_State *L) {
  hb_enter(L);
  sandbox *b = self(L, "fields");
  request q = {0};
  if (!run(b, run_fields, &q, 1)) return failed(L, b);
  if (!take(L, b, 1, "the policy's name, needs or options")) return 2;
  if (lua_getfield(L, -1, "needs") == LUA_TNIL) {
    lua_newtable(L);
    lua_setfield(L, -3, "needs");
  }
  lua_pop(L, 1);
  return 1;
}

/* sb:init(opts) -> state | nil, message */
static int l_init(lua_State *L) {
  hb_enter(L);
  sandbox *b = self(L, "init");
  lua_settop(L, 2);
  request q = {.L = L, .first = 2, .n = 1, .method = "init", .results = 1};
  if (!run(b, run_method, &q, 2)) return failed(L, b);
  if (lua_type(b->S, 2) != LUA_TTABLE) {
    lua_pushnil(L);
    lua_pushfstring(L, "init must return a table, this one returned a %s", luaL_typename(b->S, 2));
    return 2;
  }
  return take(L, b, 2, "the state") ? 1 : 2;
}

/* Pushes the stop message that update asked for, or nil: its second result is {stop = "why"} or the message. */
static void push_stop(lua_State *L, lua_State *S) {
  if (lua_type(S, 3) == LUA_TTABLE) {
    lua_pushnil(S);
    while (lua_next(S, 3)) {
      if (lua_type(S, -2) == LUA_TSTRING && lua_type(S, -1) == LUA_TSTRING &&
          strcmp(lua_tostring(S, -2), "stop") == 0) {
        lua_copy(S, -1, 3);
        lua_pop(S, 2);
        break;
      }
      lua_pop(S, 1);
    }
  }
  if (lua_type(S, 3) == LUA_TSTRING) lua_pushstring(L, lua_tostring(S, 3));
  else lua_pushnil(L);
}

/* sb:update(state, event, opts) -> new scale, stop message or nil, state | nil, message */
static int l_update(lua_State *L) {
  hb_enter(L);
  sandbox *b = self(L, "update");
  lua_settop(L, 4);
  request q = {.L = L, .first = 2, .n = 3, .method = "update", .results = 2};
  if (!run(b, run_method, &q, 3)) return failed(L, b);
  if (lua_type(b->S, 2) != LUA_TNUMBER) {
    lua_pushnil(L);
    lua_pushfstring(L, "update must return the new scale, this one returned %s",
                    lua_isnil(b->S, 2) ? "nothing" : luaL_typename(b->S, 2));
    return 2;
  }
  lua_pushnumber(L, lua_tonumber(b->S, 2));
  push_stop(L, b->S);
  return take(L, b, 1, "the state") ? 3 : 2;
}

void hb_open_sandbox(lua_State *L, hb_state *st) {
  (void)st;
  static const luaL_Reg methods[] = {{"fields", l_fields}, {"init", l_init}, {"update", l_update}, {NULL, NULL}};
  static const luaL_Reg functions[] = {{"sandbox", l_new}, {NULL, NULL}};
  hb_metatable(L, HB_SANDBOX, l_gc, false, methods);
  hb_functions(L, functions);
}
