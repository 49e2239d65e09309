/* The client as a rank uses it, against an agent in another thread: chunks arrive whole, and every end is clean. */

#define _GNU_SOURCE
#include "agent.h"
#include "check.h"
#include "failure.h"
#include "protocol.h"
#include "threads.h"

#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROUNDS 5000
#define ROWS 9
#define COLUMNS 7

static const char *new_session(void)
{
    static char session[64];
    static int number;
    snprintf(session, sizeof session, "native-%d-%d", (int)getpid(), number++);
    return session;
}

static agent agent_of(int ranks, int64_t slots)
{
    return (agent){.session = new_session(), .ranks = ranks, .wanted = 1, .rows = ROWS, .columns = COLUMNS, .slots = slots};
}

/* A rank that is there when its agent is. */
static handoff_client *joined(agent *agent, handoff_on_lost on_lost)
{
    handoff_error error = {.text = ""};
    agent_begin(agent);
    handoff_client *client = rank_open(agent, 0, on_lost, &error);
    agent_join(agent);
    if (client == NULL)
        fprintf(stderr, "%s: %s\n", error.kind, error.text);
    CHECK(client != NULL);
    return client;
}

static void gone(agent *agent, handoff_client *client)
{
    handoff_free(client);
    agent_end(agent);
}

static handoff_chunk *only_chunk(handoff_client *client)
{
    handoff_error error;
    handoff_chunk *chunk = handoff_find(client, ARRAY, HANDOFF_ONLY_CHUNK, &error);
    CHECK(chunk != NULL);
    return chunk;
}

static int64_t expected(int64_t timestep, int64_t row, int64_t column)
{
    return 1000 * timestep + 10 * row + column;
}

static double time_of(int64_t timestep)
{
    return timestep % 3 ? 0.5 * (double)timestep : HANDOFF_NO_TIME;
}

static int64_t time_word(double time)
{
    int64_t word = PAGE_NO_TIME;
    if (!isnan(time))
        memcpy(&word, &time, sizeof word);
    return word;
}

/* Hand timesteps over in turn in C order, in Fortran order, out of a larger array, and by computing in the slot. */
static void *simulate(void *data)
{
    handoff_client *client = data;
    handoff_chunk *chunk = only_chunk(client);
    handoff_error error;
    static const int64_t strides[][2] = {{8 * COLUMNS, 8}, {8, 8 * ROWS}, {16 * COLUMNS, 16}};
    for (int64_t t = 0; t < ROUNDS; t++) {
        int64_t source[4 * ROWS * COLUMNS], kind = t % 4;
        char *to = kind < 3 ? (char *)source : handoff_slot(chunk, t, &error);
        const int64_t *steps = strides[kind % 3];
        CHECK(to != NULL);
        for (int64_t row = 0; row < ROWS; row++)
            for (int64_t column = 0; column < COLUMNS; column++)
                *(int64_t *)(to + row * steps[0] + column * steps[1]) = expected(t, row, column);
        CHECK((kind < 3 ? handoff_send(chunk, to, kind ? steps : NULL, t, time_of(t), &error)
                        : handoff_commit(chunk, t, time_of(t), &error)) == 0);
    }
    return NULL;
}

/* Whatever else threads of a rank ask meanwhile. */
static void *ask(void *data)
{
    handoff_client *client = data;
    handoff_chunk *chunk = only_chunk(client);
    handoff_error error;
    while (handoff_get_stats(client).chunks < ROUNDS) {
        CHECK(handoff_check(chunk, INT64_MAX, &error) == 0);
        CHECK(handoff_find(client, "unknown", 0, &error) == NULL && is_kind(&error, "UnknownArrayError"));
        CHECK(handoff_check(chunk, INT64_MIN, &error) < 0 && is_kind(&error, "TimestepError"));
        sched_yield();
    }
    return NULL;
}

