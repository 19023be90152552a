-- What bad input gets: a message with the op, what was expected, what came, the module path and a hint; and everything works afterwards.

local hm = require "halfmoon"
local core = require "halfmoon.core"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"

local HERE = hm.get_default_device()
local nn, optim, amp, data = hm.nn, hm.optim, hm.amp, hm.data

--- A small training step, to see that the process still does what it did.
local function still_works()
  local w = hm.tensor({1, 2}, {requires_grad = true});
  (w * w):sum():backward()
  numbers.assert_same(w.grad, {2, 4})
  assert.is_true(core.is_grad_enabled())
  assert.is_false(core.autocast_state().enabled)
end

after_each(still_works)

describe("an error message", function()
  it("begins with the user's line", function()
    local line = debug.getinfo(1, "l").currentline + 1
    local message = raises("matmul", function() hm.zeros({2, 3}):matmul(hm.zeros({2, 3})) end)
    assert.truthy(message:find("errors_spec.lua:" .. line .. ": ", 1, true), message)
    line = debug.getinfo(1, "l").currentline + 1
    message = raises("nn.Linear", function() nn.Linear(2, 3, {bais = true}) end)
    assert.truthy(message:find("errors_spec.lua:" .. line .. ": ", 1, true), message)
    local layer = nn.Linear(2, 3)
    line = debug.getinfo(1, "l").currentline + 1
    message = raises("linear", function() layer(hm.zeros({2, 4})) end)
    assert.truthy(message:find("errors_spec.lua:" .. line .. ": ", 1, true), message)
  end)

  it("has shapes, dtypes and devices of both sides, and the rule", function()
    raises({"matmul: inner sizes differ: ", "f16[32,784] on " .. HERE, "f16[256,10] on " .. HERE, "\n  784 (dim 2 of ",
      ") must equal 256 (dim 1 of "},
      hm.matmul, hm.zeros({32, 784}, {dtype = "f16"}), hm.zeros({256, 10}, {dtype = "f16"}))
    raises({"add: shapes do not broadcast", "f32[2,3] on " .. HERE, "bf16[4] on " .. HERE, "hint: "}, hm.add, hm.zeros({2, 3}),
      hm.zeros({4}, {dtype = "bf16"}))
    raises({"view", "[7]", "f32[2,3] on " .. HERE}, function() hm.zeros({2, 3}):view(7) end)
    raises({"copy_", "f32[2] on " .. HERE, "f32[3] on " .. HERE}, function() hm.zeros({2}):copy_(hm.zeros({3})) end)
    raises({"where", "i64[2] on " .. HERE}, hm.where, hm.zeros({2}, {dtype = "i64"}), 1, 2)
  end)

  it("says how to do it right", function()
    raises("hint: totable", function() hm.zeros({2}):item() end)
    raises("hint: reshape", function() hm.zeros({2, 3}):t():view(6) end)
    raises("hint: dims count from 1", function() hm.zeros({2}):sum(0) end)
    raises("hint: positions count from 1", function() return hm.zeros({2})[0] end)
    raises("hint: a:lt(b)", function() return hm.zeros({2}) < hm.zeros({2}) end)
  end)

  it("names the closest name of an option, dtype, reduction or policy", function()
    raises('did you mean "dtype"', hm.zeros, {2}, {dypte = "f16"})
    raises("did you mean 'lr'", optim.AdamW, {hm.zeros({1}, {requires_grad = true})}, {l = 1})
    raises("did you mean 'weight_decay'", optim.SGD, {hm.zeros({1}, {requires_grad = true})}, {weight_deacy = 1})
    raises("did you mean 'growth_factor'", amp.GradScaler, {growth_facter = 2})
    raises("did you mean 'batch_size'", data.DataLoader, {{hm.zeros({2})}, batchsize = 2})
    raises("did you mean 'padding'", nn.Conv2d, 1, 1, 3, {pading = 1})
    raises("mean, sum, none", nn.functional.mse_loss, hm.zeros({1}), hm.zeros({1}), {reduction = "avg"})
    raises("dynamic", amp.GradScaler, {policy = "dinamic"})
    raises({"autocast", "dtype"}, amp.autocast, {dtpye = "f16"})
  end)
end)

