/*
 * status.c -- the message of the last failure, one for each thread, and the text of status codes.
 *
 * Anybody in core may call hm_fail; backends reach it through hm_host.  Nothing here allocates, so that an
 * out-of-memory error can always be told.
 */
#include <stdio.h>
#include <string.h>

#include "alloc.h"

enum { MESSAGE_BYTES = 4096, BUFFERS = 16 };

/* Thread-local room is scarce in a library that is loaded at run time (a whole buffer there would keep stock Lua from loading
 * the module), so a thread holds a pointer only.  The first buffer is the mutator's; other threads take the others in turn. */
static char buffers[BUFFERS][MESSAGE_BYTES];
static _Thread_local char *own;

static char *buffer(void) {
  static _Atomic uint32_t taken;
  if (hm__is_mutator()) return buffers[0];
  if (!own) own = buffers[1 + atomic_fetch_add(&taken, 1) % (BUFFERS - 1)];
  return own;
}

int hm_fail(int code, const char *format, ...) {
  char text[MESSAGE_BYTES]; /* the arguments may point into the old message */
  va_list args;
  va_start(args, format);
  int n = vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (n < 0) {
    n = snprintf(text, sizeof text, "%s", hm_status_text(code));
  } else if (n >= (int)sizeof text) {
    n = (int)sizeof text - 1;
    memcpy(text + n - 3, "...", 3);
  }
  memcpy(buffer(), text, (size_t)n + 1);
  return code;
}

const char *hm_error_message(void) { return buffer(); }

const char *hm_status_text(int code) {
  static const char *const texts[] = {
#define X(name, text) text,
      HM_STATUS_MAP(X)
#undef X
  };
  return code >= 0 && code < (int)(sizeof texts / sizeof *texts) ? texts[code] : "unknown status";
}
