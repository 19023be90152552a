/*
 * prompt.c -- the module "halfmoon.program": what the prompt needs from the system.
 *
 * Line editing with history and completion (libedit; plain reads where input is no terminal), calls that Ctrl-C can end, and the
 * names of files.  lua/halfmoon/prompt.lua is its only user; the module exists in the program alone.
 */
#include <dirent.h>
#include <editline/readline.h>
#include <errno.h>
#include <lauxlib.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "prompt.h"

enum { HISTORY_LINES = 2000 };

/* ====== Completion: libedit asks, a Lua function answers ====== */

static lua_State *completer_state; /* the state whose registry holds the function; NULL without one */
static const char completer_key = 0;

/* Where the cursor stands inside a string, words are file names; elsewhere they are Lua names. */
static bool inside_string(const char *line, int end) {
  char quote = 0;
  for (int i = 0; i < end; i++) {
    if (quote && line[i] == '\\') i++;
    else if (quote && line[i] == quote) quote = 0;
    else if (!quote && (line[i] == '"' || line[i] == '\'')) quote = line[i];
  }
  return quote != 0;
}

static char *word_breaks(void) {
  static char in_string[] = " \"'";
  static char in_code[] = " \t\n\"\\'`@$><=;:|&{}(),.+-*/%^~#?![]";
  return inside_string(rl_line_buffer, rl_point) ? in_string : in_code;
}

/* The candidates in the array on top of the stack, as libedit wants them: what all have in common, then each, then NULL; its own
 * allocations, because libedit frees them. */
static char **pack_matches(lua_State *L) {
  size_t n = lua_rawlen(L, -1), common = 0;
  if (n == 0) return NULL;
  char **list = calloc(n + 2, sizeof *list);
  if (!list) return NULL;
  for (size_t i = 1; i <= n; i++) {
    lua_rawgeti(L, -1, (lua_Integer)i);
    const char *word = lua_tostring(L, -1);
    list[i] = strdup(word ? word : "");
    lua_pop(L, 1);
    if (!list[i]) break;
    if (i == 1) common = strlen(list[1]);
    while (strncmp(list[1], list[i], common) != 0) common--;
  }
  list[0] = list[1] ? strndup(list[1], common) : NULL;
  return list;
}

static char **attempt_completion(const char *word, int start, int end) {
  (void)word;
  (void)start;
  lua_State *L = completer_state;
  if (!L || inside_string(rl_line_buffer, end)) return NULL; /* libedit completes the file name */
  rl_attempted_completion_over = 1;
  int top = lua_gettop(L);
  char **list = NULL;
  if (lua_rawgetp(L, LUA_REGISTRYINDEX, &completer_key) == LUA_TFUNCTION) {
    lua_pushlstring(L, rl_line_buffer, (size_t)end);
    if (lua_pcall(L, 1, 1, 0) == LUA_OK && lua_istable(L, -1)) list = pack_matches(L);
  }
  lua_settop(L, top);
  return list;
}

/* program.set_completer(fn): fn(text before the cursor) returns an array of words for the name being typed. */
static int l_set_completer(lua_State *L) {
  luaL_checktype(L, 1, LUA_TFUNCTION);
  lua_settop(L, 1);
  lua_rawsetp(L, LUA_REGISTRYINDEX, &completer_key);
  lua_rawgeti(L, LUA_REGISTRYINDEX, LUA_RIDX_MAINTHREAD);
  completer_state = lua_tothread(L, -1);
  return 0;
}

/* ====== Lines ====== */

static bool editing_is_possible(void) {
  static int known = -1;
  if (known >= 0) return known;
  const char *term = getenv("TERM");
  known = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO) && term && strcmp(term, "dumb") != 0;
  if (known) {
    setlocale(LC_CTYPE, "");
    rl_readline_name = "halfmoon";
    rl_initialize();
    using_history();
    stifle_history(HISTORY_LINES);
    rl_attempted_completion_function = attempt_completion;
    rl_completion_word_break_hook = word_breaks;
    rl_completion_append_character = '\0';
  }
  return known;
}

/* program.readline(prompt) -> line | nil, "interrupted" | nil, "end" */
static int l_readline(lua_State *L) {
  const char *prompt = luaL_checkstring(L, 1);
  char *line = NULL;
  hm_program_editing(true);
  errno = 0;
  if (editing_is_possible()) {
    line = readline(prompt);
  } else {
    size_t size = 0;
    if (isatty(STDIN_FILENO)) fputs(prompt, stdout);
    fflush(stdout);
    ssize_t length = getline(&line, &size, stdin);
    if (length > 0 && line[length - 1] == '\n') line[--length] = '\0';
    if (length < 0) {
      free(line);
      line = NULL;
      clearerr(stdin);
    }
  }
  /* libedit gives NULL both for Ctrl-C and for the end of input. */
  bool interrupted = hm_program_interrupted();
  hm_program_editing(false);
  if (interrupted || !line) {
    free(line);
    lua_pushnil(L);
    lua_pushstring(L, interrupted ? "interrupted" : "end");
    return 2;
  }
  lua_pushstring(L, line); /* a failure for lack of memory loses one line */
  free(line);
  return 1;
}

/* program.history_load(path): a missing file is an empty history. */
static int l_history_load(lua_State *L) {
  const char *path = luaL_checkstring(L, 1);
  if (editing_is_possible()) read_history(path);
  return 0;
}

/* program.history_add(line[, path]): remembers line, and writes the file so that nothing is lost when the program is killed. */
static int l_history_add(lua_State *L) {
  const char *line = luaL_checkstring(L, 1), *path = luaL_optstring(L, 2, NULL);
  if (!editing_is_possible()) return 0;
  add_history(line);
  if (path) write_history(path);
  return 0;
}

/* program.interactive() -> whether a person sits at both ends. */
static int l_interactive(lua_State *L) {
  lua_pushboolean(L, isatty(STDIN_FILENO) && isatty(STDOUT_FILENO));
  return 1;
}

/* ====== Calls and files ====== */

/* program.call(fn, ...) -> true, results... | false, message with traceback.  Ctrl-C raises "interrupted!" in fn. */
static int l_call(lua_State *L) {
  luaL_checkany(L, 1);
  int status = hm_program_call(L, lua_gettop(L) - 1, LUA_MULTRET);
  lua_pushboolean(L, status == LUA_OK);
  lua_insert(L, 1);
  return lua_gettop(L);
}

/* program.files(folder) -> array of names, folders with a slash at the end, or nil, message. */
static int l_files(lua_State *L) {
  const char *path = luaL_checkstring(L, 1);
  DIR *dir = opendir(path);
  if (!dir) {
    lua_pushnil(L);
    lua_pushfstring(L, "%s: %s", path, strerror(errno));
    return 2;
  }
  lua_newtable(L);
  lua_Integer n = 0;
  for (struct dirent *entry; (entry = readdir(dir));) {
    if (entry->d_name[0] == '.') continue;
    lua_pushfstring(L, "%s%s", entry->d_name, entry->d_type == DT_DIR ? "/" : "");
    lua_rawseti(L, -2, ++n);
  }
  closedir(dir);
  return 1;
}

int luaopen_halfmoon_program(lua_State *L) {
  static const luaL_Reg functions[] = {{"readline", l_readline},
                                       {"set_completer", l_set_completer},
                                       {"history_load", l_history_load},
                                       {"history_add", l_history_add},
                                       {"interactive", l_interactive},
                                       {"call", l_call},
                                       {"files", l_files},
                                       {NULL, NULL}};
  luaL_newlib(L, functions);
  return 1;
}
