/* The hand-off: how a simulation rank gives the chunks of its arrays to the agent of its node.

   A client is opened once for each rank, and then handed chunks, timestep after timestep. Functions that can fail return 0
   for success and -1 for failure, and say in a `handoff_error` what has failed. Every function may be called from any thread;
   calls on one client take turns. In a forked child every call fails and touches nothing. */

#ifndef DEISA_HANDOFF_H
#define DEISA_HANDOFF_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define HANDOFF_KIND_BYTES 40
#define HANDOFF_TEXT_BYTES 4096
#define HANDOFF_MAX_DIMENSIONS 64
#define HANDOFF_LATEST_TIMESTEP INT64_MAX
#define HANDOFF_ONLY_CHUNK INT64_MIN /* as an index: the only one that there is */
#define HANDOFF_EARLIEST_TIMESTEP (INT64_MIN + 1)
#define HANDOFF_NO_TIME ((double)NAN) /* no physical time is known of a timestep */

/* `kind` is the name of a class of deisa.ray.errors, or "Interrupted" if the hook of that name asked to give up. */
typedef struct {
    char kind[HANDOFF_KIND_BYTES];
    char text[HANDOFF_TEXT_BYTES];
} handoff_error;

/* What to do when a party that was there has gone. */
typedef enum {
    HANDOFF_WAIT,     /* for an analytics that takes over; fail if something is final */
    HANDOFF_CONTINUE, /* without: nothing goes anywhere any more */
    HANDOFF_RAISE     /* fail at the next call */
} handoff_on_lost;

typedef enum { HANDOFF_INFO, HANDOFF_WARNING } handoff_level;

typedef struct {
    const char *session;
    const char *socket_path; /* NULL: the abstract address made of user and session */
    int64_t bridge_id, world_size;
    double connect_timeout_s, start_timeout_s, send_timeout_s, warn_every_s;
    handoff_on_lost on_lost;
    int disabled;  /* every call succeeds, and nothing goes anywhere */
    void *context; /* of the hooks, which may be NULL */
    void (*say)(void *context, handoff_level level, const char *text);
    int (*interrupted)(void *context); /* called now and then in a wait; other than 0 gives up */
} handoff_options;

/* A value that the analytics finds as an attribute, for example. */
typedef enum {
    HANDOFF_NONE,
    HANDOFF_BOOL, /* `integer` is 0 or 1 */
    HANDOFF_INT,
    HANDOFF_FLOAT,
    HANDOFF_TEXT,
    HANDOFF_ARRAY,  /* of `dtype` and `shape`, with its elements at `data` in C order */
    HANDOFF_ENCODED /* any value: `nbytes` bytes at `data`, as docs/protocol.md says for the type `value` */
} handoff_value_kind;

typedef struct {
    handoff_value_kind kind;
    int64_t integer;
    double real;
    const char *text, *dtype; /* dtype: as in handoff_array_description */
    int ndim;
    const int64_t *shape;
    const void *data;
    size_t nbytes;
} handoff_value;

typedef struct {
    const char *name;
    handoff_value value;
} handoff_attribute;

/* A coordinate along one dimension, whose values are an array of that dimension: for each element of the chunk, or, with a
   `length`, of the whole array (which has that length) from position `first` on. Or `values` are HANDOFF_NONE: the value at
   position i of the whole array is start + step * i. */
typedef struct {
    const char *name;
    int dimension;
    int64_t first, length;
    handoff_value values;
    double start, step;
    size_t attr_count;
    const handoff_attribute *attrs;
} handoff_coordinate;

/* Where a chunk lies: at a position in the grid of chunks, or at an offset in elements; the other one is NULL. `halo` has two
   numbers for each dimension: how many ghost cells lie before the chunk and after it in the rank's local array. NULL: none.
   Coordinates need names of the dimensions. */
typedef struct {
    const int64_t *shape, *position, *offset, *halo;
    size_t coord_count;
    const handoff_coordinate *coords;
} handoff_chunk_description;

typedef struct {
    const char *name;
    const char *dtype; /* as in the header of a .npy file, "<f8" for example; NULL: that of the first chunk */
    int ndim;
    const int64_t *global_shape, *grid; /* or NULL */
    size_t chunk_count;
    const handoff_chunk_description *chunks;
    const char *const *dims; /* names of the dimensions, or NULL */
    size_t attr_count;
    const handoff_attribute *attrs;
} handoff_array_description;

typedef struct handoff_client handoff_client;
typedef struct handoff_array handoff_array;
typedef struct handoff_chunk handoff_chunk;

