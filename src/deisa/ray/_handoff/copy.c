#define _GNU_SOURCE
#include "copy.h"

#include "handoff.h"
#include "hot.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TILE 32 /* elements; two tiles of 8-byte elements take 16 KiB, half of a small first-level cache */

typedef struct {
    int64_t length, to, from; /* elements; bytes from one to the next */
} axis;

HOT static int64_t distance(int64_t stride)
{
    return stride < 0 ? -stride : stride;
}

/* Write down the axes longer than 1, the widest steps of the target first; neighbours that make one axis together become one. */
HOT static int simplify(axis *axes, const int64_t *to, const int64_t *from, const int64_t *shape, int ndim)
{
    int count = 0;
    for (int d = 0; d < ndim; d++) {
        if (shape[d] == 1)
            continue;
        axis new = {shape[d], to[d], from[d]};
        int at = count++;
        for (; at > 0 && distance(axes[at - 1].to) < distance(new.to); at--)
            axes[at] = axes[at - 1];
        axes[at] = new;
    }
    int kept = 0;
    for (int d = 0; d < count; d++) {
        axis *outer = axes + kept - 1;
        if (kept > 0 && outer->to == axes[d].length * axes[d].to && outer->from == axes[d].length * axes[d].from)
            *outer = (axis){outer->length * axes[d].length, axes[d].to, axes[d].from};
        else
            axes[kept++] = axes[d];
    }
    return kept;
}

