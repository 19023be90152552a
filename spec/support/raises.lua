-- raises.lua -- asserting that a call raises a message with certain parts in it.

--- Calls fn(...), which must raise a string that holds each of the parts (one string or an array, plain text).  Returns the message.
return function(parts, fn, ...)
  local ok, message = pcall(fn, ...)
  if ok then error("expected an error, none was raised", 2) end
  if type(message) ~= "string" then error("expected an error message, came a " .. type(message), 2) end
  for _, part in ipairs(type(parts) == "table" and parts or {parts}) do
    if not message:find(part, 1, true) then
      error(("the error does not say %q:\n%s"):format(part, message), 2)
    end
  end
  return message
end