describe("wrong dtypes", function()
  it("are refused where they mean nothing", function()
    raises("i64[2] on " .. HERE, hm.zeros, {2}, {dtype = "i64", requires_grad = true})
    raises({"mean", "i64[2] on " .. HERE}, function() hm.zeros({2}, {dtype = "i64"}):mean() end)
    raises({"matmul", "i64[2,2] on " .. HERE}, function() hm.eye(2, {dtype = "i64"}):matmul(hm.eye(2, {dtype = "i64"})) end)
    raises({"matmul", "f32[2,2] on " .. HERE, "f16[2,2] on " .. HERE}, function() hm.eye(2):matmul(hm.eye(2):half()) end)
    raises({"cross_entropy", "int64", "f32[2] on " .. HERE}, nn.functional.cross_entropy, hm.zeros({2, 3}), hm.zeros({2}))
    raises("autocast", amp.autocast, "float64")
    raises("autocast", amp.autocast, "int8")
  end)

  it("are refused as data", function()
    raises("class", nn.functional.cross_entropy, hm.zeros({2, 3}), hm.tensor({0, 3}, {dtype = "i64"}))
    raises("class", nn.functional.cross_entropy, hm.zeros({2, 3}), hm.tensor({0, -1}, {dtype = "i64"}))
  end)
end)

describe("wrong devices", function()
  it("name what there is", function()
    local there = hm.cuda.is_available() and "the last is cuda:" or "use device = \"cpu\""
    raises({"cuda:15", there}, hm.zeros, {2}, {device = "cuda:15"})
    raises({"cuda:15", there}, function() hm.zeros({2}):to("cuda:15") end)
    raises({"cuda:15", there}, function() nn.Linear(2, 2):to("cuda:15") end)
    raises("tpu", function() hm.zeros({2}):to {device = "tpu"} end)
  end)
end)

describe("the module path", function()
  local Block = nn.class("Block")
  function Block:init() self.fc = nn.Linear(256, 10) end
  function Block:forward(x) return self.fc(x) end
  local Net = nn.class("Net")
  function Net:init()
    self.body = nn.Sequential(nn.ReLU(), Block())
    self.fc = nn.Linear(256, 10)
  end
  function Net:forward(x, deep) return deep and self.body(x) or self.fc(x) end

  it("stands in errors that happen inside modules", function()
    local net = Net()
    local message = raises({"linear: inner sizes differ", "f32[32,784] on " .. HERE, "f32[10,256] on " .. HERE}, net, hm.zeros({32, 784}))
    assert.truthy(message:find("\n  in Net.fc (Linear 256 -> 10)", 1, true), message)
    message = raises("linear", net, hm.zeros({2, 5}), true)
    assert.truthy(message:find("\n  in Net.body.1.fc (Linear 256 -> 10)", 1, true), message)
    assert.equal(1, select(2, message:gsub("\n  in ", "")))
  end)

  it("is of the innermost call, and gone after the error", function()
    local net = Net()
    raises("linear", net, hm.zeros({2, 5}), true)
    assert.is_nil(require("halfmoon.nn.class").path())
    local message = raises("matmul", hm.matmul, hm.zeros({2, 3}), hm.zeros({2, 3}))
    assert.is_nil(message:find("\n  in ", 1, true))
    -- an error inside, caught inside, leaves the outer path
    local Outer = nn.class("Outer")
    function Outer:init() self.net = Net() end
    function Outer:forward(x)
      assert.is_false((pcall(self.net, x, true)))
      return x:matmul(x)
    end
    message = raises("matmul", Outer(), hm.zeros({2, 5}))
    assert.truthy(message:find("\n  in Outer$"), message)
  end)

  it("belongs to the coroutine that makes the call", function()
    local Yields = nn.class("Yields")
    function Yields:forward(x) -- luacheck: ignore 212
      coroutine.yield()
      return x:matmul(x)
    end
    local co = coroutine.create(function() Yields()(hm.zeros({2, 3})) end)
    assert(coroutine.resume(co))
    local message = raises("matmul", hm.matmul, hm.zeros({2, 3}), hm.zeros({2, 3}))
    assert.is_nil(message:find("\n  in ", 1, true))
    local ok, inside = coroutine.resume(co)
    assert.is_false(ok)
    assert.truthy(inside:find("\n  in Yields", 1, true), inside)
  end)

  it("stands in errors of the library's own checks", function()
    local Odd = nn.class("Odd")
    function Odd:init() self.pool = nn.MaxPool2d(3) end
    function Odd:forward(x) return self.pool(x) end
    local message = raises({"max_pool2d", "f32[1,1,2,2] on " .. HERE}, Odd(), hm.zeros({1, 1, 2, 2}))
    assert.truthy(message:find("\n  in Odd.pool (MaxPool2d kernel 3x3)", 1, true), message)
  end)
end)

