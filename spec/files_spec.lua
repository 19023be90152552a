-- Files: safetensors to the byte, every kind of damage told by name, and saves that leave the old file or the new one.
-- luacheck: no max line length

local hm = require "halfmoon"
local core = require "halfmoon.core"
local bits = require "spec.support.bits"
local devices = require "spec.support.devices"
local files = require "spec.support.files"
local numbers = require "spec.support.numbers"
local process = require "spec.support.process"
local raises = require "spec.support.raises"

local nan, inf = 0 / 0, math.huge
local scratch = files.folder(setup, teardown)
local folder, path_of, write, read = scratch.path, scratch.path_of, scratch.write, files.read

--- Asserts nil, a message with all parts, and the code.
local function refused(code, parts, result, message, came)
  assert.is_nil(result)
  assert.equal("string", type(message))
  for _, part in ipairs(type(parts) == "table" and parts or {parts}) do
    assert.truthy(message:find(part, 1, true), ("%q is not in: %s"):format(part, message))
  end
  assert.equal(code, came)
end

describe("hm.save and hm.load", function()
  it("keep every dtype, shape and bit", function()
    local state = {}
    for _, dtype in ipairs {"float32", "float16", "bfloat16", "float64"} do
      state[dtype] = hm.tensor({{1.5, -2, nan}, {inf, -inf, 3e-8}}, {dtype = dtype})
    end
    state.i64 = hm.tensor({math.maxinteger, math.mininteger, 0}, {dtype = "i64"})
    state.i32 = hm.tensor({{2147483647}, {-2147483648}}, {dtype = "i32"})
    state.u8 = hm.tensor({0, 255}, {dtype = "u8"})
    state.bool = hm.tensor({true, false, true})
    state.scalar = hm.tensor(7.25)
    state.empty = hm.zeros({0, 3}, {dtype = "f16"})
    state["a name with spaces, \"quotes\" and ümlauts"] = hm.ones({1})
    assert.is_true(hm.save(path_of("all"), state))
    local back = assert(hm.load(path_of("all")))
    for name, t in pairs(state) do
      assert.equal(t.dtype, back[name].dtype)
      assert.same(t.shape, back[name].shape)
      assert.equal(bits.bytes(t), bits.bytes(back[name]))
    end
    for name in pairs(back) do assert(state[name], name) end
  end)

  it("write other memory orders as rows", function()
    local x = hm.arange(24, {dtype = "f32"}):view(2, 3, 4)
    local state = {t = x:permute(3, 1, 2), part = x[{2, {1, 2}, {2, 3}}], wide = hm.tensor({5}):expand(2, 2), row = x[1][2]}
    assert.is_true(hm.save(path_of("orders"), state))
    local back = assert(hm.load(path_of("orders")))
    for name, t in pairs(state) do
      assert.is_true(back[name]:is_contiguous())
      numbers.assert_same(back[name], t, name)
    end
  end)

  it("keep metadata", function()
    assert.is_true(hm.save(path_of("meta"), {x = hm.ones({1})}, {note = "line\nbreak \"quoted\" \\ é", empty = ""}))
    local _, metadata = hm.load(path_of("meta"))
    assert.same({note = "line\nbreak \"quoted\" \\ é", empty = ""}, metadata)
    raises("metadata must be strings", hm.save, path_of("meta"), {x = hm.ones({1})}, {n = 1})
  end)

  it("keep nested tables of tensors, numbers, strings and booleans", function()
    local x = hm.arange(3)
    local obj = {
      model = {fc = {weight = x}}, epoch = 3, lr = 0.1, big = math.maxinteger, name = "run \"7\"", done = false,
      list = {1, 2.5, "three", {x = x:float()}}, tiny = 5e-324, huge = inf,
    }
    assert.is_true(hm.save(path_of("tree"), obj))
    local back = assert(hm.load(path_of("tree")))
    numbers.assert_same(back.model.fc.weight, x)
    numbers.assert_same(back.list[4].x, x)
    for _, key in ipairs {"epoch", "lr", "big", "name", "done", "tiny", "huge"} do
      assert.equal(obj[key], back[key])
      assert.equal(math.type(obj[key]), math.type(back[key]))
    end
    assert.same({1, 2.5, "three"}, {back.list[1], back.list[2], back.list[3]})
  end)

  it("take a module, an optimizer, one tensor", function()
    local model = hm.nn.Linear(3, 2)
    assert.is_true(hm.save(path_of("module"), model))
    local other = hm.nn.Linear(3, 2)
    other:load_state_dict(assert(hm.load(path_of("module"))))
    numbers.assert_same(other.weight, model.weight)
    assert.is_true(hm.save(path_of("one"), hm.ones({2})))
    numbers.assert_same(hm.load(path_of("one")).tensor, {1, 1})
  end)

  it("write what others read: the bytes of a small file", function()
    local state = {b = hm.tensor({1, 2}, {dtype = "f16"}), a = hm.tensor({{3}}, {dtype = "u8"})}
    assert.is_true(hm.save(path_of("bytes"), state))
    local all = read(path_of("bytes"))
    local n = string.unpack("<I8", all)
    assert.equal(0, n % 8)
    local header = all:sub(9, 8 + n)
    local function entry(name)
      local dtype, shape, from, to = header:match('"' .. name .. '":{"dtype":"(%w+)","shape":%[([%d,]*)%],"data_offsets":%[(%d+),(%d+)%]}')
      return dtype, shape, all:sub(9 + n + from, 8 + n + to)
    end
    assert.same({"F16", "2", "\x00\x3c\x00\x40"}, {entry "b"})
    assert.same({"U8", "1,1", "\x03"}, {entry "a"})
    assert.equal(8 + n + 5, #all)
    assert.equal("{", header:sub(1, 1))
  end)

  it("refuse what is no path and no state", function()
    raises("path", hm.save, 3, {})
    raises("path", hm.load)
    raises("hm.save", hm.save, path_of("x"), "text")
    raises("hm.save", hm.save, path_of("x"), {f = print})
    raises({"unknown option", "device"}, hm.load, path_of("x"), {devise = "cpu"})
    local t = hm.ones({1})
    t:release()
    raises("released", hm.save, path_of("x"), {t = t})
  end)
end)

describe("a file written by hand", function()
  local two = {{"w", "F32", {2}, string.pack("<ff", 1.5, -2)}, {"n", "I64", {}, string.pack("<i8", -5)}}

  it("is read as it stands", function()
    local state, metadata = hm.load(write("hand", bits.file(two, '"__metadata__":{"format":"pt"}')))
    numbers.assert_same(state.w, {1.5, -2})
    assert.equal(-5, state.n:item())
    assert.same({format = "pt"}, metadata)
  end)

  it("may have spaces, escapes, any order, and a padded header", function()
    local header = ' {"\\u0061\\"b" : { "shape" : [ 1 , 2 ] , "data_offsets":[ 2, 4 ],\n"dtype":"U8"}, "c":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}   '
    header = header:sub(2)
    local state = assert(hm.load(write("free", string.pack("<I8", #header) .. header .. "\x80\x3f\x07\x08")))
    numbers.assert_same(state['a"b'], {7, 8})
    numbers.assert_same(state.c, {1})
  end)

  it("may hold nothing", function()
    assert.same({}, (hm.load(write("nothing", bits.file({})))))
  end)

  local good = bits.file(two)
  local header_size = string.unpack("<I8", good)
  local function with_header(header, data) return string.pack("<I8", #header) .. header .. (data or "") end
  local function entry(fields) return '{"x":{' .. fields .. "}}" end

  for name, row in pairs {
    ["cut in the data"] = {good:sub(1, -3), {"w"}},
    ["cut in the header"] = {good:sub(1, 20), {}},
    ["shorter than its size field"] = {"\1\2\3", {"3 bytes long"}},
    ["empty"] = {"", {"0 bytes long"}},
    ["a header size beyond all bounds"] = {string.pack("<I8", 1 << 62) .. "{}", {}},
    ["a header size of minus one"] = {string.rep("\255", 8) .. "{}", {}},
    ["bytes behind the tensors"] = {good .. "x", {"byte"}},
    ["another format"] = {with_header("PK\3\4" .. ("x"):rep(50)), {"should begin with '{'", "hint"}},
    ["JSON that is none"] = {with_header('{"w":'), {"JSON"}},
    ["JSON with text behind it"] = {with_header("{} x"), {"JSON"}},
    ["a dtype that does not exist"] = {with_header(entry '"dtype":"F7","shape":[],"data_offsets":[0,4]', "1234"), {'"x"', "F7"}},
    ["a shape that does not fit the bytes"] = {with_header(entry '"dtype":"F32","shape":[3],"data_offsets":[0,8]',
      "12345678"), {'"x"', "12"}},
    ["a negative size"] = {with_header(entry '"dtype":"U8","shape":[-1],"data_offsets":[0,1]', "1"), {'"x"'}},
    ["sizes whose product overflows"] = {
      with_header(entry '"dtype":"U8","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,1]', "1"), {'"x"'}},
    ["a fractional size"] = {with_header(entry '"dtype":"U8","shape":[1.5],"data_offsets":[0,1]', "1"), {'"x"'}},
    ["offsets beyond the data"] = {with_header(entry '"dtype":"U8","shape":[9],"data_offsets":[0,9]', "1"), {'"x"', "data_offsets"}},
    ["offsets that run backwards"] = {with_header(entry '"dtype":"U8","shape":[1],"data_offsets":[2,1]', "12"), {'"x"', "data_offsets"}},
    ["missing offsets"] = {with_header(entry '"dtype":"U8","shape":[1]', "1"), {'"x"'}},
    ["an entry that is no object"] = {with_header('{"x":3}'), {'"x"'}},
    ["metadata that is no text"] = {with_header('{"__metadata__":{"n":3}}'), {'"n"'}},
    ["a hole between tensors"] = {
      with_header('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"y":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}', "123"), {'"y"'}},
    ["tensors that overlap"] = {
      with_header('{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"y":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', "123"), {'"y"', '"x"'}},
    ["a name that comes twice"] = {
      with_header('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', "12"), {'"x"', "duplicate"}},
    ["a BOOL that is neither 0 nor 1"] = {with_header(entry '"dtype":"BOOL","shape":[2],"data_offsets":[0,2]', "\1\2"), {'"x"', "0 or 1"}},
    ["more dims than there can be"] = {
      with_header(entry('"dtype":"U8","shape":[' .. ("1,"):rep(40) .. '1],"data_offsets":[0,1]'), "1"), {'"x"', "dims"}},
    ["nesting without end"] = {with_header('{"x":' .. ("["):rep(100000)), {}},
  } do
    it("is refused with a reason: " .. name, function()
      local path = write("damaged", row[1])
      table.insert(row[2], path)
      refused("EFORMAT", row[2], hm.load(path))
    end)
  end

  it("is refused or read wherever one byte is damaged, and never crashes", function()
    for i = 1, 8 + header_size do
      for _, byte in ipairs {"\0", "\255", "9", '"', "{"} do
        local ok, state, message = pcall(hm.load, write("flip", good:sub(1, i - 1) .. byte .. good:sub(i + 1)))
        assert(ok, state)
        assert(state or message)
      end
    end
    for i = 0, #good - 1 do refused("EFORMAT", path_of("cut"), hm.load(write("cut", good:sub(1, i)))) end
  end)
end)

describe("the world refuses:", function()
  it("no such file, a folder", function()
    refused("ENOENT", {path_of("absent")}, hm.load(path_of("absent")))
    refused("ENOENT", path_of("no/such/folder"), hm.save(path_of("no/such/folder/x"), {x = hm.ones({1})}))
    write("plain", "x")
    refused("ENOTDIR", path_of("plain/x"), hm.save(path_of("plain/x"), {x = hm.ones({1})}))
    refused("EISDIR", folder, hm.load(folder))
    assert.is_nil((hm.save(folder, {x = hm.ones({1})})))
    local ok, message = hm.save("/dev/full", {x = hm.ones({1})})
    assert.is_nil(ok)
    assert.truthy(message:find("/dev/full", 1, true))
  end)

  local outside = devices.cpu_cases("the program from outside", it)

  outside("a full disk leaves the old file and nothing else", function()
    local path = path_of("kept")
    assert.is_true(hm.save(path, {x = hm.ones({4})}))
    local before = read(path)
    local said = process.shell(("trap '' XFSZ; ulimit -f 8; %s -e %s"):format(process.program, process.quote(([[
      local ok, message, code = hm.save(%q, {x = hm.zeros({100000})})
      print(ok, code, message ~= nil and message:find(%q, 1, true) ~= nil)]]):format(path, path))))
    assert.equal("nil\tEFBIG\ttrue\n", said)
    assert.equal(before, read(path))
    assert.equal("", (process.shell("ls " .. folder .. " | grep '^kept.'")))
  end)

  outside("a kill in the middle of a save leaves the old file or the new one, whole", function()
    local path = path_of("victim")
    local source = ([[
      local a, b = hm.zeros({1 << 20}), hm.ones({1 << 20})
      assert(hm.save(%q, {x = a, y = a}))
      print("ready") io.stdout:flush()
      while true do
        assert(hm.save(%q, {x = b, y = b}))
        assert(hm.save(%q, {x = a, y = a}))
      end]]):format(path, path, path)
    local seen = {}
    for round = 1, 6 do
      local said = process.shell(("HALFMOON_THREADS=1 %s -e %s > %s & pid=$!; while [ ! -s %s ]; do sleep 0.02; done; sleep 0.%02d; kill -9 $pid; wait $pid"):format(
        process.program, process.quote(source), path_of("ready"), path_of("ready"), 3 + 7 * round))
      os.remove(path_of("ready"))
      local state, message = hm.load(path)
      assert(state, tostring(message) .. said)
      local v = state.x[1]:item()
      assert.is_true(state.x:eq(v):all():item())
      assert.is_true(state.y:eq(v):all():item())
      seen[v] = true
    end
    assert(next(seen))
    -- the next save works, whatever the killed ones left
    assert.is_true(hm.save(path, {x = hm.full({2}, 3)}))
    numbers.assert_same(hm.load(path).x, {3, 3})
  end)
end)

describe("names", function()
  it("may not come twice, be reserved or be broken text", function()
    local t = hm.ones({1})
    local function save(entries, metadata) return core.safetensors_save(path_of("names"), entries, metadata or {}) end
    for _, case in ipairs {{{{"a", t}, {"a", t}}, "twice"}, {{{"__metadata__", t}}, "__metadata__"}, {{{"\xff", t}}, "UTF-8"}} do
      local ok, result, message = pcall(save, case[1])
      local text = ok and message or result
      assert(not (ok and result), "it was saved")
      assert.truthy(tostring(text):find(case[2], 1, true), text)
    end
    assert.is_nil(io.open(path_of("names")))
  end)

  it("of a nested table that collide are told apart", function()
    local a, b = hm.full({1}, 1), hm.full({1}, 2)
    assert.is_true(hm.save(path_of("collide"), {n = 1, ["a.b"] = a, a = {b = b}}))
    local back = assert(hm.load(path_of("collide")))
    assert.equal(1, back["a.b"]:item())
    assert.equal(2, back.a.b:item())
  end)
end)
