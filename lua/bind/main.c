/*
 * main.c -- the program `halfmoon`: Lua with the engine inside.
 *
 * Runs a script, chunks from the command line, or the prompt (lua/halfmoon/prompt.lua).  Scripts see plain Lua and require what they
 * use; chunks of -e and lines at the prompt run in an environment of their own, which offers hm, nn, optim and amp, loaded on first
 * use, in front of the globals.  Finds its Lua library beside itself: in the source tree or below the installation prefix.
 *
 * Owns the Lua state and the handling of Ctrl-C.  Exit status: 0, 1 after an error, 130 after Ctrl-C.
 */
#include <lauxlib.h>
#include <limits.h>
#include <lualib.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bind.h"
#include "prompt.h"

static const char *const USAGE =
    "usage: halfmoon [options] [script [arguments]]\n"
    "  -e chunk    run chunk; hm, nn, optim and amp are there\n"
    "  -l name     require name and give the global `name` its value\n"
    "  -i          go to the prompt afterwards\n"
    "  -           run what comes from standard input\n"
    "  --          end of options\n"
    "  --version   versions, instruction set, devices\n"
    "  --help      this text\n"
    "Without a script or a chunk: the prompt.\n"
    "HALFMOON_THREADS, HALFMOON_ISA (baseline, avx2, avx512) and HALFMOON_HISTORY are obeyed.\n";

/* ====== Ctrl-C ====== */

static lua_State *running;         /* where the hook goes; NULL outside hm_program_call */
static lua_State *coroutine;       /* a second place with the hook; only touched while it is hb_now.L, which is alive */
static pthread_t lua_thread;       /* the thread that runs Lua */
static volatile sig_atomic_t flag; /* Ctrl-C came while a line was edited */
static volatile sig_atomic_t raised; /* the hook has raised */

static void handle(int signal_number, void (*handler)(int)) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = handler;
  sigemptyset(&action.sa_mask);
  sigaction(signal_number, &action, NULL);
}

static void on_hook(lua_State *L, lua_Debug *ar) {
  (void)ar;
  lua_sethook(L, NULL, 0, 0);
  raised = 1;
  luaL_error(L, "interrupted!");
}

/* A signal may meet any thread, but only Lua's own may touch the state. */
static void on_interrupt(int signal_number) {
  if (!pthread_equal(pthread_self(), lua_thread)) {
    pthread_kill(lua_thread, signal_number);
    return;
  }
  handle(signal_number, SIG_DFL); /* a second Ctrl-C at a stuck place kills */
  if (!running) return;
  const int mask = LUA_MASKCALL | LUA_MASKRET | LUA_MASKLINE | LUA_MASKCOUNT;
  lua_sethook(running, on_hook, mask, 1);
  /* Hooks belong to one coroutine: a loop that runs inside another is reached through the engine, which knows who called last. */
  coroutine = hb_now.L != running ? hb_now.L : NULL;
  if (coroutine) lua_sethook(coroutine, on_hook, mask, 1);
}

static void on_interrupt_editing(int signal_number) {
  (void)signal_number;
  flag = 1;
}

void hm_program_editing(bool on) {
  flag = 0;
  handle(SIGINT, on ? on_interrupt_editing : SIG_DFL);
}

bool hm_program_interrupted(void) {
  bool was = flag;
  flag = 0;
  return was;
}

/* ====== Calls and messages ====== */

/* Message handler: the text of the error and a traceback. */
static int l_traceback(lua_State *L) {
  const char *message = lua_tostring(L, 1);
  if (!message) {
    if (luaL_callmeta(L, 1, "__tostring") && lua_type(L, -1) == LUA_TSTRING) return 1;
    message = lua_pushfstring(L, "(error object is a %s value)", luaL_typename(L, 1));
  }
  luaL_traceback(L, L, message, 1);
  return 1;
}

int hm_program_call(lua_State *L, int nargs, int nresults) {
  int base = lua_gettop(L) - nargs;
  lua_State *outer = running;
  lua_pushcfunction(L, l_traceback);
  lua_insert(L, base);
  running = L;
  raised = 0;
  handle(SIGINT, on_interrupt);
  int status = lua_pcall(L, nargs, nresults, base);
  running = outer;
  handle(SIGINT, outer ? on_interrupt : SIG_DFL);
  lua_sethook(L, NULL, 0, 0);
  if (coroutine && coroutine == hb_now.L) lua_sethook(coroutine, NULL, 0, 0);
  coroutine = NULL;
  lua_remove(L, base);
  return status;
}