static void test_chunks_arrive_whole_while_slots_are_used_again(void)
{
    agent agent = agent_of(1, 3);
    handoff_client *client = joined(&agent, HANDOFF_WAIT);
    handoff_chunk *chunk = only_chunk(client);
    pthread_t rank = started(simulate, client), other = started(ask, client);
    for (int64_t seen = 0; seen < ROUNDS; seen++) {
        while (word_acquire(client->ring + RING_SUBMITTED) == seen)
            sched_yield();
        page_word *entry = client->ring + RING_ENTRIES + RING_ENTRY_WORDS * (seen % client->capacity);
        CHECK(word_peek(entry + RING_ENTRY_REGION) == 0 && word_peek(entry + RING_ENTRY_TIMESTEP) == seen);
        CHECK(word_peek(entry + RING_ENTRY_ROWS) == 0 && word_peek(entry + RING_ENTRY_TIME) == time_word(time_of(seen)));
        int64_t *slot = agent_slot(chunk, seen);
        for (int64_t row = 0; row < ROWS; row++)
            for (int64_t column = 0; column < COLUMNS; column++)
                CHECK(slot[row * COLUMNS + column] == expected(seen, row, column));
        agent_grant(chunk->array, word_peek(chunk->array->streams->table + TABLE_SLOTS + seen % 3));
    }
    CHECK(finished(rank) == NULL && finished(other) == NULL);
    CHECK(handoff_get_stats(client).bytes_handed_over == 8 * ROWS * COLUMNS * ROUNDS);
    gone(&agent, client);
}

/* A local array of ghost cells, with a chunk in it; the strides say how it lies in memory. */
static void fill_local(char *local, const int64_t *halo, const int64_t *strides, int64_t timestep)
{
    for (int64_t row = 0; row < halo[0] + ROWS + halo[1]; row++)
        for (int64_t column = 0; column < halo[2] + COLUMNS + halo[3]; column++) {
            int64_t own_row = row - halo[0], own_column = column - halo[2];
            int is_ghost = own_row < 0 || own_row >= ROWS || own_column < 0 || own_column >= COLUMNS;
            *(int64_t *)(local + row * strides[0] + column * strides[1]) =
                is_ghost ? -1 : expected(timestep, own_row, own_column);
        }
}

static void check_slot(const int64_t *slot, int64_t timestep)
{
    for (int64_t row = 0; row < ROWS; row++)
        for (int64_t column = 0; column < COLUMNS; column++)
            CHECK(slot[row * COLUMNS + column] == expected(timestep, row, column));
}

static void test_ghost_cells_stay_in_the_rank(void)
{
    enum { HIGH = 1 + ROWS + 12, WIDE = 0 + COLUMNS + 2, CELLS = HIGH * WIDE };
    static const int64_t halo[] = {1, 12, 0, 2}; /* larger than the chunk; none on one side */
    static const int64_t strides[][2] = {{8 * WIDE, 8}, {8, 8 * HIGH}, {16 * WIDE, 16}, {-8 * WIDE, -8}};
    handoff_error error;
    agent agent = agent_of(1, 2);
    agent.halo = halo;
    handoff_client *client = joined(&agent, HANDOFF_WAIT);
    handoff_chunk *chunk = only_chunk(client);
    for (int64_t t = 0; t < 8; t++) {
        int64_t *cells = calloc(2 * CELLS, sizeof *cells);
        const int64_t *steps = strides[t % 4];
        char *to = (char *)(t % 4 == 3 ? cells + CELLS - 1 : cells);
        CHECK(cells != NULL);
        fill_local(to, halo, steps, t);
        CHECK(handoff_send(chunk, to, t == 0 ? NULL : steps, t, HANDOFF_NO_TIME, &error) == 0);
        check_slot(agent_slot(chunk, t), t);
        agent_grant(chunk->array, word_peek(chunk->array->streams->table + TABLE_SLOTS + t % 2));
        free(cells);
    }
    char *slot = handoff_slot(chunk, 8, &error);
    CHECK(slot != NULL);
    fill_local(slot, (const int64_t[]){0, 0, 0, 0}, (const int64_t[]){8 * COLUMNS, 8}, 8);
    CHECK(handoff_commit(chunk, 8, HANDOFF_NO_TIME, &error) == 0);
    check_slot(agent_slot(chunk, 8), 8);
    CHECK(handoff_get_stats(client).bytes_handed_over == 9 * 8 * ROWS * COLUMNS);
    gone(&agent, client);
}

