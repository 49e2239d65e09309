/* Elements of one dtype become those of another one while they are copied. */

#ifndef DEISA_HANDOFF_CONVERT_H
#define DEISA_HANDOFF_CONVERT_H

#include <stdint.h>

/* Convert `count` elements; strides are bytes. */
typedef void (*conversion)(char *to, int64_t to_stride, const char *from, int64_t from_stride, int64_t count);

/* The bytes of an element; 0 where the dtype (NULL: none) is not a plain one. */
int64_t itemsize_of(const char *dtype);

/* Find out how elements of a dtype ("<f4") become those of another one. 0: `*found` says it, NULL that they are the same.
   -1: they are not converted. */
int find_conversion(const char *from, const char *to, conversion *found);

/* The same as `copy_strided`, converting. */
void convert_strided(void *to, const int64_t *to_strides, const void *from, const int64_t *from_strides,
                     const int64_t *shape, int ndim, conversion convert);

#endif