/* Prints the error on top of the stack, if status says that there is one, and pops it. */
static bool report(lua_State *L, int status) {
  if (status == LUA_OK) return true;
  const char *message = lua_tostring(L, -1);
  fflush(stdout);
  fprintf(stderr, "%s\n", message ? message : "(error without a message)");
  lua_pop(L, 1);
  return false;
}

/* ====== The state ====== */

/* Puts into path the folder that holds halfmoon/init.lua; false if there is none. */
static bool find_library(char path[PATH_MAX]) {
  static const char *const places[] = {"../lua", "../share/halfmoon/lua", "../../lua"};
  char exe[PATH_MAX], guess[PATH_MAX + 64], probe[PATH_MAX + 32];
  ssize_t length = readlink("/proc/self/exe", exe, sizeof exe - 1);
  if (length <= 0) return false;
  exe[length] = '\0';
  char *slash = strrchr(exe, '/');
  if (!slash) return false;
  *slash = '\0';
  for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
    snprintf(guess, sizeof guess, "%s/%s", exe, places[i]);
    if (!realpath(guess, path)) continue;
    snprintf(probe, sizeof probe, "%s/halfmoon/init.lua", path);
    if (access(probe, R_OK) == 0) return true;
  }
  return false;
}

static void preload(lua_State *L, const char *name, lua_CFunction open) {
  luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_PRELOAD_TABLE);
  lua_pushcfunction(L, open);
  lua_setfield(L, -2, name);
  lua_pop(L, 1);
}

static void set_library_path(lua_State *L) {
  char library[PATH_MAX];
  if (!find_library(library)) return;
  lua_getglobal(L, "package");
  lua_getfield(L, -1, "path");
  const char *old = lua_tostring(L, -1);
  lua_pushfstring(L, "%s/?.lua;%s/?/init.lua;%s", library, library, old ? old : "");
  lua_setfield(L, -3, "path");
  lua_pop(L, 2);
}

/* require(name): pushes the module. */
static void require(lua_State *L, const char *name) {
  lua_getglobal(L, "require");
  lua_pushstring(L, name);
  lua_call(L, 1, 1);
}

static bool is_offered(const char *name) {
  return strcmp(name, "hm") == 0 || strcmp(name, "nn") == 0 || strcmp(name, "optim") == 0 || strcmp(name, "amp") == 0;
}

/* Reading a name that the environment lacks: the library's four doors, then the globals. */
static int l_environment_index(lua_State *L) {
  const char *name = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : NULL;
  if (name && is_offered(name)) {
    require(L, "halfmoon");
    if (strcmp(name, "hm") != 0) lua_getfield(L, -1, name);
    lua_pushvalue(L, 2);
    lua_pushvalue(L, -2);
    lua_rawset(L, 1);
    return 1;
  }
  lua_pushglobaltable(L);
  lua_pushvalue(L, 2);
  lua_gettable(L, -2);
  return 1;
}

/* Assigning a new name makes a global, as everywhere in Lua; the four doors, and the names that the prompt keeps as locals, stay in
 * the environment. */
static int l_environment_newindex(lua_State *L) {
  const char *name = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : NULL;
  bool own = name && is_offered(name);
  if (!own) {
    lua_pushvalue(L, 2);
    own = lua_rawget(L, lua_upvalueindex(1)) != LUA_TNIL;
    lua_pop(L, 1);
  }
  lua_settop(L, 3);
  if (own) {
    lua_rawset(L, 1);
  } else {
    lua_pushglobaltable(L);
    lua_replace(L, 1);
    lua_settable(L, 1);
  }
  return 0;
}

