/* Taking turns, and the ends of a client. */

#define _GNU_SOURCE
#include "client.h"
#include "failure.h"
#include "hot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define LAST_CALL_S 1 /* for threads that are sending when the process ends */

void client_say(handoff_client *client, handoff_level level, const char *format, ...)
{
    char text[2 * HANDOFF_TEXT_BYTES];
    va_list arguments;
    if (client->options.say == NULL)
        return;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    client->options.say(client->options.context, level, text);
}

/* Taking turns. */

int client_is_own(const handoff_client *client, handoff_error *error)
{
    if (atomic_load_explicit(client->alive, memory_order_relaxed) && client->pid == getpid())
        return 0;
    return fail(error, "ForkedProcessError",
                "bridge %lld belongs to process %d; this is process %d, a forked child of it, which must not use the parent's "
                "connection and memory. Hand the values to the parent, or start the child with "
                "multiprocessing.get_context('spawn') or 'forkserver', where it can have one of its own",
                (long long)client->options.bridge_id, (int)client->pid, (int)getpid());
}

HOT int client_try_enter(handoff_client *client)
{
    if (!atomic_load_explicit(client->alive, memory_order_relaxed) || pthread_mutex_trylock(&client->lock) != 0)
        return 0;
    atomic_store_explicit(&client->owner, pthread_self(), memory_order_relaxed);
    return 1;
}

/* Take the lock; the thread that has it may wait for long. */
static int wait_for_turn(handoff_client *client, handoff_error *error)
{
    struct timespec limit;
    if (pthread_mutex_trylock(&client->lock) == 0)
        return 0;
    do {
        if (client_check_interrupt(client, error) < 0)
            return -1;
        clock_gettime(CLOCK_REALTIME, &limit);
        limit.tv_nsec += (long)(PAUSE_S * 1e9);
        limit.tv_sec += limit.tv_nsec / 1000000000;
        limit.tv_nsec %= 1000000000;
    } while (pthread_mutex_timedlock(&client->lock, &limit) != 0);
    return 0;
}

int client_enter(handoff_client *client, handoff_error *error)
{
    if (!client->options.disabled) /* that has nothing to lose in a child */
        if (client_is_own(client, error) < 0)
            return -1;
    if (atomic_load_explicit(&client->owner, memory_order_relaxed) == pthread_self())
        return fail(error, "ClosedError",
                    "bridge %lld is in use by the very call that a signal has interrupted; have the handler set a flag, or raise",
                    (long long)client->options.bridge_id);
    if (wait_for_turn(client, error) < 0)
        return -1;
    atomic_store_explicit(&client->owner, pthread_self(), memory_order_relaxed);
    return 0;
}

HOT void client_leave(handoff_client *client)
{
    atomic_store_explicit(&client->owner, (pthread_t)0, memory_order_relaxed);
    pthread_mutex_unlock(&client->lock);
}

HOT int client_check_open(handoff_client *client, handoff_error *error)
{
    if (client->closed)
        return fail(error, "ClosedError", "bridge %lld is closed; nothing can be sent after close()",
                    (long long)client->options.bridge_id);
    return client->detached ? 0 : 1;
}

/* Ends. */

void client_drop_memory(handoff_client *client)
{
    pthread_mutex_lock(&client->ends);
    for (size_t a = 0; a < client->array_count; a++) {
        handoff_array *array = client->arrays + a;
        streams_free(array);
        for (size_t c = 0; c < array->chunk_count; c++)
            array->chunks[c].given_out = NULL;
    }
    for (placement *next; client->placements != NULL; client->placements = next) {
        next = client->placements->next;
        placement_free(client->placements);
    }
    for (int i = 0; i < PAGES; i++) {
        memory_release(client->pages[i]);
        client->pages[i] = NULL;
    }
    memory_release(client->feedback);
    memory_release(client->questions);
    client->feedback = client->questions = NULL;
    client->asked = NULL;
    client->ring = client->notified = NULL;
    client->stream_count = 0;
    pthread_mutex_unlock(&client->ends);
}

