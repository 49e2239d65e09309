#define _GNU_SOURCE
#include "failure.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int fail(handoff_error *error, const char *kind, const char *format, ...)
{
    if (error != NULL) {
        handoff_error said; /* the arguments may lie in *error */
        va_list arguments;
        va_start(arguments, format);
        snprintf(said.kind, sizeof said.kind, "%s", kind);
        vsnprintf(said.text, sizeof said.text, format, arguments);
        va_end(arguments);
        *error = said;
    }
    return -1;
}

int fail_errno(handoff_error *error, const char *kind, const char *what)
{
    int number = errno;
    if (number == ENOMEM)
        kind = "MemoryBoundError";
    return fail(error, kind, "%s: %s", what, strerror(number));
}

int is_kind(const handoff_error *error, const char *kind)
{
    return strcmp(error->kind, kind) == 0;
}

int is_loss(const handoff_error *error)
{
    static const char *const losses[] = {"LostError", "BridgeLostError", "AgentLostError", "AnalyticsLostError",
                                         "AnalyticsStoppedError", "ComputationLostError"};
    for (size_t i = 0; i < sizeof losses / sizeof *losses; i++)
        if (is_kind(error, losses[i]))
            return 1;
    return 0;
}

const char *quoted(const char *text, char *buffer, size_t size)
{
    char mark = strchr(text, '\'') != NULL && strchr(text, '"') == NULL ? '"' : '\'';
    size_t at = 0;
    if (size < 8)
        return "";
    buffer[at++] = mark;
    for (; *text != '\0' && at < size - 8; text++) {
        if (*text == mark || *text == '\\')
            buffer[at++] = '\\';
        if ((unsigned char)*text < ' ')
            at += (size_t)snprintf(buffer + at, size - at, "\\x%02x", (unsigned char)*text);
        else
            buffer[at++] = *text;
    }
    if (*text != '\0')
        for (int i = 0; i < 3; i++)
            buffer[at++] = '.';
    buffer[at++] = mark;
    buffer[at] = '\0';
    return buffer;
}

const char *human_bytes(int64_t count, char *buffer, size_t size)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double shown = (double)count;
    int unit = 0;
    while (shown >= 1024 && unit < 4) {
        shown /= 1024;
        unit++;
    }
    snprintf(buffer, size, unit == 0 ? "%.0f %s" : "%.1f %s", shown, units[unit]);
    return buffer;
}
