/*
 * file.c -- reading and replacing files, for the formats in core: safetensors.c, npy.c, zip.c, cifar.c, csv.c.
 *
 * Writing goes to a new file beside the target, which is flushed to the disk and renamed over it; then the folder is
 * flushed.  A crash at any moment leaves the old file or the new one.  Mutator thread only.
 */
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HM_AT_ONCE = 1 << 30, HM_NAMES_TRIED = 1000 };

char *hm__copy_string(const char *text) {
  size_t bytes = strlen(text) + 1;
  char *copy = hm_alloc(bytes);
  if (copy) memcpy(copy, text, bytes);
  return copy;
}

int hm__file_fail(const hm_file *f, const char *what) {
  int saved = errno;
  hm_fail(HM_ERR_IO, "%s: %s: %s: %s", f->format, f->path, what, strerror(saved));
  errno = saved;
  return HM_ERR_IO;
}

static int open_again(const char *path, int flags) {
  int fd;
  do fd = open(path, flags, 0666);
  while (fd < 0 && errno == EINTR);
  return fd;
}

/* ====== Reading ====== */

int hm__file_open(hm_file *f, const char *format, const char *path) {
  *f = (hm_file){.format = format, .path = path};
  f->fd = open_again(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not hold us up */
  if (f->fd < 0) return hm__file_fail(f, "cannot open");
  struct stat st;
  int rc = HM_OK;
  if (fstat(f->fd, &st) != 0) {
    rc = hm__file_fail(f, "cannot examine");
  } else if (!S_ISREG(st.st_mode)) {
    errno = S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
    rc = hm_fail(HM_ERR_IO, "%s: %s: not a regular file", format, path);
  } else {
    f->size = st.st_size;
  }
  if (rc) hm__file_close(f);
  return rc;
}

void hm__file_close(hm_file *f) {
  int saved = errno;
  if (f->fd >= 0) close(f->fd);
  f->fd = -1;
  errno = saved;
}

int hm__file_read(const hm_file *f, void *dst, int64_t bytes, int64_t offset) {
  char *p = dst;
  while (bytes > 0) {
    ssize_t got = pread(f->fd, p, bytes > HM_AT_ONCE ? HM_AT_ONCE : (size_t)bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return hm__file_fail(f, "cannot read");
    if (got == 0) {
      return hm_fail(HM_ERR_FORMAT, "%s: %s: the file ends at byte %" PRId64 ", %" PRId64 " bytes too early", f->format,
                     f->path, offset, bytes);
    }
    p += got;
    offset += got;
    bytes -= got;
  }
  return HM_OK;
}

int hm__file_slurp(const hm_file *f, char **text) {
  char *p = hm_alloc((size_t)f->size + 1);
  if (!p) return HM_ERR_MEMORY;
  int rc = hm__file_read(f, p, f->size, 0);
  if (rc) {
    hm_free(p);
    return rc;
  }
  p[f->size] = 0;
  *text = p;
  return HM_OK;
}

/* ====== Writing ====== */

int hm__file_write(hm_file *f, const void *data, size_t bytes) {
  const char *p = data;
  while (bytes > 0) {
    ssize_t put = write(f->fd, p, bytes > HM_AT_ONCE ? HM_AT_ONCE : bytes);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return hm__file_fail(f, "cannot write");
    p += put;
    bytes -= (size_t)put;
    f->size += put;
  }
  return HM_OK;
}

int hm__file_rows(const hm_tensor *t, const void **data, void **owned) {
  *owned = NULL;
  *data = hm_tensor_data(t);
  const size_t bytes = (size_t)t->numel * (size_t)hm_dtype_size(t->dtype);
  if (bytes == 0 || (hm_tensor_device(t) == HM_CPU && hm_is_contiguous(t))) return HM_OK;
  void *copy = hm_alloc(bytes);
  if (!copy) return HM_ERR_MEMORY;
  int rc = hm_to_host(t, copy, t->dtype);
  if (rc) {
    hm_free(copy);
    return rc;
  }
  *data = *owned = copy;
  return HM_OK;
}

/* Creates a file that did not exist, named after f->path; its name (hm_free) goes to *name.  It has the mode of the
 * file that it will replace. */
static int create_beside(hm_file *f, char **name) {
  size_t size = strlen(f->path) + 40;
  struct stat st;
  bool exists = stat(f->path, &st) == 0;
  if (exists && !S_ISREG(st.st_mode)) {
    errno = S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
    return hm_fail(HM_ERR_IO, "%s: %s: exists and is not a regular file", f->format, f->path);
  }
  char *text = hm_alloc(size);
  if (!text) return HM_ERR_MEMORY;
  for (int i = 0; i < HM_NAMES_TRIED && f->fd < 0; i++) {
    snprintf(text, size, "%s.tmp.%ld.%d", f->path, (long)getpid(), i);
    f->fd = open_again(text, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC);
    if (f->fd < 0 && errno != EEXIST) break;
  }
  if (f->fd < 0) {
    int rc = hm__file_fail(f, "cannot create a file beside it");
    hm_free(text);
    return rc;
  }
  if (exists) (void)!fchmod(f->fd, st.st_mode & 07777);
  *name = text;
  return HM_OK;
}

static int flush(int fd) {
  int rc;
  do rc = fsync(fd);
  while (rc != 0 && errno == EINTR);
  return rc;
}

/* Flushes the folder that holds the file, so that the rename survives a crash. */
static int flush_folder(const hm_file *f) {
  char *copy = hm__copy_string(f->path);
  if (!copy) return HM_ERR_MEMORY;
  char *slash = strrchr(copy, '/');
  if (slash) slash[slash == copy] = 0; /* "/file" lies in "/" */
  const hm_file folder = {.format = f->format, .path = slash ? copy : "."};
  int rc = HM_OK;
  int fd = open_again(folder.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) {
    if (errno != EACCES) rc = hm__file_fail(&folder, "cannot open"); /* EACCES: one may write there, but not read */
  } else {
    /* some file systems cannot flush a folder, and say EINVAL */
    if (flush(fd) != 0 && errno != EINVAL && errno != ENOTSUP) rc = hm__file_fail(&folder, "cannot flush");
    int saved = errno;
    close(fd);
    errno = saved;
  }
  hm_free(copy);
  return rc;
}

/* Writes the file under a temporary name and moves it to f->path. */
static int replace(hm_file *f, int (*body)(hm_file *f, void *ud), void *ud) {
  char *name = NULL;
  int rc = create_beside(f, &name);
  if (rc) return rc;
  rc = body(f, ud);
  if (!rc && flush(f->fd) != 0) rc = hm__file_fail(f, "cannot flush");
  int saved = errno;
  /* an interrupted close has closed the file all the same, and its data are on the disk already */
  if (close(f->fd) != 0 && errno != EINTR && !rc) {
    rc = hm__file_fail(f, "cannot close");
    saved = errno;
  }
  f->fd = -1;
  if (!rc && rename(name, f->path) != 0) {
    rc = hm__file_fail(f, "cannot replace");
    saved = errno;
  }
  if (rc) unlink(name);
  hm_free(name);
  errno = saved;
  return rc ? rc : flush_folder(f);
}

int hm__file_replace(const char *format, const char *path, int (*body)(hm_file *f, void *ud), void *ud) {
  char *target = realpath(path, NULL); /* a link keeps pointing where it does; NULL: nothing is there yet */
  hm_file f = {.format = format, .path = target ? target : path, .fd = -1};
  int rc = replace(&f, body, ud);
  int saved = errno;
  free(target);
  errno = saved;
  return rc;
}
