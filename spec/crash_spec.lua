-- Files and a system that fails: a save that is killed at each of its calls in turn, and every read and write that goes wrong
-- once.  Needs build/io-shim.so (`make test` and `make test-io` build it).

local hm = require "halfmoon"
local devices = require "spec.support.devices"
local files = require "spec.support.files"
local process = require "spec.support.process"

if os.getenv("HALFMOON_SANITIZED") then
  describe("files and a system that fails", function() pending("the sanitizers must be loaded before the shim") end)
  return
end

local it = devices.cpu_cases("the program from outside", it) -- luacheck: ignore 431
local shim = (os.getenv("BUILD") or process.program:match("^(.*)/") or ".") .. "/io-shim.so"
if shim:sub(1, 1) ~= "/" then shim = "./" .. shim end

if not files.exists(shim) then
  describe("files and a system that fails", function()
    pending("there is no " .. shim .. ": `make test-io` builds it")
  end)
  return
end

local scratch = files.folder(setup, teardown)
local folder, path_of, read = scratch.path, scratch.path_of, files.read

--- Runs a Lua file or -e text of the program under the shim.
local function under_shim(words)
  return process.shell(("HALFMOON_THREADS=1 HALFMOON_SHIM=%s LD_PRELOAD=%s %s %s"):format(folder, shim, process.program, words))
end

describe("a save that is killed", function()
  local save = [[
    local hm = require "halfmoon"
    local path, n, k = %q, %d, 3
    local object = {a = hm.full({1000}, k), b = hm.full({50}, k, {dtype = "f16"})}
    if path:find("state") then object = {model = object, rng = true, epoch = k} end
    io.open("%s/@arm:%s:*:" .. n)
    assert(hm.save(path, object))
    io.open("%s/@status"):close()
    print "saved"]]

  --- Walks n until the save ends; returns how many kills there were, and how often the new file was there.
  local function walk(path, action, old, new)
    local kills, news = 0, 0
    for n = 1, 60 do
      local f = assert(io.open(path, "wb"))
      f:write(old)
      f:close()
      local said, status = under_shim("-e " .. process.quote(save:format(path, n, folder, action, folder)))
      local now = read(path)
      if status == 0 then
        assert.equal("saved\n", said)
        assert(now == new, "not the new file")
        return kills, news
      end
      assert(status == 137, said)
      assert(now == old or now == new, ("call %d, %s: neither the old file nor the new one, %d bytes"):format(n, action, #now))
      kills = kills + 1
      if now == new then news = news + 1 end
    end
    error("the save never ended")
  end

  for name, least in pairs {["state.safetensors"] = 10, ["arrays.npz"] = 15} do
    it("at each of its calls leaves the old file or the new one, whole: " .. name, function()
      local path = path_of(name)
      local function object(k)
        local o = {a = hm.full({1000}, k), b = hm.full({50}, k, {dtype = "f16"})}
        return name:find("state") and {model = o, rng = true, epoch = k} or o
      end
      assert(hm.save(path, object(1)))
      local old = read(path)
      local _, status = under_shim("-e " .. process.quote(save:format(path, 999, folder, "kill", folder)))
      assert.equal(0, status)
      local new = read(path)
      assert(old ~= new)
      for _, action in ipairs(name:find("state") and {"kill", "half", "after"} or {"half"}) do
        local kills, news = walk(path, action, old, new)
        assert(kills >= least, kills .. " calls were killed")
        assert(news > 0 and news < kills, "one of both was never seen")
      end
      os.execute("rm -f " .. folder .. "/*")
    end)
  end
end)

describe("every call on a file that fails once", function()
  it("is told, or made again; the old file or the new one is there, and nothing is left open", function()
    local said, status = under_shim("spec/support/io_walk.lua " .. folder)
    assert(status == 0, said)
    local survived = tonumber(said:match("(%d+) failures survived\n$"))
    assert(survived and survived > 300, said)
    assert.equal("", (process.shell("ls -A " .. folder .. " | grep tmp")))
  end)
end)
