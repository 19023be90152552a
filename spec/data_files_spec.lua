-- Files that data come in: CIFAR-10, tables as text, text as bytes.

local hm = require "halfmoon"
local files = require "spec.support.files"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"

local data = hm.data
local nan, inf = 0 / 0, math.huge
local scratch = files.folder(setup, teardown, "below/cifar-10-batches-bin")
local folder, path_of, write = scratch.path, scratch.path_of, scratch.write

describe("data.cifar10", function()
  --- A record: the label, then planes of one value each, the first pixel of each plane marked.
  local function record(label, r, g, b)
    local function plane(v) return "\255" .. string.char(v):rep(1023) end
    return string.char(label) .. plane(r) .. plane(g) .. plane(b)
  end

  setup(function()
    for i = 1, 5 do write(("data_batch_%d.bin"):format(i), record(i, i, 20, 30) .. record(0, 1, 2, 3)) end
    local many = {}
    for i = 1, 70 do many[i] = record(i % 10, i, i, i) end
    write("test_batch.bin", table.concat(many))
    write("below/cifar-10-batches-bin/test_batch.bin", record(9, 7, 8, 9))
  end)

  it("reads the batches in order: label, then red, green and blue by rows", function()
    local d = data.cifar10 {root = folder}
    assert.equal(10, d:size())
    assert.same({10, 3, 32, 32}, d.images.shape)
    assert.equal("uint8", d.images.dtype)
    assert.equal("int64", d.labels.dtype)
    assert.same({1, 0, 2, 0, 3, 0, 4, 0, 5, 0}, d.labels:totable())
    assert.same({255, 5, 5}, {d.images[9][1][1][1]:item(), d.images[9][1][1][2]:item(), d.images[9][1][32][32]:item()})
    assert.same({255, 20, 30}, {d.images[9][2][1][1]:item(), d.images[9][2][32][1]:item(), d.images[9][3][2][2]:item()})
    assert.equal("automobile", d.classes[d.labels[1]:item() + 1])
    local test = data.cifar10 {root = folder, train = false}
    assert.equal(70, test:size())
    assert.equal(69, test.images[69][3][32][32]:item())
    assert.same({9, 0}, {test.labels[69]:item(), test.labels[70]:item()})
    assert.equal(1, data.cifar10({root = path_of "below", train = false}):size())
  end)

  it("says what is missing or damaged", function()
    raises({"data_batch_1.bin", "cifar-10-binary.tar.gz", "HALFMOON_DATA"}, data.cifar10, {root = path_of "none"})
    os.execute("mkdir " .. path_of "bad")
    local path = write("bad/test_batch.bin", record(1, 1, 1, 1):sub(1, -2))
    raises({path, "3072 bytes", "3073", "hint"}, data.cifar10, {root = path_of "bad", train = false})
    write("bad/test_batch.bin", record(1, 1, 1, 1) .. record(10, 1, 1, 1))
    raises({path, "record 1 has label 10"}, data.cifar10, {root = path_of "bad", train = false})
    write("bad/test_batch.bin", "")
    raises({path, "0 bytes"}, data.cifar10, {root = path_of "bad", train = false})
    raises("did you mean 'root'", data.cifar10, {rot = folder})
  end)
end)