typedef struct {
    int64_t chunks, bytes_handed_over;
    double held_up_s; /* spent in waiting for free slots */
    int64_t bytes_left_out; /* of what was sent, what no callback asks for; of dtypes that are known */
} handoff_stats;

/* Announce a rank and its chunks, and wait until the session has started. Returns NULL for failure. */
handoff_client *handoff_open(const handoff_options *options, const handoff_array_description *arrays,
                             size_t array_count, handoff_error *error);

/* Connect only to say why this rank cannot join, so that nobody waits for it. Where there are other ranks, this waits for the
   agent as `handoff_open` does. Never fails. */
void handoff_refuse(const handoff_options *options, const char *reason);

/* Find a chunk by its array's name and its index, or HANDOFF_ONLY_CHUNK. */
handoff_chunk *handoff_find(handoff_client *client, const char *array, int64_t index, handoff_error *error);

/* Whether a chunk may be handed over for a timestep. */
int handoff_check(handoff_chunk *chunk, int64_t timestep, handoff_error *error);

/* Hand a chunk over: copy it into a free slot, for which this waits. `strides` are bytes; NULL: C order, contiguous. With a
   halo, `data` and `strides` are those of the whole local array, of which the chunk is copied. `time` is the physical time,
   finite and the same for all chunks of the timestep, or HANDOFF_NO_TIME. */
int handoff_send(handoff_chunk *chunk, const void *data, const int64_t *strides, int64_t timestep, double time,
                 handoff_error *error);

/* Give out the slot that the chunk's next timestep will have, to compute into; the same until `handoff_commit`. It has no room
   for a halo. NULL is failure, or that no callback asks for the array: then `kind` is empty, and any memory will do. The memory
   may be written until the commit, and stays until `handoff_free`, also where the rank goes on without an agent meanwhile. */
void *handoff_slot(handoff_chunk *chunk, int64_t timestep, handoff_error *error);

/* Hand over the slot that was given out. */
int handoff_commit(handoff_chunk *chunk, int64_t timestep, double time, handoff_error *error);

/* Say the dtype of an array that was described without one, and wait for its memory. It fails where other ranks have declared
   another one. */
int handoff_declare_dtype(handoff_array *array, const char *dtype, handoff_error *error);

/* Say that nothing older than a timestep will come. */
int handoff_advance(handoff_client *client, int64_t timestep, handoff_error *error);

/* Steering. A value that the analytics has set: `bytes` as a `value` of docs/protocol.md, to be given back. */
typedef struct {
    unsigned char *bytes;
    size_t length;
    int64_t timestep; /* for which it was set */
} handoff_answer;

/* Get the value of a key at a timestep: 1 it is there; 0 it is not set, and no bridge will ever get one for this key and
   timestep; -1 failure. With `wait_s` (seconds, else negative) this waits until the analytics has set it, or has finished with
   the timestep; when the time is over that is a failure. */
int handoff_get(handoff_client *client, const char *key, int64_t timestep, double wait_s, handoff_answer *value,
                handoff_error *error);

/* Get all values of a key that are kept, in the order of their timesteps: 1 there are some; 0 there are none; -1 failure. The
   array is to be freed with its values. */
int handoff_get_queue(handoff_client *client, const char *key, handoff_answer **values, size_t *count, handoff_error *error);

void handoff_answer_free(handoff_answer *value);
void handoff_answers_free(handoff_answer *values, size_t count);

/* Read a plain value: 1 if it is one of that kind, else 0. A truth value is also an integer, and an integer a real number. A
   text is a copy to be freed, or NULL. */
int handoff_answer_is_none(const handoff_answer *value);
int handoff_answer_int(const handoff_answer *value, int64_t *number);
int handoff_answer_float(const handoff_answer *value, double *number);
char *handoff_answer_text(const handoff_answer *value);

handoff_stats handoff_get_stats(handoff_client *client);

/* End in order; what was handed over stays with the agent. A second call does nothing. */
int handoff_close(handoff_client *client, handoff_error *error);

/* End because of an error, whose text the analytics reports; without one (NULL), as a dying rank does. A call in which
   another thread waits fails. */
void handoff_abort(handoff_client *client, const char *reason);

/* End as the process does: in order if its exit status is 0, else because of an error with that text. */
void handoff_close_with_process(handoff_client *client, const char *otherwise);

/* In a forked child: close its copies of the descriptors. */
void handoff_close_in_child(handoff_client *client);

/* Give everything back; no other call may be under way, or come. Memory that `handoff_memory` objects refer to stays mapped until they are released. */
void handoff_free(handoff_client *client);

#endif
