/* What the agent says, and what follows from it. */

#define _GNU_SOURCE
#include "client.h"
#include "failure.h"
#include "hot.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

int client_malformed(const char *message, handoff_error *error)
{
    return fail(error, "ProtocolError", "received a malformed %s", message);
}

int client_lost(handoff_client *client, handoff_error *error)
{
    if (*client->down)
        fail(error, "AnalyticsLostError", "%s; then its agent on this host has ended as well", client->down);
    else
        fail(error, "AnalyticsLostError", "the agent of session '%s' on this host has gone; the analytics has ended or died%s%s",
             client->session, *client->if_lost ? ", or " : "", client->if_lost);
    if (client->welcomed) {
        client->failure = *error;
        client->failed = 1;
    }
    return -1;
}

/* Read a message that is one text. */
static int get_text(wire_in *in, char *text, size_t size)
{
    char *got = wire_get_text(in);
    if (got == NULL)
        return -1;
    snprintf(text, size, "%s", got);
    free(got);
    return 0;
}

static int on_later(handoff_client *client, wire_in *in, handoff_error *error)
{
    client->sent_away = client->welcomed;
    client->welcomed = 0;
    *client->down = '\0';
    if (get_text(in, client->later, sizeof client->later) < 0)
        return client_malformed("Later", error);
    return fail(error, "AnalyticsLostError", "%s", client->later);
}

static int on_fail(handoff_client *client, wire_in *in, handoff_error *error)
{
    char kind[HANDOFF_KIND_BYTES], text[HANDOFF_TEXT_BYTES];
    if (get_text(in, kind, sizeof kind) < 0 || get_text(in, text, sizeof text) < 0)
        return client_malformed("Fail", error);
    fail(&client->failure, kind, "%s", text);
    client->failed = 1;
    *error = client->failure;
    return -1;
}

static int on_analytics_down(handoff_client *client, wire_in *in, handoff_error *error)
{
    if (get_text(in, client->down, sizeof client->down) < 0)
        return client_malformed("AnalyticsDown", error);
    if (client->options.on_lost != HANDOFF_WAIT) {
        fail(&client->failure, "AnalyticsLostError", "%s", client->down);
        client->failed = 1;
        *error = client->failure;
        return -1;
    }
    client_say(client, HANDOFF_WARNING, "%s; waiting for another one", client->down);
    return 0;
}

static void on_analytics_up(handoff_client *client)
{
    *client->down = '\0';
    client_say(client, HANDOFF_WARNING, "another analytics has taken over");
}

/* The start. */

typedef struct {
    const char *magic;
    int writable;
    handoff_memory **memory; /* where it goes */
} expected_page;

static int map_pages(handoff_client *client, const expected_page *expected, const int64_t *sizes, size_t count,
                     handoff_error *error)
{
    int descriptors[PAGES];
    if (connection_take(&client->agent, descriptors, count) < 0)
        return fail(error, "ProtocolError",
                    "the agent's pages did not all come along; is the limit on open files (ulimit -n) too small?");
    for (size_t i = 0; i < count; i++) {
        if ((*expected[i].memory = memory_map(descriptors[i], sizes[i], expected[i].writable, error)) == NULL) {
            while (++i < count)
                close(descriptors[i]);
            return -1;
        }
    }
    for (size_t i = 0; i < count; i++) {
        const handoff_memory *page = *expected[i].memory;
        const page_word *words = (const page_word *)page->base;
        if (page->nbytes < PAGE_HEADER_WORDS * sizeof *words || memcmp(words, expected[i].magic, sizeof *words) != 0 ||
            word_peek(words + PAGE_VERSION) != PAGE_LAYOUT_VERSION)
            return fail(error, "ProtocolError",
                        "a page of the agent's has another layout; install the same deisa-ray on both sides");
    }
    return 0;
}

/* The pages for steering, which come last. */
static int get_feedback(handoff_client *client, wire_in *in, handoff_error *error)
{
    const expected_page expected[FEEDBACK_PAGES] = {
        {PAGE_MAGIC_FEEDBACK, 0, &client->feedback},
        {PAGE_MAGIC_QUESTIONS, 1, &client->questions},
    };
    int64_t sizes[FEEDBACK_PAGES];
    if (in->at == in->end) /* an agent that has none */
        return 0;
    size_t count = wire_get_count(in);
    if (in->bad || (count != 0 && count != FEEDBACK_PAGES))
        return client_malformed("Start", error);
    for (size_t i = 0; i < count; i++)
        sizes[i] = wire_get_natural(in);
    int64_t row = wire_get_natural(in);
    if (in->bad)
        return client_malformed("Start", error);
    if (count == 0)
        return 0;
    if (map_pages(client, expected, sizes, count, error) < 0)
        return -1;
    client->asked = page_words(client->questions, row, ASKED_WORDS * FEEDBACK_MAX_ASKED_KEYS);
    return client->asked != NULL && client_check_feedback(client) == 0 ? 0 : client_malformed("Start", error);
}

