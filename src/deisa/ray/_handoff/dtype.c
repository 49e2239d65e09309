/* Dtypes that come late: with the first chunk of an array that was described without one. */

#define _GNU_SOURCE
#include "client.h"
#include "failure.h"

#include <stdio.h>

static int has_memory(handoff_client *client, void *subject)
{
    const handoff_array *array = subject;
    (void)client;
    for (size_t c = 0; c < array->chunk_count; c++)
        if (array->chunks[c].place == NULL)
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

int handoff_declare_dtype(handoff_array *array, const char *dtype, int64_t itemsize, handoff_error *error)
{
    handoff_client *client = array->client;
    (void)itemsize;
    if (client_enter(client, error) < 0)
        return -1;
    int result = client_check_open(client, error);
    if (result == 1 && array->wanted && !has_memory(client, array)) {
        client_wait wait = {client->options.start_timeout_s, "DEISA_RAY_START_TIMEOUT_S", has_memory,
                            client_pause_for_message, describe_memory, array};
        result = 0;
        if (!array->declared) {
            wire_out message;
            wire_begin(&message, MESSAGE_DECLARE_DTYPE);
            wire_text(&message, array->name);
            wire_text(&message, dtype);
            put_limits(&message);
            result = client_transmit(client, &message, error);
            array->declared = result == 0;
        }
        if (result == 0)
            result = client_wait_for(client, &wait, error);
    }
    result = client_settle(client, result, error);
    client_leave(client);
    return result < 0 ? -1 : 0;
}
