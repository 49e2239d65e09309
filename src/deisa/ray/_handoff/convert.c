#define _GNU_SOURCE
#include "convert.h"

#include "handoff.h"

#include <complex.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* X(source, its type, target, its type): those of NumPy's safe casts, and to floating-point and complex numbers of any size. */
#define TO_REAL_AND_COMPLEX(X, name, type)                                                                             \
    X(name, type, f4, float)                                                                                           \
    X(name, type, f8, double)                                                                                          \
    TO_COMPLEX(X, name, type)
#define TO_COMPLEX(X, name, type)                                                                                      \
    X(name, type, c8, float complex)                                                                                   \
    X(name, type, c16, double complex)

#define ALL(X)                                                                                                         \
    X(b1, uint8_t, i1, int8_t)                                                                                         \
    X(b1, uint8_t, u1, uint8_t)                                                                                        \
    X(b1, uint8_t, i2, int16_t)                                                                                        \
    X(b1, uint8_t, u2, uint16_t)                                                                                       \
    X(b1, uint8_t, i4, int32_t)                                                                                        \
    X(b1, uint8_t, u4, uint32_t)                                                                                       \
    X(b1, uint8_t, i8, int64_t)                                                                                        \
    X(b1, uint8_t, u8, uint64_t)                                                                                       \
    X(i1, int8_t, i2, int16_t)                                                                                         \
    X(i1, int8_t, i4, int32_t)                                                                                         \
    X(i1, int8_t, i8, int64_t)                                                                                         \
    X(u1, uint8_t, i2, int16_t)                                                                                        \
    X(u1, uint8_t, u2, uint16_t)                                                                                       \
    X(u1, uint8_t, i4, int32_t)                                                                                        \
    X(u1, uint8_t, u4, uint32_t)                                                                                       \
    X(u1, uint8_t, i8, int64_t)                                                                                        \
    X(u1, uint8_t, u8, uint64_t)                                                                                       \
    X(i2, int16_t, i4, int32_t)                                                                                        \
    X(i2, int16_t, i8, int64_t)                                                                                        \
    X(u2, uint16_t, i4, int32_t)                                                                                       \
    X(u2, uint16_t, u4, uint32_t)                                                                                      \
    X(u2, uint16_t, i8, int64_t)                                                                                       \
    X(u2, uint16_t, u8, uint64_t)                                                                                      \
    X(i4, int32_t, i8, int64_t)                                                                                        \
    X(u4, uint32_t, i8, int64_t)                                                                                       \
    X(u4, uint32_t, u8, uint64_t)                                                                                      \
    TO_REAL_AND_COMPLEX(X, b1, uint8_t)                                                                                \
    TO_REAL_AND_COMPLEX(X, i1, int8_t)                                                                                 \
    TO_REAL_AND_COMPLEX(X, u1, uint8_t)                                                                                \
    TO_REAL_AND_COMPLEX(X, i2, int16_t)                                                                                \
    TO_REAL_AND_COMPLEX(X, u2, uint16_t)                                                                               \
    TO_REAL_AND_COMPLEX(X, i4, int32_t)                                                                                \
    TO_REAL_AND_COMPLEX(X, u4, uint32_t)                                                                               \
    TO_REAL_AND_COMPLEX(X, i8, int64_t)                                                                                \
    TO_REAL_AND_COMPLEX(X, u8, uint64_t)                                                                               \
    X(f4, float, f8, double)                                                                                           \
    X(f8, double, f4, float)                                                                                           \
    TO_COMPLEX(X, f4, float)                                                                                           \
    TO_COMPLEX(X, f8, double)                                                                                          \
    X(c8, float complex, c16, double complex)                                                                          \
    X(c16, double complex, c8, float complex)

#define DEFINE(source, source_type, target, target_type)                                                               \
    static void source##_to_##target(char *to, int64_t to_stride, const char *from, int64_t from_stride, int64_t count) \
    {                                                                                                                  \
        for (int64_t i = 0; i < count; i++, to += to_stride, from += from_stride) {                                    \
            source_type element;                                                                                       \
            memcpy(&element, from, sizeof element);                                                                    \
            target_type converted = (target_type)element;                                                              \
            memcpy(to, &converted, sizeof converted);                                                                  \
        }                                                                                                              \
    }

ALL(DEFINE)

#define ENTRY(source, source_type, target, target_type) {#source, #target, source##_to_##target},

static const struct {
    const char *from, *to;
    conversion convert;
} conversions[] = {ALL(ENTRY)};

/* "<f8" and "|u1" without the byte order; another machine's order stays in front. */
static const char *plain(const char *dtype)
{
    return *dtype == '<' || *dtype == '|' || *dtype == '=' ? dtype + 1 : dtype;
}

int64_t itemsize_of(const char *dtype)
{
    const char *kind = dtype != NULL ? plain(dtype) : "";
    if (*kind == '>')
        kind++;
    if (*kind == '\0' || strchr("biufcSUVmM", *kind) == NULL)
        return 0;
    int64_t size = atoll(kind + 1);
    return *kind == 'U' ? 4 * size : size;
}

int find_conversion(const char *from, const char *to, conversion *found)
{
    *found = NULL;
    if (strcmp(plain(from), plain(to)) == 0)
        return 0;
    for (size_t i = 0; i < sizeof conversions / sizeof *conversions; i++)
        if (strcmp(plain(from), conversions[i].from) == 0 && strcmp(plain(to), conversions[i].to) == 0) {
            *found = conversions[i].convert;
            return 0;
        }
    return -1;
}

void convert_strided(void *target, const int64_t *to_strides, const void *source, const int64_t *from_strides,
                     const int64_t *shape, int ndim, conversion convert)
{
    int64_t at[HANDOFF_MAX_DIMENSIONS] = {0};
    char *to = target;
    const char *from = source;
    if (ndim == 0) {
        convert(to, 0, from, 0, 1);
        return;
    }
    int last = ndim - 1;
    for (;;) {
        convert(to, to_strides[last], from, from_strides[last], shape[last]);
        int d = last - 1;
        for (; d >= 0; d--) {
            to += to_strides[d];
            from += from_strides[d];
            if (++at[d] < shape[d])
                break;
            to -= at[d] * to_strides[d];
            from -= at[d] * from_strides[d];
            at[d] = 0;
        }
        if (d < 0)
            return;
    }
}
