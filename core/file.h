/*
 * file.h -- private to core: what the readers and writers of file formats share.
 *
 * A file is known by its format's name and its path, for messages.  Where the system refused, functions return
 * HM_ERR_IO and leave errno as the system set it.  Interrupted calls (EINTR) are made again, short reads and writes go
 * on.  Mutator thread only.
 */
#ifndef HM_CORE_FILE_H
#define HM_CORE_FILE_H

#include "halfmoon.h"

typedef struct hm_file {
  const char *format; /* "npy": what messages begin with */
  const char *path;   /* borrowed */
  int fd;             /* owned by whoever opened it; -1: none */
  int64_t size;       /* when it was opened; of a file that is written: bytes written so far */
} hm_file;

/* HM_ERR_IO with "format: path: what: the system's reason". */
int hm__file_fail(const hm_file *f, const char *what);
/* Opens a regular file for reading and notes its size. */
int hm__file_open(hm_file *f, const char *format, const char *path);
/* Closes it, if it is open; errno survives. */
void hm__file_close(hm_file *f);
/* Reads exactly `bytes` at `offset`; HM_ERR_FORMAT where the file ends before. */
int hm__file_read(const hm_file *f, void *dst, int64_t bytes, int64_t offset);
/* The whole file in new memory (hm_free) with a zero behind it. */
int hm__file_slurp(const hm_file *f, char **text);

/* Writes at the end of a file that hm__file_replace has made. */
int hm__file_write(hm_file *f, const void *data, size_t bytes);
/* The elements of a tensor in row-major order: its own memory where that is so, else a copy that the caller frees by
 * hm_free(*owned). */
int hm__file_rows(const hm_tensor *t, const void **data, void **owned);
/* Writes a file by calling body(f, ud), under a temporary name beside path; flushes it to the disk and renames.  At any
 * moment path is the old file or the new one.  A link keeps pointing where it does. */
int hm__file_replace(const char *format, const char *path, int (*body)(hm_file *f, void *ud), void *ud);

/* A copy of a string (hm_free); NULL, with a message, when there is no memory. */
char *hm__copy_string(const char *text);

/* ====== npy.c: arrays as NumPy writes them, in a file or inside a zip archive ====== */

/* Where an array comes from. */
typedef struct hm_npy_source {
  int (*read)(void *ud, void *dst, int64_t bytes); /* exactly so many, in order */
  void *ud;
  int64_t bytes;    /* of header and data together */
  const char *path; /* for messages; format and file, and the entry */
} hm_npy_source;

/* Reads header and data into a new row-major tensor on the CPU. */
int hm__npy_read(const hm_npy_source *source, hm_tensor **out);

enum { HM_NPY_HEADER = 1024 };
/* The header for a tensor into `text`; returns its bytes, or 0 with a message for a dtype that the format has not. */
int hm__npy_header(const hm_tensor *t, const char *path, char text[HM_NPY_HEADER]);

/* ====== zip.c: archives ====== */

typedef struct hm_zip_entry {
  char *name; /* owned by the archive */
  int method; /* 0: stored, 8: deflated */
  uint32_t crc;
  int64_t packed, bytes; /* of its data in the file, and unpacked */
  int64_t header;        /* place of its local header */
} hm_zip_entry;

typedef struct hm_zip {
  hm_file file;
  hm_zip_entry *entry;
  int n;
} hm_zip;

/* Opens an archive and checks its directory: no entry encrypted, split, of an unknown method, twice there, or larger
 * than its packed data can make.  Zero *z before; hm__zip_close after, also when this fails. */
int hm__zip_open(hm_zip *z, const char *format, const char *path);
void hm__zip_close(hm_zip *z);

typedef struct hm_zip_stream hm_zip_stream;
/* Reads an entry from its beginning; *out: hm__zip_end. */
int hm__zip_begin(const hm_zip *z, int index, hm_zip_stream **out);
int hm__zip_read(hm_zip_stream *s, void *dst, int64_t bytes);
/* Checks that all was read and the checksum agrees, where rc is HM_OK; frees s (NULL is ignored).  Returns rc or what it
 * found. */
int hm__zip_end(hm_zip_stream *s, int rc);

/* Writing, inside hm__file_replace: entries are stored, one after the other, then the directory. */
typedef struct hm_zip_writer {
  hm_file *file;
  hm_zip_entry *entry; /* of size n; names are copies */
  int n, at;
} hm_zip_writer;
/* One entry: a head and a body, which make its data together. */
int hm__zip_add(hm_zip_writer *w, const char *name, const void *head, size_t head_bytes, const void *body,
                size_t body_bytes);
int hm__zip_finish(hm_zip_writer *w);

#endif
