/* Handing chunks over, timestep after timestep. */

#define _GNU_SOURCE
#include "client.h"
#include "copy.h"
#include "failure.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Notifying. */

/* Whether no other bridge of the node has a smaller word in its entry of the array's row. */
static int is_last(const handoff_array *array, int word, int64_t value)
{
    for (int64_t bridge = 0; bridge < array->bridges; bridge++)
        if (word_load(array->counters + ENTRY_WORDS * bridge + word) < value)
            return 0;
    return 1;
}

/* It may get lost where the agent does not read: that looks at all rings after a while anyway. */
static void notify(handoff_client *client)
{
    static const unsigned char message[] = {2, 0, 0, 0, MESSAGE_NOTIFY, 0};
    if (word_exchange(client->notified, 1) == 0)
        connection_send_now(&client->agent, &(wire_out){.data = (unsigned char *)message, .length = sizeof message});
}

/* Move on to a timestep, of an array or (NULL) of nothing; whether the agent should be notified of that. */
static int pass(handoff_client *client, const handoff_array *of, int64_t timestep)
{
    int last = 0;
    if (client->newest_any && timestep == client->newest)
        return 0;
    if (client->ring != NULL)
        word_publish(client->ring + RING_PASSED, timestep);
    for (size_t a = 0; client->wanted_count > 0 && a < client->array_count; a++) {
        handoff_array *array = client->arrays + a;
        if (!array->wanted)
            continue;
        word_store(array->entry + ENTRY_PASSED, timestep);
        int skipped = client->newest_any && !(array->whole_any && array->whole == client->newest);
        last |= skipped && is_last(array, ENTRY_PASSED, timestep);
    }
    client->newest = timestep;
    client->newest_of = of;
    client->newest_any = 1;
    return last;
}

/* Slots. */

static int has_slot(const handoff_chunk *chunk)
{
    return word_acquire(chunk->array->table + TABLE_GRANTED) > chunk->sequence;
}

typedef struct {
    handoff_chunk *chunk;
    int64_t timestep;
} slot_wait;

static int slot_is_there(handoff_client *client, void *subject)
{
    (void)client;
    return has_slot(((slot_wait *)subject)->chunk);
}

static void pause_for_slot(handoff_client *client, void *subject, double seconds)
{
    const handoff_chunk *chunk = ((slot_wait *)subject)->chunk;
    page_word *wake = chunk->array->table + TABLE_WAKE;
    int64_t seen = word_acquire(wake);
    if (!has_slot(chunk) && !atomic_load(&client->ended_by_thread) && !connection_wait(&client->agent, 0))
        word_wait(wake, seen, seconds);
}

static void describe_slot(handoff_client *client, void *subject, char *text, size_t size)
{
    const slot_wait *wait = subject;
    const handoff_array *array = wait->chunk->array;
    char name[NAME_BYTES];
    snprintf(text, size, "all %lld slots of array %s are in use: timestep %lld waits for %s", (long long)array->slots,
             quoted(array->name, name, sizeof name), (long long)wait->timestep,
             *client->progress ? client->progress : ANALYTICS_BUSY);
}

static int wait_for_slot(handoff_chunk *chunk, int64_t timestep, handoff_error *error)
{
    handoff_client *client = chunk->array->client;
    slot_wait subject = {chunk, timestep};
    client_wait wait = {client->options.send_timeout_s, "DEISA_RAY_SEND_TIMEOUT_S", slot_is_there, pause_for_slot, describe_slot,
                        &subject};
    double started = seconds_now();
    *client->progress = '\0';
    word_publish(client->ring + RING_BLOCKED, chunk->region + 1);
    int result = client_wait_for(client, &wait, error);
    if (client->ring != NULL)
        word_publish(client->ring + RING_BLOCKED, 0);
    atomic_fetch_add_explicit(&client->waited_ns, (int64_t)(1e9 * (seconds_now() - started)), memory_order_relaxed);
    return result;
}

/* The memory for the chunk's next timestep, which has a slot; NULL where the table makes no sense. */
static char *slot_of(const handoff_chunk *chunk, handoff_error *error)
{
    const handoff_array *array = chunk->array;
    int64_t slot = word_peek(array->table + TABLE_SLOTS + chunk->sequence % array->slots);
    if (slot < 0 || slot >= array->slots) {
        fail(error, "ProtocolError", "the slot table names slot %lld of %lld", (long long)slot, (long long)array->slots);
        return NULL;
    }
    return chunk->place->base + slot * chunk->place->slot_bytes;
}

static int64_t bits_of(double time)
{
    int64_t bits;
    memcpy(&bits, &time, sizeof bits);
    return isnan(time) ? PAGE_NO_TIME : bits;
}

