#define _GNU_SOURCE
#include "memory_limits.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define UNLIMITED ((int64_t)1 << 60) /* what version 1 says without a limit is larger */

/* Read a whole small file; returns NULL if there is none. To be freed. */
static char *contents(const char *folder, const char *name)
{
    char path[PATH_MAX];
    if ((size_t)snprintf(path, sizeof path, "%s%s%s", folder, *name ? "/" : "", name) >= sizeof path)
        return NULL;
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return NULL;
    char *text = NULL;
    size_t length = 0, capacity = 0, got;
    do {
        if (capacity - length < 4096) {
            char *larger = realloc(text, capacity += 16384);
            if (larger == NULL)
                break;
            text = larger;
        }
        got = fread(text + length, 1, capacity - length - 1, file);
        length += got;
    } while (got > 0);
    fclose(file);
    if (text != NULL)
        text[length] = '\0';
    return text;
}

static int read_number(const char *folder, const char *name, int64_t *number)
{
    char *text = contents(folder, name), *end = NULL;
    if (text == NULL)
        return -1;
    long long value = strtoll(text, &end, 10);
    int good = end != text && (*end == '\0' || *end == '\n');
    free(text);
    *number = value;
    return good ? 0 : -1; /* "max" is no number */
}

/* Bytes of cached files that the kernel gives up when memory is needed. */
static int64_t inactive_files(const char *stat)
{
    static const char *const names[] = {"total_inactive_file ", "inactive_file "};
    for (int i = 0; i < 2; i++)
        for (const char *line = stat; line != NULL; line = (line = strchr(line, '\n')) ? line + 1 : NULL)
            if (strncmp(line, names[i], strlen(names[i])) == 0)
                return atoll(line + strlen(names[i]));
    return 0;
}

static int limit_of(const char *folder, memory_limit *found)
{
    static const char *const files[][2] = {{"memory.max", "memory.current"},
                                           {"memory.limit_in_bytes", "memory.usage_in_bytes"}};
    for (int version = 0; version < 2; version++) {
        int64_t limit, used;
        struct stat status;
        if (read_number(folder, files[version][0], &limit) < 0 || read_number(folder, files[version][1], &used) < 0 ||
            limit >= UNLIMITED || limit < 0 || stat(folder, &status) < 0)
            continue;
        char *text = contents(folder, "memory.stat");
        if (text == NULL)
            continue;
        int64_t kept = used - inactive_files(text);
        free(text);
        int64_t available = limit - (kept > 0 ? kept : 0);
        found->group = (int64_t)status.st_ino;
        found->limit = limit;
        found->available = available > 0 ? available : 0;
        snprintf(found->path, sizeof found->path, "%.*s", (int)sizeof found->path - 1, folder);
        return 0;
    }
    return -1;
}

/* Add the limits of one membership: its own group, and those above up to where groups are mounted. */
static size_t add_limits(const char *mounted, const char *path, memory_limit *limits, size_t count)
{
    char folder[PATH_MAX];
    while (*path == '/')
        path++;
    if (strstr(path, "..") != NULL ||
        (size_t)snprintf(folder, sizeof folder, "%s%s%s", mounted, *path ? "/" : "", path) >= sizeof folder)
        return count;
    while (count < LIMITS_MOST) {
        if (limit_of(folder, limits + count) == 0) {
            size_t same = 0;
            while (limits[same].group != limits[count].group)
                same++;
            if (same == count)
                count++;
        }
        char *last = strrchr(folder + strlen(mounted), '/');
        if (last == NULL)
            break;
        *last = '\0';
    }
    return count;
}

size_t own_limits(const char *memberships, const char *root, memory_limit limits[LIMITS_MOST])
{
    char *read = NULL;
    size_t count = 0;
    if (memberships == NULL)
        memberships = read = contents("/proc/self/cgroup", "");
    for (const char *line = memberships; line != NULL && *line != '\0'; line = (line = strchr(line, '\n')) ? line + 1 : NULL) {
        const char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (path == NULL)
            continue;
        char listed[256], mounted[PATH_MAX], own[PATH_MAX];
        snprintf(listed, sizeof listed, ",%.*s,", (int)(path - controllers - 1), controllers + 1);
        int unified = strcmp(listed, ",,") == 0;
        if (!unified && strstr(listed, ",memory,") == NULL)
            continue;
        snprintf(mounted, sizeof mounted, "%s%s", root, unified ? "" : "/memory");
        snprintf(own, sizeof own, "%.*s", (int)strcspn(path + 1, "\n"), path + 1);
        count = add_limits(mounted, own, limits, count);
    }
    free(read);
    return count;
}
