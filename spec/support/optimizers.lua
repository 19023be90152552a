-- optimizers.lua -- what the specs of optimizers share: inputs, names, and a rule in doubles against the engine's steps.

local hm = require "halfmoon"
local numbers = require "spec.support.numbers"
local reference = require "spec.reference.optim"

local M = {}

--- Numbers without a pattern, the same in every run; step 0 for the parameter itself.
function M.filled(n, step, seed)
  local list = {}
  for i = 1, n do list[i] = math.sin(i * 12.9898 + step * 4.1414 + (seed or 0) * 78.233) * 1.5 end
  return list
end

function M.parameter(n, dtype, seed, device)
  return hm.tensor(M.filled(n, 0, seed), {dtype = dtype, device = device, requires_grad = true})
end

local DEFAULTS = {
  SGD = {}, Adam = {betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0},
  AdamW = {betas = {0.9, 0.999}, eps = 1e-8, weight_decay = 0.01}, RMSprop = {alpha = 0.99, eps = 1e-8},
  Adagrad = {eps = 1e-10}, Lion = {betas = {0.9, 0.99}},
}

--- All options of a case {kind, options}.
function M.options_of(case)
  local o = {}
  for k, v in pairs(DEFAULTS[case[1]]) do o[k] = v end
  for k, v in pairs(case[2]) do o[k] = v end
  return o
end

function M.name_of(case)
  local parts = {}
  for k, v in pairs(case[2]) do parts[#parts + 1] = k .. " " .. (type(v) == "table" and table.concat(v, ",") or tostring(v)) end
  table.sort(parts)
  return case[1] .. " " .. table.concat(parts, " ")
end

--- 20 steps of a case in float32 or float64 within a tolerance of the rule in doubles; state has the parameter's dtype.
function M.check_steps(case, dtype, tolerance)
  local rule, o = reference[case[1]:lower()], M.options_of(case)
  local n = 37 -- a vector's width and a rest
  local p = M.parameter(n, dtype)
  local opt, state, want = hm.optim[case[1]]({p}, case[2]), {}, numbers.flat(p)
  for step = 1, 20 do
    p.grad = hm.tensor(M.filled(n, step), {dtype = dtype})
    rule(want, numbers.flat(p.grad), state, o)
    opt:step()
    numbers.assert_near(p, want, tolerance, tolerance, ("step %d"):format(step))
  end
  for _, entry in pairs(opt:state_dict().state) do
    for key, t in pairs(entry) do if key ~= "step" then assert(p.dtype == t.dtype, key .. " is " .. t.dtype) end end
  end
end

--- 5 steps of a case on a half-precision parameter: each is the rule in doubles, rounded once; state is float32; the
--- gradient is left alone.
function M.check_half_steps(case, dtype)
  local rule, o = reference[case[1]:lower()], M.options_of(case)
  local n = 21
  local p = M.parameter(n, dtype)
  local opt, state = hm.optim[case[1]]({p}, case[2]), {}
  for step = 1, 5 do
    p.grad = hm.tensor(M.filled(n, step), {dtype = dtype})
    local want = numbers.flat(p)
    rule(want, numbers.flat(p.grad), state, o)
    opt:step()
    local got = numbers.flat(p)
    for i = 1, n do
      local d = numbers.ulps(got[i], want[i], p.dtype)
      assert(d <= 0.52, ("step %d, value %d is %.9g, exact %.9g: %.3g ulp"):format(step, i, got[i], want[i], d))
    end
    numbers.assert_near(p.grad, M.filled(n, step), 0.01, 0.01)
  end
  for _, entry in pairs(opt:state_dict().state) do
    for key, t in pairs(entry) do if key ~= "step" then assert(t.dtype == "float32", key .. " is " .. t.dtype) end end
  end
end

return M
