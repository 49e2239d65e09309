/* Plain values, read in C: what each is, and that nothing is read beyond its end. */

#include "check.h"

#include "handoff.h"

#include <stdlib.h>
#include <string.h>

/* A value in memory that ends where the value ends. */
static handoff_answer value_of(const char *bytes, size_t length)
{
    handoff_answer value = {.bytes = malloc(length + !length), .length = length};
    CHECK(value.bytes != NULL);
    memcpy(value.bytes, bytes, length);
    return value;
}

/* What the readers make of a value, as one text. */
static void shown(handoff_answer *value, char *text, size_t size)
{
    int64_t whole = -1;
    double real = -1;
    int is_int = handoff_answer_int(value, &whole), is_float = handoff_answer_float(value, &real);
    char *letters = handoff_answer_text(value);
    snprintf(text, size, "%d %d:%lld %d:%g %s", handoff_answer_is_none(value), is_int, (long long)whole, is_float, real,
             letters != NULL ? letters : "-");
    free(letters);
}

static void check_value(const char *bytes, size_t length, const char *expected)
{
    char text[100];
    handoff_answer value = value_of(bytes, length);
    shown(&value, text, sizeof text);
    CHECK(strcmp(text, expected) == 0);
    handoff_answer_free(&value);
    for (size_t shorter = 0; shorter < length; shorter++) {
        handoff_answer part = value_of(bytes, shorter);
        shown(&part, text, sizeof text);
        CHECK(strcmp(text, "0 0:-1 0:-1 -") == 0 || shorter > 0);
        handoff_answer_free(&part);
    }
    CHECK(value.bytes == NULL && value.length == 0);
}

int main(void)
{
    check_value("\0", 1, "1 0:-1 0:-1 -");
    check_value("\1\1", 2, "0 1:1 1:1 -");
    check_value("\2\376\377\377\377\377\377\377\377", 9, "0 1:-2 1:-2 -");
    check_value("\3\0\0\0\0\0\0\4\100", 9, "0 0:-1 1:2.5 -");
    check_value("\5\4\0\0\0stop", 9, "0 0:-1 0:-1 stop");
    check_value("\7\0\0\0\0", 5, "0 0:-1 0:-1 -");
    check_value("", 0, "0 0:-1 0:-1 -");
    return 0;
}