void client_drop_connection(handoff_client *client)
{
    pthread_mutex_lock(&client->ends);
    connection_close(&client->agent);
    pthread_mutex_unlock(&client->ends);
    client->started = 0;
}

static void say_abort(handoff_client *client, const char *reason)
{
    wire_out message;
    wire_begin(&message, MESSAGE_ABORT);
    wire_text_at_most(&message, reason, PROTOCOL_MAX_TEXT);
    if (wire_end(&message) == 0)
        connection_send_now(&client->agent, &message);
    wire_discard(&message);
}

static void end(handoff_client *client)
{
    client->closed = 1;
    client_drop_memory(client);
}

int client_settle(handoff_client *client, int result, handoff_error *error)
{
    if (result >= 0 || client->options.on_lost != HANDOFF_CONTINUE || !is_loss(error) || client->detached)
        return result;
    char reason[HANDOFF_TEXT_BYTES + 64];
    client_say(client, HANDOFF_WARNING, "bridge %lld goes on without analytics: %s", (long long)client->options.bridge_id,
               error->text);
    snprintf(reason, sizeof reason, "it goes on without analytics: %s", error->text);
    client->detached = 1;
    say_abort(client, reason);
    client_drop_connection(client);
    client_drop_memory(client);
    error->kind[0] = '\0';
    return 0;
}

static void put_close(wire_out *message, handoff_client *client)
{
    handoff_stats stats = handoff_get_stats(client);
    wire_begin(message, MESSAGE_CLOSE);
    size_t part = wire_open_part(message);
    wire_int(message, stats.chunks);
    wire_int(message, stats.bytes_handed_over);
    wire_float(message, stats.held_up_s);
    wire_int(message, stats.bytes_left_out);
    wire_close_part(message, part);
}

int handoff_close(handoff_client *client, handoff_error *error)
{
    int result = 0;
    if (client_enter(client, error) < 0)
        return -1;
    if (!client->closed) {
        end(client);
        if (client->agent.fd >= 0) {
            wire_out message;
            put_close(&message, client);
            if (client->failed) { /* an analytics that takes over wants to know; the rank has been told */
                if (wire_end(&message) == 0)
                    connection_send_now(&client->agent, &message);
                wire_discard(&message);
            }
            else
                result = client_transmit(client, &message, error);
            client_drop_connection(client);
        }
    }
    result = client_settle(client, result, error);
    client_leave(client);
    return result;
}

/* Have a thread that waits in a call give up. */
static void interrupt(handoff_client *client, const char *reason)
{
    pthread_mutex_lock(&client->ends);
    if (!atomic_load_explicit(&client->ended_by_thread, memory_order_relaxed))
        snprintf(client->ended_why, sizeof client->ended_why, "%s", reason);
    atomic_store_explicit(&client->ended_by_thread, 1, memory_order_release);
    if (*reason)
        say_abort(client, reason);
    if (client->agent.fd >= 0)
        shutdown(client->agent.fd, SHUT_RDWR);
    for (size_t a = 0; a < client->array_count; a++)
        for (const stream *stream = client->arrays[a].streams; stream != NULL; stream = stream->next)
            if (stream->table != NULL)
                word_wake(stream->table + TABLE_WAKE);
    if (client->feedback != NULL)
        word_wake((page_word *)client->feedback->base + FEEDBACK_WAKE);
    pthread_mutex_unlock(&client->ends);
}

void handoff_abort(handoff_client *client, const char *reason)
{
    if (client_is_own(client, NULL) < 0 || atomic_load_explicit(&client->owner, memory_order_relaxed) == pthread_self())
        return;
    if (pthread_mutex_trylock(&client->lock) != 0) {
        interrupt(client, reason ? reason : "");
        pthread_mutex_lock(&client->lock);
    }
    if (!client->closed) {
        end(client);
        if (reason != NULL && *reason)
            say_abort(client, reason);
        client_drop_connection(client);
    }
    client_leave(client);
}

