-- linear_cases.lua -- linear with an activation and its gradients on cuda, against the plain ops on the CPU, in every
-- dtype; run by cuda_linear_spec.lua in a process of its own for each setting of the test double.
--
-- Raises at the first case that is wrong.  Prints a Lua table: by activation and dtype what the counters say of
-- a chain of layers, forward and backward.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local amp = hm.amp
local numbers = require "spec.support.numbers"

local nan, inf = 0 / 0, math.huge
-- Relative to the largest value; gelu's gradients go through values that were rounded before.
local TOLERANCE = {f32 = 4e-6, f16 = 2.0 ^ -9, bf16 = 2.0 ^ -6, f64 = 1e-12}
-- Leading dims, and the features of three layers.  Lines of 8 elements suit cublasLt's gelu, others do not.
local CASES = {
  {{5}, 16, 24, 16}, {{33}, 40, 136, 8}, {{2, 3}, 8, 8, 8}, {{1}, 8, 16, 24}, {{300}, 24, 264, 16},
}
local ODD = {{7}, 9, 13, 11}

local function values(shape, seed, scale)
  hm.manual_seed(seed)
  return hm.randn(shape) * scale
end

--- The tensors of a case on a device: x, then weight and bias of each layer.
local function operands(case, dtype, device)
  local shape = table.pack(table.unpack(case[1]))
  shape[#shape + 1] = case[2]
  local list = {values(shape, 1, 1)}
  for layer = 1, #case - 2 do
    local inputs, outputs = case[layer + 1], case[layer + 2]
    list[#list + 1] = values({outputs, inputs}, 10 + layer, 1 / math.sqrt(inputs))
    list[#list + 1] = values({outputs}, 20 + layer, 0.5)
  end
  for i, t in ipairs(list) do list[i] = t:to(dtype):to(device):requires_grad_(true) end
  return list
end

--- All layers but the last have the activation.  fused: by the rows in question, else by the plain ops.
local function chain(list, activation, fused)
  local h = list[1]
  for i = 2, #list, 2 do
    local last = i == #list - 1
    if last then h = core.call("linear", h, list[i], list[i + 1])
    elseif fused then h = core.call("linear_" .. activation, h, list[i], list[i + 1])
    else h = core.call(activation, (core.call("linear", h, list[i], list[i + 1]))) end
  end
  return h
end

--- Result and gradients of everything, as float64 on the CPU.
local function run(case, activation, dtype, device, fused, region)
  local list = operands(case, dtype, device)
  local out = region and amp.autocast(region, chain, list, activation, fused) or chain(list, activation, fused)
  out:float():square():mean():backward()
  local all = {out:detach()}
  for i, t in ipairs(list) do all[i + 1] = t.grad end
  for i, t in ipairs(all) do all[i] = t:cpu():double() end
  return all
end

local function check(got, want, tolerance, what)
  for i = 1, #want do
    local most = math.max(want[i]:abs():max():item(), 1e-3)
    local off = (got[i] - want[i]):abs():max():item()
    if off ~= off or off > tolerance * most then
      error(("%s: tensor %d is off by %g of %g"):format(what, i, off, most), 0)
    end
  end
end

local function check_case(case, activation, dtype)
  local what = ("%s %s {%s}"):format(activation, dtype, table.concat(case, ", ", 2))
  local tolerance = TOLERANCE[dtype] * (activation == "relu" and 1 or 2)
  check(run(case, activation, dtype, "cuda", true), run(case, activation, dtype, "cpu", false), tolerance, what)
end

--- Not a number and infinities among what goes in come out as from the plain ops.
local function check_special(activation, dtype)
  local plain = {}
  for _, device in ipairs {"cpu", "cuda"} do
    local x = hm.tensor({nan, inf, -inf, 1, -1, 0, 2, -2, 3, 4, 5, 6, 7, 8, 9, 10}, {dtype = dtype}):view(16, 1)
    local w, b = hm.ones({8, 1}, {dtype = dtype}), hm.zeros({8}, {dtype = dtype})
    x, w, b = x:to(device):requires_grad_(true), w:to(device), b:to(device)
    local row = device == "cuda" and core.call("linear_" .. activation, x, w, b)
      or core.call(activation, (core.call("linear", x, w, b)))
    plain[device] = numbers.flat(row:detach():cpu():double())
  end
  for i, want in ipairs(plain.cpu) do
    local got = plain.cuda[i]
    local same = got == want or (got ~= got and want ~= want)
    local off = math.abs(got - want)
    if not same and (off ~= off or off > TOLERANCE[dtype] * 16) then
      error(("%s %s: value %d is %s, on the CPU %s"):format(activation, dtype, i, got, want), 0)
    end
  end
end

local function counted(fn)
  hm.cuda.reset_stats()
  fn()
  local s = hm.cuda.stats()
  return ("{fused = %d, stepped = %d}"):format(s.fused_linears, s.stepped_linears)
end

local dtypes = {}
for dtype in (os.getenv("HALFMOON_LINEAR_SPEC") or "f32 f16 bf16 f64"):gmatch("%S+") do dtypes[#dtypes + 1] = dtype end

local lines = {}
for _, activation in ipairs {"relu", "gelu_tanh"} do
  for _, dtype in ipairs(dtypes) do
    local count = counted(function() for _, case in ipairs(CASES) do check_case(case, activation, dtype) end end)
    lines[#lines + 1] = ("[%q] = %s"):format(activation .. " " .. dtype, count)
    check_case(ODD, activation, dtype)
    check_special(activation, dtype)
  end
  for region in (os.getenv("HALFMOON_LINEAR_REGIONS") or "f16 bf16"):gmatch("%S+") do
    local count = counted(function()
      for _, case in ipairs(CASES) do
        check(run(case, activation, "f32", "cuda", true, region), run(case, activation, "f32", "cpu", false, region),
          TOLERANCE[region] * 2, activation .. " autocast " .. region)
      end
    end)
    lines[#lines + 1] = ("[%q] = %s"):format(activation .. " autocast " .. region, count)
  end
end
print("return {\n  " .. table.concat(lines, ",\n  ") .. "\n}")
