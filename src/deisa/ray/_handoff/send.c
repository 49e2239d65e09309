/* Handing chunks over, timestep after timestep. */

#define _GNU_SOURCE
#include "client.h"
#include "copy.h"
#include "failure.h"
#include "hot.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Notifying. */

/* Whether no other bridge of the node has a smaller word in its entry of the stream's row. */
HOT static int is_last(const stream *stream, int word, int64_t value)
{
    for (int64_t bridge = 0; bridge < stream->bridges; bridge++)
        if (word_load(stream->counters + ENTRY_WORDS * bridge + word) < value)
            return 0;
    return 1;
}

/* It may get lost where the agent does not read: that looks at all rings after a while anyway. */
HOT static void notify(handoff_client *client)
{
    static const unsigned char message[] = {2, 0, 0, 0, MESSAGE_NOTIFY, 0};
    if (word_exchange(client->notified, 1) == 0)
        connection_send_now(&client->agent, &(wire_out){.data = (unsigned char *)message, .length = sizeof message});
}

/* Move on to a timestep, of an array or (NULL) of nothing; whether the agent should be notified of that. */
HOT static int pass(handoff_client *client, const handoff_array *of, int64_t timestep)
{
    int last = 0;
    if (client->newest_any && timestep == client->newest)
        return 0;
    if (client->ring != NULL)
        word_publish(client->ring + RING_PASSED, timestep);
    for (size_t a = 0; client->stream_count > 0 && a < client->array_count; a++)
        for (stream *stream = client->arrays[a].streams; stream != NULL; stream = stream->next) {
            int whole = stream->whole_any && stream->whole == client->newest;
            int skipped = client->newest_any && is_due(stream, client->newest) && !whole;
            word_store(stream->entry + ENTRY_PASSED, timestep);
            last |= skipped && is_last(stream, ENTRY_PASSED, timestep);
        }
    client->newest = timestep;
    client->newest_of = of;
    client->newest_any = 1;
    return last;
}

/* Slots. */

HOT static int has_slot(const part *part)
{
    return word_acquire(part->stream->table + TABLE_GRANTED) > part->sequence;
}

/* The first part of a chunk, from one on, that is handed over at a timestep. */
HOT static part *next_due(part *part, int64_t timestep)
{
    while (part != NULL && !is_due(part->stream, timestep))
        part = part->next;
    return part;
}

/* The first part that has no slot for a timestep; NULL: all have one. */
HOT static part *first_without_slot(const handoff_chunk *chunk, int64_t timestep)
{
    part *part = next_due(chunk->parts, timestep);
    while (part != NULL && has_slot(part))
        part = next_due(part->next, timestep);
    return part;
}

typedef struct {
    part *part;
    int64_t timestep;
} slot_wait;

static int slot_is_there(handoff_client *client, void *subject)
{
    (void)client;
    return has_slot(((slot_wait *)subject)->part);
}

static void pause_for_slot(handoff_client *client, void *subject, double seconds)
{
    const part *part = ((slot_wait *)subject)->part;
    page_word *wake = part->stream->table + TABLE_WAKE;
    int64_t seen = word_acquire(wake);
    if (!has_slot(part) && !atomic_load(&client->ended_by_thread) && !connection_wait(&client->agent, 0))
        word_wait(wake, seen, seconds);
}

static void describe_slot(handoff_client *client, void *subject, char *text, size_t size)
{
    const slot_wait *wait = subject;
    const stream *stream = wait->part->stream;
    char name[NAME_BYTES];
    snprintf(text, size, "all %lld slots of array %s are in use: timestep %lld waits for %s", (long long)stream->slots,
             quoted(stream->array->name, name, sizeof name), (long long)wait->timestep,
             *client->progress ? client->progress : ANALYTICS_BUSY);
}