static void test_a_halo_that_makes_no_sense(void)
{
    static const int64_t shape[] = {4, 4}, position[] = {0, 0};
    static const int64_t halos[][4] = {{0, 0, -1, 0}, {0, -1, 0, 0}, {INT64_MAX, 0, 0, 0}, {0, 0, INT64_MAX - 5, 2}};
    const handoff_options options = {.session = new_session(), .world_size = 1, .warn_every_s = 600};
    for (size_t i = 0; i < sizeof halos / sizeof *halos; i++) {
        handoff_error error;
        const handoff_chunk_description chunk = {.shape = shape, .position = position, .halo = halos[i]};
        const handoff_array_description array = {
            .name = ARRAY, .dtype = "<i8", .ndim = 2, .global_shape = shape, .chunk_count = 1, .chunks = &chunk};
        CHECK(handoff_open(&options, &array, 1, &error) == NULL && is_kind(&error, "DescriptionError"));
        CHECK(strstr(error.text, "array 'T': in dimension ") == error.text);
    }
}

/* Two ranks that complete a timestep at the same time: at least one of them notifies. */

static struct {
    handoff_client *clients[2];
    meeting start, end;
} node;

static void *send_together(void *which)
{
    int own = which != NULL;
    int64_t source[ROWS * COLUMNS] = {0};
    handoff_client *client = node.clients[own];
    handoff_chunk *chunk = only_chunk(client);
    handoff_error error;
    for (int64_t t = 0; t < ROUNDS; t++) {
        meet(&node.start);
        CHECK(handoff_send(chunk, source, NULL, t, HANDOFF_NO_TIME, &error) == 0);
        meet(&node.end);
        if (own) { /* the agent, while both wait */
            CHECK(word_exchange(client->notified, 0) == 1);
            agent_grant(chunk->array, t % 2);
        }
    }
    return NULL;
}

static void *open_first(void *data)
{
    handoff_error error;
    node.clients[0] = rank_open(data, 0, HANDOFF_WAIT, &error);
    return NULL;
}

/* A full socket would hold a rank up. */
static void *drop_notices(void *data)
{
    const int *connection = data;
    char bytes[4096];
    while (recv(*connection, bytes, sizeof bytes, 0) > 0)
        ;
    return NULL;
}

static void test_of_ranks_at_the_same_time_one_notifies(void)
{
    handoff_error error;
    handoff_client **clients = node.clients;
    agent agent = agent_of(2, 2);
    agent_begin(&agent);
    pthread_t opening = started(open_first, &agent), readers[2], ranks[2];
    clients[1] = rank_open(&agent, 1, HANDOFF_WAIT, &error);
    CHECK(finished(opening) == NULL && clients[0] != NULL && clients[1] != NULL);
    agent_join(&agent);
    for (int i = 0; i < 2; i++) {
        readers[i] = started(drop_notices, agent.connections + i);
        ranks[i] = started(send_together, i ? &node : NULL);
    }
    for (int i = 0; i < 2; i++)
        CHECK(finished(ranks[i]) == NULL);
    for (int i = 0; i < 2; i++)
        CHECK(handoff_close(clients[i], &error) == 0 && finished(readers[i]) == NULL);
    handoff_free(clients[0]);
    gone(&agent, clients[1]);
}

/* Ends. */

static void *send_two(void *data)
{
    handoff_error *error = data;
    handoff_chunk *chunk = only_chunk(node.clients[0]);
    int64_t source[ROWS * COLUMNS] = {0};
    CHECK(handoff_send(chunk, source, NULL, 0, HANDOFF_NO_TIME, error) == 0);
    return (void *)(intptr_t)handoff_send(chunk, source, NULL, 1, HANDOFF_NO_TIME, error);
}

static _Thread_local int gives_up;

static int is_interrupted(void *context)
{
    (void)context;
    return gives_up;
}

/* A rank with one slot, which is held up by its second timestep. */
static pthread_t held_up(agent *agent, handoff_on_lost on_lost, handoff_error *error)
{
    node.clients[0] = joined(agent, on_lost);
    node.clients[0]->options.interrupted = is_interrupted;
    page_word *blocked = node.clients[0]->ring + RING_BLOCKED;
    pthread_t rank = started(send_two, error);
    while (word_acquire(blocked) != 1)
        sched_yield();
    return rank;
}

static void test_another_thread_ends_a_wait(void)
{
    handoff_error error;
    agent agent = agent_of(1, 1);
    pthread_t rank = held_up(&agent, HANDOFF_WAIT, &error);
    handoff_abort(node.clients[0], "enough");
    CHECK(finished(rank) != NULL && is_kind(&error, "ClosedError") && strstr(error.text, "enough") != NULL);
    CHECK(agent_hear(&agent, 0) == MESSAGE_NOTIFY && agent_hear(&agent, 0) == MESSAGE_ABORT && agent_hear(&agent, 0) == 0);
    gone(&agent, node.clients[0]);
}

