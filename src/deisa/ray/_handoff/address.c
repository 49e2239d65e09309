#define _GNU_SOURCE
#include "address.h"

#include "failure.h"

#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PREFIX "deisa-ray/"
#define SHOWN 5 /* addresses in a message */

int address_of(const char *session, const char *socket_path, agent_address *address, handoff_error *error)
{
    memset(address, 0, sizeof *address);
    address->address.sun_family = AF_UNIX;
    char *path = address->address.sun_path;
    size_t room = sizeof address->address.sun_path, length;
    if (socket_path != NULL && *socket_path != '\0') {
        length = strlen(socket_path);
        if (length >= room)
            return fail(error, "ConfigurationError", "socket_path has %zu bytes; a socket's path may have %zu", length, room - 1);
        memcpy(path, socket_path, length + 1);
        snprintf(address->shown, sizeof address->shown, "%s", path);
        address->length = sizeof address->address;
        return 0;
    }
    length = (size_t)snprintf(path + 1, room - 1, PREFIX "%u/%s", (unsigned)getuid(), session);
    if (length >= room - 1)
        return fail(error, "ConfigurationError", "session name '%.80s' is too long", session);
    snprintf(address->shown, sizeof address->shown, "@%s", path + 1);
    address->length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
    return 0;
}

int check_socket_path(const char *path, handoff_error *error)
{
    struct stat status;
    char quoted_path[PATH_MAX], copy[PATH_MAX], quoted_folder[PATH_MAX];
    quoted(path, quoted_path, sizeof quoted_path);
    snprintf(copy, sizeof copy, "%s", path);
    const char *folder = dirname(copy);
    if (lstat(path, &status) == 0) {
        if (S_ISSOCK(status.st_mode))
            return 0;
        return fail(error, "ConfigurationError",
                    "socket_path %s is %s, which stays as it is; give the path of a file that is not there yet, the same "
                    "on both sides (DEISA_RAY_SOCKET_PATH)",
                    quoted_path, stat(path, &status) == 0 && S_ISDIR(status.st_mode) ? "a folder" : "a file that is no socket");
    }
    if (errno != ENOENT)
        return fail(error, "ConfigurationError",
                    "socket_path %s cannot be reached: %s; give another path, the same on both sides "
                    "(DEISA_RAY_SOCKET_PATH)",
                    quoted_path, strerror(errno));
    if (stat(folder, &status) < 0 || !S_ISDIR(status.st_mode))
        return fail(error, "ConfigurationError",
                    "socket_path %s: there is no folder %s on this host; create it, or give another path, the same on both "
                    "sides (DEISA_RAY_SOCKET_PATH)",
                    quoted_path, quoted(folder, quoted_folder, sizeof quoted_folder));
    return 0;
}

static int by_text(const void *one, const void *other)
{
    return strcmp(*(char *const *)one, *(char *const *)other);
}

/* The addresses of agents in this network namespace other than one, in order; returns how many. */
static size_t bound_names(const char *except, char **names, size_t most)
{
    FILE *listing = fopen("/proc/net/unix", "re");
    char line[512];
    size_t count = 0;
    if (listing == NULL)
        return 0;
    while (count < most && fgets(line, sizeof line, listing) != NULL) {
        char *name = strchr(line, '@');
        if (name == NULL || strncmp(name, "@" PREFIX, sizeof PREFIX) != 0)
            continue;
        name[strcspn(name, "\n")] = '\0';
        int known = strcmp(name, except) == 0;
        for (size_t i = 0; i < count && !known; i++)
            known = strcmp(names[i], name) == 0;
        if (!known && (names[count] = strdup(name)) != NULL)
            count++;
    }
    fclose(listing);
    qsort(names, count, sizeof *names, by_text);
    return count;
}

void other_agents(const agent_address *own, char *said, size_t size)
{
    char *names[64], mine[sizeof own->shown];
    char sessions[512] = "", strangers[512] = "";
    size_t count = bound_names(own->shown, names, sizeof names / sizeof *names), listed_mine = 0, listed_others = 0;
    size_t prefix = (size_t)snprintf(mine, sizeof mine, "@" PREFIX "%u/", (unsigned)getuid());
    for (size_t i = 0; i < count; i++) {
        if (strncmp(names[i], mine, prefix) == 0) {
            if (listed_mine++ < SHOWN)
                snprintf(sessions + strlen(sessions), sizeof sessions - strlen(sessions), "%s'%s'", listed_mine > 1 ? ", " : "", names[i] + prefix);
        }
        else if (listed_others++ < SHOWN)
            snprintf(strangers + strlen(strangers), sizeof strangers - strlen(strangers), "%s%s", listed_others > 1 ? ", " : "", names[i]);
        free(names[i]);
    }
    *said = '\0';
    if (listed_mine > 0)
        snprintf(said, size, "; you have an agent of session %s here: is DEISA_RAY_SESSION the same on both sides?", sessions);
    if (listed_others > 0) {
        size_t length = strlen(said);
        snprintf(said + length, size - length,
                 "; there are agents of other user ids (%s): if one is yours, seen from a container with user ids of its own "
                 "(here you are %u), set DEISA_RAY_SOCKET_PATH to a path that both sides see",
                 strangers, (unsigned)getuid());
    }
}
