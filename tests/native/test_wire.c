/* The bytes of messages: what is written is read back, and nothing is read beyond the end. */

#include "check.h"

#include "protocol.h"
#include "wire.h"

#include <string.h>

/* A message with every type of field. */
static void put_all(wire_out *out)
{
    wire_begin(out, 0x0102);
    wire_byte(out, 0xff);
    wire_int(out, INT64_MIN);
    wire_int(out, INT64_MAX);
    wire_float(out, -0.1);
    wire_text(out, "");
    wire_text(out, "Gr\xc3\xb6\xc3\x9f" "e");
    size_t part = wire_open_part(out);
    wire_count(out, 3);
    for (int i = 0; i < 3; i++)
        wire_int(out, i);
    wire_text(out, "of a later version");
    wire_close_part(out, part);
    wire_byte(out, 7);
}

/* Read it from a copy that ends where the memory ends; returns whether it is whole. */
static int get_all(const unsigned char *data, size_t length)
{
    unsigned char *copy = malloc(length + !length);
    CHECK(copy != NULL);
    memcpy(copy, data, length);
    wire_in in = wire_of(copy, length);
    int same = wire_get_code(&in) == 0x0102;
    same &= wire_get_byte(&in) == 0xff;
    same &= wire_get_int(&in) == INT64_MIN;
    same &= wire_get_natural(&in) == INT64_MAX;
    same &= wire_get_float(&in) == -0.1;
    char *empty = wire_get_text(&in), *text = wire_get_text(&in);
    same &= empty != NULL && *empty == '\0' && text != NULL && strcmp(text, "Gr\xc3\xb6\xc3\x9f" "e") == 0;
    free(empty);
    free(text);
    wire_in part = wire_get_part(&in);
    size_t count = wire_get_count(&part);
    same &= count == 3;
    for (size_t i = 0; i < count; i++)
        same &= wire_get_int(&part) == (int64_t)i;
    same &= wire_get_byte(&in) == 7 && !in.bad && !part.bad;
    free(copy);
    return same;
}

static void test_what_is_written_is_read_back(void)
{
    wire_out out;
    put_all(&out);
    CHECK(wire_end(&out) == 0);
    CHECK(wire_announced(out.data) == out.length - 4);
    CHECK(get_all(out.data + 4, out.length - 4));
    wire_discard(&out);
    CHECK(out.data == NULL && out.length == 0);
}

static void test_a_message_that_is_cut_short_is_bad(void)
{
    wire_out out;
    put_all(&out);
    for (size_t length = 0; length < out.length - 4; length++)
        CHECK(!get_all(out.data + 4, length));
    wire_discard(&out);
}

static void test_changed_bytes_are_never_read_beyond_the_end(void)
{
    uint64_t random = 1;
    wire_out out;
    put_all(&out);
    for (int i = 0; i < 20000; i++) {
        unsigned char *byte = out.data + 4 + random_below(&random, (int64_t)out.length - 4), before = *byte;
        *byte = (unsigned char)next_random(&random);
        get_all(out.data + 4, out.length - 4);
        *byte = before;
    }
    wire_discard(&out);
}

static void test_numbers_are_little_endian(void)
{
    static const unsigned char expected[] = {16, 0, 0, 0, 0x02, 0x01, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                                             2,  0, 0, 0, 'h',  'i'};
    wire_out out;
    wire_begin(&out, 0x0102);
    wire_int(&out, -2);
    wire_text(&out, "hi");
    CHECK(wire_end(&out) == 0);
    CHECK(out.length == sizeof expected && memcmp(out.data, expected, sizeof expected) == 0);
    wire_discard(&out);
}

static wire_in of_number(unsigned char *bytes, uint32_t number)
{
    for (int i = 0; i < 4; i++)
        bytes[i] = (unsigned char)(number >> (8 * i));
    return wire_of(bytes, 8);
}

static void test_more_items_than_bytes_are_refused(void)
{
    unsigned char bytes[8] = {0};
    wire_in in = of_number(bytes, 4);
    CHECK(wire_get_count(&in) == 4 && !in.bad);
    const uint32_t wrong[] = {5, PROTOCOL_MAX_ITEMS + 1, UINT32_MAX};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        in = of_number(bytes, wrong[i]);
        CHECK(wire_get_count(&in) == 0 && in.bad);
        in = of_number(bytes, wrong[i]);
        CHECK(wire_get_text(&in) == NULL && in.bad);
        in = of_number(bytes, wrong[i]);
        CHECK(wire_get_part(&in).bad && in.bad);
    }
}

static void test_bad_values_are_refused(void)
{
    wire_out out;
    wire_begin(&out, 0);
    wire_int(&out, -1);
    wire_in in = wire_of(out.data + WIRE_HEADER_BYTES, 8);
    CHECK(wire_get_natural(&in) == 0 && in.bad);
    wire_discard(&out);

    unsigned char with_zero[] = {2, 0, 0, 0, 'a', 0};
    in = wire_of(with_zero, sizeof with_zero);
    CHECK(wire_get_text(&in) == NULL && in.bad);
}

static void test_what_is_bad_gives_zeros_from_then_on(void)
{
    unsigned char bytes[] = {1, 2, 3, 4, 5, 6, 7, 8};
    wire_in in = wire_of(bytes, sizeof bytes);
    in.bad = 1;
    CHECK(wire_get_byte(&in) == 0 && wire_get_int(&in) == 0 && wire_get_count(&in) == 0 && wire_get_text(&in) == NULL);
    CHECK(in.at == bytes);
}

static void test_a_message_beyond_the_limit_is_refused(void)
{
    wire_out out;
    wire_begin(&out, 1);
    for (size_t i = 0; i < PROTOCOL_MAX_MESSAGE_BYTES / 8; i++)
        wire_int(&out, 0);
    CHECK(!out.failed && wire_end(&out) < 0); /* by the two bytes of its code */
    wire_discard(&out);
}

int main(void)
{
    RUN(test_what_is_written_is_read_back);
    RUN(test_a_message_that_is_cut_short_is_bad);
    RUN(test_changed_bytes_are_never_read_beyond_the_end);
    RUN(test_numbers_are_little_endian);
    RUN(test_more_items_than_bytes_are_refused);
    RUN(test_bad_values_are_refused);
    RUN(test_what_is_bad_gives_zeros_from_then_on);
    RUN(test_a_message_beyond_the_limit_is_refused);
    return 0;
}
