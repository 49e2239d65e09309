/* A rank in C whose array has labels of every kind: prints its Hello's array, for Python to read. */

#define _GNU_SOURCE
#include "labels.h"

#include <stdio.h>

int main(void)
{
    static const int64_t shape[] = {2, 3}, position[] = {0, 0}, two[] = {2}, three[] = {3};
    static const double y[] = {0.5, 1.5}, mask[] = {1, 0, 1};
    static const char *const dims[] = {"y", "x"};
    static const unsigned char list[] = {7, 1, 0, 0, 0, 1, 1}; /* a list with a truth value */
    const handoff_attribute attrs[] = {
        {"units", {.kind = HANDOFF_TEXT, .text = "K"}},
        {"nothing", {.kind = HANDOFF_NONE}},
        {"true", {.kind = HANDOFF_BOOL, .integer = 1}},
        {"count", {.kind = HANDOFF_INT, .integer = -3}},
        {"factor", {.kind = HANDOFF_FLOAT, .real = 0.25}},
        {"mask", {.kind = HANDOFF_ARRAY, .dtype = "<f8", .ndim = 1, .shape = three, .data = mask, .nbytes = sizeof mask}},
        {"list", {.kind = HANDOFF_ENCODED, .data = list, .nbytes = sizeof list}},
    };
    const handoff_coordinate coords[] = {
        {.name = "y", .dimension = 0, .attr_count = 1, .attrs = attrs,
         .values = {.kind = HANDOFF_ARRAY, .dtype = "<f8", .ndim = 1, .shape = two, .data = y, .nbytes = sizeof y}},
        {.name = "level", .dimension = 0, .first = 4, .length = 9,
         .values = {.kind = HANDOFF_ARRAY, .dtype = "<f8", .ndim = 1, .shape = two, .data = y, .nbytes = sizeof y}},
        {.name = "x", .dimension = 1, .start = 10, .step = 0.5},
    };
    const handoff_chunk_description chunk = {.shape = shape, .position = position, .coord_count = 3, .coords = coords};
    const handoff_array_description array = {.name = "T", .ndim = 2, .chunk_count = 1, .chunks = &chunk,
                                             .dims = dims, .attr_count = 7, .attrs = attrs};
    wire_out out = {0};
    put_coords(&out, &chunk);
    put_labels(&out, &array);
    for (size_t i = 0; i < out.length; i++)
        printf("%02x", out.data[i]);
    int failed = out.failed;
    wire_discard(&out);
    return failed;
}
