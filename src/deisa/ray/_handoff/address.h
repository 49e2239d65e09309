/* Where the agent listens, and what to say when nobody does. */

#ifndef DEISA_HANDOFF_ADDRESS_H
#define DEISA_HANDOFF_ADDRESS_H

#include "handoff.h"

#include <sys/socket.h>
#include <sys/un.h>

typedef struct {
    struct sockaddr_un address;
    socklen_t length;
    char shown[sizeof(((struct sockaddr_un *)0)->sun_path) + 2]; /* an abstract one with the usual @ */
} agent_address;

/* The address of a session's agent on this host: an abstract socket, or the path. */
int address_of(const char *session, const char *socket_path, agent_address *address, handoff_error *error);

/* Whether a socket can be at a path, now or later. */
int check_socket_path(const char *path, handoff_error *error);

/* Say which addresses of other sessions, or other user ids, there are on this host; empty if there are none. */
void other_agents(const agent_address *own, char *said, size_t size);

#endif
