/* Opening a client: find the agent, say who this is, and wait for the others. */

#define _GNU_SOURCE
#include "client.h"
#include "failure.h"
#include "labels.h"
#include "memory_limits.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define FIRST_RETRY_S 0.01
#define LAST_RETRY_S 0.25
#define REFUSAL_S 2.0 /* that the only rank looks for somebody to tell that its description is refused */
#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

/* Copying what describes the rank. */

static int64_t *copied(const int64_t *numbers, int count, int64_t *to)
{
    if (numbers != NULL)
        memcpy(to, numbers, (size_t)count * sizeof *numbers);
    return numbers != NULL ? to : NULL;
}

/* Note the shape of the local array, and where the chunk begins in it. */
static void copy_halo(handoff_chunk *chunk, const int64_t *halo, int ndim, int64_t *local, int64_t *before)
{
    chunk->local = halo != NULL ? local : chunk->shape;
    chunk->before = halo != NULL ? before : NULL;
    for (int d = 0; halo != NULL && d < ndim; d++) {
        before[d] = halo[2 * d];
        local[d] = before[d] + chunk->shape[d] + halo[2 * d + 1];
    }
}

static int copy_array(handoff_client *client, handoff_array *array, const handoff_array_description *described)
{
    size_t ndim = described->ndim > 0 ? (size_t)described->ndim : 0;
    array->client = client;
    array->ndim = (int)ndim;
    array->name = strdup(described->name);
    array->chunks = calloc(described->chunk_count + 1, sizeof *array->chunks);
    if (array->name == NULL || array->chunks == NULL || (described->dtype != NULL && (array->dtype = strdup(described->dtype)) == NULL))
        return -1;
    array->itemsize = itemsize_of(array->dtype);
    if (described->global_shape != NULL && (array->global_shape = calloc(ndim + 1, sizeof(int64_t))) == NULL)
        return -1;
    if (described->grid != NULL && (array->grid = calloc(ndim + 1, sizeof(int64_t))) == NULL)
        return -1;
    copied(described->global_shape, (int)ndim, array->global_shape);
    copied(described->grid, (int)ndim, array->grid);
    for (size_t c = 0; c < described->chunk_count; c++) {
        handoff_chunk *chunk = array->chunks + c;
        int64_t *numbers = calloc(5 * ndim + 1, sizeof *numbers);
        if (numbers == NULL)
            return -1;
        array->chunk_count = c + 1;
        chunk->array = array;
        chunk->index = (int64_t)c;
        chunk->shape = copied(described->chunks[c].shape, (int)ndim, numbers);
        chunk->position = copied(described->chunks[c].position, (int)ndim, numbers + ndim);
        chunk->offset = copied(described->chunks[c].offset, (int)ndim, numbers + 2 * ndim);
        copy_halo(chunk, described->chunks[c].halo, (int)ndim, numbers + 3 * ndim, numbers + 4 * ndim);
    }
    return 0;
}

