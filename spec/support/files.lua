-- files.lua -- whole files in specs, and a folder of its own for what a spec file writes.

local M = {}

--- The bytes of a file; raises where it cannot be read.
---@param path string
---@return string
function M.read(path)
  local f = assert(io.open(path, "rb"))
  local bytes = f:read("a")
  f:close()
  return bytes
end

--- Writes a file; returns its path.
---@param path string
---@param bytes string
---@return string
function M.write(path, bytes)
  local f = assert(io.open(path, "wb"))
  f:write(bytes)
  f:close()
  return path
end

---@param path string
---@return boolean
function M.exists(path)
  local f = io.open(path, "rb")
  if f then f:close() end
  return f ~= nil
end

--- A folder that is there while the cases of a spec file run.  In the file, whose environment has busted's functions:
---   local folder = files.folder(setup, teardown)
---@param setup function
---@param teardown function
---@param below string? folders to make in it
---@return {path: string, path_of: (fun(name: string): string), write: (fun(name: string, bytes: string): string)}
function M.folder(setup, teardown, below)
  local path = os.tmpname()
  os.remove(path)
  setup(function() assert(os.execute(("mkdir -p %s/%s"):format(path, below or ""))) end)
  teardown(function() assert(os.execute("rm -rf " .. path)) end)
  local function path_of(name) return path .. "/" .. name end
  return {path = path, path_of = path_of, write = function(name, bytes) return M.write(path_of(name), bytes) end}
end

return M