describe("data.csv", function()
  local function csv(text, opts) return data.csv(write("t.csv", text), opts) end

  it("reads numbers with and without a header", function()
    local t, names = csv("a,b\n1,2.5\n-3,4e2\n")
    assert.same({"a", "b"}, names)
    assert.equal("float32", t.dtype)
    assert.same({{1, 2.5}, {-3, 400}}, t:totable())
    t, names = csv("1,2\n3,4")
    assert.is_nil(names)
    assert.same({{1, 2}, {3, 4}}, t:totable())
    assert.same({{3, 4}}, (csv("1,2\n3,4\n", {header = true})):totable())
    raises("column 1: \"a\" is no float32", csv, "a,b\n1,2\n", {header = false})
    t, names = csv("a;b\n", {delimiter = ";"})
    assert.same({0, 2}, t.shape)
    assert.same({"a", "b"}, names)
  end)

  it("reads quotes, spaces, CR LF, empty lines and fields, a byte-order mark", function()
    local t, names = csv("\xef\xbb\xbf\"one, \"\"two\"\"\", three \r\n\r\n\"5\", 6 \r\n\"7\",\n\n")
    assert.same({"one, \"two\"", "three"}, names)
    numbers.assert_same(t, hm.tensor {{5, 6}, {7, nan}})
    numbers.assert_same((csv("nan,inf\n-inf,-0.0\n")), hm.tensor {{nan, inf}, {-inf, -0.0}})
  end)

  it("chooses columns by name and number, in any order, more than once", function()
    local t, names = csv("id,x,label\nq,1.5,2\nr,2.5,3\n", {columns = {"label", 2, "label"}})
    assert.same({{2, 1.5, 2}, {3, 2.5, 3}}, t:totable())
    assert.same({"label", "x", "label"}, names)
    raises({"no column 'labl'", "did you mean 'label'"}, csv, "id,label\n1,2\n", {columns = {"labl"}})
    raises("has no header", csv, "1,2\n", {columns = {"a"}})
    raises("from 1 to 2, not 3", csv, "1,2\n", {columns = {3}})
    raises("twice", csv, "a,a\n1,2\n", {columns = {"a"}})
  end)

  it("rounds once, and keeps integers exact", function()
    assert.same({{9007199254740993, -9223372036854775808}}, (csv("9007199254740993,-9223372036854775808\n", {dtype = "i64"})):totable())
    assert.same({{0, 255}}, (csv("0, 255\n", {dtype = "u8"})):totable())
    assert.equal(0.1, (csv("0.1\n", {dtype = "f64"})):item())
    -- halfway between two float32 values but for the last digit: by way of float64 it would round down
    assert.equal(1.00000012, tonumber(("%.8f"):format((csv("1.000000059604644775390626\n")):item())))
    assert.equal("float16", (csv("1\n", {dtype = "f16"})).dtype)
    for dtype, values in pairs {f8_e4m3 = {1.5, -2.25, 448}, f8_e5m2 = {1.5, -2, 448}} do -- one byte for each
      local t = csv("1.5,-2.2,440\n", {dtype = dtype})
      numbers.assert_same(t:float(), hm.tensor {values}, dtype)
    end
    raises({"t.csv:1", "column 2", "\"256\" is no uint8"}, csv, "1,256\n", {dtype = "u8"})
    raises("\"1.5\" is no int64", csv, "1.5\n", {dtype = "i64"})
    raises("\"\" is no int32", csv, "1,\n", {dtype = "i32"})
  end)

  it("tells the line of what is wrong", function()
    raises({"t.csv:4", "column 2 (b)", "\"x\"", "hint"}, csv, "a,b\n1,2\n\n3,x\n")
    raises({"t.csv:3", "3 fields", "the first one 2"}, csv, "1,2\n3,4\n5,6,7\n")
    raises({"t.csv:2", "1 field,"}, csv, "1,2\n3\n")
    raises({"t.csv:2", "no end"}, csv, "1,2\n\"3,4\n5,6\n")
    raises({"t.csv:2", "behind a quoted field"}, csv, "1,2\n\"3\"4,5\n")
    raises({"t.csv:4", "\"y\""}, csv, "a,b\n1,\"2\n\"\ny,3\n", {columns = {"a"}})
    raises("\"0x10\"", csv, "1\n0x10\n")
    raises("is no float32", csv, "1\n1\0\n")
    raises("nothing in it", csv, "")
    raises("nothing in it", csv, "\n\r\n")
    raises("65,536 columns", csv, ("1,"):rep(70000))
    raises("one character", csv, "1", {delimiter = "::"})
    raises("delimiter may not be", csv, "1", {delimiter = "\n"})
    raises("absent.csv", data.csv, path_of "absent.csv")
  end)

  it("gives its memory back when it fails", function()
    write("t.csv", "a,b\n1,2\n3,x\n")
    raises("t.csv", data.csv, path_of "t.csv")
    collectgarbage()
    local before = hm.cpu.memory_stats().live
    for _ = 1, 20 do assert.is_false((pcall(data.csv, path_of "t.csv"))) end
    collectgarbage()
    assert.equal(before, hm.cpu.memory_stats().live)
  end)
end)

describe("text", function()
  it("is a tensor of bytes", function()
    local t = data.text(write("text", "A\0\255\n"))
    assert.equal("uint8", t.dtype)
    assert.same({65, 0, 255, 10}, t:totable())
    assert.equal("int64", data.text(path_of "text", {dtype = "i64"}).dtype)
    assert.same({0}, data.text(write("none", "")).shape)
    raises("absent", data.text, path_of "absent")
    raises("regular file", data.text, folder)
    raises("unknown dtype", data.text, path_of "text", {dtype = "f99"})
  end)

  it("is a data set of windows, each with the ids that follow", function()
    local d = data.Text {write("text", "abcdefghij"), context = 3}
    assert.equal(3, d:size())
    assert.equal("int64", d.tensors[1].dtype)
    local x, y = d:get(3)
    assert.same({103, 104, 105}, x:totable())
    assert.same({104, 105, 106}, y:totable())
    d = data.Text {write("digits", "\0\1\2\3\4\5\6\7\8\9"), context = 4, stride = 2}
    assert.same({{0, 1, 2, 3}, {2, 3, 4, 5}, {4, 5, 6, 7}}, d.tensors[1]:totable())
    assert.same({{1, 2, 3, 4}, {3, 4, 5, 6}, {5, 6, 7, 8}}, d.tensors[2]:totable())
    assert.equal(1, data.Text({hm.arange(4), context = 3, stride = 9}):size())
    local seen = 0
    for ids in data.DataLoader({d, batch_size = 2}):batches() do seen = seen + ids:size(1) end
    assert.equal(3, seen)
  end)

  it("says what it needs", function()
    raises({"context", "missing"}, data.Text, {path_of "text"})
    raises({"10 ids are too few", "window of 10"}, data.Text, {hm.arange(10), context = 10})
    raises("one dim", data.Text, {hm.ones({2, 2}), context = 1})
    raises("did you mean 'context'", data.Text, {hm.arange(10), contxt = 3})
  end)
end)