describe("memory", function()
  it("that cannot be had is an ordinary error with the sizes", function()
    collectgarbage()
    local live = core.memory_stats().live
    raises({"out of memory on " .. HERE, "wanted 17.59 TB"}, hm.zeros, {1 << 42})
    raises("size", hm.zeros, {1 << 40, 1 << 40})
    raises("size", hm.empty, {math.maxinteger, math.maxinteger})
    raises("does not fit 63 bits", function() return hm.zeros({1 << 40, 0, 1 << 40}) + hm.zeros({1}) end)
    local wide = hm.zeros({1}):expand(1 << 42)
    raises({"out of memory"}, function() return wide + 1 end)
    raises({"out of memory"}, function() return wide:contiguous() end)
    wide:release()
    collectgarbage()
    assert.equal(live, core.memory_stats().live)
  end)
end)

describe("NaN in the input", function()
  it("reaches the loss and is named by clip_grad_norm_ and the scaler, not hidden", function()
    local model = nn.Linear(2, 2)
    local opt = optim.SGD(model:parameters(), {lr = 0.1})
    local scaler = amp.GradScaler {}
    local before = model.weight:detach():clone()
    local loss = model(hm.tensor {{0 / 0, 1}}):sum()
    assert(loss:item() ~= loss:item())
    scaler:scale(loss):backward()
    local stepped, record = scaler:step(opt)
    assert.is_false(stepped)
    assert(record.nan_count > 0)
    assert.equal("backoff", scaler:update().event)
    numbers.assert_same(model.weight, before)
    raises("nan", nn.utils.clip_grad_norm_, model:parameters(), 1, {error_if_nonfinite = true})
  end)
end)

describe("a policy", function()
  local function after(policy)
    local scaler = amp.GradScaler {init_scale = 4.0, policy = policy}
    local w = hm.tensor({1}, {requires_grad = true})
    local opt = optim.SGD({w}, {lr = 0})
    scaler:scale(w:sum()):backward()
    scaler:step(opt)
    return scaler:update(), scaler
  end

  -- What goes to the standard error stream meanwhile.
  local function told(fn)
    local stream, said = io.stderr, {}
    io.stderr = {write = function(_, ...) said[#said + 1] = table.concat({...}) end} -- luacheck: ignore 122
    local ok, message = pcall(fn)
    io.stderr = stream -- luacheck: ignore 122
    assert(ok, message)
    return table.concat(said)
  end

  it("that raises or returns nonsense leaves the scale and is told", function()
    for _, update in ipairs {
      function() error("policy is broken") end, function() return 0 / 0 end, function() return -1 end, function() return "big" end,
      function() end, function() return math.huge end, function() return {} end,
    } do
      local said = told(function()
        local report, scaler = after {name = "mine", init = function() return {} end, update = update}
        assert.equal("fault", report.event)
        assert.equal(4, scaler:get_scale())
      end)
      assert.truthy(said:find("loss%-scale policy 'mine' failed: [^\n]*errors_spec%.lua:%d+: "), said)
    end
  end)

  it("that is no policy is refused when it is set", function()
    raises("policy", amp.GradScaler, {policy = 3})
    raises("policy", amp.GradScaler, {policy = {name = "empty"}})
    raises("absent.lua", amp.GradScaler, {policy = "/absent.lua"})
  end)
end)

describe("missing data", function()
  it("names the package", function()
    raises({"data.fashion_mnist", "/nowhere", "dataset-fashion-mnist", "apt-get"}, data.fashion_mnist, {root = "/nowhere"})
    raises({"/nowhere/x"}, data.idx, "/nowhere/x")
  end)
end)
