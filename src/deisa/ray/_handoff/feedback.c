/* Steering: getting what the analytics has set, from pages that the agent writes.

   A bridge *asks* about a key and a timestep. It notes that first, and then looks for the answer: so the agent knows, before it
   lets a value be set, whether somebody has an answer already. See "Steering" in docs/protocol.md. */

#define _GNU_SOURCE
#include "client.h"
#include "failure.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SHOWN_KEY_BYTES (2 * FEEDBACK_MAX_KEY_BYTES)

typedef enum { NOT_NOW, NOT_SET, IS_SET, WAS_DROPPED } answer;
typedef enum { NO_TROUBLE, NO_MEMORY, NO_ROOM, NONSENSE } trouble;

typedef struct {
    const char *key;
    size_t length;
    int64_t hash, timestep;
    int waits; /* for the analytics to set it, or to finish with the timestep */
    int all;   /* values of the key are asked for, whatever their timesteps */
    answer answer;
    handoff_answer *values; /* where the answer goes: one, or as many as there are */
    size_t count;
    trouble trouble; /* why there is no answer */
} question;

static page_word *feedback_of(const handoff_client *client)
{
    return (page_word *)client->feedback->base;
}

static int64_t row_words(const page_word *page)
{
    return KEY_ENTRIES + ANSWER_WORDS * word_peek(page + FEEDBACK_QUEUE_SIZE);
}

int client_check_feedback(const handoff_client *client)
{
    int64_t words = (int64_t)(client->feedback->nbytes / sizeof(page_word));
    const page_word *page = feedback_of(client);
    if (words < FEEDBACK_FIRST_ROW)
        return -1;
    int64_t size = word_peek(page + FEEDBACK_QUEUE_SIZE), values = word_peek(page + FEEDBACK_VALUES);
    if (size < 1 || size > FEEDBACK_MAX_QUEUE_SIZE || word_peek(page + FEEDBACK_ROWS) != FEEDBACK_MAX_KEYS)
        return -1;
    return values == FEEDBACK_FIRST_ROW + FEEDBACK_MAX_KEYS * row_words(page) && values <= words ? 0 : -1;
}

/* FNV-1a; 0 stands for no key. */
static int64_t hash_of(const char *key, size_t length)
{
    uint64_t hash = 0xCBF29CE484222325u;
    for (size_t i = 0; i < length; i++)
        hash = (hash ^ (unsigned char)key[i]) * 0x100000001B3u;
    return hash != 0 ? (int64_t)hash : 1;
}

/* Where a hash comes in a table of so many entries, and then the next ones. */
static int64_t place_of(int64_t hash, int64_t probe, int64_t entries)
{
    return (int64_t)(((uint64_t)hash % (uint64_t)entries + (uint64_t)probe) % (uint64_t)entries);
}

/* Looking. All of this may be overwritten meanwhile: nothing that is read is believed before `look` has seen that it was not. */

static const page_word *row_of(const page_word *page, const question *asked)
{
    for (int64_t probe = 0; probe < FEEDBACK_MAX_KEYS; probe++) {
        const page_word *row = page + FEEDBACK_FIRST_ROW + row_words(page) * place_of(asked->hash, probe, FEEDBACK_MAX_KEYS);
        int64_t hash = word_peek(row + KEY_HASH);
        if (hash == 0)
            return NULL;
        if (hash == asked->hash && word_peek(row + KEY_LENGTH) == (int64_t)asked->length &&
            memcmp((const char *)(row + KEY_BYTES), asked->key, asked->length) == 0)
            return row;
    }
    return NULL;
}

static int64_t count_of(const page_word *page, const page_word *row)
{
    int64_t count = word_peek(row + KEY_COUNT), size = word_peek(page + FEEDBACK_QUEUE_SIZE);
    return count < 0 ? 0 : count < size ? count : size;
}

/* The entry of a timestep, or NULL. */
static const page_word *entry_of(const page_word *page, const page_word *row, int64_t timestep)
{
    int64_t low = 0, high = count_of(page, row);
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        const page_word *entry = row + KEY_ENTRIES + ANSWER_WORDS * middle;
        int64_t found = word_peek(entry + ANSWER_TIMESTEP);
        if (found == timestep)
            return entry;
        if (found < timestep)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}

/* Copy a value: 1 copied; 0 what the entry says makes no sense; -1 no memory is left. */
static int copy_value(const handoff_client *client, const page_word *entry, handoff_answer *value)
{
    const page_word *page = feedback_of(client);
    int64_t first = word_peek(entry + ANSWER_FIRST), length = word_peek(entry + ANSWER_LENGTH);
    int64_t words = (int64_t)(client->feedback->nbytes / sizeof *page);
    if (first < word_peek(page + FEEDBACK_VALUES) || first > words || length < 1 ||
        length > (words - first) * (int64_t)sizeof *page)
        return 0;
    if ((value->bytes = malloc((size_t)length)) == NULL)
        return -1;
    value->length = (size_t)length;
    value->timestep = word_peek(entry + ANSWER_TIMESTEP);
    memcpy(value->bytes, (const char *)(page + first), (size_t)length);
    return 1;
}

