#include "labels.h"

#include "protocol.h"

void put_value(wire_out *out, const handoff_value *value)
{
    switch (value->kind) {
    case HANDOFF_NONE: wire_byte(out, VALUE_NONE); break;
    case HANDOFF_BOOL:
        wire_byte(out, VALUE_BOOL);
        wire_byte(out, value->integer != 0);
        break;
    case HANDOFF_INT:
        wire_byte(out, VALUE_INT);
        wire_int(out, value->integer);
        break;
    case HANDOFF_FLOAT:
        wire_byte(out, VALUE_FLOAT);
        wire_float(out, value->real);
        break;
    case HANDOFF_TEXT:
        wire_byte(out, VALUE_TEXT);
        wire_text(out, value->text);
        break;
    case HANDOFF_ARRAY:
        wire_byte(out, VALUE_ARRAY);
        wire_text(out, value->dtype);
        wire_count(out, (size_t)value->ndim);
        for (int d = 0; d < value->ndim; d++)
            wire_int(out, value->shape[d]);
        wire_count(out, value->nbytes);
        wire_raw(out, value->data, value->nbytes);
        break;
    case HANDOFF_ENCODED: wire_raw(out, value->data, value->nbytes); break;
    }
}

static void put_attrs(wire_out *out, const handoff_attribute *attrs, size_t count)
{
    wire_count(out, count);
    for (size_t i = 0; i < count; i++) {
        wire_text(out, attrs[i].name);
        put_value(out, &attrs[i].value);
    }
}

static void put_steps(wire_out *out, double start, double step)
{
    wire_byte(out, VALUE_DICT);
    wire_count(out, 2);
    wire_text(out, "start");
    put_value(out, &(handoff_value){.kind = HANDOFF_FLOAT, .real = start});
    wire_text(out, "step");
    put_value(out, &(handoff_value){.kind = HANDOFF_FLOAT, .real = step});
}

static void put_optional_int(wire_out *out, int there, int64_t value)
{
    wire_byte(out, (uint8_t)there);
    if (there)
        wire_int(out, value);
}

void put_coords(wire_out *out, const handoff_chunk_description *chunk)
{
    wire_count(out, chunk->coord_count);
    for (size_t i = 0; i < chunk->coord_count; i++) {
        const handoff_coordinate *coord = chunk->coords + i;
        int of_whole = coord->length > 0;
        size_t part = wire_open_part(out);
        wire_text(out, coord->name);
        wire_int(out, coord->dimension);
        put_optional_int(out, of_whole, coord->first);
        put_optional_int(out, of_whole, coord->length);
        if (coord->values.kind == HANDOFF_NONE)
            put_steps(out, coord->start, coord->step);
        else
            put_value(out, &coord->values);
        put_attrs(out, coord->attrs, coord->attr_count);
        wire_close_part(out, part);
    }
}

void put_labels(wire_out *out, const handoff_array_description *array)
{
    wire_byte(out, array->dims != NULL);
    if (array->dims != NULL) {
        wire_count(out, (size_t)array->ndim);
        for (int d = 0; d < array->ndim; d++)
            wire_text(out, array->dims[d]);
    }
    put_attrs(out, array->attrs, array->attr_count);
}
