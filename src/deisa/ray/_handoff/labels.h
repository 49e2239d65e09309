/* Labels of arrays in a message: names of dimensions, coordinates, attributes. */

#ifndef DEISA_HANDOFF_LABELS_H
#define DEISA_HANDOFF_LABELS_H

#include "handoff.h"
#include "wire.h"

void put_value(wire_out *out, const handoff_value *value);
void put_coords(wire_out *out, const handoff_chunk_description *chunk);
void put_labels(wire_out *out, const handoff_array_description *array); /* those of the array itself */

#endif
