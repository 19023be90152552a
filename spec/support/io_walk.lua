-- io_walk.lua -- every read and write of every file format fails once: for crash_spec.lua, under io_shim.so.
--
--   HALFMOON_SHIM=FOLDER LD_PRELOAD=build/io-shim.so halfmoon spec/support/io_walk.lua FOLDER
--
-- For each format and each kind of failure the n-th call fails, n = 1, 2, ... until none is left to fail.  Prints a line
-- for each walk and ends with "N failures survived"; raises at the first thing that is not as it should be.

local hm = require "halfmoon"
local files = require "spec.support.files"
local folder = arg[1]
local survived = 0

local function arm(action, ops, n) io.open(("%s/@arm:%s:%s:%d"):format(folder, action, ops, n)) end

--- Calls counted, whether the failure came, and open descriptors.
local function status()
  local f = assert(io.open(folder .. "/@status"))
  local text = f:read("a")
  f:close()
  local count, fired, open = text:match("(%d+) (%d) (%d+)")
  return tonumber(count), fired == "1", tonumber(open)
end

local read = files.read
local function write(name, bytes) return files.write(folder .. "/" .. name, bytes) end

local function must(ok, ...)
  if not ok then error(("%s, %s, call %d: %s"):format(...), 0) end
end

local CODES = {eio = "EIO", enospc = "ENOSPC"}

-- ====== Writing ======

local function content(k)
  local model = hm.nn.Linear(5, 3)
  hm.no_grad(function() model.weight:fill_(k) model.bias:fill_(-k) end)
  return model
end

local flat = {content(1):state_dict(), content(2):state_dict()}
for k, state in ipairs(flat) do state.turned = hm.arange(6, {dtype = "f32"}):mul(k):view(2, 3):t() end

local writers = {
  {"state.safetensors", {{model = content(1), rng = true, n = 1}, {model = content(2), rng = true, n = 2}}},
  {"flat.safetensors", flat},
  {"array.npy", {hm.ones({40}), hm.zeros({50})}},
  {"arrays.npz", flat},
}

--- A save whose n-th call fails; returns whether one did.
local function save_once(name, path, versions, bytes, action, ops, n)
  assert(hm.save(path, versions[1]))
  arm(action, ops, n)
  local ok, message, code = hm.save(path, versions[2])
  local _, fired, open = status()
  local now = read(path)
  must(open == 0, name, action, n, "a descriptor is left open")
  if not fired or not CODES[action] then
    must(ok == true, name, action, n, tostring(message))
    must(now == bytes[2], name, action, n, "not the new file")
    return fired
  end
  if ok then -- closing the folder may fail without harm
    must(now == bytes[2], name, action, n, "not the new file, and no error")
    return true
  end
  must(ok == nil and type(message) == "string" and message:find(folder, 1, true), name, action, n, "no message")
  must(code == CODES[action], name, action, n, "code " .. tostring(code))
  must(now == bytes[1] or now == bytes[2], name, action, n, "neither the old file nor the new one")
  if now == bytes[2] then must(message:find("cannot flush") or message:find("cannot open"), name, action, n, message) end
  return true
end

local function walk_save(name, versions)
  local path, bytes = folder .. "/" .. name, {}
  for k = 1, 2 do
    assert(hm.save(path, versions[k]))
    bytes[k] = read(path)
  end
  for action, ops in pairs {short = "w", eio = "owsnc", enospc = "owsnc", eintr = "owsc"} do
    local n = 1
    while save_once(name, path, versions, bytes, action, ops, n) do n = n + 1 end
    survived = survived + n - 1
    print(("save %-18s %-7s %d"):format(name, action, n - 1))
    must(n > 2, name, action, n, "nothing failed")
  end
  os.remove(path)
end

-- ====== Reading ======

local function bytes_of(path) return read("spec/data/" .. path) end

local function idx() return string.pack(">I2BBI4I4", 0, 8, 2, 60, 70) .. ("x"):rep(4200) end

local data = hm.data
local readers = {
  {"a.npy", bytes_of "numpy_fortran.npy", data.npy, function(t) return t:sum():item() end},
  {"stored.npz", bytes_of "numpy_stored.npz", data.npz, function(t) return t.b:sum():item() end},
  {"packed.npz", bytes_of "numpy_packed.npz", data.npz, function(t) return t.zeros:size(1) end},
  {"t.csv", "a,b\n1,2\n3,4\n", data.csv, function(t) return t:sum():item() end},
  {"t.txt", ("text"):rep(100), data.text, function(t) return t:size(1) end},
  {"test_batch.bin", ("\1" .. ("p"):rep(3072)):rep(70), function() return data.cifar10 {root = folder, train = false} end,
    function(d) return d:size() end},
  {"images", idx(), data.idx, function(t) return t:sum():item() end, "gzip"},
}

--- A read whose n-th call fails; returns whether one did.
local function load_once(name, read_it, want, action, n, also_fails)
  arm(action, action == "short" and "r" or "or", n)
  local ok, result = pcall(read_it)
  local _, fired, open = status()
  collectgarbage()
  must(open == 0, name, action, n, "a descriptor is left open")
  if ok then
    must(not (fired and CODES[action]), name, action, n, "no error")
    must(result == want, name, action, n, "something else was read")
    return fired
  end
  must(fired and (CODES[action] or (action == "eintr" and also_fails)), name, action, n, tostring(result))
  must(type(result) == "string" and result:find(folder, 1, true), name, action, n, "no message: " .. tostring(result))
  return true
end

local function walk_load(name, read_it, also_fails)
  local want = read_it()
  for _, action in ipairs {"short", "eio", "eintr"} do
    local n = 1
    while load_once(name, read_it, want, action, n, also_fails) do n = n + 1 end
    survived = survived + n - 1
    print(("load %-18s %-7s %d"):format(name, action, n - 1))
    must(n > 1, name, action, n, "nothing failed")
  end
  must(read_it() == want, name, "none", 0, "it cannot be read any more")
end

--- hm.load gives nil, message, code: raised here, to be walked like the others.
local function load_flat()
  local state, message, code = hm.load(folder .. "/flat.safetensors")
  if state then return state.weight:sum():item() + state.turned:sum():item() end
  assert(code == "EIO", code)
  error(message, 0)
end

for _, w in ipairs(writers) do walk_save(w[1], w[2]) end
assert(hm.save(folder .. "/flat.safetensors", flat[2]))
walk_load("flat.safetensors", load_flat)
for _, r in ipairs(readers) do
  local path = write(r[1], r[2])
  walk_load(r[1], function() return r[4](r[3](path)) end, r[5]) -- zlib does not try an interrupted call again
end
print(survived .. " failures survived")
