/* Bytes that an agent might send, handled by a rank's client: see tests/fuzz/client.py.

   The first byte of an input says how many segments of chunk memory come along; the rest are messages. If they start a
   session, the chunks that have memory are handed over. */

#define _GNU_SOURCE
#include "client.h"
#include "protocol.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define MEMORY_BYTES 16384 /* of each segment and page */
#define MOST_SEGMENTS 3
#define MOST_CHUNK_BYTES 65536

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int condition)
{
    if (!condition)
        abort();
}

static int new_memory(const char *magic)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    require(fd >= 0 && ftruncate(fd, MEMORY_BYTES) == 0);
    if (magic != NULL) {
        int64_t header[] = {0, PAGE_LAYOUT_VERSION, PAGE_HEADER_WORDS, 0, 0, 0, 0, 0, 2 /* granted */};
        memcpy(header, magic, sizeof *header);
        require(pwrite(fd, header, sizeof header, 0) == sizeof header);
    }
    return fd;
}

static void bring_along(connection *peer, const char *magic)
{
    peer->descriptors[peer->descriptor_count++] = new_memory(magic);
}

/* A client that is connected to nobody, with the arrays of the seeds. */
static handoff_client *new_client(int *other_end)
{
    static const int64_t shape[] = {4, 3}, global[] = {8, 6}, position[] = {1, 0}, offset[] = {0}, halo[] = {1, 0, 2, 1};
    static const handoff_chunk_description chunk = {.shape = shape, .position = position, .halo = halo};
    static const handoff_chunk_description chunks[] = {{.shape = shape, .offset = offset}, {.shape = shape, .offset = offset}};
    static const handoff_array_description arrays[] = {
        {.name = "a", .dtype = "<f8", .ndim = 2, .global_shape = global, .chunk_count = 1, .chunks = &chunk},
        {.name = "b", .ndim = 1, .global_shape = global, .chunk_count = 2, .chunks = chunks},
    };
    const handoff_options options = {.session = "s", .world_size = 1, .warn_every_s = 1e9, .disabled = 1};
    handoff_error error;
    int ends[2];
    handoff_client *client = handoff_open(&options, arrays, 2, &error);
    require(client != NULL && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    client->options.disabled = client->detached = 0;
    client->agent.fd = ends[0];
    *other_end = ends[1];
    return client;
}

static void hand_over(handoff_chunk *chunk, int64_t timestep)
{
    handoff_error error;
    int64_t nbytes = 16; /* the largest element that is converted */
    for (const part *part = chunk->parts; part != NULL; part = part->next) {
        if (part->place == NULL)
            return;
        nbytes = part->place->itemsize > nbytes ? part->place->itemsize : nbytes;
    }
    for (int d = 0; d < chunk->array->ndim; d++)
        nbytes *= chunk->local[d];
    if (chunk->parts == NULL || nbytes > MOST_CHUNK_BYTES)
        return;
    void *data = calloc(1, (size_t)nbytes);
    require(data != NULL);
    client_hand_over_at_once(chunk, data, NULL, timestep, HANDOFF_NO_TIME, &error);
    free(data);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    int other_end;
    handoff_error error;
    handoff_client *client = new_client(&other_end);
    connection *peer = &client->agent;
    for (int i = 0; i < data[0] % (MOST_SEGMENTS + 1); i++)
        bring_along(peer, NULL);
    bring_along(peer, PAGE_MAGIC_SLOT_TABLE);
    bring_along(peer, PAGE_MAGIC_ARRIVAL_COUNTERS);
    bring_along(peer, PAGE_MAGIC_SUBMISSION_RING);
    peer->length = peer->capacity = size - 1;
    peer->received = malloc(size - 1); /* which ends where the messages end */
    require(peer->received != NULL);
    memcpy(peer->received, data + 1, size - 1);
    if (client_receive(client, &error) == 0 && client->started)
        for (int64_t timestep = 0; timestep < 3; timestep++)
            for (size_t a = 0; a < client->array_count; a++)
                for (size_t c = 0; c < client->arrays[a].chunk_count; c++)
                    hand_over(client->arrays[a].chunks + c, timestep);
    handoff_free(client);
    close(other_end);
    return 0;
}

/* Change bytes, and then, half of the time, have the last message end where the input ends. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    size = LLVMFuzzerMutate(data, size, most);
    for (size_t at = 1; seed % 2 && at + 4 <= size;) {
        size_t rest = size - at - 4, announced = wire_announced(data + at);
        if (announced > rest || (announced < rest && rest - announced < 6)) {
            for (int i = 0; i < 4; i++)
                data[at + i] = (uint8_t)(rest >> (8 * i));
            break;
        }
        at += 4 + announced;
    }
    return size;
}
