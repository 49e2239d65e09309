/* Reading plain values that the analytics has set: see `value` in docs/protocol.md. */

#include "handoff.h"
#include "protocol.h"
#include "wire.h"

#include <stdlib.h>

void handoff_answer_free(handoff_answer *value)
{
    free(value->bytes);
    *value = (handoff_answer){0};
}

void handoff_answers_free(handoff_answer *values, size_t count)
{
    for (size_t i = 0; i < count; i++)
        handoff_answer_free(values + i);
    free(values);
}

/* The tag, with `in` behind it; or -1. */
static int tag_of(const handoff_answer *value, wire_in *in)
{
    *in = wire_of(value->bytes, value->length);
    int tag = value->length > 0 ? wire_get_byte(in) : -1;
    return in->bad ? -1 : tag;
}

int handoff_answer_is_none(const handoff_answer *value)
{
    wire_in in;
    return tag_of(value, &in) == VALUE_NONE;
}

int handoff_answer_int(const handoff_answer *value, int64_t *number)
{
    wire_in in;
    int tag = tag_of(value, &in);
    if (tag != VALUE_BOOL && tag != VALUE_INT)
        return 0;
    *number = tag == VALUE_INT ? wire_get_int(&in) : wire_get_byte(&in);
    return !in.bad;
}

int handoff_answer_float(const handoff_answer *value, double *number)
{
    wire_in in;
    int64_t whole;
    if (tag_of(value, &in) == VALUE_FLOAT) {
        *number = wire_get_float(&in);
        return !in.bad;
    }
    if (!handoff_answer_int(value, &whole))
        return 0;
    *number = (double)whole;
    return 1;
}

char *handoff_answer_text(const handoff_answer *value)
{
    wire_in in;
    return tag_of(value, &in) == VALUE_TEXT ? wire_get_text(&in) : NULL;
}
