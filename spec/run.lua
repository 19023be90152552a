-- run.lua -- runs the specs with busted, inside the program, so that they see the engine that was built:
--
--   build/halfmoon spec/run.lua [--gc=generational] [--device=cuda] [busted's own options] [files]
--
-- --device makes a device the default one: the specs then make their tensors there.  HALFMOON_CUDA=emu gives a device "cuda" without
-- a GPU.
--
-- The library is loaded before busted isolates the files from each other: modules are then loaded once, and what one file
-- holds (a class, a metatable) is what the next one sees.

local own = {gc = "incremental", device = "cpu"} -- our own options; busted does not see them
for i = #arg, 1, -1 do
  local name, value = arg[i]:match("^%-%-(%a+)=([%w:]+)$")
  if own[name] then
    own[name] = value
    table.remove(arg, i)
  end
end

--- Loads every module of the library below a folder.
local function load_all(folder, prefix)
  local files = require("halfmoon.program").files
  for _, name in ipairs(assert(files(folder))) do
    local module = name:match("^(.*)%.lua$")
    if name:sub(-1) == "/" then
      load_all(folder .. "/" .. name:sub(1, -2), prefix .. name:sub(1, -2) .. ".")
    elseif module and not module:find("^meta") then
      require(module == "init" and prefix:sub(1, -2) or prefix .. module)
    end
  end
end

local init = assert(package.searchpath("halfmoon", package.path), "the Lua library is not beside the program")
require "halfmoon" -- first: the C module learns from it where the library lies, which error positions skip
load_all(init:match("^(.*)/init%.lua$"), "halfmoon.")

if os.getenv("HALFMOON_LEDGER") then -- see scripts/audit
  require("spec.support.watch").start(require "halfmoon", require("spec.support.proofs").note)
end
require("halfmoon").set_default_device(own.device)
require("spec.support.devices").collector = own.gc
require "busted.runner" {standalone = false, output = "spec/support/output.lua"}
