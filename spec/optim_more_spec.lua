-- optim_more_spec.lua -- RMSprop, Adagrad, Lion, amsgrad: against the published rules in doubles and against PyTorch's
-- numbers, with the scaler, resumed, and on cuda; half-precision weights without masters (Kahan sums, rounding by
-- chance); clipping by value.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local devices = require "spec.support.devices"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"
local optimizers = require "spec.support.optimizers"
local reference = require "spec.reference.optim"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local filled, parameter = optimizers.filled, optimizers.parameter
local name_of, options_of = optimizers.name_of, optimizers.options_of

local cases, why_not = devices.cases("spec/optim_more_spec.lua")
local function case(name, fn) it(name, function() cases:run(name, fn) end) end

local CASES = {
  {"Adam", {lr = 0.02, amsgrad = true, betas = {0.8, 0.7}}},
  {"Adam", {lr = 0.02, amsgrad = true, weight_decay = 0.1, maximize = true}},
  {"AdamW", {lr = 0.02, amsgrad = true, betas = {0.3, 0.6}, weight_decay = 0.2}},
  {"RMSprop", {lr = 0.01}},
  {"RMSprop", {lr = 0.01, alpha = 0.8, eps = 1e-3, weight_decay = 0.1}},
  {"RMSprop", {lr = 0.01, momentum = 0.9, weight_decay = 0.1}},
  {"RMSprop", {lr = 0.01, alpha = 0.9, centered = true, eps = 1e-4}},
  {"RMSprop", {lr = 0.01, alpha = 0.4, centered = true, momentum = 0.8, weight_decay = 0.05, eps = 1e-2, maximize = true}},
  {"Adagrad", {lr = 0.1}},
  {"Adagrad", {lr = 0.1, lr_decay = 0.2, initial_accumulator_value = 0.7, eps = 1e-4}},
  {"Adagrad", {lr = 0.1, lr_decay = 0.1, weight_decay = 0.1, maximize = true}},
  {"Lion", {lr = 0.01}},
  {"Lion", {lr = 0.01, betas = {0.8, 0.6}, weight_decay = 0.3}},
  {"Lion", {lr = 0.01, weight_decay = 0.1, maximize = true}},
}

-- ====== The rules ======

