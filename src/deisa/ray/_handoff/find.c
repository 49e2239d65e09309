/* Finding a chunk, and checking whether it may be handed over. */

#define _GNU_SOURCE
#include "client.h"
#include "failure.h"
#include "hot.h"

#include <stdio.h>
#include <string.h>

const char *what_array(const handoff_array *array, char *text, size_t size)
{
    char name[NAME_BYTES];
    if (array == NULL)
        return "advance()";
    snprintf(text, size, "array %s", quoted(array->name, name, sizeof name));
    return text;
}

static int unknown_array(const handoff_client *client, const char *shown, handoff_error *error)
{
    char name[NAME_BYTES], known[2048] = "";
    for (size_t a = 0; a < client->array_count; a++) {
        size_t length = strlen(known);
        snprintf(known + length, sizeof known - length, "%s%s", a > 0 ? ", " : "",
                 quoted(client->arrays[a].name, name, sizeof name));
    }
    return fail(error, "UnknownArrayError", "bridge %lld described no array %s; it has %s",
                (long long)client->options.bridge_id, shown, *known ? known : "none");
}

static handoff_array *find_array(const handoff_client *client, const asked_name *asked, handoff_error *error)
{
    char shown[NAME_BYTES];
    for (size_t a = 0; a < client->array_count && asked->name != NULL; a++)
        if (strcmp(client->arrays[a].name, asked->name) == 0)
            return client->arrays + a;
    unknown_array(client, asked->name != NULL ? quoted(asked->name, shown, sizeof shown) : asked->shown, error);
    return NULL;
}

static handoff_chunk *find_chunk(handoff_array *array, const asked_index *asked, handoff_error *error)
{
    long long bridge_id = array->client->options.bridge_id;
    char name[NAME_BYTES];
    quoted(array->name, name, sizeof name);
    if (!asked->is_integer)
        fail(error, "ChunkIndexError", "bridge %lld, array %s: chunk_index is an integer, got %s", bridge_id, name, asked->shown);
    else if (asked->index != HANDOFF_ONLY_CHUNK && asked->index >= 0 && (size_t)asked->index < array->chunk_count)
        return array->chunks + asked->index;
    else if (asked->index == HANDOFF_ONLY_CHUNK && array->chunk_count == 1)
        return array->chunks;
    else if (asked->index == HANDOFF_ONLY_CHUNK && array->chunk_count > 1)
        fail(error, "ChunkIndexError", "bridge %lld owns %zu chunks of array %s; say which with chunk_index=", bridge_id,
             array->chunk_count, name);
    else
        fail(error, "ChunkIndexError", "bridge %lld owns %zu chunks of array %s, there is no chunk %s", bridge_id,
             array->chunk_count, name, asked->shown);
    return NULL;
}

handoff_chunk *client_find(handoff_client *client, const asked_name *name, const asked_index *index, handoff_error *error)
{
    handoff_chunk *chunk = NULL;
    if (client_enter(client, error) < 0)
        return NULL;
    if (client_check_open(client, error) >= 0) {
        handoff_array *array = find_array(client, name, error);
        chunk = array != NULL ? find_chunk(array, index, error) : NULL;
    }
    client_leave(client);
    return chunk;
}

handoff_chunk *handoff_find(handoff_client *client, const char *array, int64_t index, handoff_error *error)
{
    char shown[32] = "None";
    if (index != HANDOFF_ONLY_CHUNK)
        snprintf(shown, sizeof shown, "%lld", (long long)index);
    return client_find(client, &(asked_name){array, "NULL"}, &(asked_index){1, index, shown}, error);
}

HOT int client_check_timestep(const handoff_client *client, const handoff_array *array, int64_t timestep, handoff_error *error)
{
    char what[NAME_BYTES + 16], before[NAME_BYTES + 16];
    if (timestep < HANDOFF_EARLIEST_TIMESTEP)
        return fail(error, "TimestepError", "bridge %lld, %s: timestep %lld exceeds 64 bits",
                    (long long)client->options.bridge_id, what_array(array, what, sizeof what), (long long)timestep);
    if (client->newest_any && timestep < client->newest)
        return fail(error, "TimestepError",
                    "bridge %lld, %s: timestep %lld comes after timestep %lld of %s; the timesteps of a bridge must not decrease, "
                    "whatever it sends",
                    (long long)client->options.bridge_id, what_array(array, what, sizeof what), (long long)timestep,
                    (long long)client->newest, what_array(client->newest_of, before, sizeof before));
    return 0;
}

HOT int client_check_time(const handoff_chunk *chunk, int64_t timestep, double time, handoff_error *error)
{
    char what[NAME_BYTES + 16];
    if (!isinf(time))
        return 0;
    return fail(error, "PhysicalTimeError", "bridge %lld, %s, timestep %lld: a physical time is a finite number, got %g",
                (long long)chunk->array->client->options.bridge_id, what_array(chunk->array, what, sizeof what),
                (long long)timestep, time);
}

HOT int client_check_chunk(const handoff_chunk *chunk, int64_t timestep, handoff_error *error)
{
    handoff_array *array = chunk->array;
    char name[NAME_BYTES];
    int ready = client_check_open(array->client, error);
    if (ready != 1)
        return ready;
    if (client_check_timestep(array->client, array, timestep, error) < 0)
        return -1;
    if (chunk->sent_any && chunk->sent == timestep)
        return fail(error, "DuplicateChunkError",
                    "bridge %lld has already sent chunk %lld of array %s for timestep %lld",
                    (long long)array->client->options.bridge_id, (long long)chunk->index,
                    quoted(array->name, name, sizeof name), (long long)timestep);
    return 1;
}

int handoff_check(handoff_chunk *chunk, int64_t timestep, handoff_error *error)
{
    handoff_client *client = chunk->array->client;
    if (client_enter(client, error) < 0)
        return -1;
    int result = client_check_chunk(chunk, timestep, error);
    client_leave(client);
    return result < 0 ? -1 : 0;
}
