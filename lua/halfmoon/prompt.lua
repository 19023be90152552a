--- The prompt of the program `halfmoon`: reads lines, runs them, prints what they give.
--
-- Owns the loop, completion, and the names that lines leave behind; line editing and calls that Ctrl-C can end come from
-- "halfmoon.program" (lua/bind/prompt.c), help from halfmoon.help.  Only the program loads this file.
--
-- A line is tried as an expression first.  Unfinished input asks for more.  `local` at the outermost level keeps its names for the
-- lines that follow: each line is a chunk of its own, so a true local would be gone at once.

local program = require "halfmoon.program"
local core = require "halfmoon.core"

local M = {}

local PROMPT, MORE = "hm> ", "..> "
local SLOW = 0.05 -- seconds from which on the time is shown
local OFFERED = {"hm", "nn", "optim", "amp"}
local KEYWORDS = {}
local RESERVED = "and break do else elseif end false for function goto if in local nil not or repeat return then true until while"
for word in RESERVED:gmatch("%a+") do KEYWORDS[word] = true end

-- ====== Outermost locals become names of the prompt ======

-- The tokens of a chunk that matter here: {text, from, to} of names, keywords and single marks; strings and comments are skipped.
local function tokens(source)
  local list, at = {}, 1
  while true do
    at = source:find("%S", at)
    if not at then return list end
    local _, stop = source:find("^%-%-%[(=*)%[.-%]%1%]", at)
    if not stop then _, stop = source:find("^%-%-[^\n]*", at) end
    if not stop then _, stop = source:find("^%[(=*)%[.-%]%1%]", at) end
    if not stop and source:find("^[\"']", at) then
      local quote, to = source:sub(at, at), at + 1
      while to <= #source and source:sub(to, to) ~= quote do
        to = to + (source:sub(to, to) == "\\" and 2 or 1)
      end
      stop = to
    end
    if not stop then
      local _, to = source:find("^[%a_][%w_]*", at)
      if not to then _, to = source:find("^%.?%d[%w%.]*", at) end
      stop = to or at
      list[#list + 1] = {source:sub(at, stop), at, stop}
    end
    at = stop + 1
  end
end

local OPENS = {["function"] = true, ["do"] = true, ["then"] = true, ["repeat"] = true, ["{"] = true, ["("] = true}
local CLOSES = {["end"] = true, ["until"] = true, ["elseif"] = true, ["else"] = true, ["}"] = true, [")"] = true}

-- The names declared by a `local` whose first token after it is list[i]: names, index after them, whether one is <close>.
local function declared(list, i)
  local names, close = {}, false
  while list[i] and list[i][1]:find("^[%a_]") do
    names[#names + 1] = list[i][1]
    i = i + 1
    if list[i] and list[i][1] == "<" then
      close = close or (list[i + 1] and list[i + 1][1] == "close")
      i = i + 3
    end
    if not (list[i] and list[i][1] == ",") then break end
    i = i + 1
  end
  return names, i, close
end

--- Rewrites the outermost `local` statements of a chunk into assignments.
---@param source string a chunk that compiles
---@return string rewritten
---@return string[] names that those statements declare
---@return boolean closes whether a `<close>` variable was left alone: it closes when the chunk ends
function M.keep_locals(source)
  local list, depth, out, from = tokens(source), 0, {}, 1
  local kept, closes = {}, false
  local function replace(first, last, text)
    out[#out + 1] = source:sub(from, first - 1)
    out[#out + 1] = text
    from = last + 1
  end
  for i, token in ipairs(list) do
    local word = token[1]
    if CLOSES[word] then depth = depth - 1 end
    if OPENS[word] or word == "else" then depth = depth + 1 end
    if word == "local" and depth == 0 then
      local following = list[i + 1] and list[i + 1][1]
      if following == "function" then
        kept[#kept + 1] = list[i + 2][1]
        replace(token[2], token[3], "")
      else
        local names, after, close = declared(list, i + 1)
        if close then
          closes = true
        else
          table.move(names, 1, #names, #kept + 1, kept)
          local assigned = list[after] and list[after][1] == "="
          replace(token[2], list[after - 1][3], table.concat(names, ", ") .. (assigned and "" or " = nil;"))
        end
      end
    end
  end
  out[#out + 1] = source:sub(from)
  return table.concat(out), kept, closes
end

-- ====== Printing ======

local function is_plain(value)
  if type(value) ~= "table" then return false end
  local meta = getmetatable(value)
  return not (meta and (meta.__tostring or meta.__name))
end

local function key_text(key)
  if type(key) == "string" and key:find("^[%a_][%w_]*$") and not KEYWORDS[key] then return key end
  return "[" .. (type(key) == "string" and ("%q"):format(key) or tostring(key)) .. "]"
end

-- The keys of t that do not belong to its array part, in a readable order.
local function sorted_keys(t, length)
  local keys = {}
  for key in next, t do
    if not (math.type(key) == "integer" and key >= 1 and key <= length) then keys[#keys + 1] = key end
  end
  table.sort(keys, function(a, b)
    if type(a) == type(b) and (type(a) == "string" or type(a) == "number") then return a < b end
    return type(a) < type(b) or (type(a) == type(b) and tostring(a) < tostring(b))
  end)
  return keys
end

local MAX_ITEMS, MAX_DEPTH, WIDTH = 40, 3, 100

-- A plain table as Lua would write it, cut where it gets long.
local function table_text(t, depth, indent)
  if next(t) == nil then return "{}" end
  if depth > MAX_DEPTH then return "{...}" end
  local items, length = {}, rawlen(t)
  local function value_text(value)
    if is_plain(value) then return table_text(value, depth + 1, indent .. "  ") end
    if type(value) == "string" then return (("%q"):format(value):gsub("\\\n", "\\n")) end
    return (tostring(value):gsub("\n", "\n" .. indent .. "  "))
  end
  for i = 1, math.min(length, MAX_ITEMS) do items[i] = value_text(t[i]) end
  for _, key in ipairs(sorted_keys(t, length)) do
    if #items >= MAX_ITEMS then break end
    items[#items + 1] = key_text(key) .. " = " .. value_text(t[key])
  end
  local count = length + #sorted_keys(t, length)
  if count > #items then items[#items + 1] = ("... %d more"):format(count - #items) end
  local line = "{" .. table.concat(items, ", ") .. "}"
  if #line + #indent <= WIDTH and not line:find("\n") then return line end
  return "{\n" .. indent .. "  " .. table.concat(items, ",\n" .. indent .. "  ") .. "\n" .. indent .. "}"
end

--- A value as the prompt prints it.
---@param value any
---@return string
function M.show(value)
  if is_plain(value) then return table_text(value, 1, "") end
  return tostring(value)
end

local function show_results(results)
  local texts = {}
  for i = 1, results.n do
    local ok, text = pcall(M.show, results[i])
    texts[i] = ok and text or ("(cannot be printed: %s)"):format(tostring(text))
  end
  local joined = table.concat(texts, "\t")
  print(joined:find("\n") and table.concat(texts, "\n") or joined)
end

-- ====== Completion ======

-- The object that the text before a "." or ":" names, as a path of keys from the environment; nil where it is no plain path.
local function path_before(text)
  local keys = {}
  while true do
    local rest, key = text:match("^(.-)%[(%d+)%]$")
    if not rest then
      rest, key = text:match("^(.-)%[[\"']([^\"'%]]*)[\"']%]$")
    else
      key = math.tointeger(key)
    end
    if rest then
      table.insert(keys, 1, key)
      text = rest
    else
      local name = text:match("[%a_][%w_]*$")
      if not name then return nil end
      table.insert(keys, 1, name)
      text = text:sub(1, -#name - 1)
      local mark = text:sub(-1)
      if mark ~= "." and mark ~= ":" then return keys end
      text = text:sub(1, -2)
    end
  end
end

local function follow(env, keys)
  local value = env
  for _, key in ipairs(keys) do value = value[key] end
  return value
end

-- Fields of a tensor that are no methods.
local TENSOR_FIELDS = {"shape", "dtype", "device", "grad", "requires_grad", "is_leaf", "ndim"}

-- Collects the names that indexing value answers to, without calling anything of the user's: own keys, then those of the tables that
-- stand behind it.
local function names_of(value, methods_only)
  local found = {}
  local function add(t)
    for key, field in next, t do
      if type(key) == "string" and key:find("^[%a_][%w_]*$")
        and (not methods_only or type(field) == "function") then found[key] = true end
    end
  end
  local seen, level = {}, value
  while level ~= nil and not seen[level] do
    seen[level] = true
    if type(level) == "table" then add(level) end
    local meta = getmetatable(level)
    if type(meta) ~= "table" then break end
    local later = rawget(meta, "__lazy") -- names that are loaded on first use
    if type(later) == "table" and not methods_only then add(later) end
    local behind = rawget(meta, "__index")
    if core.is_tensor(level) then
      behind = core.Tensor
      if not methods_only then
        for _, name in ipairs(TENSOR_FIELDS) do found[name] = true end
      end
    elseif type(behind) == "function" then
      behind = type(level) == "table" and meta or nil
    end
    level = type(behind) == "table" and behind or nil
  end
  return found
end

--- The words that may stand where the text ends.
---@param env table the environment of the prompt
---@param text string the line up to the cursor
---@return string[] words sorted; what the user typed of the last name is their beginning
function M.complete(env, text)
  local partial = text:match("[%w_]*$")
  local before = text:sub(1, -#partial - 1)
  local found = {}
  local mark = before:sub(-1)
  if (mark == "." and before:sub(-2) ~= "..") or mark == ":" then
    local keys = path_before(before:sub(1, -2))
    if keys then
      local ok, value = pcall(follow, env, keys)
      if ok and value ~= nil then found = names_of(value, mark == ":") end
    end
  elseif partial ~= "" or before:find("^%s*%??%s*$") then
    for _, name in ipairs(OFFERED) do found[name] = true end
    for name in pairs(names_of(env)) do found[name] = true end
    for name in pairs(names_of(_G)) do found[name] = true end
    if before:find("^%s*%?") then
      for _, row in ipairs(core.ops()) do
        if row.lua ~= "no" then found[row.name] = true end
      end
    elseif partial ~= "" then
      for word in pairs(KEYWORDS) do found[word] = true end
    end
  end
  local words = {}
  for name in pairs(found) do
    local private = name:sub(1, 1) == "_" and partial:sub(1, 1) ~= "_"
    if name:sub(1, #partial) == partial and not private then words[#words + 1] = name end
  end
  table.sort(words)
  return words
end

-- ====== Running lines ======

local function is_unfinished(message) return message:find("<eof>$") ~= nil end

-- Compiles text as an expression or as statements.  Returns a function, or nil, message, unfinished.
local function compile(env, text)
  local fn = load("return " .. text, "=stdin", "t", env)
  if fn then return fn end
  local message
  fn, message = load(text, "=stdin", "t", env)
  if not fn then return nil, message, is_unfinished(message) end
  local rewritten, names, closes = M.keep_locals(text)
  if closes then
    print("note: a <close> variable closes when this line ends; a scope for many lines is a function: amp.autocast(dtype, fn)")
  end
  if #names > 0 then
    local kept = getmetatable(env).kept
    local again = load(rewritten, "=stdin", "t", env)
    if again then
      for _, name in ipairs(names) do kept[name] = true end
      return again
    end
  end
  return fn
end

-- The message of an error without the frames of the prompt itself; of an interruption, its first line.
local function trim_traceback(message)
  if message:find("interrupted!", 1, true) and not message:find("\n.*\nstack traceback:") then
    return (message:match("^[^\n]*"))
  end
  local lines = {}
  for line in (message .. "\n"):gmatch("(.-)\n") do
    if line:find("halfmoon/prompt.lua:", 1, true) then
      while #lines > 0 and lines[#lines]:find("^%s*%[C%]:") do lines[#lines] = nil end
      break
    end
    lines[#lines + 1] = line
  end
  if lines[#lines] == "stack traceback:" then lines[#lines] = nil end
  return table.concat(lines, "\n")
end

local function complain(message)
  io.stdout:flush()
  io.stderr:write(message, "\n")
end

local function show_time(seconds)
  if seconds < SLOW then return end
  local text = seconds < 1 and ("%.0f ms"):format(seconds * 1e3) or ("%.2f s"):format(seconds)
  print((" "):rep(math.min(core.term_width(), 80) - #text) .. text)
end

-- Runs a compiled line; returns whether it went well.
local function execute(env, fn, text)
  local start = core.now()
  local results = table.pack(program.call(fn))
  local seconds = core.now() - start
  if not results[1] then
    complain(trim_traceback(results[2]))
    return false
  end
  results = table.pack(table.unpack(results, 2, results.n))
  if results.n > 0 then
    if results[1] ~= nil then rawset(env, "_", results[1]) end
    if not text:find(";%s*$") then show_results(results) end
  end
  show_time(seconds)
  return true
end

-- `? name` and `?`.
local function help(env, topic)
  local ok, text = pcall(function() return require("halfmoon.help").text(topic, env) end)
  if ok then print(text) else complain(text) end
  return ok
end

-- ====== The loop ======

local function history_path()
  local path = os.getenv("HALFMOON_HISTORY")
  if path == "" then return nil end
  local home = os.getenv("HOME")
  return path or (home and home .. "/.halfmoon_history")
end

local function greet()
  local features = core.features()
  print(("Halfmoon %s on %s  ·  cpu: %s, %d threads"):format(core.version, _VERSION, features.isa, features.threads))
  print("? for help, ? name for one thing, Tab completes, Ctrl-C interrupts, Ctrl-D leaves")
end

-- Reads one complete input.  Returns compiled function and text | nil, "again" | nil, "end", and whether it failed to compile.
local function read(env, ask, remember)
  local text
  while true do
    local line, why = program.readline(text and ask.more or ask.first)
    if not line then
      if ask.interactive then print() end
      if why == "end" and text then complain("unfinished: " .. text) end
      return nil, why == "end" and "end" or "again", why == "end" and text ~= nil
    end
    if line:find("%S") then remember(line) end
    text = text and text .. "\n" .. line or line
    if not text:find("%S") then return nil, "again" end
    local topic = text:match("^%s*%?+%s*(.-)%s*$")
    if topic then return nil, "again", not help(env, topic) end
    local fn, message, unfinished = compile(env, text)
    if fn then return fn, text end
    if not unfinished then
      complain(message)
      return nil, "again", true
    end
  end
end

--- Reads and runs lines until the end of input.
---@param env table the environment that lines run in
---@return boolean ok whether no line failed
function M.run(env)
  local interactive = program.interactive()
  local path = history_path()
  local ask = {first = interactive and PROMPT or "", more = interactive and MORE or "", interactive = interactive}
  if interactive then greet() end
  if path then program.history_load(path) end
  program.set_completer(function(text) return M.complete(env, text) end)
  local last
  local function remember(line)
    if line ~= last then program.history_add(line, path) end
    last = line
  end
  local ok = true
  while true do
    local fn, text, failed = read(env, ask, remember)
    if failed then ok = false end
    if fn then
      ok = execute(env, fn, text) and ok
    elseif text == "end" then
      return ok
    end
    io.stdout:flush()
  end
end

return M
