-- layer_scale.lua -- gradients that no one scale can save: a deep network of sigmoids in float16, with amp.layer_scale.
--
--     build/halfmoon examples/layer_scale.lua [LAYERS]    -- 18 layers of 64; a second
--
-- Each sigmoid makes the gradient smaller by about 2^-3 on its way back, so between the last layer and the first lie more
-- than the 40 powers of two that float16 has.  A loss scale that saves the first layers' gradients overflows in the
-- last ones.  Shown for each layer, on one batch of Fashion-MNIST: the size of its weight's gradient in float32, and the
-- share of it that is zero in float16: as it is, with the largest loss scale that does not overflow, and with each layer
-- scaled; and how far the last lies from float32.

local hm = require "halfmoon"
local nn, amp, data = hm.nn, hm.amp, hm.data

local M = {}

--- layers linear layers with sigmoids between them.
function M.network(layers)
  local list = {nn.Flatten()}
  for i = 1, layers do
    list[#list + 1] = nn.Linear(i == 1 and 784 or 64, i == layers and 10 or 64)
    if i < layers then list[#list + 1] = nn.Sigmoid() end
  end
  return nn.Sequential(table.unpack(list))
end

--- The gradients of the weights after a backward in a dtype, times 1 / scale.
function M.gradients(model, x, y, dtype, scale)
  model:zero_grad()
  local loss = amp.autocast({enabled = dtype == "float16"}, function()
    return nn.functional.cross_entropy(model(x), y) * scale
  end)
  loss:backward()
  local grads = {}
  for name, p in model:named_parameters() do
    if name:find("weight", 1, true) then grads[#grads + 1] = {name = name, grad = p.grad / scale} end
  end
  return grads
end

--- The largest power of two that no gradient overflows with.
function M.best_scale(model, x, y)
  local best = 1.0
  for e = 1, 40 do
    for _, entry in ipairs(M.gradients(model, x, y, "float16", 2.0 ^ e)) do
      if not entry.grad:isfinite():all():item() then return best end
    end
    best = 2.0 ^ e
  end
  return best
end

function M.zeros(grad) return grad:eq(0):float():mean():item() end

--- The first images and labels of the training set.
function M.batch()
  local loader = data.DataLoader {data.fashion_mnist(), batch_size = 128, normalize = {mean = 0.286, std = 0.353}}
  return loader:batches()()
end

--- For each layer: {name, amax (in float32), plain, scaled, layered (shares of zeros), off, carried}; and `best`, the loss
--- scale.
function M.compare(layers, x, y)
  hm.manual_seed(1)
  local model = M.network(layers)
  local exact = M.gradients(model, x, y, "float32", 1)
  local plain = M.gradients(model, x, y, "float16", 1)
  local best = M.best_scale(model, x, y)
  local scaled = M.gradients(model, x, y, "float16", best)
  local ls = amp.layer_scale(model, "adaptive", {accum_upper_bound = 2.0 ^ 100})
  local layered = M.gradients(model, x, y, "float16", 1)
  local carried, rows = ls:carried(), {best = best}
  for i, entry in ipairs(exact) do
    rows[i] = {
      name = entry.name, amax = entry.grad:abs():max():item(), plain = M.zeros(plain[i].grad),
      scaled = M.zeros(scaled[i].grad), layered = M.zeros(layered[i].grad),
      off = ((layered[i].grad - entry.grad):norm() / entry.grad:norm()):item(),
      carried = carried[(entry.name:gsub("%.weight$", ""))],
    }
  end
  ls:remove()
  return rows
end

if arg and arg[0] and arg[0]:find("layer_scale%.lua$") then
  local layers = math.tointeger(tonumber(arg[1] or 18))
  if not layers or layers < 1 then
    io.stderr:write("layer_scale.lua: LAYERS must be a whole number from 1 on, not '", arg[1], "'\n")
    os.exit(1, true)
  end
  local rows = M.compare(layers, M.batch())
  print(("%-10s %10s   zeros: %8s %10s %10s %10s %8s"):format("", "largest", "float16", ("* 2^%d"):format(
    math.log(rows.best, 2)), "layers", "carried", "off by"))
  for _, r in ipairs(rows) do
    print(("%-10s %10.1e %16.1f%% %9.1f%% %9.1f%% %10s %7.2f%%"):format(r.name, r.amax, 100 * r.plain, 100 * r.scaled,
      100 * r.layered, ("2^%g"):format(math.log(r.carried, 2)), 100 * r.off))
  end
end
return M