static int wait_for_slot(part *part, int64_t timestep, handoff_error *error)
{
    handoff_client *client = part->chunk->array->client;
    slot_wait subject = {part, timestep};
    client_wait wait = {client->options.send_timeout_s, "DEISA_RAY_SEND_TIMEOUT_S", slot_is_there, pause_for_slot, describe_slot,
                        &subject};
    double started = seconds_now();
    *client->progress = '\0';
    word_publish(client->ring + RING_BLOCKED, part->region + 1);
    int result = client_wait_for(client, &wait, error);
    if (client->ring != NULL)
        word_publish(client->ring + RING_BLOCKED, 0);
    atomic_fetch_add_explicit(&client->waited_ns, (int64_t)(1e9 * (seconds_now() - started)), memory_order_relaxed);
    return result;
}

/* Slots do not go again: those that are there stay while others are waited for. */
static int wait_for_slots(handoff_chunk *chunk, int64_t timestep, handoff_error *error)
{
    for (part *part; (part = first_without_slot(chunk, timestep)) != NULL;)
        if (wait_for_slot(part, timestep, error) < 0)
            return -1;
    return 0;
}

/* The memory for a part's next timestep, which has a slot; NULL where the table makes no sense. */
HOT static char *slot_of(const part *part, handoff_error *error)
{
    const stream *stream = part->stream;
    int64_t slot = word_peek(stream->table + TABLE_SLOTS + part->sequence % stream->slots);
    if (slot < 0 || slot >= stream->slots) {
        fail(error, "ProtocolError", "the slot table names slot %lld of %lld", (long long)slot, (long long)stream->slots);
        return NULL;
    }
    return part->place->base + slot * part->place->slot_bytes;
}

HOT static int64_t bits_of(double time)
{
    int64_t bits;
    memcpy(&bits, &time, sizeof bits);
    return isnan(time) ? PAGE_NO_TIME : bits;
}

/* Hand over what lies in the slots of the parts that are due, all by one store: a chunk has been handed over, or it has not, and
   nothing fails from there on. Returns whether the agent should be notified. */
HOT static int submit(handoff_chunk *chunk, int64_t timestep, double time)
{
    handoff_client *client = chunk->array->client;
    part *first = next_due(chunk->parts, timestep);
    if (first == NULL)
        return 0;
    int64_t number = word_peek(client->ring + RING_SUBMITTED);
    for (const part *part = first; part != NULL; part = next_due(part->next, timestep)) {
        page_word *entry = client->ring + RING_ENTRIES + RING_ENTRY_WORDS * (number++ % client->capacity);
        word_note(entry + RING_ENTRY_REGION, part->region);
        word_note(entry + RING_ENTRY_TIMESTEP, timestep);
        word_note(entry + RING_ENTRY_ROWS, 0);
        word_note(entry + RING_ENTRY_TIME, bits_of(time));
    }
    word_publish(client->ring + RING_SUBMITTED, number);
    int last = 0;
    for (part *part = first; part != NULL; part = next_due(part->next, timestep)) {
        stream *stream = part->stream;
        int64_t whole = ++part->sequence; /* all parts of the stream are as far, once it is whole */
        if (++stream->within < stream->parts)
            continue;
        stream->within = 0;
        stream->whole = timestep;
        stream->whole_any = 1;
        word_store(stream->entry + ENTRY_WHOLE, whole);
        last |= is_last(stream, ENTRY_WHOLE, whole);
    }
    return last;
}

HOT static int64_t bytes_of(const int64_t *shape, int ndim, int64_t itemsize)
{
    int64_t nbytes = itemsize;
    for (int d = 0; d < ndim; d++)
        nbytes *= shape[d];
    return nbytes;
}

/* A chunk has been handed over, as far as anybody wants it. */
HOT static void count(handoff_chunk *chunk, int64_t timestep)
{
    handoff_array *array = chunk->array;
    handoff_client *client = array->client;
    int64_t nbytes = 0, all = bytes_of(chunk->shape, array->ndim, array->itemsize);
    part *first = next_due(chunk->parts, timestep);
    for (part *part = first; part != NULL; part = next_due(part->next, timestep))
        nbytes += bytes_of(part->shape, array->ndim, part->place->itemsize);
    chunk->sent = timestep;
    chunk->sent_any = 1;
    chunk->given_out = NULL;
    if (first != NULL)
        atomic_fetch_add_explicit(&client->chunks, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&client->bytes, nbytes, memory_order_relaxed);
    if (nbytes < all)
        atomic_fetch_add_explicit(&client->bytes_left_out, all - nbytes, memory_order_relaxed);
}

