-- watch.lua -- notes in the ledger (proofs.lua) which modules were called and which optimizers made a step while the
-- specs ran, so that scripts/audit can tell those that no spec uses.  Used by spec/run.lua where HALFMOON_LEDGER is
-- set.

local M = {}

--- Puts itself before the first call of each module class and the steps of optimizers.  Tail calls: no error points
--- here.
---@param hm table the library
---@param note fun(aspect: string, name: string)
function M.start(hm, note)
  for name, class in pairs(hm.nn) do
    local instance = type(class) == "table" and rawget(class, "__class") and rawget(class, "__instance")
    if instance then
      local call = instance.__call
      instance.__call = function(...)
        instance.__call = call
        note("module", name)
        return call(...)
      end
    end
  end
  local Optimizer = hm.optim.Optimizer
  local step = Optimizer.step
  function Optimizer.step(self, ...)
    note("optimizer", self.name)
    return step(self, ...)
  end
end

return M
