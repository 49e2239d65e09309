/* Dtypes that come late: with the first chunk of an array that was described without one. */

#define _GNU_SOURCE
#include "client.h"
#include "failure.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int has_memory(handoff_client *client, void *subject)
{
    const handoff_array *array = subject;
    (void)client;
    for (size_t c = 0; c < array->chunk_count; c++)
        for (const part *part = array->chunks[c].parts; part != NULL; part = part->next)
            if (part->place == NULL)
                return 0;
    return 1;
}

static void describe_memory(handoff_client *client, void *subject, char *text, size_t size)
{
    const handoff_array *array = subject;
    char name[NAME_BYTES];
    (void)client;
    snprintf(text, size, "waiting for the memory of array %s", quoted(array->name, name, sizeof name));
}

static int tell_and_wait(handoff_client *client, handoff_array *array, const char *dtype, handoff_error *error)
{
    client_wait wait = {client->options.start_timeout_s, "DEISA_RAY_START_TIMEOUT_S", has_memory,
                        client_pause_for_message, describe_memory, array};
    if (!array->declared) {
        wire_out message;
        free(array->dtype);
        if ((array->dtype = strdup(dtype)) == NULL)
            return fail(error, "MemoryBoundError", "no memory is left");
        if (array->itemsize == 0)
            array->itemsize = itemsize_of(dtype);
        wire_begin(&message, MESSAGE_DECLARE_DTYPE);
        wire_text(&message, array->name);
        wire_text(&message, dtype);
        put_limits(&message);
        if (client_transmit(client, &message, error) < 0)
            return -1;
        array->declared = 1;
    }
    return client_wait_for(client, &wait, error);
}

/* What was declared, by this bridge or, where its memory is there already, by others. */
static const char *settled_dtype(const handoff_array *array)
{
    for (size_t c = 0; c < array->chunk_count && array->dtype == NULL; c++)
        if (array->chunks[c].parts != NULL)
            return array->chunks[c].parts->place->dtype;
    return array->dtype;
}

int client_declare_dtype(handoff_array *array, const char *dtype, char **settled, handoff_error *error)
{
    handoff_client *client = array->client;
    *settled = NULL;
    if (client_enter(client, error) < 0)
        return -1;
    int result = client_check_open(client, error);
    if (result == 1 && array->streams != NULL) {
        result = has_memory(client, array) ? 0 : tell_and_wait(client, array, dtype, error);
        if (result == 0 && (*settled = strdup(settled_dtype(array))) == NULL)
            result = fail(error, "MemoryBoundError", "no memory is left");
    }
    result = client_settle(client, result, error);
    client_leave(client);
    return result < 0 ? -1 : 0;
}

int handoff_declare_dtype(handoff_array *array, const char *dtype, handoff_error *error)
{
    char *settled, what[NAME_BYTES + 16];
    int result = client_declare_dtype(array, dtype, &settled, error);
    if (settled != NULL && strcmp(settled, dtype) != 0)
        result = fail(error, "ChunkDtypeError",
                      "bridge %lld, %s: other bridges declared dtype %s, this one declared none and sends %s",
                      (long long)array->client->options.bridge_id, what_array(array, what, sizeof what), settled, dtype);
    free(settled);
    return result;
}
