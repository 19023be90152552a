-- process.lua -- running the program in a process of its own, for specs that need another instruction set, a crash or a kill.

local M = {}

M.program = os.getenv("HALFMOON_PROGRAM") or "build/halfmoon"

--- A word for the shell.
function M.quote(text) return "'" .. text:gsub("'", "'\\''") .. "'" end

--- Runs a shell command.  Returns all it printed on both streams, and its exit status.
function M.shell(command)
  local pipe = assert(io.popen("{ " .. command .. "\n} 2>&1; echo \"status=$?\""))
  local text = pipe:read("a")
  pipe:close()
  local said, status = text:match("^(.*)status=(%d+)\n$")
  return said, tonumber(status)
end

--- "NAME='value' NAME='value' " for a table of environment variables.
local function assignments(env)
  local words = {}
  for name, value in pairs(env or {}) do words[#words + 1] = name .. "=" .. M.quote(tostring(value)) end
  table.sort(words)
  return #words > 0 and table.concat(words, " ") .. " " or ""
end

--- Runs a Lua text as a script of the program, with arguments.  Returns what it printed and its exit status.
function M.script(source, env, ...)
  local path = os.tmpname()
  local f = assert(io.open(path, "w"))
  f:write(source)
  f:close()
  local words = {}
  for i, word in ipairs {...} do words[i] = " " .. M.quote(tostring(word)) end
  local said, status = M.shell(assignments(env) .. M.program .. " " .. path .. table.concat(words))
  os.remove(path)
  return said, status
end

--- Runs a Lua file of the repository in the program; raises with its output unless it ends with 0.
function M.file(path, env, ...)
  local words = {}
  for i, word in ipairs {...} do words[i] = " " .. M.quote(tostring(word)) end
  local said, status = M.shell(assignments(env) .. M.program .. " " .. path .. table.concat(words))
  if status ~= 0 then error(("%s%s ended with %d:\n%s"):format(assignments(env), path, status, said), 2) end
  return said
end

return M
