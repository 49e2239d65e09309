#define _GNU_SOURCE
#include "agent.h"
#include "check.h"
#include "failure.h"
#include "protocol.h"
#include "threads.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define PAGE_BYTES 4096

static int new_memory(int64_t nbytes)
{
    int fd = memfd_create("test", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, nbytes) == 0);
    return fd;
}

/* A page with its header, and some more words; the ranks map it afterwards. */
static int new_page(const char *magic, const int64_t *words, int64_t count)
{
    int64_t page[PAGE_BYTES / 8] = {0};
    memcpy(page, magic, 8);
    page[1] = PAGE_LAYOUT_VERSION;
    page[2] = PAGE_HEADER_WORDS;
    memcpy(page + 4, words, (size_t)count * sizeof *words);
    int fd = new_memory(PAGE_BYTES);
    CHECK(pwrite(fd, page, sizeof page, 0) == sizeof page);
    return fd;
}

static void send_with(int connection, wire_out *out, int *descriptors, size_t count)
{
    union {
        struct cmsghdr aligned;
        char bytes[CMSG_SPACE(PAGES * sizeof(int))];
    } control = {0};
    CHECK(wire_end(out) == 0);
    struct iovec data = {out->data, out->length};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    if (count > 0) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *part = CMSG_FIRSTHDR(&message);
        part->cmsg_level = SOL_SOCKET;
        part->cmsg_type = SCM_RIGHTS;
        part->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(part), descriptors, count * sizeof(int));
    }
    CHECK(sendmsg(connection, &message, MSG_NOSIGNAL) == (ssize_t)out->length);
    while (count > 0)
        close(descriptors[--count]);
    wire_discard(out);
}

static void receive_all(int connection, void *data, size_t length)
{
    CHECK(length == 0 || recv(connection, data, length, MSG_WAITALL) == (ssize_t)length);
}

/* Receive a message, and return its code; of a Hello also say whose it is. */
static uint16_t hear(int connection, int64_t *bridge_id)
{
    unsigned char header[WIRE_HEADER_BYTES];
    ssize_t got = recv(connection, header, sizeof header, MSG_WAITALL);
    if (got <= 0)
        return 0;
    CHECK(got == sizeof header);
    size_t length = wire_announced(header) - 2;
    unsigned char *fields = malloc(length + 1);
    CHECK(fields != NULL);
    receive_all(connection, fields, length);
    if (bridge_id != NULL) {
        wire_in in = wire_of(fields, length);
        CHECK(wire_get_int(&in) == PROTOCOL_VERSION);
        free(wire_get_text(&in));
        *bridge_id = wire_get_int(&in);
        CHECK(!in.bad);
    }
    free(fields);
    wire_in in = wire_of(header + 4, 2);
    return wire_get_code(&in);
}

uint16_t agent_hear(agent *agent, int rank)
{
    return hear(agent->connections[rank], NULL);
}

void agent_say(agent *agent, int rank, uint16_t code, const char *text)
{
    wire_out out;
    wire_begin(&out, code);
    wire_text(&out, text);
    send_with(agent->connections[rank], &out, NULL, 0);
}

void agent_fail(agent *agent, int rank, const char *kind, const char *text)
{
    wire_out out;
    wire_begin(&out, MESSAGE_FAIL);
    wire_text(&out, kind);
    wire_text(&out, text);
    send_with(agent->connections[rank], &out, NULL, 0);
}

static void send_slots(agent *agent, int rank)
{
    int64_t slot_bytes = agent->rows * agent->columns * 8, nbytes = agent->slots * slot_bytes;
    int segment = new_memory(nbytes);
    wire_out out;
    wire_begin(&out, MESSAGE_SLOTS);
    wire_count(&out, 1);
    wire_int(&out, nbytes);
    wire_count(&out, 1);
    size_t part = wire_open_part(&out);
    const int64_t numbers[] = {rank, 0, 0, slot_bytes, agent->slots};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        wire_int(&out, numbers[i]);
    wire_count(&out, 2);
    wire_int(&out, agent->rows);
    wire_int(&out, agent->columns);
    wire_count(&out, 2);
    wire_int(&out, agent->columns * 8);
    wire_int(&out, 8);
    wire_text(&out, "<i8");
    wire_int(&out, 8);
    wire_close_part(&out, part);
    send_with(agent->connections[rank], &out, &segment, 1);
}