static int on_start(handoff_client *client, wire_in *in, handoff_error *error)
{
    const expected_page expected[PAGES] = {
        {PAGE_MAGIC_SLOT_TABLE, 0, &client->pages[0]},
        {PAGE_MAGIC_ARRIVAL_COUNTERS, 1, &client->pages[1]},
        {PAGE_MAGIC_SUBMISSION_RING, 1, &client->pages[2]},
    };
    int64_t sizes[PAGES];
    size_t pages = wire_get_count(in);
    if (in->bad || client->started || (pages != 0 && pages != PAGES))
        return client_malformed("Start", error);
    for (size_t i = 0; i < pages; i++)
        sizes[i] = wire_get_natural(in);
    client->capacity = wire_get_natural(in);
    size_t wanted = wire_get_count(in);
    if (in->bad || (pages == 0 && wanted > 0))
        return client_malformed("Start", error);
    if (pages > 0) {
        if (map_pages(client, expected, sizes, PAGES, error) < 0)
            return -1;
        client->ring = (page_word *)client->pages[2]->base;
        client->notified = (page_word *)client->pages[1]->base + COUNTERS_NOTIFIED;
        if (client->capacity < 1 || client->capacity > INT32_MAX ||
            page_words(client->pages[2], RING_ENTRIES, RING_ENTRY_WORDS * client->capacity) == NULL)
            return client_malformed("Start", error);
    }
    for (size_t i = 0; i < wanted; i++)
        if (client_on_wanted(client, in) < 0)
            return client_malformed("Start", error);
    if (get_text(in, client->if_lost, sizeof client->if_lost) < 0)
        return client_malformed("Start", error);
    if (get_feedback(client, in, error) < 0)
        return -1;
    client->started = 1;
    *client->progress = '\0';
    client_provide(client);
    return 0;
}

static int handle(handoff_client *client, uint16_t code, wire_in *in, handoff_error *error)
{
    switch (code) {
    case MESSAGE_PROGRESS:
        client->welcomed = 1;
        return get_text(in, client->progress, sizeof client->progress) < 0 ? client_malformed("Progress", error) : 0;
    case MESSAGE_SLOTS:
        return client_on_slots(client, in, error);
    case MESSAGE_START:
        return on_start(client, in, error);
    case MESSAGE_FAIL:
        return on_fail(client, in, error);
    case MESSAGE_ANALYTICS_DOWN:
        return on_analytics_down(client, in, error);
    case MESSAGE_ANALYTICS_UP:
        on_analytics_up(client);
        return 0;
    case MESSAGE_LATER:
        return on_later(client, in, error);
    default:
        return fail(error, "ProtocolError", "the agent sent a message with code %u, which a rank does not expect", code);
    }
}

int client_receive(handoff_client *client, handoff_error *error)
{
    if (atomic_load_explicit(&client->ended_by_thread, memory_order_acquire))
        return fail(error, "ClosedError", "another thread has ended the bridge: %s", client->ended_why);
    if (client->failed) {
        *error = client->failure;
        return -1;
    }
    if (client->agent.fd < 0)
        return fail(error, "AnalyticsLostError", "the connection to the agent is closed");
    for (;;) {
        uint16_t code;
        wire_in fields;
        int there;
        while ((there = connection_next(&client->agent, &code, &fields)) > 0)
            if (handle(client, code, &fields, error) < 0)
                return -1;
        if (there < 0)
            return fail(error, "ProtocolError", "received bytes that are no message");
        int got = connection_receive(&client->agent);
        if (got == 0)
            return 0;
        if (got < 0 && atomic_load_explicit(&client->ended_by_thread, memory_order_acquire))
            return fail(error, "ClosedError", "another thread has ended the bridge: %s", client->ended_why);
        if (got < 0)
            return client_lost(client, error);
    }
}

/* The connection tells of the agent's end, unless something that it has started keeps that open: then its process does, which is
   asked now and then, since a rank that has computed for a while pays for whatever the kernel has to look up. */
HOT int client_hear(handoff_client *client, handoff_error *error)
{
    int has_news = ++client->heard % HEARD_WITH_PROCESS == 0 ? connection_wait(&client->agent, 0)
                                                             : connection_has_news(&client->agent);
    if (!client->failed && !has_news)
        return 0;
    return client_receive(client, error);
}

/* Sending a message, for which the agent may have no room now. */
typedef struct {
    const wire_out *message;
    size_t sent;
    int gone;
} transmission;

static int has_sent(handoff_client *client, void *subject)
{
    transmission *now = subject;
    int result = connection_send(&client->agent, now->message, &now->sent);
    now->gone = result < 0;
    return result != 0;
}

static void pause_for_room(handoff_client *client, void *subject, double seconds)
{
    (void)subject;
    connection_wait_for_room(&client->agent, seconds);
}

static void describe_transmission(handoff_client *client, void *subject, char *text, size_t size)
{
    (void)client;
    (void)subject;
    snprintf(text, size, "waiting for the agent, which does not read what this rank says");
}

static int transmit(handoff_client *client, const wire_out *message, handoff_error *error)
{
    transmission now = {message, 0, 0};
    client_wait wait = {client->options.start_timeout_s, "DEISA_RAY_START_TIMEOUT_S", has_sent, pause_for_room,
                        describe_transmission, &now};
    int result = client_wait_for(client, &wait, error);
    if (result < 0 && now.sent > 0) /* half a message: nothing can follow it */
        shutdown(client->agent.fd, SHUT_RDWR);
    if (now.gone) /* it may have said why */
        return client_receive(client, error) < 0 ? -1 : client_lost(client, error);
    return result;
}

int client_transmit(handoff_client *client, wire_out *message, handoff_error *error)
{
    int result;
    if (wire_end(message) == 0)
        result = client->agent.fd >= 0 ? transmit(client, message, error)
                                       : fail(error, "AnalyticsLostError", "the connection to the agent is closed");
    else if (message->failed)
        result = fail(error, "MemoryBoundError", "no memory is left");
    else
        result = fail(error, "ProtocolError",
                      "a message of %zu bytes is larger than the limit of %d; the bridge describes too many chunks",
                      message->length, PROTOCOL_MAX_MESSAGE_BYTES);
    wire_discard(message);
    return result;
}