/* Pushes the environment of -e chunks and of the prompt; its metatable's field `kept` is the set of names kept as locals. */
static void push_environment(lua_State *L) {
  lua_newtable(L);
  lua_createtable(L, 0, 3);
  lua_pushcfunction(L, l_environment_index);
  lua_setfield(L, -2, "__index");
  lua_newtable(L);
  lua_pushvalue(L, -1);
  lua_setfield(L, -3, "kept");
  lua_pushcclosure(L, l_environment_newindex, 1);
  lua_setfield(L, -2, "__newindex");
  lua_setmetatable(L, -2);
}

/* The global `arg`: the script at 0, its arguments from 1, what came before at negative indices. */
static void set_arg(lua_State *L, char **argv, int argc, int script) {
  if (script >= argc) script = 0; /* no script: the program's own name */
  lua_createtable(L, argc > script ? argc - script - 1 : 0, script + 1);
  for (int i = 0; i < argc; i++) {
    lua_pushstring(L, argv[i]);
    lua_rawseti(L, -2, i - script);
  }
  lua_setglobal(L, "arg");
}

/* ====== What can be run ====== */

static void print_version(lua_State *L) {
  require(L, "halfmoon.core");
  int core = lua_gettop(L);
  lua_getfield(L, core, "version");
  printf("halfmoon %s\n", lua_tostring(L, -1));
  printf("Lua %s\n", LUA_RELEASE + 4);
  lua_getfield(L, core, "features");
  lua_call(L, 0, 1);
  int features = lua_gettop(L);
  lua_getfield(L, features, "onednn");
  printf("oneDNN %s\n", luaL_tolstring(L, -1, NULL));
  lua_getfield(L, features, "isa");
  lua_getfield(L, features, "native_bf16");
  lua_getfield(L, features, "threads");
  printf("instruction set %s, bfloat16 %s, %d threads\n", lua_tostring(L, -3),
         lua_toboolean(L, -2) ? "in hardware" : "through float32", (int)lua_tointeger(L, -1));
  lua_getfield(L, core, "devices");
  lua_call(L, 0, 1);
  int devices = lua_gettop(L);
  for (int i = 1; lua_rawgeti(L, devices, i) == LUA_TTABLE; i++) {
    lua_getfield(L, -1, "name");
    lua_getfield(L, -2, "detail");
    printf("device %s", lua_tostring(L, -2));
    if (lua_isstring(L, -1)) printf(" (%s)", lua_tostring(L, -1));
    printf("\n");
    lua_settop(L, devices);
  }
  lua_settop(L, core - 1);
}

/* Runs text in the environment at index env. */
static bool run_chunk(lua_State *L, const char *text, int env) {
  int status = luaL_loadbuffer(L, text, strlen(text), "=(command line)");
  if (status == LUA_OK) {
    lua_pushvalue(L, env);
    lua_setupvalue(L, -2, 1);
    status = hm_program_call(L, 0, 0);
  }
  return report(L, status);
}

/* -l name or -l global=name. */
static bool run_require(lua_State *L, const char *name) {
  const char *equals = strchr(name, '=');
  lua_getglobal(L, "require");
  lua_pushstring(L, equals ? equals + 1 : name);
  int status = hm_program_call(L, 1, 1);
  if (status == LUA_OK) {
    lua_pushglobaltable(L);
    if (equals) lua_pushlstring(L, name, (size_t)(equals - name));
    else lua_pushstring(L, name);
    lua_pushvalue(L, -3);
    lua_settable(L, -3);
    lua_pop(L, 2);
  }
  return report(L, status);
}

/* Runs the file argv[0] ("-": standard input) with the rest as arguments. */
static bool run_script(lua_State *L, char **argv, int argc) {
  int status = luaL_loadfile(L, strcmp(argv[0], "-") == 0 ? NULL : argv[0]);
  if (status == LUA_OK) {
    luaL_checkstack(L, argc, "too many arguments");
    for (int i = 1; i < argc; i++) lua_pushstring(L, argv[i]);
    status = hm_program_call(L, argc - 1, 0);
  }
  return report(L, status);
}

/* require("halfmoon.prompt").run(environment): returns whether every line went well. */
static bool run_prompt(lua_State *L, int env) {
  require(L, "halfmoon.prompt");
  lua_getfield(L, -1, "run");
  lua_pushvalue(L, env);
  lua_call(L, 1, 1);
  bool ok = lua_toboolean(L, -1);
  lua_pop(L, 2);
  return ok;
}