static void send_start(agent *agent, int rank, int table, int counters)
{
    const int64_t ring[] = {agent->slots, 0, INT64_MIN, 0};
    int pages[PAGES] = {dup(table), dup(counters), new_page(PAGE_MAGIC_SUBMISSION_RING, ring, 4)};
    wire_out out;
    wire_begin(&out, MESSAGE_START);
    wire_count(&out, agent->wanted ? PAGES : 0);
    for (int i = 0; i < PAGES && agent->wanted; i++)
        wire_int(&out, PAGE_BYTES);
    wire_int(&out, agent->slots);
    wire_count(&out, agent->wanted);
    if (agent->wanted) {
        size_t part = wire_open_part(&out);
        wire_text(&out, ARRAY);
        wire_int(&out, 1); /* every timestep */
        wire_count(&out, 1);
        size_t whole = wire_open_part(&out);
        const int64_t numbers[3][2] = {{0, 0}, {1, 1}, {agent->rows, agent->columns}};
        wire_int(&out, 0);
        wire_int(&out, rank);
        for (int i = 0; i < 3; i++) {
            wire_count(&out, 2);
            wire_int(&out, numbers[i][0]);
            wire_int(&out, numbers[i][1]);
        }
        wire_close_part(&out, whole);
        wire_int(&out, agent->slots);
        wire_int(&out, PAGE_HEADER_WORDS);
        wire_int(&out, PAGE_HEADER_WORDS);
        wire_int(&out, agent->ranks);
        wire_int(&out, PAGE_HEADER_WORDS + ENTRY_WORDS * rank);
        wire_close_part(&out, part);
    }
    wire_text(&out, agent->if_lost != NULL ? agent->if_lost : "");
    send_with(agent->connections[rank], &out, pages, agent->wanted ? PAGES : 0);
}

static void *take_in(void *data)
{
    agent *agent = data;
    int64_t row[4 + TABLE_SLOTS + 64] = {0}, none[1] = {0};
    CHECK(agent->slots <= 64 && agent->ranks <= MOST_RANKS);
    row[4 + TABLE_GRANTED] = agent->slots;
    for (int64_t slot = 0; slot < agent->slots; slot++)
        row[4 + TABLE_SLOTS + slot] = slot;
    int table = new_page(PAGE_MAGIC_SLOT_TABLE, row, 4 + TABLE_SLOTS + agent->slots);
    int counters = new_page(PAGE_MAGIC_ARRIVAL_COUNTERS, none, 1);
    for (int i = 0; i < agent->ranks; i++) {
        int64_t rank;
        int connection = accept(agent->listener, NULL, NULL);
        CHECK(connection >= 0 && hear(connection, &rank) == MESSAGE_HELLO && rank < agent->ranks);
        agent->connections[rank] = connection;
        agent_say(agent, (int)rank, MESSAGE_PROGRESS, "waiting for the others");
    }
    for (int rank = 0; rank < agent->ranks; rank++) {
        if (agent->wanted)
            send_slots(agent, rank);
        send_start(agent, rank, table, counters);
    }
    close(table);
    close(counters);
    return NULL;
}

void agent_begin(agent *agent)
{
    handoff_error error;
    agent_address address;
    CHECK(address_of(agent->session, NULL, &address, &error) == 0);
    CHECK((agent->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) >= 0);
    CHECK(bind(agent->listener, (struct sockaddr *)&address.address, address.length) == 0);
    CHECK(listen(agent->listener, MOST_RANKS) == 0);
    agent->thread = started(take_in, agent);
}

void agent_join(agent *agent)
{
    CHECK(finished(agent->thread) == NULL);
}

void agent_end(agent *agent)
{
    for (int rank = 0; rank < agent->ranks; rank++)
        close(agent->connections[rank]);
    close(agent->listener);
}

handoff_client *rank_open(const agent *agent, int rank, handoff_on_lost on_lost, handoff_error *error)
{
    const int64_t shape[] = {agent->rows, agent->columns}, global[] = {agent->ranks * agent->rows, agent->columns};
    const int64_t position[] = {rank, 0};
    const handoff_chunk_description chunk = {.shape = shape, .position = position, .halo = agent->halo};
    const handoff_array_description array = {
        .name = ARRAY, .dtype = "<i8", .ndim = 2, .global_shape = global, .chunk_count = 1, .chunks = &chunk};
    const handoff_options options = {
        .session = agent->session,
        .bridge_id = rank,
        .world_size = agent->ranks,
        .connect_timeout_s = 600, /* a test that waits so long is broken */
        .start_timeout_s = 600,
        .send_timeout_s = 600,
        .warn_every_s = 600,
        .on_lost = on_lost,
    };
    handoff_client *client = handoff_open(&options, &array, 1, error);
    if (client != NULL && client->pages[0] != NULL) /* the agent here writes where a rank only reads */
        CHECK(mprotect(client->pages[0]->base, client->pages[0]->nbytes, PROT_READ | PROT_WRITE) == 0);
    return client;
}

int64_t *agent_slot(const handoff_chunk *chunk, int64_t sequence)
{
    const part *whole = chunk->parts;
    int64_t slot = word_peek(whole->stream->table + TABLE_SLOTS + sequence % whole->stream->slots);
    return (int64_t *)(whole->place->base + slot * whole->place->slot_bytes);
}

void agent_grant(handoff_array *array, int64_t slot)
{
    const stream *stream = array->streams;
    int64_t granted = word_peek(stream->table + TABLE_GRANTED);
    word_note(stream->table + TABLE_SLOTS + granted % stream->slots, slot);
    word_publish(stream->table + TABLE_GRANTED, granted + 1);
    word_publish(stream->table + TABLE_WAKE, (uint32_t)(word_peek(stream->table + TABLE_WAKE) + 1));
    word_wake(stream->table + TABLE_WAKE);
}