describe("optimizer", function()
  for _, entry in ipairs(CASES) do
    for dtype, tolerance in pairs {f32 = 1e-5, f64 = 1e-11} do
      it(("%s: 20 steps in %s"):format(name_of(entry), dtype), function() optimizers.check_steps(entry, dtype, tolerance) end)
    end
    for _, dtype in ipairs {"f16", "bf16"} do
      it(("%s: %s parameters are rounded once a step, state is float32"):format(name_of(entry), dtype), function()
        optimizers.check_half_steps(entry, dtype)
      end)
    end
  end

  -- Made by PyTorch 2.15 in float64, six steps with foreach = False:
  --   def g(n, t): return torch.tensor([math.sin(i*12.9898 + t*4.1414)*1.5 for i in range(1, n+1)], dtype=torch.float64)
  --   p = g(3, 0).requires_grad_(); opt = getattr(torch.optim, name)([p], foreach=False, **options)
  --   for t in range(1, 7): p.grad = g(3, t); opt.step()
  --   print(p.tolist())
  local GOLDEN = {
    {"SGD", {lr = 0.05, momentum = 0.9, dampening = 0.3, weight_decay = 0.01},
      {0.82090205185852705, 1.3448337010703832, 1.6312279275717712}},
    {"SGD", {lr = 0.05, momentum = 0.8, nesterov = true, weight_decay = 0.02, maximize = true},
      {0.51111917461598078, 0.99411468146346527, 1.3015201215796277}},
    {"Adam", {lr = 0.02, betas = {0.8, 0.95}, eps = 1e-06, weight_decay = 0.1, amsgrad = true},
      {0.63533841757377219, 1.1434748616178121, 1.4574133140738357}},
    {"AdamW", {lr = 0.02, betas = {0.4, 0.9}, weight_decay = 0.3, amsgrad = true},
      {0.60316116090731708, 1.0930547347866337, 1.3987589138455034}},
    {"RMSprop", {lr = 0.01},
      {0.64756755390673448, 1.1459443595382797, 1.4804667677976184}},
    {"RMSprop", {lr = 0.01, alpha = 0.9, weight_decay = 0.1, momentum = 0.9},
      {0.67469435559174917, 1.1718703167526681, 1.517124355040109}},
    {"RMSprop", {lr = 0.02, alpha = 0.8, centered = true, momentum = 0.5, maximize = true},
      {0.57467424348468099, 1.0885606579995826, 1.3626885906176318}},
    {"RMSprop", {lr = 0.01, centered = true},
      {0.64817799933266973, 1.1465025787113916, 1.4811724356647864}},
    {"Adagrad", {lr = 0.1},
      {0.64803466282032152, 1.14675651632612, 1.4809646390023781}},
    {"Adagrad", {lr = 0.1, lr_decay = 0.3, initial_accumulator_value = 0.5, weight_decay = 0.05, maximize = true},
      {0.56635104918366708, 1.0693638474027471, 1.3611728255004476}},
  }
  for _, entry in ipairs(GOLDEN) do
    it(name_of(entry) .. ": PyTorch's numbers", function()
      local p = parameter(3, "f64")
      local opt = optim[entry[1]]({p}, entry[2])
      for t = 1, 6 do
        p.grad = hm.tensor(filled(3, t), {dtype = "f64"})
        opt:step()
      end
      near(p, entry[3], 1e-14)
    end)
  end

  it("many parameters of many sizes, in any memory order, in two groups", function()
    for _, kind in ipairs {"RMSprop", "Adagrad", "Lion"} do
      local list, want, states, o = {}, {}, {}, options_of {kind, {lr = 0.01, weight_decay = 0.1}}
      for k = 1, 50 do
        list[k] = parameter(k == 50 and 17000 or k, "f32", k)
        if k == 12 then list[k] = hm.tensor(filled(12, 0, k)):view(3, 4):t():detach():requires_grad_() end
        want[k], states[k] = numbers.flat(list[k]), {}
      end
      local first, second = table.move(list, 1, 30, 1, {}), table.move(list, 31, 50, 1, {})
      local opt = optim[kind]({{params = first}, {params = second, lr = 0.02}}, {lr = 0.01, weight_decay = 0.1})
      local o2 = options_of {kind, {lr = 0.02, weight_decay = 0.1}}
      for step = 1, 2 do
        for k, p in ipairs(list) do
          p.grad = hm.tensor(filled(p:numel(), step, k)):view(table.unpack(p.shape))
          reference[kind:lower()](want[k], filled(p:numel(), step, k), states[k], k > 30 and o2 or o)
        end
        opt:step()
      end
      for k, p in ipairs(list) do near(p, want[k], 1e-5, 1e-6, kind .. " " .. k) end
    end
  end)

  it("NaN and infinity go through: nothing is swallowed", function()
    for _, kind in ipairs {"Adam", "RMSprop", "Adagrad", "Lion"} do
      for _, dtype in ipairs {"f32", "f64", "bf16"} do
        local p = parameter(3, dtype)
        local opt = optim[kind]({p}, kind == "Adam" and {amsgrad = true} or nil)
        p.grad = hm.tensor({0 / 0, 1, 0 / 0}, {dtype = dtype})
        opt:step()
        p.grad = hm.ones({3}, {dtype = dtype})
        opt:step()
        local v = p:totable()
        assert(v[1] ~= v[1] and v[2] == v[2] and v[3] ~= v[3], kind .. " " .. dtype)
      end
    end
    local p = hm.tensor({1.0}, {requires_grad = true})
    local opt = optim.Lion({p}, {lr = 0.5})
    p.grad = hm.tensor {-math.huge}
    opt:step()
    same(p, {1.5})
    p.grad = hm.zeros({1})
    local still = hm.tensor({1.0}, {requires_grad = true})
    still.grad = hm.zeros({1})
    optim.Lion({still}, {lr = 0.5}):step()
    same(still, {1}) -- the sign of 0 is 0
  end)

  it("options that were switched between steps count at once", function()
    local p = parameter(5, "f64")
    local opt, want, state = optim.RMSprop({p}, {lr = 0.01}), numbers.flat(p), {}
    local o = options_of {"RMSprop", {lr = 0.01}}
    for step = 1, 6 do
      if step == 3 then
        opt.param_groups[1].centered, opt.param_groups[1].momentum = true, 0.5
        o.centered, o.momentum = true, 0.5
      elseif step == 5 then
        opt.param_groups[1].centered, opt.param_groups[1].alpha = false, 0.5
        o.centered, o.alpha = false, 0.5
      end
      p.grad = hm.tensor(filled(5, step), {dtype = "f64"})
      reference.rmsprop(want, filled(5, step), state, o)
      opt:step()
      near(p, want, 1e-12, 1e-13, "step " .. step)
    end
  end)
end)

