/* The bytes of messages: see "Messages" in docs/protocol.md. Codes and limits are in protocol.h. */

#ifndef DEISA_HANDOFF_WIRE_H
#define DEISA_HANDOFF_WIRE_H

#include <stddef.h>
#include <stdint.h>

#define WIRE_HEADER_BYTES 6 /* length and code */

/* A message that is being written. Memory that cannot be had shows in `failed`. */
typedef struct {
    unsigned char *data;
    size_t length, capacity;
    int failed;
} wire_out;

void wire_begin(wire_out *out, uint16_t code);
void wire_byte(wire_out *out, uint8_t value);
void wire_count(wire_out *out, size_t count); /* of items, pairs or bytes that follow */
void wire_int(wire_out *out, int64_t value);
void wire_float(wire_out *out, double value);
void wire_raw(wire_out *out, const void *data, size_t nbytes); /* without their number */
void wire_text(wire_out *out, const char *text);
void wire_text_at_most(wire_out *out, const char *text, size_t characters); /* leaves out what comes after them */
size_t wire_open_part(wire_out *out); /* a structure: returns its mark for `wire_close_part` */
void wire_close_part(wire_out *out, size_t mark);
int wire_end(wire_out *out); /* 0 if the message is whole and not too long */
void wire_discard(wire_out *out);

/* A place in received bytes. What does not fit, or makes no sense, shows in `bad`, and gives zeros from then on. */
typedef struct {
    const unsigned char *at, *end;
    int bad;
} wire_in;

wire_in wire_of(const void *data, size_t length);
uint8_t wire_get_byte(wire_in *in);
uint16_t wire_get_code(wire_in *in);
size_t wire_get_count(wire_in *in); /* of items: at most PROTOCOL_MAX_ITEMS, and as many bytes are there */
int64_t wire_get_int(wire_in *in);
int64_t wire_get_natural(wire_in *in);
double wire_get_float(wire_in *in);
char *wire_get_text(wire_in *in); /* to be freed; NULL where it is bad */
wire_in wire_get_part(wire_in *in);

/* The length that a header announces. */
uint32_t wire_announced(const unsigned char *header);

#endif