/* Copy all values of a key, as `copy_value` does. */
static int copy_all(const handoff_client *client, const page_word *row, question *asked)
{
    const page_word *page = feedback_of(client);
    size_t count = (size_t)count_of(page, row);
    if ((asked->values = calloc(count + 1, sizeof *asked->values)) == NULL)
        return -1;
    for (; asked->count < count; asked->count++) {
        int copied = copy_value(client, row + KEY_ENTRIES + ANSWER_WORDS * (int64_t)asked->count, asked->values + asked->count);
        if (copied != 1)
            return copied;
    }
    return 1;
}

static void forget(question *asked)
{
    if (asked->all) {
        handoff_answers_free(asked->values, asked->count);
        asked->values = NULL;
        asked->count = 0;
    }
    else
        handoff_answer_free(asked->values);
}

/* Read the answer once: whether it was not overwritten meanwhile. */
static int read_answer(const handoff_client *client, question *asked)
{
    const page_word *page = feedback_of(client);
    int64_t before = word_load(page + FEEDBACK_CHANGES);
    int copied = 1;
    asked->answer = NOT_NOW;
    if (before & 1)
        return 1;
    int closed = !asked->all && word_peek(page + FEEDBACK_CLOSED_KEY) == asked->hash &&
                 word_peek(page + FEEDBACK_CLOSED_TIMESTEP) == asked->timestep;
    if (!closed) {
        const page_word *row = row_of(page, asked);
        const page_word *entry = row != NULL && !asked->all ? entry_of(page, row, asked->timestep) : NULL;
        asked->answer = NOT_SET;
        if (entry != NULL || (row != NULL && asked->all && count_of(page, row) > 0)) {
            copied = asked->all ? copy_all(client, row, asked) : copy_value(client, entry, asked->values);
            asked->answer = IS_SET;
        }
        else if (row != NULL && !asked->all && asked->timestep <= word_peek(row + KEY_DROPPED))
            asked->answer = WAS_DROPPED;
    }
    word_fence_reads();
    if (word_peek(page + FEEDBACK_CHANGES) == before) {
        if (copied != 1)
            asked->trouble = copied < 0 ? NO_MEMORY : NONSENSE;
        return 1;
    }
    forget(asked);
    return 0;
}

static void look(const handoff_client *client, question *asked)
{
    while (!read_answer(client, asked))
        ;
}

/* Note that this bridge has an answer, from now on: 0 noted; -1 there is no room for another key. */
static int note(const handoff_client *client, const question *asked)
{
    for (int64_t probe = 0; probe < FEEDBACK_MAX_ASKED_KEYS; probe++) {
        page_word *entry = client->asked + ASKED_WORDS * place_of(asked->hash, probe, FEEDBACK_MAX_ASKED_KEYS);
        int64_t hash = word_peek(entry + ASKED_HASH);
        if (hash != 0 && hash != asked->hash)
            continue;
        if (hash == 0 || word_peek(entry + ASKED_TIMESTEP) < asked->timestep)
            word_store(entry + ASKED_TIMESTEP, asked->timestep);
        if (hash == 0)
            word_store(entry + ASKED_HASH, asked->hash);
        return 0;
    }
    return -1;
}

/* Whether there is an answer; once there is, it is noted, and final. */
static int is_answered(handoff_client *client, void *subject)
{
    question *asked = subject;
    if (asked->waits) {
        int finished = word_acquire(feedback_of(client) + FEEDBACK_FINISHED) >= asked->timestep;
        look(client, asked);
        if (asked->answer == NOT_NOW || (asked->answer == NOT_SET && !finished))
            return 0;
        forget(asked);
        asked->waits = 0; /* only for a question that is closed, from now on */
    }
    if (asked->trouble == NO_TROUBLE && !asked->all && note(client, asked) < 0)
        asked->trouble = NO_ROOM;
    if (asked->trouble == NO_TROUBLE)
        look(client, asked);
    return asked->answer != NOT_NOW || asked->trouble != NO_TROUBLE;
}

static void pause_for_answer(handoff_client *client, void *subject, double seconds)
{
    question *asked = subject, again = *asked;
    handoff_answer unused = {0};
    page_word *wake = feedback_of(client) + FEEDBACK_WAKE;
    int64_t seen = word_acquire(wake);
    int finished = word_acquire(feedback_of(client) + FEEDBACK_FINISHED) >= asked->timestep;
    again.values = again.all ? NULL : &unused;
    look(client, &again);
    forget(&again);
    int goes_on = again.answer == NOT_NOW || (again.answer == NOT_SET && asked->waits && !finished);
    if (goes_on && !atomic_load(&client->ended_by_thread) && !connection_wait(&client->agent, 0))
        word_wait(wake, seen, seconds);
}