/* A chunk that is asked for has its memory, unless the dtype of its array has not been declared. */
HOT static int check_memory(const handoff_chunk *chunk, handoff_error *error)
{
    char name[NAME_BYTES];
    for (const part *part = chunk->parts; part != NULL; part = part->next)
        if (part->place == NULL)
            return fail(error, "ChunkDtypeError", "bridge %lld, array %s: a slot needs the dtype; declare it in arrays_metadata",
                        (long long)chunk->array->client->options.bridge_id, quoted(chunk->array->name, name, sizeof name));
    return 0;
}

/* Where the chunk begins in the local array. */
HOT static const char *interior(const handoff_chunk *chunk, const char *data, const int64_t *strides)
{
    for (int d = 0; chunk->before != NULL && d < chunk->array->ndim; d++)
        data += chunk->before[d] * strides[d];
    return data;
}

/* Copy what a part takes of a chunk. */
HOT static int copy_into(char *slot, const part *part, const char *data, const int64_t *strides, handoff_error *error)
{
    const placement *place = part->place;
    int64_t steps[HANDOFF_MAX_DIMENSIONS];
    for (int d = 0; d < place->ndim; d++) {
        data += part->start[d] * strides[d];
        steps[d] = part->step[d] * strides[d];
    }
    if (part->convert != NULL)
        convert_strided(slot, place->strides, data, steps, place->shape, place->ndim, part->convert);
    else if (copy_overlapping(slot, place->strides, data, steps, place->shape, place->ndim, place->itemsize) < 0)
        return fail(error, "MemoryBoundError", "no memory is left for a copy of what lies in the slot itself");
    return 0;
}

/* Fill the slots of all parts that are due. `data` is NULL for a slot that was given out and filled. */
HOT static int fill(const handoff_chunk *chunk, const char *data, const int64_t *strides, int64_t timestep, handoff_error *error)
{
    const handoff_array *array = chunk->array;
    int64_t contiguous[HANDOFF_MAX_DIMENSIONS];
    const part *filled = data == NULL ? chunk->given_out : NULL;
    if (filled != NULL) {
        data = slot_of(filled, error);
        strides = filled->place->strides;
    }
    else if (chunk->parts != NULL) {
        if (strides == NULL) {
            int64_t itemsize = array->itemsize > 0 ? array->itemsize : chunk->parts->place->itemsize;
            contiguous_strides(contiguous, chunk->local, array->ndim, itemsize);
            strides = contiguous;
        }
        data = interior(chunk, data, strides);
    }
    for (part *part = next_due(chunk->parts, timestep); part != NULL; part = next_due(part->next, timestep)) {
        char *slot = data != NULL ? slot_of(part, error) : NULL;
        if (slot == NULL || (part != filled && copy_into(slot, part, data, strides, error) < 0))
            return -1;
    }
    return 0;
}

/* `data` is NULL for a slot that was given out and filled. With `at_once`, returns 0 instead of waiting. */
HOT static int hand_over(handoff_chunk *chunk, const void *data, const int64_t *strides, int64_t timestep, double time,
                     int at_once, handoff_error *error)
{
    handoff_array *array = chunk->array;
    handoff_client *client = array->client;
    char what[NAME_BYTES + 16];
    int ready = client_check_chunk(chunk, timestep, error);
    if (ready != 1)
        return ready < 0 ? -1 : 1;
    if (client_check_time(chunk, timestep, time, error) < 0)
        return -1;
    if (data == NULL && chunk->given_out == NULL && chunk->parts != NULL)
        return fail(error, "ContractError", "bridge %lld, %s: no slot was given out", (long long)client->options.bridge_id,
                    what_array(array, what, sizeof what));
    if (check_memory(chunk, error) < 0)
        return -1;
    if (client->failed)
        return client_receive(client, error);
    int free_now = first_without_slot(chunk, timestep) == NULL;
    if (at_once && !free_now)
        return 0;
    int should_notify = pass(client, array, timestep);
    if (!free_now) {
        if (should_notify)
            notify(client);
        should_notify = 0;
        if (wait_for_slots(chunk, timestep, error) < 0)
            return -1;
    }
    if (fill(chunk, data, strides, timestep, error) < 0)
        return -1;
    should_notify |= submit(chunk, timestep, time);
    count(chunk, timestep);
    if (should_notify)
        notify(client);
    return client_hear(client, error) < 0 ? -1 : 1;
}

