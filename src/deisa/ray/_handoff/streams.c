/* What callbacks ask for, as the agent says it. */

#define _GNU_SOURCE
#include "client.h"
#include "failure.h"

#include <stdlib.h>
#include <string.h>

static void part_free(part *part)
{
    if (part != NULL) {
        placement_free(part->place);
        free(part->start);
        free(part);
    }
}

void streams_free(handoff_array *array)
{
    for (size_t c = 0; c < array->chunk_count; c++)
        while (array->chunks[c].parts != NULL) {
            part *first = array->chunks[c].parts;
            array->chunks[c].parts = first->next;
            part_free(first);
        }
    while (array->streams != NULL) {
        stream *first = array->streams;
        array->streams = first->next;
        free(first);
    }
}

/* Whether a part lies within its chunk. */
static int fits(const part *part)
{
    for (int d = 0; d < part->chunk->array->ndim; d++) {
        int64_t last;
        if (part->shape[d] < 1 || part->step[d] < 1 || __builtin_mul_overflow(part->shape[d] - 1, part->step[d], &last) ||
            __builtin_add_overflow(last, part->start[d], &last) || last >= part->chunk->shape[d])
            return 0;
    }
    return 1;
}

/* Read a WantedPart, and append it to those of its chunk. */
static int get_part(handoff_array *array, stream *stream, wire_in *in)
{
    wire_in fields = wire_get_part(in);
    int64_t index = wire_get_natural(&fields), region = wire_get_natural(&fields);
    if (fields.bad || index >= (int64_t)array->chunk_count)
        return -1;
    size_t ndim = (size_t)array->ndim;
    part *new = calloc(1, sizeof *new);
    if (new == NULL)
        return -1;
    new->chunk = array->chunks + index;
    new->stream = stream;
    new->region = region;
    new->start = calloc(3 * ndim + 1, sizeof(int64_t));
    int whole = new->start != NULL;
    if (whole) {
        new->step = new->start + ndim;
        new->shape = new->step + ndim;
    }
    for (size_t list = 0; list < 3 && whole; list++) {
        whole = wire_get_count(&fields) == ndim;
        for (size_t d = 0; d < ndim && whole; d++)
            new->start[list * ndim + d] = wire_get_natural(&fields);
    }
    part **link = &new->chunk->parts;
    for (; whole && *link != NULL; link = &(*link)->next)
        whole = (*link)->stream != stream; /* a chunk has one part of a stream */
    if (!whole || fields.bad || !fits(new)) {
        part_free(new);
        return -1;
    }
    *link = new;
    stream->parts++;
    return 0;
}

page_word *page_words(const handoff_memory *page, int64_t first, int64_t count)
{
    int64_t words = (int64_t)(page->nbytes / sizeof(page_word));
    if (first < PAGE_HEADER_WORDS || count < 1 || first > words || count > words - first)
        return NULL;
    return (page_word *)page->base + first;
}

static handoff_array *array_of(handoff_client *client, const char *name)
{
    for (size_t a = 0; a < client->array_count; a++)
        if (strcmp(client->arrays[a].name, name) == 0)
            return client->arrays + a;
    return NULL;
}

int client_on_wanted(handoff_client *client, wire_in *in)
{
    wire_in fields = wire_get_part(in);
    char *name = wire_get_text(&fields);
    handoff_array *array = name != NULL ? array_of(client, name) : NULL;
    free(name);
    stream *new = calloc(1, sizeof *new);
    if (array == NULL || new == NULL) {
        free(new);
        return -1;
    }
    stream **link = &array->streams;
    while (*link != NULL)
        link = &(*link)->next;
    *link = new; /* from now on it is the array's */
    client->stream_count++;
    new->array = array;
    new->every = wire_get_natural(&fields);
    size_t parts = wire_get_count(&fields);
    for (size_t i = 0; i < parts; i++)
        if (fields.bad || get_part(array, new, &fields) < 0)
            return -1;
    new->slots = wire_get_natural(&fields);
    int64_t table_row = wire_get_natural(&fields), counters_row = wire_get_natural(&fields);
    new->bridges = wire_get_natural(&fields);
    int64_t own = wire_get_natural(&fields) - counters_row;
    if (fields.bad || parts == 0 || new->every < 1 || new->slots < 1 || new->slots > INT32_MAX || new->bridges < 1 ||
        new->bridges > INT32_MAX)
        return -1;
    new->table = page_words(client->pages[0], table_row, TABLE_SLOTS + new->slots);
    new->counters = page_words(client->pages[1], counters_row, ENTRY_WORDS * new->bridges);
    if (new->table == NULL || new->counters == NULL || own < 0 || own >= ENTRY_WORDS * new->bridges)
        return -1;
    new->entry = new->counters + own;
    return 0;
}

int client_settle_memory(part *part, placement *place)
{
    const handoff_array *array = part->chunk->array;
    if (place->ndim != array->ndim || place->slots != part->stream->slots ||
        memcmp(place->shape, part->shape, (size_t)place->ndim * sizeof *place->shape) != 0)
        return -1;
    if (array->dtype != NULL && find_conversion(array->dtype, place->dtype, &part->convert) < 0)
        return -1;
    part->place = place;
    return 0;
}

part *whole_part(const handoff_chunk *chunk, int64_t timestep)
{
    for (part *part = chunk->parts; part != NULL; part = part->next)
        if (is_due(part->stream, timestep) && part->convert == NULL &&
            memcmp(part->shape, chunk->shape, (size_t)chunk->array->ndim * sizeof *chunk->shape) == 0)
            return part;
    return NULL;
}
