#define _GNU_SOURCE
#include "wire.h"

#include "protocol.h"

#include <stdlib.h>
#include <string.h>

/* Numbers are put together from bytes, so that the order of the machine plays no part. */

static unsigned char *room(wire_out *out, size_t nbytes)
{
    if (out->failed)
        return NULL;
    if (nbytes > out->capacity - out->length) {
        size_t capacity = out->capacity ? out->capacity : 256;
        while (capacity - out->length < nbytes)
            capacity *= 2;
        unsigned char *data = realloc(out->data, capacity);
        if (data == NULL) {
            out->failed = 1;
            return NULL;
        }
        out->data = data;
        out->capacity = capacity;
    }
    unsigned char *at = out->data + out->length;
    out->length += nbytes;
    return at;
}

static void put(unsigned char *at, uint64_t value, size_t nbytes)
{
    for (size_t i = 0; i < nbytes; i++)
        at[i] = (unsigned char)(value >> (8 * i));
}

static uint64_t get(const unsigned char *at, size_t nbytes)
{
    uint64_t value = 0;
    for (size_t i = 0; i < nbytes; i++)
        value |= (uint64_t)at[i] << (8 * i);
    return value;
}

static void put_number(wire_out *out, uint64_t value, size_t nbytes)
{
    unsigned char *at = room(out, nbytes);
    if (at != NULL)
        put(at, value, nbytes);
}

void wire_begin(wire_out *out, uint16_t code)
{
    *out = (wire_out){0};
    put_number(out, 0, 4);
    put_number(out, code, 2);
}

void wire_byte(wire_out *out, uint8_t value)
{
    put_number(out, value, 1);
}

void wire_count(wire_out *out, size_t count)
{
    if (count > UINT32_MAX)
        out->failed = 1;
    put_number(out, count, 4);
}

void wire_int(wire_out *out, int64_t value)
{
    put_number(out, (uint64_t)value, 8);
}

void wire_float(wire_out *out, double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    put_number(out, bits, 8);
}

void wire_raw(wire_out *out, const void *data, size_t nbytes)
{
    unsigned char *at = room(out, nbytes);
    if (at != NULL && nbytes > 0)
        memcpy(at, data, nbytes);
}

static void put_text(wire_out *out, const char *text, size_t length)
{
    wire_count(out, length);
    wire_raw(out, text, length);
}

void wire_text(wire_out *out, const char *text)
{
    put_text(out, text, strlen(text));
}

void wire_text_at_most(wire_out *out, const char *text, size_t characters)
{
    size_t length = 0;
    while (characters-- > 0 && text[length] != '\0') {
        unsigned char first = (unsigned char)text[length];
        size_t bytes = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
        if (strnlen(text + length, bytes) < bytes)
            break; /* the text has been cut before, in the middle of a character */
        length += bytes;
    }
    put_text(out, text, length);
}

size_t wire_open_part(wire_out *out)
{
    put_number(out, 0, 4);
    return out->length;
}

void wire_close_part(wire_out *out, size_t mark)
{
    if (!out->failed)
        put(out->data + mark - 4, out->length - mark, 4);
}

int wire_end(wire_out *out)
{
    if (out->failed || out->length - 4 > PROTOCOL_MAX_MESSAGE_BYTES)
        return -1;
    put(out->data, out->length - 4, 4);
    return 0;
}

void wire_discard(wire_out *out)
{
    free(out->data);
    *out = (wire_out){0};
}

wire_in wire_of(const void *data, size_t length)
{
    return (wire_in){data, (const unsigned char *)data + length, 0};
}

static const unsigned char *take(wire_in *in, size_t nbytes)
{
    if (in->bad || nbytes > (size_t)(in->end - in->at)) {
        in->bad = 1;
        return NULL;
    }
    const unsigned char *at = in->at;
    in->at += nbytes;
    return at;
}

static uint64_t get_number(wire_in *in, size_t nbytes)
{
    const unsigned char *at = take(in, nbytes);
    return at == NULL ? 0 : get(at, nbytes);
}

uint8_t wire_get_byte(wire_in *in)
{
    return (uint8_t)get_number(in, 1);
}

uint16_t wire_get_code(wire_in *in)
{
    return (uint16_t)get_number(in, 2);
}

size_t wire_get_count(wire_in *in)
{
    size_t count = get_number(in, 4);
    if (count > PROTOCOL_MAX_ITEMS || count > (size_t)(in->end - in->at)) { /* no item takes less than a byte */
        in->bad = 1;
        return 0;
    }
    return count;
}

int64_t wire_get_int(wire_in *in)
{
    return (int64_t)get_number(in, 8);
}

int64_t wire_get_natural(wire_in *in)
{
    int64_t value = wire_get_int(in);
    if (value < 0) {
        in->bad = 1;
        return 0;
    }
    return value;
}

double wire_get_float(wire_in *in)
{
    uint64_t bits = get_number(in, 8);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

char *wire_get_text(wire_in *in)
{
    size_t length = get_number(in, 4);
    const unsigned char *at = take(in, length);
    if (at == NULL || memchr(at, '\0', length) != NULL) {
        in->bad = 1;
        return NULL;
    }
    char *text = malloc(length + 1);
    if (text == NULL) {
        in->bad = 1;
        return NULL;
    }
    memcpy(text, at, length);
    text[length] = '\0';
    return text;
}

wire_in wire_get_part(wire_in *in)
{
    size_t length = get_number(in, 4);
    const unsigned char *at = take(in, length);
    if (at == NULL)
        return (wire_in){NULL, NULL, 1};
    return wire_of(at, length);
}

uint32_t wire_announced(const unsigned char *header)
{
    return (uint32_t)get(header, 4);
}
