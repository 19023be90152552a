/*
 * io_shim.c -- test double for the system: makes the n-th call on files of one folder fail, or be the last one.
 *
 * Built as build/io-shim.so and put before the C library by LD_PRELOAD; HALFMOON_SHIM names the folder.  Only calls on
 * files below it, and on the folder itself, count.  What shall happen is told by opening a path in the folder that
 * begins with '@' (by fopen, which is io.open in Lua); no such file is made, the open is the message:
 *
 *   @arm:ACTION:OPS:N  the N-th call from now on among OPS does ACTION, once.  OPS is '*' or letters: o open, r read,
 *                      w write, s fsync, n rename, c close, u unlink.  ACTION is one of
 *       kill     the process gets SIGKILL instead of the call
 *       after    the call is made, then comes SIGKILL
 *       half     half of the bytes are written, then comes SIGKILL; other calls as `kill`
 *       short    a read or write transfers half of the bytes (one at least)
 *       eio, enospc, eintr   the call fails with that error (a close closes all the same)
 *   @status            can be read: "CALLS FIRED OPEN": calls counted since @arm, 1 if the action was taken, and how many
 *                      descriptors of the folder are open.  Ends the counting.
 *
 * For one thread that touches the folder; there are no locks.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_FD = 4096 };

static struct {
  bool on, fired;
  char action[16], ops[16];
  long at, count;
  bool ours[MAX_FD]; /* descriptors of the folder */
  int open;
} now;

