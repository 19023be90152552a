-- plant.lua -- plants faults in a copy of the op table, for scripts/audit, which expects the specs to see them:
--
--   lua5.4 scripts/plant.lua SEED kernels/ops.def COPY EXPECTED
--
-- Writes the table with one fault of each kind in rows picked by SEED, and to EXPECTED one line for each: the row,
-- what its failing case is called, what was done, separated by tabs.

local seed, from, to, expected = table.unpack(arg, 1, 4)
assert(expected, "usage: lua5.4 scripts/plant.lua SEED OPS_DEF COPY EXPECTED")
math.randomseed(math.tointeger(tonumber(seed)))

local f = assert(io.open(from))
local text = f:read("a")
f:close()

-- The pieces of the file: rows, each with what follows up to the next.
local pieces, names = {}, {}
local begins = {}
for at in text:gmatch("()\n%a+{\"[%w_]+%(") do begins[#begins + 1] = at + 1 end
pieces[1] = text:sub(1, begins[1] - 1)
for i, at in ipairs(begins) do
  pieces[i + 1] = text:sub(at, (begins[i + 1] or #text + 1) - 1)
  names[i + 1] = pieces[i + 1]:match("^%a+{\"([%w_]+)%(")
end

local function is_elementwise(piece) return piece:find("^elementwise") ~= nil end

--- A change of the first match of a pattern; nil where there is none.
local function change(pattern, by)
  return function(piece)
    local out, n = piece:gsub(pattern, by, 1)
    return n > 0 and out or nil
  end
end

-- Each kind: which rows, what is done to them, the case that must fail.
local KINDS = {
  {
    what = "a derivative that is 1 % too large", case = "gradient",
    fit = function(piece) return is_elementwise(piece) and not piece:find('d = {x = "0"')
      and not piece:find("^elementwise{\"remainder") end,
    plant = change('( d = {x = ")([^"]+)"', '%11.01 * (%2)"'),
  },
  {
    what = "a derivative by ops with the wrong sign", case = "derivative",
    fit = function(piece)
      return piece:find("^op") and not piece:find("^op{\"[%w_]*_backward") and piece:find('family = "[rsnip]')
        and not piece:find("float p=2", 1, true)
    end,
    plant = change('(grad = {x = ")([%w_]+%b())"', '%1-%2"'),
  },
  {
    what = "the wrong autocast class, and so the wrong dtype inside a region", case = "its autocast class",
    fit = function(piece) return is_elementwise(piece) end,
    plant = change("^(elementwise{\"[%w_]+%()T x%) %-> T", "%1F x) -> F"),
  },
  {
    what = "a NaN that becomes 0", case = "NaN, infinities and zeros",
    fit = function(piece)
      return is_elementwise(piece) and piece:find("^elementwise{\"[%w_]+%(%u x%) %-> %u") and not piece:find("loss", 1,
        true)
    end,
    plant = change('(, f = ")([^"]+)"', '%1x != x ? 0 : (%2)"'),
  },
  {
    what = "values that are off by one part in a million", case = "f64 value",
    fit = function(piece) return is_elementwise(piece) and piece:find("^elementwise{\"[%w_]+%(F x%) %-> F") end,
    plant = change('(, f = ")([^"]+)"', '%1(%2) * 1.000001"'),
  },
}

local taken, report = {}, {}
for _, kind in ipairs(KINDS) do
  local fitting = {}
  for i = 2, #pieces do
    if not taken[i] and kind.fit(pieces[i]) and kind.plant(pieces[i]) then fitting[#fitting + 1] = i end
  end
  assert(#fitting > 0, "no row fits: " .. kind.what)
  local i = fitting[math.random(#fitting)]
  taken[i] = true
  pieces[i] = kind.plant(pieces[i])
  report[#report + 1] = ("%s\t%s\t%s\n"):format(names[i], kind.case, kind.what)
end

local function write(path, content)
  local out = assert(io.open(path, "w"))
  out:write(content)
  out:close()
end
write(to, table.concat(pieces))
write(expected, table.concat(report))
