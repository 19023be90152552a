-- emit_source.lua -- math_text.h: kernels/math.h and kernels/half.h as text, for kernels that are compiled at run time.
--
-- Comments and #include lines are left out; core/expression_source.c puts what they would bring in front.

local function read(path)
  local f = assert(io.open(path, "rb"))
  local text = f:read("a")
  f:close()
  return text
end

local function literal(path)
  local t = {}
  for line in read(path):gsub("/%*.-%*/", ""):gmatch("[^\n]+") do
    if line:match("%S") and not line:match("^#include") then
      t[#t + 1] = ('  "%s\\n"\n'):format(line:gsub("%s+$", ""):gsub("[\\\"]", "\\%0"))
    end
  end
  return table.concat(t)
end

return function(_, kernels)
  return {["math_text.h"] = ("static const char hm_math_text[] =\n%s%s  ;\n"):format(
    literal(kernels .. "/math.h"), literal(kernels .. "/half.h"))}
end
