/* Finding a chunk, and checking whether it may be handed over. */

#define _GNU_SOURCE
#include "client.h"
#include "failure.h"

#include <stdio.h>
#include <string.h>

const char *what_array(const handoff_array *array, char *text, size_t size)
{
    char name[NAME_BYTES];
    snprintf(text, size, "array %s", quoted(array->name, name, sizeof name));
    return text;
}

static int unknown_array(handoff_client *client, const char *array, handoff_error *error)
{
    char wanted[NAME_BYTES], name[NAME_BYTES], known[2048] = "";
    for (size_t a = 0; a < client->array_count; a++) {
        size_t length = strlen(known);
        snprintf(known + length, sizeof known - length, "%s%s", a > 0 ? ", " : "",
                 quoted(client->arrays[a].name, name, sizeof name));
    }
    return fail(error, "UnknownArrayError", "bridge %lld described no array %s; it has %s",
                (long long)client->options.bridge_id, quoted(array, wanted, sizeof wanted), *known ? known : "none");
}

static handoff_chunk *find(handoff_client *client, const char *name, int64_t index, handoff_error *error)
{
    handoff_array *array = NULL;
    char shown[NAME_BYTES];
    for (size_t a = 0; a < client->array_count && array == NULL; a++)
        if (strcmp(client->arrays[a].name, name) == 0)
            array = client->arrays + a;
    if (array == NULL)
        unknown_array(client, name, error);
    else if (index == HANDOFF_ONLY_CHUNK && array->chunk_count == 1)
        return array->chunks;
    else if (index == HANDOFF_ONLY_CHUNK && array->chunk_count > 1)
        fail(error, "ChunkIndexError", "bridge %lld owns %zu chunks of array %s; say which with chunk_index=",
             (long long)client->options.bridge_id, array->chunk_count, quoted(name, shown, sizeof shown));
    else if (index >= 0 && (size_t)index < array->chunk_count)
        return array->chunks + index;
    else {
        char asked[32] = "None";
        if (index != HANDOFF_ONLY_CHUNK)
            snprintf(asked, sizeof asked, "%lld", (long long)index);
        fail(error, "ChunkIndexError", "bridge %lld owns %zu chunks of array %s, there is no chunk %s",
             (long long)client->options.bridge_id, array->chunk_count, quoted(name, shown, sizeof shown), asked);
    }
    return NULL;
}

handoff_chunk *handoff_find(handoff_client *client, const char *array, int64_t index, handoff_error *error)
{
    handoff_chunk *chunk = NULL;
    if (client_enter(client, error) < 0)
        return NULL;
    if (client_check_open(client, error) >= 0)
        chunk = find(client, array, index, error);
    client_leave(client);
    return chunk;
}

int client_check_timestep(const handoff_client *client, const handoff_array *array, int64_t timestep, handoff_error *error)
{
    char what[NAME_BYTES + 16] = "advance()";
    if (timestep < HANDOFF_EARLIEST_TIMESTEP)
        return fail(error, "TimestepError", "bridge %lld, %s: timestep %lld exceeds 64 bits",
                    (long long)client->options.bridge_id, array != NULL ? what_array(array, what, sizeof what) : what,
                    (long long)timestep);
    if (client->newest_any && timestep < client->newest)
        return fail(error, "TimestepError",
                    "bridge %lld, %s: timestep %lld comes after timestep %lld; timesteps must not decrease",
                    (long long)client->options.bridge_id, array != NULL ? what_array(array, what, sizeof what) : what,
                    (long long)timestep, (long long)client->newest);
    return 0;
}

int client_check_chunk(const handoff_chunk *chunk, int64_t timestep, handoff_error *error)
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
