/* Copying between arrays of any strides. */

#ifndef DEISA_HANDOFF_COPY_H
#define DEISA_HANDOFF_COPY_H

#include <stddef.h>
#include <stdint.h>

/* Copy an array element by element, as far as possible in long runs. Strides are bytes, of any sign; the two arrays do not
   overlap. `ndim` is at most HANDOFF_MAX_DIMENSIONS. */
void copy_strided(void *to, const int64_t *to_strides, const void *from, const int64_t *from_strides,
                  const int64_t *shape, int ndim, int64_t itemsize);

/* The same for arrays that may overlap, as where a rank turns round what it has computed in a slot: -1 if that takes memory
   that cannot be had. */
int copy_overlapping(void *to, const int64_t *to_strides, const void *from, const int64_t *from_strides,
                     const int64_t *shape, int ndim, int64_t itemsize);

/* The strides of an array in C order. */
void contiguous_strides(int64_t *strides, const int64_t *shape, int ndim, int64_t itemsize);

/* Write one byte into each page of an array, so that the kernel provides it now, near the calling thread. */
void touch_strided(void *to, const int64_t *strides, const int64_t *shape, int ndim, int64_t itemsize);

#endif
