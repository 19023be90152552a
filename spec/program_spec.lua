-- The program `halfmoon` from outside: options, exit statuses, the prompt with lines from a pipe, Ctrl-C.

local devices = require "spec.support.devices"

local program = os.getenv("HALFMOON_PROGRAM") or "build/halfmoon"

local function quote(text) return "'" .. text:gsub("'", "'\\''") .. "'" end

--- Runs a shell command; returns everything it printed, and its exit status.
local function shell(command)
  local pipe = assert(io.popen("{ " .. command .. "; } 2>&1; echo \"status=$?\""))
  local text = pipe:read("a")
  pipe:close()
  local said, status = text:match("^(.*)status=(%d+)\n$")
  return said, tonumber(status)
end

local function run(arguments) return shell(program .. " " .. arguments) end

--- Gives lines to the prompt; returns what it printed.
local function prompt(lines)
  return shell("printf %s " .. quote(lines .. "\n") .. " | HALFMOON_HISTORY= " .. program .. " -i")
end

local function with_file(text, use)
  local path = os.tmpname()
  local f = assert(io.open(path, "w"))
  f:write(text)
  f:close()
  local ok, message = pcall(use, path)
  os.remove(path)
  if not ok then error(message, 0) end
end

describe("the program", function()
  local it = devices.cpu_cases("the program from outside", it)

  it("runs a chunk in which hm, nn, optim and amp are there, and leaves the globals alone", function()
    local said, status = run("-e " .. quote("print(type(hm), type(nn), type(optim), type(amp), rawget(_G, 'hm'), rawget(_G, 'nn'))"))
    assert.equal("table\ttable\ttable\ttable\tnil\tnil\n", said)
    assert.equal(0, status)
  end)

  it("shares names between chunks", function()
    assert.equal("3\n", (run("-e 'x = 1' -e 'y = x + 2' -e 'print(y)'")))
  end)

  it("gives a script its arguments, and plain Lua around it", function()
    with_file("print(arg[0] == ..., ...); print(arg[1], arg[2], #arg, hm)", function(path)
      local said, status = run(path .. " one 'two words'")
      assert.equal("false\tone\ttwo words\none\ttwo words\t2\tnil\n", said)
      assert.equal(0, status)
    end)
  end)

  it("reads a script from standard input", function()
    assert.equal("a\n", (shell("echo 'print(...)' | " .. program .. " - a")))
  end)

  it("loads a module by -l", function()
    assert.equal("table\n", (run("-lh=halfmoon -e 'print(type(h))'")))
  end)

  it("ends with 1 and a traceback after an error", function()
    with_file("local function f() error('boom') end\nf()", function(path)
      local said, status = run(path)
      assert.equal(1, status)
      assert.truthy(said:find(":1: boom", 1, true))
      assert.truthy(said:find("stack traceback:", 1, true))
    end)
  end)

  it("ends with 1 after a syntax error, a missing file, an unknown option, a missing value", function()
    for _, arguments in ipairs {"-e 'x = = 1'", "/nonexistent.lua", "--nonsense", "-e"} do
      local said, status = run(arguments)
      assert.equal(1, status, arguments)
      assert.truthy(#said > 0, arguments)
    end
  end)

  it("passes os.exit on", function()
    assert.equal(7, select(2, run("-e 'os.exit(7)'")))
  end)

  it("tells its versions", function()
    local said, status = run("--version")
    assert.equal(0, status)
    for _, what in ipairs {"halfmoon %d", "Lua 5%.4", "oneDNN %d", "instruction set %a+", "%d+ threads", "device cpu"} do
      assert.truthy(said:find(what), what .. " is missing from: " .. said)
    end
  end)

  it("explains its options", function()
    local said, status = run("--help")
    assert.equal(0, status)
    assert.truthy(said:find("usage: halfmoon", 1, true))
  end)

  it("loads no part of the library before it is asked for", function()
    local said = run("-e " .. quote("for name in pairs(package.loaded) do if name:find('^halfmoon') then print(name) end end"))
    assert.equal("", said)
  end)

  it("ends with 130 when it is interrupted", function()
    local said, status = shell(program .. " -e 'print(1) io.stdout:flush() while true do end' & sleep 0.5; kill -INT $!; wait $!")
    assert.equal(130, status)
    assert.truthy(said:find("interrupted!", 1, true))
  end)
end)

describe("the prompt", function()
  local it = devices.cpu_cases("the program from outside", it)

  it("prints the value of an expression, and several", function()
    assert.equal("3\n1\t2\nnil\n", (prompt("1 + 2\n1, 2\nnil")))
  end)

  it("prints nothing after a semicolon, or where there is no value", function()
    assert.equal("", (prompt("5;\nx = 1\n(function() end)()")))
  end)

  it("keeps the last value in _", function()
    assert.equal("6\n12\n", (prompt("2 * 3\n_ * 2")))
  end)

  it("waits for the rest of unfinished input", function()
    assert.equal("1\n2\n", (prompt("for i = 1, 2 do\nprint(i)\nend")))
    assert.equal("a\nb\n", (prompt("print([[a\nb]])")))
  end)

  it("keeps outermost locals, and only those", function()
    assert.equal("3\t4\n5\nnil\n", (prompt("local a, b = 3, 4\na, b\nlocal function f() return 5 end\nf()\ndo local c = 1 end\nc")))
    assert.equal("nil\n", (prompt("local a = 1\nrawget(_G, 'a')")))
    assert.equal("1\t2\n", (prompt("local n = 0\nfunction inc() n = n + 1 return n end\ninc(), inc()")))
  end)

  it("stays alive after errors, with what was there before", function()
    local said, status = prompt("x = 41\nerror('bad')\nx = = 1\nnil + 1\nx + 1")
    assert.truthy(said:find("bad", 1, true))
    assert.truthy(said:find("42\n$"))
    assert.equal(0, status)
    assert.falsy(said:find("prompt.lua", 1, true))
  end)

  it("prints tables so that one can read them", function()
    assert.equal('{1, 2, {a = "x"}, ["b c"] = true}\n', (prompt("{1, 2, {a = 'x'}, ['b c'] = true}")))
  end)

  it("prints a table that contains itself", function()
    local said = prompt("t = {}\nt.t = t\nt")
    assert.truthy(said:find("{...}", 1, true))
  end)

  it("prints tensors", function()
    assert.truthy((prompt("hm.ones({2, 2})")):find("f32", 1, true))
  end)

  it("explains ops, functions, classes and methods", function()
    for topic, expected in pairs {
      [""] = "Tab", matmul = "x:?matmul", ["hm.matmul"] = "autocast", ["nn.Linear"] = "nn%.Linear", ["amp.autocast"] = "autocast",
      ["x:sum"] = "sum", GradScaler = "GradScaler", nn = "Linear",
    } do
      local said = prompt("x = hm.ones({1})\n? " .. topic)
      assert.truthy(said:find(expected), topic .. ": " .. said)
      assert.falsy(said:find("no help on", 1, true), topic)
    end
  end)

  it("offers close names where it knows no help", function()
    assert.truthy((prompt("? matmull")):find("matmul", 1, true))
  end)

  it("returns from an interrupted loop with all variables", function()
    local said = shell([[(printf 'n = 0\nwhile true do n = n + 1 end\n'; sleep 1; printf 'n > 0\n') | (exec ]] .. program ..
      [[ -i) & sleep 0.6; kill -INT $!; wait $!]])
    assert.truthy(said:find("interrupted!", 1, true), said)
    assert.truthy(said:find("true\n$"), said)
  end)
end)

describe("help", function()
  local help = require "halfmoon.help"
  local hm = require "halfmoon"

  it("describes every public function and class", function()
    local spaces = {
      ["hm"] = hm, tensor = require("halfmoon.core").Tensor, nn = hm.nn, ["nn.functional"] = hm.nn.functional,
      ["nn.utils"] = hm.nn.utils, ["nn.init"] = hm.nn.init, optim = hm.optim, ["optim.lr_scheduler"] = hm.optim.lr_scheduler,
      amp = hm.amp, data = hm.data, autograd = hm.autograd, cpu = hm.cpu,
    }
    local silent = {}
    for space, content in pairs(spaces) do
      for name, value in pairs(content) do
        if not name:find("^_") and type(value) ~= "string" then
          local text = help.text(space .. "." .. name, {hm = hm})
          if text:find("^no help") or text:find("without a description", 1, true) or not text:find("[\n:>]") then
            silent[#silent + 1] = space .. "." .. name
          end
        end
      end
    end
    table.sort(silent)
    assert.equal("", table.concat(silent, " "))
  end)

  it("keeps lines within the terminal", function()
    for line in help.text("amp.GradScaler", {hm = hm}):gmatch("[^\n]+") do assert.truthy(#line <= 120, line) end
  end)
end)

describe("completion", function()
  local complete = require("halfmoon.prompt").complete
  local env = setmetatable({hm = require "halfmoon"}, {__index = _G})

  local function has(text, word)
    for _, found in ipairs(complete(env, text)) do
      if found == word then return true end
    end
    return false
  end

  it("knows globals, keywords and the library's doors", function()
    assert.is_true(has("pri", "print"))
    assert.is_true(has("x = func", "function"))
    assert.is_true(has("op", "optim"))
    assert.is_false(has("pri", "string"))
  end)

  it("follows fields of nested tables", function()
    assert.is_true(has("string.f", "format"))
    env.t = {a = {{b = {cc = 1}}}}
    assert.is_true(has("y = t.a[1].b.", "cc"))
    assert.is_true(has("hm.rand", "randn"))
  end)

  it("knows methods and fields of tensors", function()
    env.x = env.hm.ones({1})
    assert.is_true(has("x:mat", "matmul"))
    assert.is_true(has("x.sh", "shape"))
    assert.is_false(has("x:sh", "shape"))
  end)

  it("knows what a module has, and what its class has", function()
    env.model = env.hm.nn.Sequential(env.hm.nn.Linear(2, 2))
    assert.is_true(has("model:para", "parameters"))
    assert.is_true(has("model[1].we", "weight"))
  end)

  it("is silent where the text is no name", function()
    assert.same({}, complete(env, "nothing.here.at_all."))
    assert.same({}, complete(env, "1 .. "))
    assert.same({}, complete(env, "f()."))
  end)

  it("raises nothing when indexing does", function()
    env.bad = setmetatable({}, {__index = function() error("no") end})
    assert.same({}, complete(env, "bad.x.y"))
  end)
end)

describe("outermost locals", function()
  local keep = require("halfmoon.prompt").keep_locals

  local function kept(source)
    local text, names = keep(source)
    assert(load(text), text)
    return table.concat(names, " ")
  end

  it("are found among all else that Lua has", function()
    assert.equal("a b", kept("local a, b = 1, {c = function() local d end}"))
    assert.equal("a", kept("local a <const> = 1"))
    assert.equal("a", kept("local a"))
    assert.equal("f", kept("local function f() local g end"))
    assert.equal("z", kept("if x then local y elseif q then local w else local v end local z = 1"))
    assert.equal("n", kept("for i = 1, 2 do local a end repeat local b until b local n = 0"))
    assert.equal("s", kept("local s = 'local t' -- local u\n--[[ local v ]] print [==[ local w ]==]"))
    assert.equal("", kept("while x do local a end"))
  end)

  it("leave a <close> variable alone and say so", function()
    local text, names, closes = keep("local _ <close> = f()")
    assert.equal("local _ <close> = f()", text)
    assert.same({}, names)
    assert.is_true(closes)
  end)
end)
