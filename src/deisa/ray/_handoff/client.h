/* A rank's client, as the files of the library see it.

       handoff_open ── start.c ──> client ── send.c ──> chunks, timestep after timestep
                                     |
                     receive.c: what the agent says; wait.c: waiting for it

   Whoever works with a client holds its lock. A wait keeps the lock: other threads of the rank wait as well. */

#ifndef DEISA_HANDOFF_CLIENT_H
#define DEISA_HANDOFF_CLIENT_H

#include "address.h"
#include "connection.h"
#include "convert.h"
#include "handoff.h"
#include "memory.h"
#include "pages.h"
#include "protocol.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#define PAGES 3 /* that come along with a start: slot table, arrival counters, submission ring */
#define ANALYTICS_BUSY "the analytics (slower than the simulation, or keeping arrays alive)"

/* Where the slots of a region lie, as `Slots` has said. */
typedef struct placement {
    struct placement *next;
    int64_t region, slot_bytes, slots, itemsize;
    int ndim;
    int64_t *shape, *strides; /* of one allocation, which starts at `shape` */
    char *dtype;
    char *base;
    handoff_memory *memory;
} placement;

/* What callbacks ask for of an array: some of its elements, at timesteps that are multiples of `every`. */
typedef struct stream {
    struct stream *next; /* of the array */
    handoff_array *array;
    int64_t every, slots, bridges;
    page_word *table;    /* row of the slot table: granted, wake, slots */
    page_word *counters; /* row of the arrival counters: whole and passed for each bridge */
    page_word *entry;    /* there, this bridge's */
    int64_t parts;       /* of this bridge's chunks */
    int64_t within;      /* of those, handed over for a timestep that is not whole yet */
    int64_t whole;       /* the newest timestep that was handed over whole */
    int whole_any;
} stream;

/* What a stream takes of a chunk: `shape` elements from `start` on, `step` from one to the next along each dimension. */
typedef struct part {
    struct part *next; /* of the chunk */
    handoff_chunk *chunk;
    stream *stream;
    int64_t region;
    int64_t *start, *step, *shape; /* of one allocation, which starts at `start` */
    placement *place;              /* NULL until the memory is there */
    conversion convert;            /* NULL: elements are copied as they are */
    int64_t sequence;              /* number of the next timestep: so many have been handed over */
} part;

struct handoff_chunk {
    handoff_array *array;
    int64_t index;
    int64_t *shape, *position, *offset; /* the last two: one is NULL */
    int64_t *local, *before;            /* the shape with the halo; ghost cells before the chunk (NULL: there is no halo) */
    part *parts;                        /* none where no callback asks for anything of the chunk */
    int64_t sent;                       /* the newest timestep handed over */
    int sent_any;
    part *given_out;                /* that has its next slot lent to the rank; or NULL */
    _Atomic(handoff_memory *) kept; /* that handoff_slot gave out: it stays until handoff_free */
};

struct handoff_array {
    handoff_client *client;
    char *name, *dtype; /* as described; dtype may be NULL */
    int ndim;
    int64_t *global_shape, *grid; /* or NULL */
    handoff_chunk *chunks;
    size_t chunk_count;
    int64_t itemsize; /* bytes; 0 where it is not known */
    stream *streams;  /* none where no callback asks for anything of this bridge's chunks */
    int declared;     /* its dtype was told by DeclareDtype */
};

/* What every hand-over reads comes first, together: a rank that has computed for a while finds none of it in the caches. */
struct handoff_client {
    _Atomic int *alive;        /* in a page that the kernel wipes in a forked child: 0 there */
    pthread_mutex_t lock;
    pthread_mutex_t ends;      /* while connection and pages go, or are used by a thread whose turn it is not */
    _Atomic(pthread_t) owner;  /* of the lock, or 0 */
    int detached, closed;      /* nothing goes anywhere any more; the end was said */
    int failed;                /* `failure` holds for every call from now on */
    int newest_any;
    int64_t newest;            /* timestep */
    const handoff_array *newest_of; /* the array that came there first; NULL: handoff_advance did */
    unsigned heard; /* calls of client_hear */
    page_word *ring, *notified;
    int64_t capacity;
    handoff_array *arrays;
    size_t array_count, stream_count;
    _Atomic int64_t chunks, bytes, bytes_left_out, waited_ns;
    connection agent;

    handoff_options options;
    char *session, *socket_path;
    const handoff_array_description *described; /* while the client is opened */
    agent_address address;
    pid_t pid;
    int welcomed, sent_away, started;
    char progress[HANDOFF_TEXT_BYTES], later[HANDOFF_TEXT_BYTES], down[HANDOFF_TEXT_BYTES];
    char if_lost[HANDOFF_TEXT_BYTES]; /* what may have happened if the agent goes */
    handoff_error failure;
    _Atomic int ended_by_thread;
    char ended_why[HANDOFF_TEXT_BYTES];
    placement *placements; /* those that no chunk has taken yet */
    handoff_memory *pages[PAGES];
    handoff_memory *feedback, *questions; /* pages; NULL where the agent has none */
    page_word *asked;                     /* this bridge's row on the questions page */
};

