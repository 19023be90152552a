-- run.lua -- runs the specs with busted, inside the program, so that they see the engine that was built:
--
--   build/halfmoon spec/run.lua [--gc=generational] [busted's own options] [files]
--
-- The library is loaded before busted isolates the files from each other: modules are then loaded once, and what one file
-- holds (a class, a metatable) is what the next one sees.

local generational = false
for i = #arg, 1, -1 do
  local mode = arg[i]:match("^%-%-gc=(%a+)$")
  if mode then
    generational = mode == "generational"
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
    elseif module and module ~= "meta" then
      require(module == "init" and prefix:sub(1, -2) or prefix .. module)
    end
  end
end

local init = assert(package.searchpath("halfmoon", package.path), "the Lua library is not beside the program")
load_all(init:match("^(.*)/init%.lua$"), "halfmoon.")

if generational then collectgarbage("generational") end
require "busted.runner" {standalone = false, output = "spec/support/output.lua"}