/* ====== Command line ====== */

typedef struct options {
  int script; /* index in argv, argc if none */
  bool chunks, prompt, version, help;
} options;

/* The value of option i, which may stand in the same word ("-lname"); moves *i to its last word.  NULL if it is missing. */
static const char *option_value(char **argv, int argc, int *i) {
  if (argv[*i][2] != '\0') return argv[*i] + 2;
  return *i + 1 < argc ? argv[++*i] : NULL;
}

static bool parse_options(char **argv, int argc, options *o) {
  *o = (options){.script = argc};
  for (int i = 1; i < argc; i++) {
    const char *word = argv[i];
    if (word[0] != '-' || word[1] == '\0') {
      o->script = i;
      return true;
    }
    if (strcmp(word, "--") == 0) {
      o->script = i + 1;
      return true;
    }
    if (strcmp(word, "--version") == 0 || strcmp(word, "-v") == 0) {
      o->version = true;
    } else if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
      o->help = true;
    } else if (strcmp(word, "-i") == 0) {
      o->prompt = true;
    } else if (word[1] == 'e' || word[1] == 'l') {
      if (!option_value(argv, argc, &i)) {
        fprintf(stderr, "halfmoon: option %s wants a value\n%s", word, USAGE);
        return false;
      }
      o->chunks |= word[1] == 'e';
    } else {
      fprintf(stderr, "halfmoon: unknown option %s\n%s", word, USAGE);
      return false;
    }
  }
  return true;
}

/* Runs -e and -l in the order in which they stand. */
static bool run_options(lua_State *L, char **argv, int end, int env) {
  for (int i = 1; i < end; i++) {
    char kind = argv[i][1];
    if (argv[i][0] != '-' || (kind != 'e' && kind != 'l')) continue;
    const char *value = option_value(argv, end, &i);
    if (!(kind == 'e' ? run_chunk(L, value, env) : run_require(L, value))) return false;
  }
  return true;
}

static int l_main(lua_State *L) {
  int argc = (int)lua_tointeger(L, 1);
  char **argv = lua_touserdata(L, 2);
  options o;
  if (!parse_options(argv, argc, &o)) return 0;
  if (o.help) fputs(USAGE, stdout);
  luaL_openlibs(L);
  lua_warning(L, "@on", 0); /* a guard that was dropped unclosed says so */
  preload(L, "halfmoon.core", luaopen_halfmoon_core);
  preload(L, "halfmoon.program", luaopen_halfmoon_program);
  set_library_path(L);
  if (o.version) print_version(L);
  set_arg(L, argv, argc, o.script);
  push_environment(L);
  int env = lua_gettop(L);
  bool script = o.script < argc, ok = run_options(L, argv, o.script, env);
  if (ok && script) ok = run_script(L, argv + o.script, argc - o.script);
  if (o.prompt) {
    run_prompt(L, env); /* here errors have been seen, and dealt with, by a person */
    ok = true;
  } else if (!script && !o.chunks && !o.version && !o.help) {
    ok = run_prompt(L, env);
  }
  lua_pushboolean(L, ok);
  return 1;
}

/* The threads of OpenMP wait by spinning, for milliseconds: on a machine that others use too, a step then takes up to six times as long.
 * A short spin costs nothing on an idle machine.  libgomp reads the setting when it is loaded, so the program starts itself once more,
 * unless the user has set one of the two variables. */
static void limit_spinning(char **argv) {
  if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
  if (!setenv("GOMP_SPINCOUNT", "10000", 1)) execv("/proc/self/exe", argv);
}

int main(int argc, char **argv) {
  limit_spinning(argv);
  lua_thread = pthread_self();
  lua_State *L = luaL_newstate();
  if (!L) {
    fputs("halfmoon: out of memory\n", stderr);
    return 1;
  }
  lua_pushcfunction(L, l_main);
  lua_pushinteger(L, argc);
  lua_pushlightuserdata(L, argv);
  bool ok = report(L, lua_pcall(L, 2, 1, 0)) && lua_toboolean(L, -1);
  lua_close(L);
  return ok ? 0 : raised ? 130 : 1;
}
