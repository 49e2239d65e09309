/* Saying what has failed. */

#ifndef DEISA_HANDOFF_FAILURE_H
#define DEISA_HANDOFF_FAILURE_H

#include "handoff.h"

/* Fill in an error (which may be NULL) and return -1. */
__attribute__((cold, format(printf, 3, 4))) int fail(handoff_error *error, const char *kind, const char *format, ...);

/* The same for errno, in a system call that should not fail. */
int fail_errno(handoff_error *error, const char *kind, const char *what);

int is_kind(const handoff_error *error, const char *kind);

/* Whether a party that was there has gone: the kinds below LostError in deisa.ray.errors. */
int is_loss(const handoff_error *error);

/* Write a text in quotes, as Python's repr does for plain ones. */
const char *quoted(const char *text, char *buffer, size_t size);

/* Write a number of bytes for people, as in "1.5 GiB". */
const char *human_bytes(int64_t count, char *buffer, size_t size);

#endif