/* client.c: taking turns, and ends. */
int client_is_own(const handoff_client *client, handoff_error *error); /* not a child of the process that opened it */
int client_enter(handoff_client *client, handoff_error *error);
int client_try_enter(handoff_client *client); /* 1 entered; 0 another thread is in there, or this is a forked child */
void client_leave(handoff_client *client);
int client_check_open(handoff_client *client, handoff_error *error); /* 1 go on; 0 detached: done; -1 closed */
int client_settle(handoff_client *client, int result, handoff_error *error);
void client_drop_connection(handoff_client *client);
void client_drop_memory(handoff_client *client);
__attribute__((format(printf, 3, 4))) void client_say(handoff_client *client, handoff_level level, const char *format,
                                                      ...);

/* find.c */
#define NAME_BYTES 512 /* of an array's name in a text */

/* What callers ask for whose language has no types for it; `shown` is what texts say. */
typedef struct {
    const char *name; /* NULL: nothing that can be a name */
    const char *shown;
} asked_name;

typedef struct {
    int is_integer;
    int64_t index; /* -1 for those that do not fit */
    const char *shown;
} asked_index;

handoff_chunk *client_find(handoff_client *client, const asked_name *name, const asked_index *index, handoff_error *error);

const char *what_array(const handoff_array *array, char *text, size_t size); /* "array 'T'"; of NULL "advance()" */
int client_check_timestep(const handoff_client *client, const handoff_array *array, int64_t timestep, handoff_error *error);
int client_check_time(const handoff_chunk *chunk, int64_t timestep, double time, handoff_error *error);
int client_check_chunk(const handoff_chunk *chunk, int64_t timestep, handoff_error *error); /* 1 go on; 0 detached; -1 no */

/* receive.c: what the agent says. */
int client_receive(handoff_client *client, handoff_error *error); /* handle what has come, without waiting */
int client_hear(handoff_client *client, handoff_error *error); /* the same, where anything has come or failed */
int client_transmit(handoff_client *client, wire_out *message, handoff_error *error); /* and discard it */
int client_lost(handoff_client *client, handoff_error *error);
int client_malformed(const char *message, handoff_error *error);

/* slots.c */
void placement_free(placement *place);
int client_on_slots(handoff_client *client, wire_in *in, handoff_error *error);
void client_provide(handoff_client *client); /* give each chunk that waits for it the memory that has come */

/* feedback.c */
#define FEEDBACK_PAGES 2 /* that come along with a start: feedback page, questions page */
int client_check_feedback(const handoff_client *client); /* 0 if the pages make sense */

/* streams.c: what callbacks ask for. */
int client_on_wanted(handoff_client *client, wire_in *in); /* read a WantedStream */
int client_settle_memory(part *part, placement *place); /* give a part its memory: -1 if that does not fit */
void streams_free(handoff_array *array);
page_word *page_words(const handoff_memory *page, int64_t first, int64_t count); /* if there are so many; or NULL */
part *whole_part(const handoff_chunk *chunk, int64_t timestep); /* that takes the chunk as it is; or NULL */

static inline int is_due(const stream *stream, int64_t timestep)
{
    return timestep % stream->every == 0;
}

/* start.c */
void put_limits(wire_out *out);

/* wait.c */
#define HEARD_WITH_PROCESS 8 /* of so many looks at the connection, one is at the agent's process, too */
#define PAUSE_S 0.5 /* at most, until interrupts, the end of the agent and other threads are looked at */

double seconds_now(void);
int client_check_interrupt(const handoff_client *client, handoff_error *error);

typedef struct {
    double timeout_s;
    const char *setting; /* that says how long */
    int (*done)(handoff_client *client, void *subject);
    void (*pause)(handoff_client *client, void *subject, double seconds);
    void (*describe)(handoff_client *client, void *subject, char *text, size_t size);
    void *subject;
} client_wait;

int client_wait_for(handoff_client *client, const client_wait *wait, handoff_error *error);
void client_pause_for_message(handoff_client *client, void *subject, double seconds);

/* send.c, for callers that use a slot longer than the client may have it: 1 given; 0 nobody asks for the array; -1 failed. */
typedef struct {
    handoff_memory *memory; /* retained */
    char *at;
    int64_t strides[HANDOFF_MAX_DIMENSIONS];
} given_slot;

int client_give_slot(handoff_chunk *chunk, int64_t timestep, given_slot *given, handoff_error *error);

/* dtype.c: the same as handoff_declare_dtype, and returns the dtype that the chunks' memory has, to be freed; NULL where they
   have none. Whether it is the one declared is left to the caller. */
int client_declare_dtype(handoff_array *array, const char *dtype, char **settled, handoff_error *error);

/* send.c, for callers that must not wait: 1 done; 0 it would have to wait, nothing has been done; -1 failed. `data` is NULL for
   the slot that was given out. */
int client_hand_over_at_once(handoff_chunk *chunk, const void *data, const int64_t *strides, int64_t timestep, double time,
                             handoff_error *error);

#endif