/* What is to be said when the process has ended: the C library hands over its exit status. */
typedef struct {
    pid_t pid; /* a forked child ends without a word */
    int fd;
    wire_out in_order, otherwise;
} last_words;

static void say_last_words(int status, void *data)
{
    last_words *words = data;
    if (getpid() == words->pid) {
        const wire_out *message = status & 0xff ? &words->otherwise : &words->in_order; /* as much as anybody sees */
        (void)!send(words->fd, message->data, message->length, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
}

static int prepare_last_words(handoff_client *client, const char *otherwise)
{
    last_words *words = calloc(1, sizeof *words);
    if (words == NULL)
        return -1;
    words->pid = getpid();
    put_close(&words->in_order, client);
    wire_begin(&words->otherwise, MESSAGE_ABORT);
    wire_text(&words->otherwise, otherwise);
    words->fd = fcntl(client->agent.fd, F_DUPFD_CLOEXEC, 0); /* for the rest of the process's life */
    if (words->fd >= 0 && wire_end(&words->in_order) == 0 && wire_end(&words->otherwise) == 0 &&
        on_exit(say_last_words, words) == 0)
        return 0;
    if (words->fd >= 0)
        close(words->fd);
    wire_discard(&words->in_order);
    wire_discard(&words->otherwise);
    free(words);
    return -1;
}

void handoff_close_with_process(handoff_client *client, const char *otherwise)
{
    struct timespec limit;
    if (client_is_own(client, NULL) < 0)
        return;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += LAST_CALL_S;
    if (pthread_mutex_timedlock(&client->lock, &limit) != 0) {
        handoff_abort(client, "its process has ended while a thread was still sending");
        return;
    }
    if (!client->closed && client->agent.fd >= 0 && !client->failed) {
        wire_out message;
        wire_begin(&message, MESSAGE_ENDING);
        if (wire_end(&message) == 0)
            connection_send_now(&client->agent, &message);
        wire_discard(&message);
        if (prepare_last_words(client, otherwise) == 0) {
            end(client);
            client_drop_connection(client);
        }
    }
    client_leave(client);
    handoff_error unheard;
    handoff_close(client, &unheard);
}

void handoff_close_in_child(handoff_client *client)
{
    atomic_store_explicit(client->alive, 0, memory_order_relaxed); /* the parent has a page of its own */
    connection_close_in_child(&client->agent);
}

handoff_stats handoff_get_stats(handoff_client *client)
{
    return (handoff_stats){
        atomic_load_explicit(&client->chunks, memory_order_relaxed),
        atomic_load_explicit(&client->bytes, memory_order_relaxed),
        1e-9 * (double)atomic_load_explicit(&client->waited_ns, memory_order_relaxed),
        atomic_load_explicit(&client->bytes_left_out, memory_order_relaxed),
    };
}

void handoff_free(handoff_client *client)
{
    if (client == NULL)
        return;
    if (client_is_own(client, NULL) < 0) { /* another thread of the parent may have been changing the rest */
        handoff_close_in_child(client);
        return;
    }
    client_drop_memory(client);
    client_drop_connection(client);
    for (size_t a = 0; a < client->array_count; a++) {
        handoff_array *array = client->arrays + a;
        for (size_t c = 0; c < array->chunk_count; c++) {
            memory_release(array->chunks[c].kept);
            free(array->chunks[c].shape);
        }
        free(array->chunks);
        free(array->global_shape);
        free(array->grid);
        free(array->name);
        free(array->dtype);
    }
    free(client->arrays);
    free(client->session);
    free(client->socket_path);
    if (client->alive != NULL)
        munmap((void *)client->alive, (size_t)sysconf(_SC_PAGESIZE));
    pthread_mutex_destroy(&client->lock);
    pthread_mutex_destroy(&client->ends);
    free(client);
}