/* Copy `rows` x `columns` elements, tile by tile: what one side reads or writes far apart stays in the cache meanwhile. */
#define DEFINE_TILED(name, type)                                                                                       \
    static void name(char *to, const char *from, axis rows, axis columns)                                              \
    {                                                                                                                  \
        for (int64_t i = 0; i < rows.length; i += TILE)                                                                \
            for (int64_t j = 0; j < columns.length; j += TILE) {                                                       \
                int64_t i_end = i + TILE < rows.length ? i + TILE : rows.length;                                       \
                int64_t j_end = j + TILE < columns.length ? j + TILE : columns.length;                                 \
                for (int64_t r = i; r < i_end; r++) {                                                                  \
                    char *t = to + r * rows.to + j * columns.to;                                                       \
                    const char *f = from + r * rows.from + j * columns.from;                                           \
                    for (int64_t c = j; c < j_end; c++, t += columns.to, f += columns.from) {                          \
                        type element;                                                                                  \
                        memcpy(&element, f, sizeof element);                                                           \
                        memcpy(t, &element, sizeof element);                                                           \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
    }

typedef struct {
    uint64_t low, high;
} sixteen;

DEFINE_TILED(tiled_1, uint8_t)
DEFINE_TILED(tiled_2, uint16_t)
DEFINE_TILED(tiled_4, uint32_t)
DEFINE_TILED(tiled_8, uint64_t)
DEFINE_TILED(tiled_16, sixteen)

static void tiled(char *to, const char *from, axis rows, axis columns, int64_t itemsize)
{
    switch (itemsize) {
    case 1: tiled_1(to, from, rows, columns); return;
    case 2: tiled_2(to, from, rows, columns); return;
    case 4: tiled_4(to, from, rows, columns); return;
    case 8: tiled_8(to, from, rows, columns); return;
    case 16: tiled_16(to, from, rows, columns); return;
    }
    for (int64_t r = 0; r < rows.length; r++)
        for (int64_t c = 0; c < columns.length; c++)
            memcpy(to + r * rows.to + c * columns.to, from + r * rows.from + c * columns.from, (size_t)itemsize);
}

/* Call for every position along the outer axes; `at` counts them. Returns 0 when all have been visited. */
HOT static int next_position(const axis *axes, int outer, int64_t *at, char **to, const char **from)
{
    for (int d = outer - 1; d >= 0; d--) {
        *to += axes[d].to;
        *from += axes[d].from;
        if (++at[d] < axes[d].length)
            return 1;
        *to -= at[d] * axes[d].to;
        *from -= at[d] * axes[d].from;
        at[d] = 0;
    }
    return 0;
}

HOT void copy_strided(void *target, const int64_t *to_strides, const void *source, const int64_t *from_strides,
                  const int64_t *shape, int ndim, int64_t itemsize)
{
    axis axes[HANDOFF_MAX_DIMENSIONS];
    int64_t at[HANDOFF_MAX_DIMENSIONS] = {0};
    int count = simplify(axes, to_strides, from_strides, shape, ndim);
    char *to = target;
    const char *from = source;
    if (count == 0) {
        memcpy(to, from, (size_t)itemsize);
        return;
    }
    axis last = axes[count - 1];
    if (last.to == itemsize && last.from == itemsize) {
        size_t run = (size_t)(last.length * itemsize);
        do
            memcpy(to, from, run);
        while (next_position(axes, count - 1, at, &to, &from));
        return;
    }
    /* The target's narrowest axis, and the source's, make the plane that is copied in tiles. */
    int other = -1;
    for (int d = 0; d < count - 1; d++)
        if (distance(axes[d].from) < distance(last.from) &&
            (other < 0 || distance(axes[d].from) < distance(axes[other].from)))
            other = d;
    axis rows = {1, 0, 0};
    int outer = count - 1;
    if (other >= 0) {
        rows = axes[other];
        memmove(axes + other, axes + other + 1, (size_t)(count - 1 - other) * sizeof *axes);
        outer--;
    }
    do
        tiled(to, from, rows, last, itemsize);
    while (next_position(axes, outer, at, &to, &from));
}

HOT void contiguous_strides(int64_t *strides, const int64_t *shape, int ndim, int64_t itemsize)
{
    for (int d = ndim - 1; d >= 0; d--) {
        strides[d] = itemsize;
        itemsize *= shape[d];
    }
}

/* Where the bytes of an array start, and where they end. */
HOT static void extent(const void *array, const int64_t *strides, const int64_t *shape, int ndim, int64_t itemsize,
                   uintptr_t *first, uintptr_t *end)
{
    *first = (uintptr_t)array;
    *end = *first + (uintptr_t)itemsize;
    for (int d = 0; d < ndim; d++)
        *(strides[d] < 0 ? first : end) += (uintptr_t)((shape[d] - 1) * strides[d]);
}

HOT int copy_overlapping(void *to, const int64_t *to_strides, const void *from, const int64_t *from_strides,
                     const int64_t *shape, int ndim, int64_t itemsize)
{
    uintptr_t to_first, to_end, from_first, from_end;
    extent(to, to_strides, shape, ndim, itemsize, &to_first, &to_end);
    extent(from, from_strides, shape, ndim, itemsize, &from_first, &from_end);
    if (to_first >= from_end || from_first >= to_end) {
        copy_strided(to, to_strides, from, from_strides, shape, ndim, itemsize);
        return 0;
    }
    if (to == from && memcmp(to_strides, from_strides, (size_t)ndim * sizeof *to_strides) == 0)
        return 0;
    int64_t strides[HANDOFF_MAX_DIMENSIONS], count = 1;
    for (int d = 0; d < ndim; d++)
        count *= shape[d];
    void *between = malloc((size_t)(count * itemsize));
    if (between == NULL)
        return -1;
    contiguous_strides(strides, shape, ndim, itemsize);
    copy_strided(between, strides, from, from_strides, shape, ndim, itemsize);
    copy_strided(to, to_strides, between, strides, shape, ndim, itemsize);
    free(between);
    return 0;
}

void touch_strided(void *target, const int64_t *strides, const int64_t *shape, int ndim, int64_t itemsize)
{
    axis axes[HANDOFF_MAX_DIMENSIONS];
    int64_t at[HANDOFF_MAX_DIMENSIONS] = {0};
    int count = simplify(axes, strides, strides, shape, ndim);
    int64_t run = itemsize, page = sysconf(_SC_PAGESIZE);
    char *to = target;
    const char *unused = target;
    if (count > 0 && axes[count - 1].to == itemsize)
        run *= axes[--count].length;
    do
        for (int64_t byte = 0; byte < run; byte += page - (int64_t)((uintptr_t)(to + byte) % (uintptr_t)page))
            *(volatile char *)(to + byte) = 0;
    while (next_position(axes, count, at, &to, &unused));
}