static void test_a_thread_that_waits_for_its_turn_can_be_interrupted(void)
{
    handoff_error error, own;
    agent agent = agent_of(1, 1);
    pthread_t rank = held_up(&agent, HANDOFF_WAIT, &error);
    gives_up = 1;
    CHECK(handoff_advance(node.clients[0], 9, &own) < 0 && is_kind(&own, "Interrupted"));
    gives_up = 0;
    handoff_abort(node.clients[0], "enough");
    CHECK(finished(rank) != NULL && is_kind(&error, "ClosedError"));
    gone(&agent, node.clients[0]);
}

static void *close_client(void *client)
{
    handoff_error unheard;
    handoff_close(client, &unheard);
    return NULL;
}

/* ThreadSanitizer looks at what the second one uses while the first one drops it. */
static void test_two_threads_end_a_client(void)
{
    for (int i = 0; i < 20; i++) {
        agent agent = agent_of(1, 1);
        handoff_client *client = joined(&agent, HANDOFF_WAIT);
        pthread_t closing = started(close_client, client);
        handoff_abort(client, "enough");
        finished(closing);
        gone(&agent, client);
    }
}

static void test_a_wait_ends_with_the_agent(void)
{
    handoff_error error;
    agent agent = agent_of(1, 1);
    agent.if_lost = "there was a flood";
    pthread_t rank = held_up(&agent, HANDOFF_WAIT, &error);
    agent_end(&agent);
    CHECK(finished(rank) != NULL && is_kind(&error, "AnalyticsLostError"));
    CHECK(strstr(error.text, " has gone; the analytics has ended or died, or there was a flood") != NULL);
    CHECK(handoff_close(node.clients[0], &error) == 0);
    handoff_free(node.clients[0]);
}

/* What the agent's process has started may keep the connection open. */
static void test_the_end_of_the_agents_process_is_enough(void)
{
    handoff_error error;
    agent agent = agent_of(1, 2);
    handoff_client *client = joined(&agent, HANDOFF_WAIT);
    pid_t process = fork();
    if (process == 0)
        _exit(0);
    client->agent.process = (int)syscall(SYS_pidfd_open, process, 0);
    CHECK(waitpid(process, NULL, 0) == process);
    if (client->agent.process >= 0) {
        int64_t t = 0;
        while (t < HEARD_WITH_PROCESS && handoff_advance(client, t, &error) == 0)
            t++;
        CHECK(t < HEARD_WITH_PROCESS && is_kind(&error, "AnalyticsLostError"));
    }
    gone(&agent, client);
}

static void test_a_rank_that_goes_on_alone(void)
{
    handoff_error error;
    agent agent = agent_of(1, 1);
    pthread_t rank = held_up(&agent, HANDOFF_CONTINUE, &error);
    agent_end(&agent);
    CHECK(finished(rank) == NULL);
    int64_t source[ROWS * COLUMNS] = {0};
    CHECK(handoff_send(only_chunk(node.clients[0]), source, NULL, 2, HANDOFF_NO_TIME, &error) == 0);
    CHECK(handoff_close(node.clients[0], &error) == 0);
    handoff_free(node.clients[0]);
}

static void test_a_failed_session_fails_every_call(void)
{
    handoff_error error;
    agent agent = agent_of(1, 1);
    pthread_t rank = held_up(&agent, HANDOFF_WAIT, &error);
    agent_fail(&agent, 0, "HoleError", "array 'T': a hole");
    CHECK(finished(rank) != NULL && is_kind(&error, "HoleError") && strcmp(error.text, "array 'T': a hole") == 0);
    int64_t source[ROWS * COLUMNS] = {0};
    CHECK(handoff_send(only_chunk(node.clients[0]), source, NULL, 3, HANDOFF_NO_TIME, &error) < 0);
    CHECK(is_kind(&error, "HoleError"));
    gone(&agent, node.clients[0]);
}