static handoff_client *new_client(const handoff_options *options, const handoff_array_description *arrays, size_t count,
                                  handoff_error *error)
{
    handoff_client *client = calloc(1, sizeof *client);
    void *page = mmap(NULL, (size_t)sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (client == NULL || page == MAP_FAILED) {
        free(client);
        if (page != MAP_FAILED)
            munmap(page, (size_t)sysconf(_SC_PAGESIZE));
        fail(error, "MemoryBoundError", "no memory is left");
        return NULL;
    }
    (void)!madvise(page, (size_t)sysconf(_SC_PAGESIZE), MADV_WIPEONFORK);
    client->alive = page;
    atomic_store(client->alive, 1);
    client->pid = getpid();
    client->options = *options;
    connection_init(&client->agent);
    pthread_mutex_init(&client->lock, NULL);
    pthread_mutex_init(&client->ends, NULL);
    client->session = strdup(options->session);
    client->socket_path = options->socket_path != NULL ? strdup(options->socket_path) : NULL;
    client->arrays = calloc(count + 1, sizeof *client->arrays);
    int whole = client->session != NULL && client->arrays != NULL && (options->socket_path == NULL || client->socket_path != NULL);
    for (size_t a = 0; a < count && whole; a++) {
        client->array_count = a + 1;
        whole = copy_array(client, client->arrays + a, arrays + a) == 0;
    }
    if (!whole)
        fail(error, "MemoryBoundError", "no memory is left");
    if (!whole || address_of(client->session, client->socket_path, &client->address, error) < 0) {
        handoff_free(client);
        return NULL;
    }
    return client;
}

/* Saying hello. */

static void put_shape(wire_out *out, const int64_t *numbers, int count)
{
    wire_count(out, (size_t)count);
    for (int d = 0; d < count; d++)
        wire_int(out, numbers[d]);
}

static void put_optional_shape(wire_out *out, const int64_t *numbers, int count)
{
    wire_byte(out, numbers != NULL);
    if (numbers != NULL)
        put_shape(out, numbers, count);
}

static void put_array(wire_out *out, const handoff_array *array, const handoff_array_description *described)
{
    size_t part = wire_open_part(out);
    wire_text(out, array->name);
    wire_byte(out, array->dtype != NULL);
    if (array->dtype != NULL)
        wire_text(out, array->dtype);
    put_optional_shape(out, array->global_shape, array->ndim);
    put_optional_shape(out, array->grid, array->ndim);
    wire_count(out, array->chunk_count);
    for (size_t c = 0; c < array->chunk_count; c++) {
        size_t inner = wire_open_part(out);
        put_shape(out, array->chunks[c].shape, array->ndim);
        put_optional_shape(out, array->chunks[c].position, array->ndim);
        put_optional_shape(out, array->chunks[c].offset, array->ndim);
        put_coords(out, described->chunks + c);
        wire_close_part(out, inner);
    }
    put_labels(out, described);
    wire_close_part(out, part);
}

void put_limits(wire_out *out)
{
    memory_limit *limits = calloc(LIMITS_MOST, sizeof *limits);
    size_t count = limits != NULL ? own_limits(NULL, LIMITS_ROOT, limits) : 0;
    wire_count(out, count);
    for (size_t i = 0; i < count; i++) {
        size_t part = wire_open_part(out);
        wire_int(out, limits[i].group);
        wire_text(out, limits[i].path);
        wire_int(out, limits[i].limit);
        wire_int(out, limits[i].available);
        wire_close_part(out, part);
    }
    free(limits);
}

static void begin_with_address(wire_out *out, int code, const handoff_client *client)
{
    wire_begin(out, code);
    wire_int(out, PROTOCOL_VERSION);
    wire_text(out, client->session);
    wire_int(out, client->options.bridge_id);
}

static void put_hello(wire_out *out, const handoff_client *client)
{
    begin_with_address(out, MESSAGE_HELLO, client);
    wire_int(out, client->options.world_size);
    wire_count(out, client->array_count);
    for (size_t a = 0; a < client->array_count; a++)
        put_array(out, client->arrays + a, client->described + a);
    put_limits(out);
}

/* Finding the agent. */

static int no_analytics(const handoff_client *client, handoff_error *error)
{
    char tried[512], others[2048];
    snprintf(tried, sizeof tried, "(tried %s for %g s; DEISA_RAY_CONNECT_TIMEOUT_S sets how long)", client->address.shown,
             client->options.connect_timeout_s);
    if (*client->later)
        return fail(error, "NoAnalyticsError", "%s, and no other analytics of session '%s' has come %s", client->later,
                    client->session, tried);
    other_agents(&client->address, others, sizeof others);
    return fail(error, "NoAnalyticsError",
                "no analytics on this host for session '%s': is Ray running here and the analytics started? %s%s",
                client->session, tried, others);
}

static void sleep_for(double seconds)
{
    struct timespec time = {.tv_sec = (time_t)seconds};
    time.tv_nsec = (long)((seconds - (double)time.tv_sec) * 1e9);
    nanosleep(&time, NULL);
}

static int connect_until(handoff_client *client, double deadline, handoff_error *error)
{
    double started = seconds_now(), said = started, pause = FIRST_RETRY_S;
    for (;;) {
        if (client->socket_path != NULL && check_socket_path(client->socket_path, error) < 0)
            return -1;
        switch (connection_open(&client->agent, &client->address, error)) {
        case CONNECTED: return 0;
        case CONNECTION_REFUSED: return -1;
        case NOBODY_THERE: break;
        }
        double now = seconds_now();
        if (now >= deadline)
            return no_analytics(client, error);
        if (now - said >= client->options.warn_every_s) {
            said = now;
            client_say(client, HANDOFF_WARNING, "waiting for the analytics of session '%s' (%.0f s so far)", client->session,
                       now - started);
        }
        sleep_for(pause);
        pause = fmin(2 * pause, LAST_RETRY_S);
        if (client_check_interrupt(client, error) < 0)
            return -1;
    }
}

/* Waiting for the start. */

static int has_started(handoff_client *client, void *subject)
{
    (void)subject;
    return client->started;
}

static void describe_start(handoff_client *client, void *subject, char *text, size_t size)
{
    (void)subject;
    snprintf(text, size, "%s", *client->progress ? client->progress : "waiting for the agent's answer");
}

static int say_hello_and_wait(handoff_client *client, handoff_error *error)
{
    client_wait wait = {client->options.start_timeout_s, "DEISA_RAY_START_TIMEOUT_S", has_started,
                        client_pause_for_message, describe_start, NULL};
    wire_out hello;
    put_hello(&hello, client);
    if (client_transmit(client, &hello, error) < 0)
        return -1;
    return client_wait_for(client, &wait, error);
}

static int start(handoff_client *client, handoff_error *error)
{
    double deadline = seconds_now() + client->options.connect_timeout_s, said = -HUGE_VAL;
    for (;;) {
        if (connect_until(client, deadline, error) < 0)
            return -1;
        if (say_hello_and_wait(client, error) == 0)
            return 0;
        if (!is_kind(error, "AnalyticsLostError") || client->welcomed || client->failed)
            return -1;
        /* An agent of an earlier run; the next one may be on its way. */
        client_drop_memory(client);
        double now = seconds_now();
        if (client->sent_away) { /* after it had waited there */
            client->sent_away = 0;
            deadline = now + client->options.connect_timeout_s;
        }
        if (now > deadline)
            return no_analytics(client, error);
        if (*client->later && now - said >= client->options.warn_every_s) {
            said = now;
            client_say(client, HANDOFF_WARNING, "%s; waiting for the next analytics", client->later);
        }
        sleep_for(LAST_RETRY_S);
        if (client_check_interrupt(client, error) < 0)
            return -1;
    }
}

/* Nobody else checks halos: they do not travel. */
static int check_halos(const handoff_array_description *array, handoff_error *error)
{
    char name[NAME_BYTES];
    for (size_t c = 0; c < array->chunk_count; c++) {
        const int64_t *sides = array->chunks[c].halo, *shape = array->chunks[c].shape;
        for (int d = 0; sides != NULL && d < array->ndim; d++, sides += 2) {
            int64_t local;
            if (sides[0] < 0 || sides[1] < 0 || __builtin_add_overflow(shape[d], sides[0], &local) ||
                __builtin_add_overflow(local, sides[1], &local))
                return fail(error, "DescriptionError",
                            "array %s: in dimension %d, chunk %zu has %lld elements, and a halo of %lld before and %lld after "
                            "them; widths are 0 or more, and all together fit into 64 bits",
                            quoted(array->name, name, sizeof name), d, c, (long long)shape[d], (long long)sides[0],
                            (long long)sides[1]);
        }
    }
    return 0;
}

handoff_client *handoff_open(const handoff_options *options, const handoff_array_description *arrays, size_t array_count,
                             handoff_error *error)
{
    for (size_t a = 0; a < array_count; a++)
        if (check_halos(arrays + a, error) < 0)
            return NULL;
    handoff_client *client = new_client(options, arrays, array_count, error);
    if (client == NULL)
        return NULL;
    if (options->disabled) {
        client->detached = 1;
        return client;
    }
    client_enter(client, error);
    client->described = arrays;
    int result = client_settle(client, start(client, error), error);
    client->described = NULL;
    client_leave(client);
    if (result < 0) {
        char reason[HANDOFF_KIND_BYTES + HANDOFF_TEXT_BYTES + 2];
        snprintf(reason, sizeof reason, "%s: %s", error->kind, error->text);
        handoff_abort(client, is_kind(error, "MemoryBoundError") ? reason : NULL);
        handoff_free(client);
        return NULL;
    }
    return client;
}

/* Find somebody to tell why this rank cannot join. Where it is not the only one, the others are told so, too. */
static int connect_to_refuse(handoff_client *client, const char *reason, handoff_error *error)
{
    double started = seconds_now(), timeout_s = client->options.connect_timeout_s;
    int is_alone = client->options.world_size <= 1;
    if (connect_until(client, started, error) == 0)
        return 0;
    if (!is_kind(error, "NoAnalyticsError"))
        return -1;
    if (!is_alone && timeout_s > 0)
        client_say(client, HANDOFF_WARNING,
                   "bridge %lld cannot join: %s; it waits up to %g s for the analytics of session '%s', so that the other ranks "
                   "hear of it (DEISA_RAY_CONNECT_TIMEOUT_S sets how long)",
                   (long long)client->options.bridge_id, reason, timeout_s, client->session);
    client->options.say = NULL; /* once is enough */
    return connect_until(client, started + (is_alone ? fmin(REFUSAL_S, timeout_s) : timeout_s), error);
}

void handoff_refuse(const handoff_options *options, const char *reason)
{
    handoff_error error;
    handoff_client *client = new_client(options, NULL, 0, &error);
    if (client == NULL)
        return;
    client_enter(client, &error);
    if (connect_to_refuse(client, reason, &error) == 0) {
        wire_out message;
        begin_with_address(&message, MESSAGE_CANNOT_JOIN, client);
        wire_text_at_most(&message, reason, PROTOCOL_MAX_TEXT);
        client_transmit(client, &message, &error);
    }
    client_leave(client);
    handoff_abort(client, NULL);
    handoff_free(client);
}
