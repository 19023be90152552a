-- fuzz_corpus_spec.lua -- the inputs of the fuzzers (scripts/fuzz/corpus) through the readers: each gives tensors or a clear refusal.
-- What a fuzzer once broke is among them.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local files = require("halfmoon.program").files

local root = "scripts/fuzz/corpus/"

--- Reads every element.
local function look(t) return #t:reshape {-1}:totable() end

local function look_all(entries)
  for _, entry in ipairs(entries) do look(entry[2]) end
end

--- Each reader: path -> true if it could be read; else false, message, code.
local readers = {
  idx = function(path)
    local ok, result = pcall(core.idx, path)
    if not ok then return false, result, "EFORMAT" end
    look(result)
    return true
  end,
  safetensors = function(path)
    local entries, message, code = core.safetensors_load(path)
    if not entries then return false, message, code end
    look_all(entries)
    return true
  end,
  npy = function(path)
    local t, message, code = core.npy_load(path)
    if not t then return false, message, code end
    look(t)
    return true
  end,
  npz = function(path)
    local entries, message, code = core.npz_load(path)
    if not entries then return false, message, code end
    look_all(entries)
    return true
  end,
  csv = function(path)
    local c, message, code = core.csv_open(path, ",", nil)
    if not c then return false, message, code end
    local names, columns = c:names()
    assert(names == nil or #names == columns)
    local t
    t, message, code = c:read({1}, "f32")
    if not t then return false, message, code end
    look(t)
    return true
  end,
}

--- Runs a reader on its whole corpus; returns how many inputs it read and refused.
local function walk(name)
  local list, read, refused = assert(files(root .. name)), 0, 0
  table.sort(list)
  for _, file in ipairs(list) do
    local path = root .. name .. "/" .. file
    local ok, message, code = readers[name](path)
    if ok then
      read = read + 1
    else
      refused = refused + 1
      assert(type(message) == "string" and message:find(path, 1, true) and #message > #path + 10, path .. ": " .. tostring(message))
      assert(code == "EFORMAT", ("%s: code %s: %s"):format(path, code, message))
    end
  end
  return read, refused
end

describe("the fuzzers' inputs", function()
  for _, name in ipairs {"idx", "safetensors", "npy", "npz", "csv"} do
    it("for " .. name .. " are read or refused, and leave nothing behind", function()
      walk(name)
      collectgarbage()
      collectgarbage()
      local before = core.memory_stats().live
      local read, refused = walk(name)
      collectgarbage()
      collectgarbage()
      assert.equal(before, core.memory_stats().live)
      assert(read >= 2 and refused >= 1, read .. " read, " .. refused .. " refused")
      assert.equal(1, hm.ones {1}:item())
    end)
  end
end)
