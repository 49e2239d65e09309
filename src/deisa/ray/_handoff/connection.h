/* The connection to an agent: bytes, descriptors, and whether the agent lives. */

#ifndef DEISA_HANDOFF_CONNECTION_H
#define DEISA_HANDOFF_CONNECTION_H

#include "address.h"
#include "handoff.h"
#include "protocol.h"
#include "wire.h"

#include <stddef.h>

/* Those of a message that is still coming, and of the next one, which the same call may have received. */
#define CONNECTION_MOST_DESCRIPTORS (2 * PROTOCOL_MAX_DESCRIPTORS)

typedef enum { CONNECTED, NOBODY_THERE, CONNECTION_REFUSED } connection_attempt;

typedef struct {
    int fd;      /* -1: there is none */
    int process; /* the agent's, from pidfd_open; -1 where there is nothing to watch */
    unsigned char *received;
    size_t length, capacity, handled; /* bytes */
    int descriptors[CONNECTION_MOST_DESCRIPTORS];
    size_t descriptor_count;
} connection;

void connection_init(connection *peer);

/* Try once. CONNECTION_REFUSED is final, and says why. */
connection_attempt connection_open(connection *peer, const agent_address *address, handoff_error *error);

/* Go on sending a message of which `*sent` bytes have been, without waiting: 1 whole, 0 not yet, -1 the other end has gone. */
int connection_send(connection *peer, const wire_out *message, size_t *sent);

/* Wait for room to send more, for so many seconds. */
void connection_wait_for_room(connection *peer, double seconds);

/* Send without waiting, and without caring. */
void connection_send_now(connection *peer, const wire_out *message);

/* Take in what has come, without waiting: 1 something, 0 nothing, -1 the other end has gone. */
int connection_receive(connection *peer);

/* The next whole message, without its header; 1 there is one, 0 not yet, -1 it is too long. */
int connection_next(connection *peer, uint16_t *code, wire_in *fields);

/* Whether there is something to receive, or the connection has ended. */
int connection_has_news(const connection *peer);

/* The same, or the other process has ended; waits so many seconds. */
int connection_wait(connection *peer, double seconds);

/* Take the next descriptors that have come; -1 if there are fewer. They are closed then. */
int connection_take(connection *peer, int *descriptors, size_t count);

void connection_close(connection *peer);

/* Close a forked child's copies of the descriptors, and nothing else: the parent may have been in the middle of a call. */
void connection_close_in_child(connection *peer);

#endif