describe("options", function()
  it("that do not exist or make no sense are refused", function()
    local p = parameter(1, "f32")
    raises({"optim.RMSprop: unknown option 'centred', did you mean 'centered'"}, optim.RMSprop, {p}, {centred = true})
    raises("unknown option 'nesterov'", optim.Adagrad, {p}, {nesterov = true})
    raises("unknown option 'eps'", optim.Lion, {p}, {eps = 1e-8})
    raises("option 'alpha' must be at least 0", optim.RMSprop, {p}, {alpha = -1})
    raises("option 'lr_decay' must be at least 0", optim.Adagrad, {p}, {lr_decay = -1})
    raises("option 'initial_accumulator_value'", optim.Adagrad, {p}, {initial_accumulator_value = -1})
    raises("option 'betas'", optim.Lion, {p}, {betas = {0.9, 1}})
    raises("option 'amsgrad' must be boolean", optim.AdamW, {p}, {amsgrad = 1})
    raises("option 'rounding' must be one of nearest, stochastic", optim.SGD, {p}, {rounding = "up"})
    raises("exclude each other", optim.SGD, {p}, {rounding = "stochastic", kahan = true})
    for _, kind in ipairs {"RMSprop", "Adagrad", "Lion"} do
      raises("the option 'kahan' is for SGD, Adam and AdamW", optim[kind], {p}, {kahan = true})
      raises("the option 'rounding' is for SGD, Adam and AdamW", optim[kind], {{params = {p}, rounding = "stochastic"}})
    end
    raises("unknown kind \"nadam\"", core.optim_new, "nadam")
    raises("unknown option \"alpha\"", function() optim.SGD({p}).core:get(1, "alpha") end)
  end)

  it("for half-precision parameters need one", function()
    local p = parameter(2, "f32")
    local opt = optim.SGD({p}, {kahan = true})
    p.grad = hm.ones({2})
    raises("are for bfloat16 and float16 parameters, and there is none", function() opt:step() end)
    opt.param_groups[1].kahan = false
    opt:step()
    opt.param_groups[1].lr = math.huge
    raises("sgd: lr must be a finite number >= 0", function() opt:step() end)
  end)

  it("are shown, with PyTorch's defaults", function()
    local shown = {}
    for name, value in pairs(optim.RMSprop({parameter(1, "f32")}).param_groups[1]) do shown[name] = value end
    assert.same({lr = 0.01, alpha = 0.99, eps = 1e-8, weight_decay = 0.0, momentum = 0.0, centered = false, maximize = false}, shown)
    assert.equal(1e-10, optim.Adagrad({parameter(1, "f32")}).param_groups[1].eps)
    assert.same({0.9, 0.99}, optim.Lion({parameter(1, "f32")}).param_groups[1].betas)
    assert.equal("nearest", optim.AdamW({parameter(1, "f32")}).param_groups[1].rounding)
  end)
end)

-- ====== State ======