static void test_closing(void)
{
    handoff_error error;
    int64_t source[ROWS * COLUMNS] = {0};
    agent agent = agent_of(1, 2);
    handoff_client *client = joined(&agent, HANDOFF_WAIT);
    handoff_chunk *chunk = only_chunk(client);
    CHECK(handoff_send(chunk, source, NULL, 0, INFINITY, &error) < 0 && is_kind(&error, "PhysicalTimeError"));
    CHECK(handoff_send(chunk, source, NULL, 0, HANDOFF_NO_TIME, &error) == 0);
    CHECK(handoff_close(client, &error) == 0 && handoff_close(client, &error) == 0);
    CHECK(handoff_send(chunk, source, NULL, 1, HANDOFF_NO_TIME, &error) < 0 && is_kind(&error, "ClosedError"));
    CHECK(agent_hear(&agent, 0) == MESSAGE_NOTIFY && agent_hear(&agent, 0) == MESSAGE_CLOSE && agent_hear(&agent, 0) == 0);
    gone(&agent, client);
}

static void test_a_slot_may_be_used_after_another_thread_has_closed(void)
{
    handoff_error error;
    given_slot given;
    agent agent = agent_of(1, 2);
    handoff_client *client = joined(&agent, HANDOFF_WAIT);
    CHECK(client_give_slot(only_chunk(client), 0, &given, &error) == 1);
    CHECK(handoff_close(client, &error) == 0);
    CHECK(given.strides[0] == 8 * COLUMNS && given.at >= given.memory->base);
    memset(given.at, 1, ROWS * COLUMNS * 8);
    memory_release(given.memory);
    gone(&agent, client);
}

static void test_a_rank_that_goes_on_alone_may_finish_its_slot(void)
{
    handoff_error error;
    agent agent = agent_of(1, 2);
    handoff_client *client = joined(&agent, HANDOFF_CONTINUE);
    handoff_chunk *chunk = only_chunk(client);
    char *slot = handoff_slot(chunk, 0, &error);
    agent_end(&agent);
    CHECK(handoff_advance(client, 0, &error) == 0 && client->detached);
    memset(slot, 1, ROWS * COLUMNS * 8);
    CHECK(handoff_commit(chunk, 0, HANDOFF_NO_TIME, &error) == 0);
    CHECK(handoff_slot(chunk, 1, &error) == NULL && error.kind[0] == '\0');
    handoff_free(client);
}

static void test_a_dtype_that_others_have_declared(void)
{
    handoff_error error;
    agent agent = agent_of(1, 2);
    handoff_client *client = joined(&agent, HANDOFF_WAIT);
    handoff_array *array = only_chunk(client)->array;
    CHECK(handoff_declare_dtype(array, "<i8", &error) == 0);
    CHECK(handoff_declare_dtype(array, "<f8", &error) < 0 && is_kind(&error, "ChunkDtypeError"));
    CHECK(strcmp(error.text, "bridge 0, array 'T': other bridges declared dtype <i8, this one declared none and sends <f8") == 0);
    gone(&agent, client);
}

static void test_what_nobody_asks_for_goes_nowhere(void)
{
    handoff_error error;
    int64_t source[ROWS * COLUMNS] = {0};
    agent agent = agent_of(1, 2);
    agent.wanted = 0;
    handoff_client *client = joined(&agent, HANDOFF_WAIT);
    handoff_chunk *chunk = only_chunk(client);
    for (int64_t t = 0; t < 10; t++)
        CHECK(handoff_send(chunk, source, NULL, t, HANDOFF_NO_TIME, &error) == 0);
    CHECK(handoff_slot(chunk, 10, &error) == NULL && error.kind[0] == '\0');
    CHECK(handoff_get_stats(client).chunks == 0);
    gone(&agent, client);
}

