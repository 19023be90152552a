-- amp_ports_spec.lua -- the list in spec/reference/amp_ports.lua holds: each test of another library that it does not leave out
-- stands in the name of a case, what it leaves out has a reason, and what users trip over there has cases here.  And what a run
-- tells that a policy stops.

local hm = require "halfmoon"
local files = require "spec.support.files"
local list = require "spec.reference.amp_ports"
local process = require "spec.support.process"
local raises = require "spec.support.raises"

--- The quoted texts of each spec file's code: name without _spec.lua -> array.
local quoted = {}
for path in process.shell("ls spec/*_spec.lua"):gmatch("%S+") do
  local texts = {}
  for line in files.read(path):gmatch("[^\n]+") do
    if not line:find("^%s*%-%-") then
      for text in line:gmatch('"(.-[^\\])"') do texts[#texts + 1] = text end
    end
  end
  quoted[path:match("([^/]+)_spec%.lua$")] = texts
end

local function bears_id(id)
  for name, texts in pairs(quoted) do
    for _, text in ipairs(name ~= "amp_ports" and texts or {}) do if text:find("%f[%w]" .. id .. "%f[^%w_]") then return true end end
  end
  return false
end

local function stands_in(file, piece)
  for _, text in ipairs(quoted[file] or {}) do if text:find(piece, 1, true) then return true end end
  return false
end

describe("the list of tests of other libraries", function()
  it("has every test in the name of a case, or a reason why not", function()
    local held, left = 0, 0
    for id, test in pairs(list.tests) do
      assert(type(test[1]) == "string", id)
      assert(not test.left or #test.left > 10, id)
      assert.equal(not test.left, bears_id(id), id)
      if test.left then left = left + 1 else held = held + 1 end
    end
    assert.same({59, 9}, {held, left})
  end)

  it("has no gaps", function()
    for letter, n in pairs {G = 22, S = 5, A = 17, C = 11, K = 6} do
      for i = 1, n do assert(list.tests[letter .. i], letter .. i) end
    end
  end)

  it("has the cases of Keras's tests", function()
    for _, row in ipairs(list.keras) do assert(row.left or stands_in("keras", row[2]), row[1]) end
  end)

  it("has an answer to what users of those libraries trip over", function()
    assert.equal(10, #list.pains)
    for _, pain in ipairs(list.pains) do
      assert(#pain > 1, pain[1])
      for i = 2, #pain do assert(stands_in(pain[i][1], pain[i][2]), pain[i][2]) end
    end
  end)
end)

it("a run that a policy stops is told of: why, how often, NaN apart from infinity, which parameters", function()
  local nn, amp = hm.nn, hm.amp
  local model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
  local opt, scaler = hm.optim.SGD(model:parameters(), {lr = 0.1}), amp.GradScaler {policy = "deepspeed", init_scale = 2}
  local function step(bad)
    opt:zero_grad()
    scaler:scale(model(hm.ones {1, 4}):sum()):backward()
    hm.no_grad(function() model[2].bias.grad:copy_(hm.tensor {bad, 0.0 / 0.0}) end)
    scaler:step(opt)
    scaler:update()
  end
  step(1 / 0)
  raises({"policy 'deepspeed' stopped the training", "already at minimum"}, step, 1 / 0)
  local record = scaler:record()
  local last = record[#record]
  assert.same({"stop", true, 1, 1, 1.0}, {last.event, last.found_inf, last.inf_count, last.nan_count, last.new_scale})
  assert.truthy(last.message:find("already at minimum", 1, true))
  local report = amp.report(scaler)
  assert.same({2, 1.0}, {report.skipped, report.overflow_rate})
  assert.same({{name = "1.bias", inf_count = 1, nan_count = 1}}, report.culprits)
end)
