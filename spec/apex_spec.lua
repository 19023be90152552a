-- apex_spec.lua -- amp.initialize and what goes with it, by the rules and the tests of NVIDIA Apex: opt levels, masters, scale_loss in
-- both forms, several losses, delay_unscale, state dicts, functions that cast; and the loop of the tutorials around scaler:step.

local hm = require "halfmoon"
local numbers = require "spec.support.numbers"
local expect = require "spec.support.expect"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local F = nn.functional
local same, near, raises = numbers.assert_same, numbers.assert_near, expect.raises
local inf = math.huge

local function net()
  return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
end

local function batch(i)
  hm.manual_seed(100 + i)
  return hm.randn({16, 6}), hm.randint(0, 3, {16})
end

local function prepared(level, opts, kind)
  hm.manual_seed(3)
  local model = net()
  local opt = optim[kind or "SGD"](model:parameters(), {lr = 0.1})
  opts = opts or {}
  opts.opt_level, opts.verbosity = level, opts.verbosity or 0
  return amp.initialize(model, opt, opts)
end

local function train(model, opt, steps)
  local losses = {}
  for i = 1, steps do
    local x, y = batch(i)
    opt:zero_grad()
    local loss = F.cross_entropy(model(x), y)
    amp.scale_loss(loss, opt, function(scaled) scaled:backward() end)
    opt:step()
    losses[i] = loss:item()
  end
  return losses
end

local function dtypes(model)
  local found = {}
  for name, p in model:named_parameters() do found[name] = p.dtype end
  return found
end

describe("amp.initialize", function()
  it("gives each level its dtypes", function()
    local half, single = "float16", "float32"
    local want = {
      O0 = {single, single}, O1 = {single, single}, O2 = {half, single}, O3 = {half, half},
    }
    for level, pair in pairs(want) do
      local model, opt = prepared(level)
      local have = dtypes(model)
      assert.equal(pair[1], have["0.weight"], level)
      assert.equal(pair[2], have["1.weight"], level)
      assert.equal("float32", model[2].running_mean.dtype, level)
      assert.equal("float32", model((batch(1))).dtype)
      for _, p in ipairs(amp.master_params(opt)) do
        assert.equal(level == "O3" and half or single, p.dtype, level)
      end
      for name, t in pairs(model:state_dict()) do
        if not name:find("num_batches") then assert.equal("float32", t.dtype, level .. " " .. name) end
      end
    end
  end)

  it("O1 runs forward under autocast, and nothing else", function()
    local model = prepared("O1")
    local seen
    model[4]:register_forward_hook(function(_, _, y) seen = y.dtype end)
    model((batch(1)))
    assert.equal("float16", seen)
    assert.is_false(amp.autocast_state().enabled)
  end)

  it("every level follows a float32 run", function()
    hm.manual_seed(3)
    local control = net()
    local opt = optim.SGD(control:parameters(), {lr = 0.1})
    local want = {}
    for i = 1, 6 do
      local x, y = batch(i)
      opt:zero_grad()
      local loss = F.cross_entropy(control(x), y)
      loss:backward()
      opt:step()
      want[i] = loss:item()
    end
    for _, level in ipairs {"O0", "O1", "O2", "O3"} do
      local model, its = prepared(level)
      for i, loss in ipairs(train(model, its, 6)) do
        assert(math.abs(loss - want[i]) < (level == "O0" and 1e-9 or 2e-2), ("%s, step %d: %g for %g"):format(level, i, loss, want[i]))
      end
    end
  end)

  it("takes options, also as command lines write them, and refuses what does not fit", function()
    local model = prepared("O2", {keep_batchnorm_fp32 = "False"})
    assert.equal("float16", dtypes(model)["1.weight"])
    prepared("O1", {loss_scale = "128.0"})
    assert.equal(128, amp.state_dict().loss_scaler0.loss_scale)
    prepared("O2", {dtype = "bf16"})
    raises({"unknown opt_level \"02\"", "letter O"}, amp.initialize, net(), nil, {opt_level = "02"})
    raises({"O1", "cast_model_type"}, amp.initialize, net(), nil, {opt_level = "O1", cast_model_type = "f16"})
    raises({"O1", "keep_batchnorm_fp32"}, amp.initialize, net(), nil, {keep_batchnorm_fp32 = true})
    raises({"O1", "master_weights"}, amp.initialize, net(), nil, {master_weights = true})
    raises("patch_functions is for O1", amp.initialize, net(), nil, {opt_level = "O2", patch_functions = true})
    raises("keep_batchnorm_fp32", amp.initialize, net(), nil, {opt_level = "O2", keep_batchnorm_fp32 = "maybe"})
    raises("loss_scale", amp.initialize, net(), nil, {loss_scale = "much"})
    raises({"unknown option", "opt_level"}, amp.initialize, net(), nil, {opt_levl = "O1"})
    raises("already", amp.initialize, net():half(), nil, {opt_level = "O2"})
    raises("expected a module", amp.initialize, {1}, nil, {})
    local ready = net()
    local opt = optim.SGD(ready:parameters(), {lr = 1})
    amp.initialize(ready, opt)
    raises("already", amp.initialize, net(), opt)
  end)

  it("enabled = false leaves everything as it is", function()
    local model = net()
    local opt = optim.SGD(model:parameters(), {lr = 0.1})
    local core = opt.core
    local m, o = amp.initialize(model, opt, {opt_level = "O2", enabled = false})
    assert.equal(model, m)
    assert.equal(opt, o)
    assert.equal(core, opt.core)
    local loss = model((batch(1))):sum()
    assert.equal(loss, (amp.scale_loss(loss, opt, function(scaled) return scaled end)))
  end)

  it("lists come back as lists", function()
    local a, b = net(), net()
    local oa, ob = optim.SGD(a:parameters(), {lr = 1}), optim.SGD(b:parameters(), {lr = 1})
    local models, opts = amp.initialize({a, b}, {oa, ob}, {opt_level = "O2", verbosity = 0})
    assert.equal(a, models[1])
    assert.equal(ob, opts[2])
    assert.equal("float16", b[1].weight.dtype)
  end)
end)