static void test_a_forked_child_touches_nothing(void)
{
    handoff_error error;
    int64_t source[ROWS * COLUMNS] = {0};
    agent agent = agent_of(1, 2);
    handoff_client *client = joined(&agent, HANDOFF_WAIT);
    handoff_chunk *chunk = only_chunk(client);
    pid_t child = fork();
    if (child == 0) {
        int refused = handoff_send(chunk, source, NULL, 0, HANDOFF_NO_TIME, &error) < 0 &&
                      is_kind(&error, "ForkedProcessError");
        refused &= handoff_close(client, &error) < 0 && is_kind(&error, "ForkedProcessError");
        handoff_abort(client, "a child");
        handoff_close_in_child(client);
        _exit(refused ? 0 : 1);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(word_peek(client->ring + RING_SUBMITTED) == 0);
    CHECK(handoff_send(chunk, source, NULL, 0, HANDOFF_NO_TIME, &error) == 0 && handoff_close(client, &error) == 0);
    CHECK(agent_hear(&agent, 0) == MESSAGE_NOTIFY && agent_hear(&agent, 0) == MESSAGE_CLOSE);
    gone(&agent, client);
}

#define MANY 50000 /* chunks, whose descriptions do not fit into a socket's buffer */

static void test_an_agent_that_does_not_read(void)
{
    static handoff_chunk_description chunks[MANY];
    const int64_t one[] = {1};
    handoff_error error;
    agent_address address;
    const char *session = new_session();
    const handoff_array_description array = {
        .name = ARRAY, .dtype = "<i8", .ndim = 1, .global_shape = one, .chunk_count = MANY, .chunks = chunks};
    const handoff_options options = {.session = session, .world_size = 1, .connect_timeout_s = 0.1, .start_timeout_s = 0.1,
                                     .warn_every_s = 600};
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), waiting = 0, connections[8];
    for (int i = 0; i < MANY; i++)
        chunks[i] = (handoff_chunk_description){.shape = one, .position = one};
    CHECK(address_of(session, NULL, &address, &error) == 0);
    CHECK(bind(listener, (struct sockaddr *)&address.address, address.length) == 0 && listen(listener, 0) == 0);
    CHECK(handoff_open(&options, &array, 1, &error) == NULL && is_kind(&error, "WaitTimeoutError"));
    do { /* until no more can wait to be accepted */
        connections[waiting] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    } while (connect(connections[waiting++], (struct sockaddr *)&address.address, address.length) == 0);
    CHECK(handoff_open(&options, NULL, 0, &error) == NULL && is_kind(&error, "NoAnalyticsError"));
    while (waiting > 0)
        close(connections[--waiting]);
    close(listener);
}

static int descriptors_left_to_programs(void)
{
    int left = 0;
    for (int fd = 3; fd < 256; fd++) {
        int flags = fcntl(fd, F_GETFD);
        left += flags >= 0 && !(flags & FD_CLOEXEC);
    }
    return left;
}

static void test_last_words_wait_for_the_exit_status(void)
{
    agent agent = agent_of(1, 2);
    handoff_client *client = joined(&agent, HANDOFF_WAIT);
    int before = descriptors_left_to_programs();
    handoff_close_with_process(client, "it failed");
    CHECK(agent_hear(&agent, 0) == MESSAGE_ENDING);
    CHECK(descriptors_left_to_programs() == before);
    gone(&agent, client);
}

static void test_nobody_listens(void)
{
    handoff_error error;
    const handoff_options options = {.session = new_session(), .world_size = 1, .warn_every_s = 600};
    CHECK(handoff_open(&options, NULL, 0, &error) == NULL && is_kind(&error, "NoAnalyticsError"));
    handoff_refuse(&options, "a reason");
}

int main(void)
{
    RUN(test_chunks_arrive_whole_while_slots_are_used_again);
    RUN(test_ghost_cells_stay_in_the_rank);
    RUN(test_a_halo_that_makes_no_sense);
    if (!EMULATED)
        RUN(test_of_ranks_at_the_same_time_one_notifies);
    RUN(test_another_thread_ends_a_wait);
    RUN(test_a_thread_that_waits_for_its_turn_can_be_interrupted);
    RUN(test_two_threads_end_a_client);
    RUN(test_a_wait_ends_with_the_agent);
    RUN(test_the_end_of_the_agents_process_is_enough);
    RUN(test_a_rank_that_goes_on_alone);
    RUN(test_a_failed_session_fails_every_call);
    RUN(test_closing);
    RUN(test_a_slot_may_be_used_after_another_thread_has_closed);
    RUN(test_a_rank_that_goes_on_alone_may_finish_its_slot);
    RUN(test_a_dtype_that_others_have_declared);
    RUN(test_what_nobody_asks_for_goes_nowhere);
    RUN(test_a_forked_child_touches_nothing);
    RUN(test_an_agent_that_does_not_read);
    RUN(test_last_words_wait_for_the_exit_status);
    RUN(test_nobody_listens);
    return 0;
}
