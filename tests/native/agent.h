/* An agent for the tests in C: it takes ranks in, gives them memory, and plays what docs/protocol.md says of an agent.

   It works on the very mappings of its clients, so that ThreadSanitizer sees both sides of each word and of the chunks. */

#ifndef DEISA_TESTS_AGENT_H
#define DEISA_TESTS_AGENT_H

#include "client.h"

#define MOST_RANKS 4

typedef struct {
    const char *session;
    int ranks, wanted; /* how many will come; whether a callback asks for their array */
    int64_t rows, columns, slots;
    const int64_t *halo; /* of their chunks, or NULL */
    const char *if_lost; /* what may have happened if it goes, or NULL */
    int listener;
    int connections[MOST_RANKS];
    pthread_t thread;
} agent;

/* The array "T" of every rank: one chunk of rows x columns 64-bit integers. */
#define ARRAY "T"

/* Listen, and take the ranks in, in a thread that ends when all have been told to start. */
void agent_begin(agent *agent);
void agent_join(agent *agent);
void agent_end(agent *agent);

/* Send a message that is one text. */
void agent_say(agent *agent, int rank, uint16_t code, const char *text);
void agent_fail(agent *agent, int rank, const char *kind, const char *text);

/* The code of the next message of a rank; 0 if the rank has gone. Its fields are dropped. */
uint16_t agent_hear(agent *agent, int rank);

/* Open the client of a rank. NULL: it has failed. */
handoff_client *rank_open(const agent *agent, int rank, handoff_on_lost on_lost, handoff_error *error);

/* The chunk's slot for a sequence number that was submitted. */
int64_t *agent_slot(const handoff_chunk *chunk, int64_t sequence);

/* Give a slot to the next sequence number, and wake who waits for it. */
void agent_grant(handoff_array *array, int64_t slot);

#endif