static int hand_over_in_turn(handoff_chunk *chunk, const void *data, const int64_t *strides, int64_t timestep, double time,
                             handoff_error *error)
{
    handoff_client *client = chunk->array->client;
    if (client_enter(client, error) < 0)
        return -1;
    int result = client_settle(client, hand_over(chunk, data, strides, timestep, time, 0, error), error);
    client_leave(client);
    return result < 0 ? -1 : 0;
}

int handoff_send(handoff_chunk *chunk, const void *data, const int64_t *strides, int64_t timestep, double time,
                 handoff_error *error)
{
    return hand_over_in_turn(chunk, data, strides, timestep, time, error);
}

int handoff_commit(handoff_chunk *chunk, int64_t timestep, double time, handoff_error *error)
{
    return hand_over_in_turn(chunk, NULL, NULL, timestep, time, error);
}

HOT int client_hand_over_at_once(handoff_chunk *chunk, const void *data, const int64_t *strides, int64_t timestep, double time,
                             handoff_error *error)
{
    handoff_client *client = chunk->array->client;
    if (!client_try_enter(client))
        return 0;
    int result = hand_over(chunk, data, strides, timestep, time, 1, error);
    result = result < 0 ? client_settle(client, result, error) < 0 ? -1 : 1 : result;
    client_leave(client);
    return result;
}

/* Wait for the slot of a part, and lend it to the rank. */
static int lend(part *part, int64_t timestep, given_slot *given, handoff_error *error)
{
    handoff_client *client = part->chunk->array->client;
    if (pass(client, part->chunk->array, timestep))
        notify(client);
    if (client_hear(client, error) < 0 || (!has_slot(part) && wait_for_slot(part, timestep, error) < 0) ||
        (given->at = slot_of(part, error)) == NULL)
        return -1;
    part->chunk->given_out = part;
    given->memory = memory_retain(part->place->memory);
    memcpy(given->strides, part->place->strides, (size_t)part->place->ndim * sizeof *given->strides);
    return 0;
}

int client_give_slot(handoff_chunk *chunk, int64_t timestep, given_slot *given, handoff_error *error)
{
    handoff_client *client = chunk->array->client;
    part *part = NULL;
    if (client_enter(client, error) < 0)
        return -1;
    int result = client_check_chunk(chunk, timestep, error);
    if (result == 1 && chunk->parts != NULL) {
        result = check_memory(chunk, error);
        if (result == 0 && (part = whole_part(chunk, timestep)) != NULL)
            result = lend(part, timestep, given, error);
        result = client_settle(client, result, error);
    }
    if (result < 0)
        part = NULL;
    client_leave(client);
    return result < 0 ? -1 : part != NULL;
}

void *handoff_slot(handoff_chunk *chunk, int64_t timestep, handoff_error *error)
{
    given_slot given;
    error->kind[0] = '\0';
    if (client_give_slot(chunk, timestep, &given, error) != 1)
        return NULL;
    memory_release(atomic_exchange(&chunk->kept, given.memory));
    return given.at;
}

int handoff_advance(handoff_client *client, int64_t timestep, handoff_error *error)
{
    if (client_enter(client, error) < 0)
        return -1;
    int result = client_check_open(client, error);
    if (result == 1 && (result = client_check_timestep(client, NULL, timestep, error)) == 0) {
        if (pass(client, NULL, timestep))
            notify(client);
        result = client_hear(client, error);
    }
    result = client_settle(client, result, error);
    client_leave(client);
    return result < 0 ? -1 : 0;
}