local RESUMED = {
  {"SGD", {lr = 0.1, momentum = 0.9, kahan = true}, "bf16", {"compensation", "momentum_buffer"}},
  {"Adam", {amsgrad = true}, "f32", {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}},
  {"AdamW", {amsgrad = true, kahan = true}, "f16", {"compensation", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}},
  {"AdamW", {rounding = "stochastic"}, "bf16", {"exp_avg", "exp_avg_sq"}},
  {"RMSprop", {centered = true, momentum = 0.9}, "f32", {"grad_avg", "momentum_buffer", "square_avg"}},
  {"Adagrad", {lr_decay = 0.1, initial_accumulator_value = 0.1}, "f64", {"sum"}},
  {"Lion", {lr = 0.01}, "f32", {"exp_avg"}},
}

describe("state_dict", function()
  for _, entry in ipairs(RESUMED) do
    local kind, o, dtype, names = table.unpack(entry)
    it(name_of(entry) .. ": through a file, another optimizer goes on bit for bit", function()
      local function train(list, opt, from, to)
        for step = from, to do
          for k, p in ipairs(list) do
            p.grad = (k == 1 or step % 2 == 0) and hm.tensor(filled(5, step, k), {dtype = dtype}) or nil
          end
          opt:step()
        end
      end
      local function make()
        local list = {parameter(5, dtype, 1), parameter(5, dtype, 2)}
        return list, optim[kind](list, o)
      end
      local a, first = make()
      train(a, first, 1, 3)
      local got = {}
      for name in pairs(first:state_dict().state[1]) do got[#got + 1] = name ~= "step" and name or nil end
      table.sort(got)
      assert.same(names, got)
      local path, rng, b, second = os.tmpname(), hm.rng_state(), make()
      assert(hm.save(path, {opt = first:state_dict()}))
      for k = 1, 2 do hm.no_grad(function() b[k]:copy_(a[k]) end) end
      train(a, first, 4, 8)
      second:load_state_dict(assert(hm.load(path)).opt)
      os.remove(path)
      hm.set_rng_state(rng)
      train(b, second, 4, 8)
      for k = 1, 2 do
        same(b[k], a[k])
        assert.equal(first:state_dict().state[k].step, second:state_dict().state[k].step)
        for _, name in ipairs(names) do same(second:state_dict().state[k][name], first:state_dict().state[k][name], name) end
      end
      for key, value in pairs(first.param_groups[1]) do assert.same(value, second.param_groups[1][key], key) end
    end)
  end

  it("a state is kept in the dtype that updates need, whatever came", function()
    local p = parameter(2, "bf16")
    local opt = optim.Adam({p}, {kahan = true})
    opt.core:set_state(1, "exp_avg", hm.ones({2}, {dtype = "bf16"}))
    opt.core:set_state(1, "compensation", hm.ones({2}))
    assert.equal("float32", opt:state_dict().state[1].exp_avg.dtype)
    assert.equal("bfloat16", opt:state_dict().state[1].compensation.dtype)
    raises("has no compensation", function() optim.SGD({parameter(2, "f32")}).core:set_state(1, "compensation", hm.ones({2})) end)
    raises("there is no state called \"sum\"", function() opt.core:set_state(1, "sum", hm.ones({2})) end)
  end)

  it("Adagrad's sum begins at initial_accumulator_value", function()
    local p = parameter(2, "f32")
    local opt = optim.Adagrad({p}, {initial_accumulator_value = 0.25})
    p.grad = hm.tensor {0.5, 2}
    opt:step()
    same(opt:state_dict().state[1].sum, {0.5, 4.25})
  end)
end)

describe("an allocation that fails", function()
  it("in a first step leaves the weights as they were; the step after goes on as if it had been the first", function()
    for _, entry in ipairs {{"RMSprop", {centered = true, momentum = 0.5}, "f32"}, {"SGD", {momentum = 0.9}, "f32"},
      {"AdamW", {amsgrad = true, kahan = true}, "bf16"}, {"Adagrad", {initial_accumulator_value = 1}, "f64"}} do
      local function make()
        local p = parameter(300, entry[3])
        p.grad = hm.tensor(filled(300, 1), {dtype = entry[3]})
        return p, optim[entry[1]]({p}, entry[2])
      end
      local want, plain = make()
      local before = want:detach():clone()
      plain:step()
      local failures, n, done = 0, 0
      repeat
        n = n + 1
        local p, opt = make()
        core.alloc_fail_at(n)
        done = pcall(opt.step, opt)
        core.alloc_fail_at(0)
        if not done then
          failures = failures + 1
          same(p, before)
          assert.same({}, opt:state_dict().state)
          opt:step()
        end
        same(p, want)
      until done or n > 100
      assert(failures >= 2, failures)
    end
  end)
end)

-- ====== The scaler ======

describe("a step that the scaler skips", function()
  it("changes no weight, no state and no count, and takes no random numbers", function()
    for _, entry in ipairs {{"RMSprop", {momentum = 0.5, centered = true}, "f32"}, {"Adagrad", nil, "f32"},
      {"Lion", nil, "f32"}, {"Adam", {amsgrad = true}, "f32"}, {"AdamW", {kahan = true}, "bf16"},
      {"SGD", {rounding = "stochastic"}, "bf16"}} do
      local p = parameter(6, entry[3])
      local opt, scaler = optim[entry[1]]({p}, entry[2]), amp.GradScaler {init_scale = 8}
      local function go(factor)
        opt:zero_grad()
        scaler:scale((p * factor):sum()):backward()
        local stepped = scaler:step(opt)
        scaler:update()
        return stepped
      end
      assert.is_true(go(1.5))
      same(p.grad, {1.5, 1.5, 1.5, 1.5, 1.5, 1.5})
      local weights, state, rng = p:detach():clone(), {}, hm.rng_state().offset
      for name, t in pairs(opt:state_dict().state[1]) do state[name] = name ~= "step" and t:clone() or t end
      assert.is_false(go(math.huge))
      same(p, weights)
      for name, t in pairs(opt:state_dict().state[1]) do
        if name == "step" then assert.equal(1, t) else same(t, state[name], name) end
      end
      assert.equal(rng, hm.rng_state().offset)
      assert.is_true(go(1))
      assert.equal(2, opt:state_dict().state[1].step)
    end
  end)
end)

-- ====== Half precision without masters ======

describe("a half-precision weight without a master", function()
  -- steps of a twentieth of a unit in the last place: from 1 down to 0.9
  local function small_steps(dtype, o, kind)
    local ulp = dtype == "bf16" and 2.0 ^ -8 or 2.0 ^ -11 -- below 1
    local p = hm.ones({512}, {dtype = dtype}):requires_grad_()
    local opt = optim[kind or "SGD"]({p}, o)
    local steps = math.floor(0.1 / (ulp / 20))
    for _, group in ipairs(opt.param_groups) do group.lr = 0.1 / steps end
    p.grad = hm.ones({512}, {dtype = dtype})
    for _ = 1, steps do opt:step() end
    return p, ulp
  end

  for _, dtype in ipairs {"bf16", "f16"} do
    it(("%s: small updates are lost, and not with Kahan sums or rounding by chance"):format(dtype), function()
      hm.manual_seed(3)
      same(small_steps(dtype, {}), hm.ones({512}))
      local kahan, ulp = small_steps(dtype, {kahan = true})
      near(kahan, hm.full({512}, 0.9), 0, 0.6 * ulp)
      for _, kind in ipairs {"Adam", "AdamW"} do
        near(small_steps(dtype, {kahan = true, weight_decay = 0}, kind), hm.full({512}, 0.9), 0, 0.6 * ulp)
      end
      local chance = small_steps(dtype, {rounding = "stochastic"})
      -- each step adds ulp^2 * 0.05 * 0.95 of variance
      local spread = ulp * math.sqrt(0.1 / (ulp / 20) * 0.05)
      near(chance:float():mean():item(), 0.9, 0, 5 * spread / math.sqrt(512) + ulp / 2)
      assert(chance:float():std():item() > spread / 2)
    end)
  end

  it("Kahan sums: weight and compensation together follow float32 weights", function()
    for _, kind in ipairs {"SGD", "Adam", "AdamW"} do
      for dtype, bound in pairs {bf16 = 2.0 ^ -13, f16 = 2.0 ^ -19} do
        local o = kind == "SGD" and {lr = 0.01, momentum = 0.9, weight_decay = 0.1} or {lr = 0.003}
        local p = parameter(40, dtype)
        local master = p:detach():float():requires_grad_()
        local plain = optim[kind]({master}, o)
        o.kahan = true
        local opt = optim[kind]({p}, o)
        for step = 1, 30 do
          p.grad = hm.tensor(filled(40, step), {dtype = dtype})
          master.grad = p.grad:float()
          plain:step()
          opt:step()
          near(p, master:detach():to(dtype), 2.0 ^ (dtype == "bf16" and -7 or -10), 1e-3)
        end
        local lost = opt:state_dict().state[1].compensation
        assert.equal(p.dtype, lost.dtype)
        near(p:detach():float() + lost:float(), master, 0, 30 * bound)
      end
    end
  end)

  it("Kahan sums: infinity and NaN are not made worse or hidden", function()
    local p = hm.tensor({1.0, 1, 1}, {dtype = "bf16"}):requires_grad_()
    local opt = optim.SGD({p}, {lr = 1, kahan = true})
    p.grad = hm.tensor({math.huge, 0 / 0, 1e-3}, {dtype = "bf16"})
    opt:step()
    local v = p:totable()
    assert(v[1] == -math.huge and v[2] ~= v[2] and v[3] == 1)
    same(opt:state_dict().state[1].compensation[1], {0})
  end)

  it("rounding by chance takes a neighbour, the nearer one more often, in normal and subnormal numbers", function()
    hm.manual_seed(11)
    for dtype, values in pairs {bf16 = {1.0, -3.14, 1e-30, 1e-39}, f16 = {1.0, -3.14, 1e-5, 2e-7}} do
      for _, value in ipairs(values) do
        local p = hm.zeros({4096}, {dtype = dtype}):requires_grad_()
        local opt = optim.SGD({p}, {lr = 1, rounding = "stochastic"})
        p.grad = hm.full({4096}, -value, {dtype = dtype})
        opt.param_groups[1].lr = 1.3 -- no value of the dtype comes out
        opt:step()
        local exact = -string.unpack("f", string.pack("f", 1.3)) * p.grad[1]:item()
        local ulp, sum, seen = numbers.ulp(exact, p.dtype), 0, {}
        for _, x in ipairs(numbers.flat(p)) do
          assert(math.abs(x - exact) < ulp, ("%s: %g for %g"):format(dtype, x, exact))
          sum, seen[x] = sum + x, true
        end
        near(sum / 4096, exact, 0, ulp * 5 * 0.5 / 64 + 2.0 ^ -12 * ulp, dtype .. " " .. value)
        local kinds = 0
        for _ in pairs(seen) do kinds = kinds + 1 end
        assert.equal(2, kinds)
      end
    end
  end)

  it("rounding by chance: the same from the same seed, for any number of threads; ceil(numel / 4) numbers each", function()
    local threads = hm.get_num_threads and hm.get_num_threads() or 1
    local function run(seed)
      hm.manual_seed(seed)
      local list = {parameter(40001, "bf16", 1), parameter(7, "bf16", 2), parameter(9, "f32", 3)}
      local opt = optim.AdamW(list, {rounding = "stochastic"})
      for k, p in ipairs(list) do p.grad = hm.tensor(filled(p:numel(), 1, k), {dtype = p.dtype}) end
      local before = hm.rng_state().offset
      opt:step()
      assert.equal(before + 10001 + 2, hm.rng_state().offset)
      return list
    end
    local a = run(5)
    hm.set_num_threads(2)
    local b, c = run(5), run(6)
    hm.set_num_threads(threads)
    for k = 1, 3 do same(b[k], a[k]) end
    assert(not pcall(same, c[1], a[1]))
  end)

  it("options concern half parameters alone: float32 ones go on as ever", function()
    for _, o in ipairs {{kahan = true}, {rounding = "stochastic"}} do
      local f, h, g = parameter(9, "f32"), parameter(9, "bf16"), parameter(9, "f32")
      local opt, plain = optim.Adam({f, h}, o), optim.Adam({g})
      for step = 1, 3 do
        f.grad, h.grad = hm.tensor(filled(9, step)), hm.tensor(filled(9, step), {dtype = "bf16"})
        g.grad = hm.tensor(filled(9, step))
        opt:step()
        plain:step()
      end
      same(f, g)
      assert.is_nil(opt:state_dict().state[1].compensation)
    end
  end)

  it("of float16 with a shadow of another dtype: the next cast sees the rounded weight", function()
    local w = hm.randn({8, 8}, {dtype = "bf16"}):requires_grad_()
    local x = hm.randn({4, 8})
    local opt = optim.SGD({w}, {lr = 0.3})
    for _ = 1, 2 do
      local loss = amp.autocast("f16", function() return x:matmul(w):float():sum() end)
      opt:zero_grad()
      loss:backward()
      opt:step()
    end
    local shadow = amp.autocast("f16", function() return core.call("matmul", hm.eye(8), w) end)
    same(shadow, w:detach():half())
  end)
end)

-- ====== Clipping by value ======

describe("clip_grad_value_", function()
  it("holds each value within the limit, in every dtype; NaN stays", function()
    for _, dtype in ipairs {"f32", "f64", "f16", "bf16"} do
      local a, b, c = parameter(3, dtype), parameter(700, dtype), parameter(2, dtype)
      a.grad = hm.tensor({0 / 0, math.huge, -math.huge}, {dtype = dtype})
      b.grad = hm.tensor(filled(700, 1), {dtype = dtype})
      local want = numbers.flat(b.grad)
      for i, x in ipairs(want) do want[i] = math.max(-0.5, math.min(0.5, x)) end
      nn.utils.clip_grad_value_({a, b, c}, 0.5)
      same(a.grad, {0 / 0, 0.5, -0.5})
      same(b.grad, want)
      assert.is_nil(c.grad)
    end
  end)

  it("takes gradients in any order of memory, and refuses what is no limit", function()
    local a = hm.zeros({2, 3}, {requires_grad = true})
    a.grad = hm.tensor({{1, -2}, {3, -4}, {0, 5}}):t()
    nn.utils.clip_grad_value_(a, 2)
    same(a.grad, {{1, 2, 0}, {-2, -2, 2}})
    raises("must be a number of at least 0", nn.utils.clip_grad_value_, a, -1)
    raises("must be a number of at least 0", nn.utils.clip_grad_value_, a, 0 / 0)
  end)
end)

-- ====== On cuda ======

local ON_CUDA = {
  {"SGD", {lr = 0.05, momentum = 0.9, nesterov = true}}, {"Adam", {lr = 0.02, amsgrad = true}},
  {"AdamW", {lr = 0.02}}, {"RMSprop", {lr = 0.01, momentum = 0.9, centered = true, eps = 1e-2}}, {"RMSprop", {lr = 0.01}},
  {"Adagrad", {lr = 0.1, lr_decay = 0.3, weight_decay = 0.1}}, {"Lion", {lr = 0.01, weight_decay = 0.2, maximize = true}},
}
local HALF = {
  {"SGD", {lr = 0.05, momentum = 0.9, kahan = true}}, {"AdamW", {lr = 0.02, kahan = true}},
  {"Adam", {lr = 0.02, amsgrad = true, rounding = "stochastic"}}, {"SGD", {lr = 0.05, rounding = "stochastic"}},
}

-- 45 parameters: more than a launch takes
local function run_on(device, entry, dtype, async)
  hm.manual_seed(9)
  local list = {}
  for k = 1, 45 do list[k] = parameter(k == 45 and 1030 or k, dtype, k, device) end
  local opt = optim[entry[1]](list, entry[2])
  local scaler = async ~= nil and amp.GradScaler {async = async, init_scale = 4}
  for step = 1, 4 do
    for k, p in ipairs(list) do
      p.grad = hm.tensor(filled(p:numel(), step, k), {dtype = dtype, device = device})
      if scaler then p.grad:mul_(scaler:get_scale()) end
    end
    if scaler and step == 2 then list[7].grad[3] = math.huge end
    if scaler then
      scaler:step(opt)
      scaler:update()
    else
      opt:step()
    end
  end
  if entry[2].rounding then -- 2,020 elements; each parameter takes whole blocks of four
    assert.equal(4 * 522, hm.rng_state(device).offset)
  end
  return list, opt:state_dict().state
end

local function assert_same_run(got, got_state, want, want_state)
  for k, p in ipairs(want) do same(got[k]:cpu(), p:cpu(), "parameter " .. k) end
  for k, entry in pairs(want_state) do
    for name, t in pairs(entry) do
      if name == "step" then assert.equal(t, got_state[k].step)
      else same(got_state[k][name]:cpu(), t:cpu(), name) end
    end
  end
end

if not cases then
  pending("on cuda: " .. why_not)
else
  describe("on cuda", function()
    for _, entry in ipairs(ON_CUDA) do
      case(name_of(entry) .. ": the CPU's weights and state to the bit, in every dtype", function()
        for _, dtype in ipairs {"f32", "f64", "bf16", "f16"} do
          local want, state = run_on("cpu", entry, dtype)
          local got, got_state = run_on("cuda", entry, dtype)
          assert_same_run(got, got_state, want, state)
        end
      end)
    end
    for _, entry in ipairs(HALF) do
      case(name_of(entry) .. ": the CPU's weights, compensation and random numbers to the bit", function()
        for _, dtype in ipairs {"bf16", "f16"} do
          local want, state = run_on("cpu", entry, dtype)
          local got, got_state = run_on("cuda", entry, dtype)
          assert_same_run(got, got_state, want, state)
        end
      end)
    end
    for _, entry in ipairs {ON_CUDA[2], ON_CUDA[4], ON_CUDA[6], ON_CUDA[7]} do
      case(name_of(entry) .. ": an asynchronous scaler, with a skipped step, does what the plain one does", function()
        local want, state = run_on("cuda", entry, "f32", false)
        local got, got_state = run_on("cuda", entry, "f32", true)
        assert.equal(3, got_state[1].step)
        assert_same_run(got, got_state, want, state)
      end)
    end
    case("momentum that is switched on between asynchronous steps begins with the gradient", function()
      local function train(async)
        local p = parameter(5, "f32", 1, "cuda")
        local opt, scaler = optim.SGD({p}, {lr = 0.1}), amp.GradScaler {async = async, init_scale = 1}
        for step = 1, 5 do
          if step == 3 then opt.param_groups[1].momentum, opt.param_groups[1].dampening = 0.9, 0.5 end
          p.grad = hm.tensor(filled(5, step), {device = "cuda"})
          scaler:step(opt)
          scaler:update()
        end
        return {p}, opt:state_dict().state
      end
      local want, state = train(false)
      local got, got_state = train(true)
      assert_same_run(got, got_state, want, state)
    end)
    case("Kahan sums with an asynchronous scaler; rounding by chance is the same in each run", function()
      local want, state = run_on("cuda", HALF[2], "bf16", false)
      local got, got_state = run_on("cuda", HALF[2], "bf16", true)
      assert_same_run(got, got_state, want, state)
      want, state = run_on("cuda", HALF[3], "bf16", true)
      got, got_state = run_on("cuda", HALF[3], "bf16", true)
      assert_same_run(got, got_state, want, state)
    end)
    case("clip_grad_value_: one launch, no wait", function()
      local a, b = parameter(3, "f32", 1, "cuda"), parameter(700, "bf16", 2, "cuda")
      a.grad, b.grad = hm.tensor({0 / 0, 7, -7}, {device = "cuda"}), b:detach() * 3
      local want = (b.grad:cpu()):clamp(-0.5, 0.5)
      local before = hm.cuda.stats()
      nn.utils.clip_grad_value_({a, b}, 0.5)
      local after = hm.cuda.stats()
      assert.equal(1, after.launches - before.launches)
      assert.equal(0, after.synchronisations - before.synchronisations)
      same(a.grad:cpu(), {0 / 0, 0.5, -0.5})
      same(b.grad:cpu(), want)
    end)
  end)
end