describe("masters under O2", function()
  it("keep what float16 loses, and the model's copy follows", function()
    local model, opt = prepared("O2", {loss_scale = 64})
    local master, p = amp.master_params(opt)[1], model[1].weight
    assert.equal("float16", p.dtype)
    assert.equal("0.weight", require("halfmoon.core").get_name(master))
    opt.param_groups[1].lr = 2e-5
    local before = master:detach():clone()
    train(model, opt, 3)
    assert.is_false(before:equal(master:detach()))
    same(p, master:detach():half())
  end)

  it("have unscaled gradients; the model's stay scaled", function()
    local model, opt = prepared("O2", {loss_scale = 1024})
    local x, y = batch(1)
    amp.scale_loss(F.cross_entropy(model(x), y), opt, function(scaled) scaled:backward() end)
    local master = amp.master_params(opt)[1]
    near(master.grad * 1024, model[1].weight.grad:float(), 1e-6)
    assert.equal("float32", master.grad.dtype)
    opt:zero_grad()
    assert.is_nil(master.grad)
    assert.is_nil(model[1].weight.grad)
  end)

  it("an optimizer keeps its options and state", function()
    hm.manual_seed(3)
    local model = net()
    local opt = optim.Adam({{params = model[1]:parameters(), lr = 0.5}, {params = model[4]:parameters()}}, {lr = 0.25})
    local x, y = batch(1)
    F.cross_entropy(model(x), y):backward()
    opt:step()
    local moment = opt:state_dict().state[1].exp_avg:clone()
    amp.initialize(model, opt, {opt_level = "O2", verbosity = 0})
    assert.equal(0.5, opt.param_groups[1].lr)
    assert.equal(0.25, opt.param_groups[2].lr)
    same(opt:state_dict().state[1].exp_avg, moment)
    assert.equal(1, opt:state_dict().state[1].step)
  end)

  it("test_add_param_group: add_param_group makes masters, too", function()
    local model, opt = prepared("O2", {loss_scale = 8})
    local extra = nn.Parameter(hm.ones({3}, {dtype = "f16"}))
    opt:add_param_group {params = {extra}, lr = 1}
    amp.scale_loss((model((batch(1))):float():sum(1) * extra:float()):sum(), opt, function(s) s:backward() end)
    local before = extra:detach():clone()
    assert.is_true(opt:step())
    assert.is_false(before:equal(extra:detach()))
    local masters = amp.master_params(opt)
    assert.equal("float32", masters[#masters].dtype)
  end)

  it("follow a state that is loaded into the model", function()
    local model, opt = prepared("O2")
    local saved = model:state_dict()
    for name, t in pairs(saved) do saved[name] = t:is_floating_point() and t:clone():fill_(0.5) or t end
    model:load_state_dict(saved)
    for _, p in ipairs(amp.master_params(opt)) do assert(p:eq(0.5):all():item()) end
  end)
end)

describe("amp.scale_loss", function()
  it("as a function and as a guard gives the same gradients", function()
    local function grads(how)
      local model, opt = prepared("O1", {loss_scale = 256})
      local x, y = batch(1)
      local loss = F.cross_entropy(model(x), y)
      if how == "function" then
        assert.equal("done", amp.scale_loss(loss, opt, function(scaled)
          near(scaled, {loss:item() * 256}, 1e-6)
          scaled:backward()
          return "done"
        end))
      else
        local scaled, scope <close> = amp.scale_loss(loss, opt)
        scaled:backward()
        scope:close()
      end
      return model[1].weight.grad
    end
    same(grads "function", grads "guard")
  end)

  it("an overflow leaves one step out, lowers the scale, and says so", function()
    local model, opt = prepared("O1", {verbosity = 1})
    local x, y = batch(1)
    local before = model[1].weight:detach():clone()
    local said = expect.stderr(function()
      amp.scale_loss(F.cross_entropy(model(x), y) * inf, opt, function(s) s:backward() end)
    end)
    assert.matches("Gradient overflow.  Skipping step, loss scaler 0 reducing loss scale to 32768", said, 1, true)
    assert.is_false(opt:step())
    same(model[1].weight, before)
    opt:zero_grad()
    amp.scale_loss(F.cross_entropy(model(x), y), opt, function(s) s:backward() end)
    assert.is_true(opt:step())
    assert.is_false(before:equal(model[1].weight:detach()))
    assert.same({loss_scaler0 = {loss_scale = 32768.0, unskipped = 1}}, amp.state_dict())
  end)

  it("an error inside leaves the gradients as they were", function()
    local model, opt = prepared("O1")
    local x, y = batch(1)
    amp.scale_loss(F.cross_entropy(model(x), y), opt, function(s) s:backward() end)
    local before = model[1].weight.grad:clone()
    raises("boom", amp.scale_loss, F.cross_entropy(model(x), y), opt, function(s)
      s:backward()
      error("boom")
    end)
    same(model[1].weight.grad, before)
    assert.is_true(opt:step())
  end)

  it("gradients of several calls add up, unscaled", function()
    for _, level in ipairs {"O0", "O1", "O2"} do
      local function grad(scales)
        local model, opt = prepared(level, {loss_scale = 64, keep_batchnorm_fp32 = level == "O2" or nil})
        for i = 1, 2 do
          local x, y = batch(i)
          amp.scale_loss(F.cross_entropy(model(x), y), opt, {delay_unscale = scales == "delayed" and i == 1},
            function(s) s:backward() end)
        end
        return amp.master_params(opt)[1].grad
      end
      near(grad "delayed", grad "apart", 1e-2, 1e-4)
      local model, opt = prepared(level, {loss_scale = 64})
      local x, y = batch(1)
      local plain = grad "apart"
      amp.scale_loss(F.cross_entropy(model(x), y), opt, function(s) s:backward() end)
      assert.is_false(plain:equal(amp.master_params(opt)[1].grad))
    end
  end)

  it("refuses what it does not know", function()
    local model, opt = prepared("O1", {num_losses = 2})
    local loss = model((batch(1))):sum()
    raises({"loss_id 2 is out of range", "num_losses = 3"}, amp.scale_loss, loss, opt, {loss_id = 2})
    raises({"amp.initialize", "hint"}, amp.scale_loss, loss, optim.SGD(net():parameters(), {lr = 1}))
    raises("expected a loss", amp.scale_loss, 3, opt)
    raises("expected a function", amp.scale_loss, loss, opt, {}, 3)
    raises("unknown option", amp.scale_loss, loss, opt, {delay = true})
  end)
end)

-- ====== Several models, optimizers and losses ======

-- (models, losses, optimizers) of Apex's tests; every loss reads two models, and two losses share the middle one.
for _, case in ipairs {{2, 2, 1}, {3, 2, 1}, {2, 2, 2}, {3, 2, 2}} do
  local n_models, n_losses, n_optimizers = table.unpack(case)
  local counts = ("%d models, %d losses, %d optimizers"):format(n_models, n_losses, n_optimizers)
  describe("test_multiple_models_optimizers_losses: " .. counts, function()
    local function setting(scaling, level)
      hm.manual_seed(9)
      local models, opts = {}, {}
      for i = 1, n_models do models[i] = nn.Linear(4, 4) end
      local params = {}
      for i = 1, n_models do
        for _, p in ipairs(models[i]:parameters()) do
          local o = n_optimizers == 1 and 1 or (i == n_models and 2 or 1)
          params[o] = params[o] or {}
          table.insert(params[o], p)
        end
      end
      for o = 1, n_optimizers do opts[o] = optim.SGD(params[o], {lr = 0.25, momentum = 0.125 * o}) end
      if scaling then
        amp.initialize(models, opts, {opt_level = level, num_losses = n_losses, verbosity = 0})
        amp.load_state_dict {
          loss_scaler0 = {loss_scale = 4, unskipped = 0}, loss_scaler1 = {loss_scale = 16, unskipped = 0},
        }
      end
      return models, opts
    end
    --- Loss l reads its own model and the one that both share.
    local function loss_of(models, l, x, poison)
      local own, shared = models[l == 1 and 1 or n_models], models[math.min(2, n_models)]
      local loss = (own(x) * 0.5 + shared(x) * (0.25 * l)):pow(2):mean()
      return poison and loss * inf or loss
    end

    for _, level in ipairs {"O1", "O2"} do
      for bad_step = 0, 2 do
        for bad_loss = 1, bad_step == 0 and 1 or n_losses do
          it(("%s, overflow at step %d in loss %d"):format(level, bad_step, bad_loss - 1), function()
            local models, opts = setting(true, level)
            local control, control_opts = setting(false)
            local scale = {4, 16}
            for step = 1, 3 do
              hm.manual_seed(step)
              local x = hm.randn({8, 4})
              for _, list in ipairs {opts, control_opts} do
                for _, o in ipairs(list) do o:zero_grad() end
              end
              for l = 1, n_losses do
                local poison = step == bad_step and l == bad_loss
                amp.scale_loss(loss_of(models, l, x, poison), opts, {loss_id = l - 1}, function(s) s:backward() end)
                loss_of(control, l, x):backward()
                if poison then scale[l] = scale[l] / 2 end
              end
              for o, opt in ipairs(opts) do
                local stepped = opt:step()
                assert.equal(step ~= bad_step, stepped)
                if stepped then control_opts[o]:step() end
              end
            end
            local state = amp.state_dict()
            assert.same(scale, {state.loss_scaler0.loss_scale, state.loss_scaler1.loss_scale})
            for i, model in ipairs(models) do
              near(model.weight, numbers.flat(control[i].weight), 5e-2, 1e-2)
            end
          end)
        end
      end
    end
  end)
end

describe("loss scales", function()
  it("static ones stay, and min_loss_scale and max_loss_scale bound the others", function()
    local model, opt = prepared("O1", {loss_scale = 1024})
    train(model, opt, 2)
    local x, y = batch(1)
    amp.scale_loss(F.cross_entropy(model(x), y) * inf, opt, function(s) s:backward() end)
    assert.is_false(opt:step())
    assert.equal(1024, amp.state_dict().loss_scaler0.loss_scale)
    model, opt = prepared("O1", {min_loss_scale = 2 ^ 14, max_loss_scale = 2 ^ 15, growth_interval = 1})
    assert.equal(2 ^ 15, amp.state_dict().loss_scaler0.loss_scale)
    train(model, opt, 1)
    assert.equal(2 ^ 15, amp.state_dict().loss_scaler0.loss_scale)
    for _ = 1, 3 do
      amp.scale_loss(F.cross_entropy(model(x), y) * inf, opt, function(s) s:backward() end)
      opt:zero_grad()
    end
    assert.equal(2 ^ 14, amp.state_dict().loss_scaler0.loss_scale)
  end)

  it("test_checkpointing: state dicts go on where they were, tell of another number of losses, refuse unknown keys", function()
    local model, opt = prepared("O1", {num_losses = 2, growth_interval = 3})
    train(model, opt, 2)
    local saved = amp.state_dict()
    assert.same({loss_scale = 65536.0, unskipped = 2}, saved.loss_scaler0)
    model, opt = prepared("O1", {num_losses = 2, growth_interval = 3})
    amp.load_state_dict(saved)
    train(model, opt, 1)
    assert.same({loss_scale = 131072.0, unskipped = 0}, amp.state_dict().loss_scaler0)
    prepared("O1")
    local said = expect.stderr(amp.load_state_dict, saved)
    assert.matches("2 loss scalers, amp.initialize made 1", said, 1, true)
    raises("unknown key \"scaler0\"", amp.load_state_dict, {scaler0 = {}})
    raises("loss_scaler0 must be", amp.load_state_dict, {loss_scaler0 = 4})
  end)

  it("test_checkpointing: a checkpoint under one level goes on under another", function()
    for _, from in ipairs {"O0", "O1", "O2", "O3"} do
      local model, opt = prepared(from, {loss_scale = "dynamic"})
      train(model, opt, 2)
      local saved, scales = model:state_dict(), amp.state_dict()
      for _, to in ipairs {"O0", "O1", "O2", "O3"} do
        local other, its = prepared(to, {loss_scale = "dynamic"})
        other:load_state_dict(saved)
        amp.load_state_dict(scales)
        for name, t in pairs(other:state_dict()) do
          if t:is_floating_point() then near(t, numbers.flat(saved[name]), 2e-3, 1e-6) end
        end
        local x, y = batch(5)
        assert(math.abs(F.cross_entropy(other:eval()(x), y):item() - F.cross_entropy(model:eval()(x), y):item()) < 1e-2)
        train(other:train(), its, 1)
      end
    end
  end)
end)

-- ====== Functions that cast ======

describe("half_function, float_function, promote_function", function()
  local function seen(...)
    local list = {}
    for i, v in ipairs {...} do list[i] = type(v) == "table" and v.x.dtype or v.dtype end
    return list
  end
  local h, s, d, i = hm.ones({2}, {dtype = "f16"}), hm.ones({2}), hm.ones({2}, {dtype = "f64"}), hm.ones({2}, {dtype = "i64"})

  it("cast inside a region only, through tables, and leave float64 and integers", function()
    local half, float, promote = amp.half_function(seen), amp.float_function(seen), amp.promote_function(seen)
    for _, fn in ipairs {half, float, promote} do assert.same({"float16", "float32", "float64", "int64"}, fn(h, s, d, i)) end
    amp.autocast("f16", function()
      assert.same({"float16", "float16", "float64", "int64", "float16"}, half(h, s, d, i, {x = s}))
      assert.same({"float32", "float32", "float64", "int64", "float32"}, float(h, s, d, i, {x = h}))
      assert.same({"float32", "float32"}, promote(h, s))
      assert.same({"float16", "float16"}, promote(h, h))
      amp.disable_casts(function() assert.same({"float16", "float32"}, half(h, s)) end)
    end)
    amp.autocast("bf16", function() assert.same({"bfloat16"}, half(s)) end)
  end)

  it("register_* puts the function in the place of the old one", function()
    local mine = {f = seen, g = seen, p = seen}
    amp.register_half_function(mine, "f")
    amp.register_float_function(mine, "g")
    amp.register_promote_function(mine, "p")
    amp.autocast("f16", function()
      assert.same({"float16"}, mine.f(s))
      assert.same({"float32"}, mine.g(h))
      assert.same({"float32", "float32"}, mine.p(h, s))
    end)
    raises("there is no function \"q\"", amp.register_half_function, mine, "q")
    raises("expected a function", amp.half_function, 3)
  end)
end)

-- ====== The tutorials' loop ======

describe("if scaler:step(opt) then scaler:update() else opt:zero_grad() end", function()
  --- A parameter whose gradient overflows while the scale is above `limit`.
  local function case(limit, options)
    local p = hm.tensor({1.0}, {requires_grad = true})
    local opt, scaler = optim.SGD({p}, {lr = 0}), amp.GradScaler(options)
    return scaler, function()
      opt:zero_grad()
      local loss = p:sum()
      if scaler:get_scale() > limit then loss = loss * inf end
      scaler:scale(loss):backward()
      local stepped = scaler:step(opt)
      if stepped then scaler:update() else opt:zero_grad() end
      return stepped
    end
  end

  it("backs off until steps succeed, and grows again", function()
    local scaler, step = case(1024, {init_scale = 2 ^ 14, growth_interval = 4})
    local skipped = 0
    for _ = 1, 12 do if not step() then skipped = skipped + 1 end end
    assert(scaler:get_scale() <= 2048, scaler:get_scale())
    assert(skipped >= 4 and skipped <= 8, skipped)
    local seen = 0
    for _, entry in ipairs(scaler:record()) do
      if entry.event == "backoff" then seen = seen + 1 end
    end
    assert(seen >= 4, seen)
  end)

  it("hears of every skip once", function()
    local heard = {}
    local limit = 4
    local scaler, step = case(limit, {init_scale = 32, policy = {
      init = function(o) return {scale = o.init_scale} end,
      update = function(state, event)
        heard[#heard + 1] = event.found_inf
        if event.found_inf then state.scale = state.scale / 2 end
        return state.scale
      end,
    }})
    local skips = 0
    for _ = 1, 10 do if not step() then skips = skips + 1 end end
    local told = 0
    for _, bad in ipairs(heard) do if bad then told = told + 1 end end
    assert.equal(skips, told)
    assert.equal(10, #heard)
    assert(scaler:get_scale() <= limit)
  end)

  it("a policy that fails while no update() comes is told of once, and the scale stays", function()
    local scaler, step = case(4, {init_scale = 32, policy = {update = function() error "broken" end}})
    local said = expect.stderr(function()
      for _ = 1, 4 do assert.is_false(step()) end
    end)
    assert.equal(1, select(2, said:gsub("broken", "")))
    assert.equal(32, scaler:get_scale())
    assert.equal("fault", scaler:record()[1].event)
  end)

  it("a policy that stops while no update() comes is obeyed by the next one", function()
    local p = hm.tensor({1.0}, {requires_grad = true})
    local opt = optim.SGD({p}, {lr = 0})
    local scaler = amp.GradScaler {init_scale = 4, policy = {
      update = function(_, event) return 4, event.found_inf and {stop = "enough"} or nil end,
    }}
    for _ = 1, 2 do
      opt:zero_grad()
      scaler:scale(p:sum() * inf):backward()
      assert.is_false((scaler:step(opt)))
    end
    raises("stopped the training: enough", scaler.update, scaler)
    opt:zero_grad()
    scaler:scale(p:sum()):backward()
    scaler:step(opt)
    scaler:update()
  end)
end)
