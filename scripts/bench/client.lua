-- client.lua -- starts peer.py and asks it one line at a time.
--
-- Loaded by run.lua.  Commands go through a pipe, answers come back through a named pipe; see peer.py for both.

local M = {}

--- 'x' for the shell.
local function quote(text) return "'" .. text:gsub("'", "'\\''") .. "'" end
M.quote = quote

local function runs(command) return (os.execute(command .. " >/dev/null 2>&1")) end

--- The Python to compare with: the one named, that of scripts/bench/peer, or the system's if it has torch.
---@param wanted string "" for any, "none" for none, or a path
---@param build string the build folder
---@return string? python
---@return string? why there is none
function M.find(wanted, build)
  if wanted == "none" then return nil, "switched off by --peer none" end
  local candidates = wanted ~= "" and {wanted} or {build .. "/peer/env/bin/python", "python3", "/usr/bin/python3"}
  for _, python in ipairs(candidates) do
    if runs("env -u OPENBLAS_CORETYPE " .. quote(python) .. " -c 'import torch, numpy'") then return python end
  end
  return nil, wanted ~= "" and wanted .. " cannot import torch and numpy"
    or "no Python with torch here; scripts/bench/peer makes one (1.4 GB in build/peer)"
end

---@class Peer
local Peer = {}
Peer.__index = Peer

--- Starts peer.py.  Its log goes to `scratch`/peer.log.
---@param python string
---@param script string path of peer.py
---@param scratch string a folder
---@param threads integer
---@return Peer? peer
---@return string? message
function M.start(python, script, scratch, threads)
  local fifo, log = scratch .. "/peer.fifo", scratch .. "/peer.log"
  if not runs(("rm -f %s && mkfifo %s"):format(quote(fifo), quote(fifo))) then return nil, "mkfifo failed: " .. fifo end
  local environment = ("env -u OPENBLAS_CORETYPE OMP_NUM_THREADS=%d TORCHINDUCTOR_CACHE_DIR=%s"):format(
    threads, quote(scratch .. "/inductor"))
  local self = setmetatable({log = log}, Peer)
  -- A shell that could not start python would leave the pipe unopened and us waiting; `true` opens it in any case.
  self.input = io.popen(("{ %s %s %s %s; true >%s; } >%s 2>&1"):format(
    environment, quote(python), quote(script), quote(fifo), quote(fifo), quote(log)), "w")
  self.output = io.open(fifo, "r")
  local hello, message = self:ask("hello")
  if not hello then return nil, message end
  self.torch, self.threads, self.compiles = hello.torch, tonumber(hello.threads), hello.compile == "yes"
  return self
end

--- Sends a command -> table of the answer's keys and values (numbers where they are) | nil, message
---@param format string
---@return table? answer
---@return string? message
function Peer:ask(format, ...)
  local sent = pcall(function(...)
    assert(self.input:write(format:format(...), "\n"))
    assert(self.input:flush())
  end, ...)
  local line = sent and self.output:read("l")
  if not line then return nil, "the peer stopped; see " .. self.log end
  local rest = line:match("^ok ?(.*)$")
  if not rest then return nil, (line:gsub("^error ", "")) end
  local answer = {}
  for key, value in rest:gmatch("(%w+)=(%S+)") do answer[key] = tonumber(value) or value end
  return answer
end

--- Ends the peer.
function Peer:close()
  pcall(function()
    self.input:write("quit\n")
    self.input:flush()
  end)
  self.input:close() -- waits until the peer has gone; its shell opens the named pipe once more, which wants a reader
  self.output:close()
end

return M
