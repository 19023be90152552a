-- raises.lua -- asserting that a call raises a message with certain parts in it.

local devices = require "spec.support.devices"

-- What a kernel found is told when somebody waits for the device.
local function and_wait(fn, ...)
  fn(...)
  devices.wait()
end

--- Calls fn(...) and waits for the device: one of both must raise a string that holds each of the parts (one string or
--- an array, plain text).  Returns the message.
return function(parts, fn, ...)
  local ok, message = pcall(and_wait, fn, ...)
  if ok then error("expected an error, none was raised", 2) end
  if type(message) ~= "string" then error("expected an error message, came a " .. type(message), 2) end
  for _, part in ipairs(type(parts) == "table" and parts or {parts}) do
    if not message:find(part, 1, true) then
      error(("the error does not say %q:\n%s"):format(part, message), 2)
    end
  end
  return message
end