static void describe_question(handoff_client *client, void *subject, char *text, size_t size)
{
    const question *asked = subject;
    char key[SHOWN_KEY_BYTES + 1];
    quoted(asked->key, key, sizeof key);
    if (asked->waits)
        snprintf(text, size,
                 "bridge %lld waits for %s at timestep %lld, which the analytics has not set, and it has not finished with that "
                 "timestep: its callbacks take longer, or an array that they look at was not sent for it yet (advance() says "
                 "that nothing more comes)",
                 (long long)client->options.bridge_id, key, (long long)asked->timestep);
    else
        snprintf(text, size, "bridge %lld waits while the analytics sets %s at timestep %lld",
                 (long long)client->options.bridge_id, key, (long long)asked->timestep);
}

/* Asking. */

static int check_key(const handoff_client *client, const char *key, handoff_error *error)
{
    size_t length = strlen(key);
    if (length >= 1 && length <= FEEDBACK_MAX_KEY_BYTES)
        return 0;
    return fail(error, "FeedbackError", "bridge %lld asks for a key of %zu bytes; keys have 1 to %d bytes of UTF-8",
                (long long)client->options.bridge_id, length, FEEDBACK_MAX_KEY_BYTES);
}

static int give_answer(const handoff_client *client, const question *asked, handoff_error *error)
{
    char key[SHOWN_KEY_BYTES + 1];
    if (asked->answer == WAS_DROPPED)
        return fail(error, "FeedbackDroppedError",
                    "bridge %lld asks for %s at timestep %lld, but the values of that key are no longer kept for it: the analytics "
                    "keeps the last ones only. Ask earlier, or have it keep more: Deisa(feedback_queue_size=...) counts the values "
                    "of each key, DEISA_RAY_FEEDBACK_MEMORY_MIB is the memory for all",
                    (long long)client->options.bridge_id, quoted(asked->key, key, sizeof key), (long long)asked->timestep);
    return asked->answer == IS_SET;
}

static int ask(handoff_client *client, question *asked, double wait_s, handoff_error *error)
{
    int result;
    if (client->closed)
        return fail(error, "ClosedError", "bridge %lld is closed; nothing can be asked after close()",
                    (long long)client->options.bridge_id);
    if (client->detached)
        return 0;
    if (client_hear(client, error) < 0)
        return -1;
    if (client->feedback == NULL)
        return fail(error, "ProtocolError", "the agent offers no values; install the same deisa-ray on both sides");
    client_wait wait = {client->options.send_timeout_s, "DEISA_RAY_SEND_TIMEOUT_S", is_answered, pause_for_answer,
                        describe_question, asked};
    if (wait_s >= 0) {
        wait.timeout_s = wait_s;
        wait.setting = "wait=";
        asked->waits = 1;
        look(client, asked);
        if (asked->answer != IS_SET)
            word_exchange((page_word *)client->questions->base + QUESTIONS_WAITED, 1);
        forget(asked);
    }
    result = client_wait_for(client, &wait, error);
    if (result < 0) {
        forget(asked);
        return -1;
    }
    if (asked->trouble != NO_TROUBLE)
        forget(asked);
    switch (asked->trouble) {
    case NO_MEMORY: return fail(error, "MemoryBoundError", "no memory is left");
    case NO_ROOM:
        return fail(error, "FeedbackSizeError", "bridge %lld asks for more than %d different keys, which is the limit",
                    (long long)client->options.bridge_id, FEEDBACK_MAX_ASKED_KEYS);
    case NONSENSE: return fail(error, "ProtocolError", "the feedback page of the agent names a value that is not there");
    default: return give_answer(client, asked, error);
    }
}

static int ask_in_turn(handoff_client *client, question *asked, double wait_s, handoff_error *error)
{
    if (check_key(client, asked->key, error) < 0)
        return -1;
    asked->length = strlen(asked->key);
    asked->hash = hash_of(asked->key, asked->length);
    if (client_enter(client, error) < 0)
        return -1;
    int result = client_settle(client, ask(client, asked, wait_s, error), error);
    client_leave(client);
    return result;
}

int handoff_get(handoff_client *client, const char *key, int64_t timestep, double wait_s, handoff_answer *value,
                handoff_error *error)
{
    question asked = {.key = key, .timestep = timestep, .values = value};
    *value = (handoff_answer){0};
    if (timestep < HANDOFF_EARLIEST_TIMESTEP)
        return fail(error, "TimestepError", "the least 64-bit integer is no timestep");
    return ask_in_turn(client, &asked, wait_s, error);
}

int handoff_get_queue(handoff_client *client, const char *key, handoff_answer **values, size_t *count, handoff_error *error)
{
    question asked = {.key = key, .all = 1};
    int result = ask_in_turn(client, &asked, -1, error);
    *values = asked.values;
    *count = asked.count;
    return result;
}