static char status_text[64];

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static bool below(const char *path) {
  const char *folder = getenv("HALFMOON_SHIM");
  const size_t n = folder ? strlen(folder) : 0;
  return n > 0 && path && strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static bool is_ours(int fd) { return fd >= 0 && fd < MAX_FD && now.ours[fd]; }

static bool wants(const char *action) { return strcmp(now.action, action) == 0; }

/* Counts a call; true if it is the one. */
static bool hit(char op) {
  if (!now.on || !(now.ops[0] == '*' || strchr(now.ops, op))) return false;
  if (++now.count != now.at) return false;
  now.fired = true;
  return true;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* What to do with a call that was hit: 0, or the error that it fails with.  Dies where that is asked for. */
static int fault(void) {
  if (wants("kill") || wants("half")) die();
  return wants("eio") ? EIO : wants("enospc") ? ENOSPC : wants("eintr") ? EINTR : 0;
}

static void die_after(bool was_hit) {
  if (was_hit && wants("after")) die();
}

static int opened(int fd) {
  if (fd >= 0 && fd < MAX_FD) {
    now.ours[fd] = true;
    now.open++;
  }
  return fd;
}

static int open_here(int (*real)(const char *, int, ...), const char *path, int flags, mode_t mode) {
  if (!below(path)) return real(path, flags, mode);
  const bool was_hit = hit('o');
  const int error = was_hit ? fault() : 0;
  if (error) {
    errno = error;
    return -1;
  }
  const int fd = opened(real(path, flags, mode));
  die_after(was_hit);
  return fd;
}

static mode_t mode_of(int flags, va_list args) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(args, mode_t) : 0; }

int open(const char *path, int flags, ...) {
  va_list args;
  va_start(args, flags);
  const mode_t mode = mode_of(flags, args);
  va_end(args);
  return open_here(REAL(open), path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  va_list args;
  va_start(args, flags);
  const mode_t mode = mode_of(flags, args);
  va_end(args);
  return open_here(REAL(open64), path, flags, mode);
}

/* Bytes to transfer in a read or write; -1: it fails with errno. */
static ssize_t transfer(char op, size_t bytes, bool *was_hit) {
  *was_hit = hit(op);
  if (!*was_hit) return (ssize_t)bytes;
  if (wants("short") || (wants("half") && op == 'w')) return (ssize_t)(bytes > 1 ? bytes / 2 : bytes);
  const int error = fault();
  if (!error) return (ssize_t)bytes;
  errno = error;
  return -1;
}

ssize_t read(int fd, void *data, size_t bytes) {
  bool was_hit;
  if (!is_ours(fd)) return REAL(read)(fd, data, bytes);
  const ssize_t n = transfer('r', bytes, &was_hit);
  return n < 0 ? n : REAL(read)(fd, data, (size_t)n);
}

ssize_t pread(int fd, void *data, size_t bytes, off_t at) {
  bool was_hit;
  if (!is_ours(fd)) return REAL(pread)(fd, data, bytes, at);
  const ssize_t n = transfer('r', bytes, &was_hit);
  return n < 0 ? n : REAL(pread)(fd, data, (size_t)n, at);
}

ssize_t pread64(int fd, void *data, size_t bytes, off64_t at) {
  bool was_hit;
  if (!is_ours(fd)) return REAL(pread64)(fd, data, bytes, at);
  const ssize_t n = transfer('r', bytes, &was_hit);
  return n < 0 ? n : REAL(pread64)(fd, data, (size_t)n, at);
}

ssize_t write(int fd, const void *data, size_t bytes) {
  bool was_hit;
  if (!is_ours(fd)) return REAL(write)(fd, data, bytes);
  const ssize_t n = transfer('w', bytes, &was_hit);
  if (n < 0) return n;
  const ssize_t put = REAL(write)(fd, data, (size_t)n);
  if (was_hit && wants("half")) die();
  die_after(was_hit);
  return put;
}

int fsync(int fd) {
  if (!is_ours(fd)) return REAL(fsync)(fd);
  const bool was_hit = hit('s');
  const int error = was_hit ? fault() : 0;
  if (error) {
    errno = error;
    return -1;
  }
  const int rc = REAL(fsync)(fd);
  die_after(was_hit);
  return rc;
}

int close(int fd) {
  if (!is_ours(fd)) return REAL(close)(fd);
  const bool was_hit = hit('c');
  const int error = was_hit ? fault() : 0;
  now.ours[fd] = false;
  now.open--;
  const int rc = REAL(close)(fd);
  die_after(was_hit);
  if (!error) return rc;
  errno = error;
  return -1;
}

int rename(const char *from, const char *to) {
  if (!below(to)) return REAL(rename)(from, to);
  const bool was_hit = hit('n');
  const int error = was_hit ? fault() : 0;
  if (error) {
    errno = error;
    return -1;
  }
  const int rc = REAL(rename)(from, to);
  die_after(was_hit);
  return rc;
}

int unlink(const char *path) {
  if (!below(path)) return REAL(unlink)(path);
  const bool was_hit = hit('u');
  const int error = was_hit ? fault() : 0;
  if (error) {
    errno = error;
    return -1;
  }
  const int rc = REAL(unlink)(path);
  die_after(was_hit);
  return rc;
}

/* ====== Messages ====== */

/* "@arm:kill:*:3" */
static void arm(const char *text) {
  char action[16], ops[16];
  long at;
  now.on = false;
  if (sscanf(text, "@arm:%15[^:]:%15[^:]:%ld", action, ops, &at) != 3) {
    fprintf(stderr, "io_shim: cannot read \"%s\"\n", text);
    abort();
  }
  memcpy(now.action, action, sizeof action);
  memcpy(now.ops, ops, sizeof ops);
  now.at = at;
  now.count = 0;
  now.fired = false;
  now.on = true;
}

static FILE *message(const char *text) {
  if (strncmp(text, "@arm:", 5) == 0) {
    arm(text);
    errno = ENOENT;
    return NULL;
  }
  now.on = false;
  snprintf(status_text, sizeof status_text, "%ld %d %d", now.count, now.fired, now.open);
  return fmemopen(status_text, strlen(status_text), "r");
}

FILE *fopen(const char *path, const char *mode) {
  const char *slash = below(path) ? strrchr(path, '/') : NULL;
  if (slash && slash[1] == '@') return message(slash + 1);
  return REAL(fopen)(path, mode);
}

FILE *fopen64(const char *path, const char *mode) {
  const char *slash = below(path) ? strrchr(path, '/') : NULL;
  if (slash && slash[1] == '@') return message(slash + 1);
  return REAL(fopen64)(path, mode);
}