/* Hand over what lies in the slot. Nothing fails between here and `client_hear`: a chunk has been handed over, or it has not. */
static int submit(handoff_chunk *chunk, int64_t timestep, double time, int should_notify, handoff_error *error)
{
    handoff_array *array = chunk->array;
    handoff_client *client = array->client;
    int64_t number = word_peek(client->ring + RING_SUBMITTED);
    page_word *entry = client->ring + RING_ENTRIES + RING_ENTRY_WORDS * (number % client->capacity);
    int64_t nbytes = chunk->place->itemsize;
    for (int d = 0; d < array->ndim; d++)
        nbytes *= chunk->shape[d];
    word_note(entry + RING_ENTRY_REGION, chunk->region);
    word_note(entry + RING_ENTRY_TIMESTEP, timestep);
    word_note(entry + RING_ENTRY_ROWS, 0);
    word_note(entry + RING_ENTRY_TIME, bits_of(time));
    word_publish(client->ring + RING_SUBMITTED, number + 1);
    chunk->sequence++;
    chunk->sent = timestep;
    chunk->sent_any = 1;
    chunk->given_out = 0;
    atomic_fetch_add_explicit(&client->chunks, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&client->bytes, nbytes, memory_order_relaxed);
    if (++array->within == (int64_t)array->chunk_count) {
        array->within = 0;
        array->whole = timestep;
        array->whole_any = 1;
        int64_t whole = chunk->sequence; /* all chunks of the array are as far */
        word_store(array->entry + ENTRY_WHOLE, whole);
        should_notify |= is_last(array, ENTRY_WHOLE, whole);
    }
    if (should_notify)
        notify(client);
    return client_hear(client, error);
}

/* Pass over an array that nobody asks for. */
static int pass_over(handoff_chunk *chunk, int64_t timestep, handoff_error *error)
{
    handoff_client *client = chunk->array->client;
    if (pass(client, chunk->array, timestep))
        notify(client);
    chunk->sent = timestep;
    chunk->sent_any = 1;
    return client_hear(client, error);
}

/* A chunk whose array is asked for has its memory, unless its dtype has not been declared. */
static int check_memory(const handoff_chunk *chunk, handoff_error *error)
{
    char name[NAME_BYTES];
    if (chunk->place != NULL)
        return 0;
    return fail(error, "ChunkDtypeError", "bridge %lld, array %s: a slot needs the dtype; declare it in arrays_metadata",
                (long long)chunk->array->client->options.bridge_id, quoted(chunk->array->name, name, sizeof name));
}

/* Where the chunk begins in the local array. */
static const void *interior(const handoff_chunk *chunk, const void *data, const int64_t *strides)
{
    const char *at = data;
    for (int d = 0; chunk->before != NULL && d < chunk->array->ndim; d++)
        at += chunk->before[d] * strides[d];
    return at;
}

static int copy_into(char *slot, const handoff_chunk *chunk, const void *data, const int64_t *strides, handoff_error *error)
{
    const placement *place = chunk->place;
    int64_t contiguous[HANDOFF_MAX_DIMENSIONS];
    if (strides == NULL) {
        contiguous_strides(contiguous, chunk->local, place->ndim, place->itemsize);
        strides = contiguous;
    }
    data = interior(chunk, data, strides);
    if (copy_overlapping(slot, place->strides, data, strides, place->shape, place->ndim, place->itemsize) == 0)
        return 0;
    return fail(error, "MemoryBoundError", "no memory is left for a copy of what lies in the slot itself");
}

/* `data` is NULL for a slot that was given out and filled. With `at_once`, returns 0 instead of waiting. */
static int hand_over(handoff_chunk *chunk, const void *data, const int64_t *strides, int64_t timestep, double time,
                     int at_once, handoff_error *error)
{
    handoff_array *array = chunk->array;
    char what[NAME_BYTES + 16];
    int ready = client_check_chunk(chunk, timestep, error);
    if (ready != 1)
        return ready < 0 ? -1 : 1;
    if (client_check_time(chunk, timestep, time, error) < 0)
        return -1;
    if (!array->wanted)
        return pass_over(chunk, timestep, error) < 0 ? -1 : 1;
    if (data == NULL && !chunk->given_out)
        return fail(error, "ContractError", "bridge %lld, %s: no slot was given out",
                    (long long)array->client->options.bridge_id, what_array(array, what, sizeof what));
    if (check_memory(chunk, error) < 0)
        return -1;
    if (array->client->failed)
        return client_receive(array->client, error);
    int free_now = has_slot(chunk);
    if (at_once && !free_now)
        return 0;
    int should_notify = pass(array->client, array, timestep);
    if (!free_now) {
        if (should_notify)
            notify(array->client);
        should_notify = 0;
        if (wait_for_slot(chunk, timestep, error) < 0)
            return -1;
    }
    char *slot = slot_of(chunk, error);
    if (slot == NULL)
        return -1;
    if (data != NULL && copy_into(slot, chunk, data, strides, error) < 0)
        return -1;
    return submit(chunk, timestep, time, should_notify, error) < 0 ? -1 : 1;
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

int client_hand_over_at_once(handoff_chunk *chunk, const void *data, const int64_t *strides, int64_t timestep, double time,
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

int client_give_slot(handoff_chunk *chunk, int64_t timestep, given_slot *given, handoff_error *error)
{
    handoff_client *client = chunk->array->client;
    int given_out = 0;
    if (client_enter(client, error) < 0)
        return -1;
    int result = client_check_chunk(chunk, timestep, error);
    if (result == 1 && chunk->array->wanted) {
        result = check_memory(chunk, error);
        if (result == 0 && pass(client, chunk->array, timestep))
            notify(client);
        if (result == 0)
            result = client_hear(client, error);
        if (result == 0 && !has_slot(chunk))
            result = wait_for_slot(chunk, timestep, error);
        if (result == 0 && (given->at = slot_of(chunk, error)) == NULL)
            result = -1;
        given_out = result == 0;
        result = client_settle(client, result, error);
    }
    if (given_out) {
        chunk->given_out = 1;
        given->memory = memory_retain(chunk->place->memory);
        memcpy(given->strides, chunk->place->strides, (size_t)chunk->place->ndim * sizeof *given->strides);
    }
    client_leave(client);
    return result < 0 ? -1 : given_out;
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
