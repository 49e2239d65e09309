/* Chunk memory, as the agent provides it. */

#define _GNU_SOURCE
#include "client.h"
#include "copy.h"
#include "failure.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

_Static_assert(HANDOFF_MAX_DIMENSIONS == PROTOCOL_MAX_DIMENSIONS, "as both headers say");

void placement_free(placement *place)
{
    if (place != NULL) {
        memory_release(place->memory);
        free(place->shape);
        free(place->dtype);
        free(place);
    }
}

/* Whether all of a region's slots lie in its segment: no access to them may go beyond it. They do not overlap, so there is
   room for all their elements. */
static int lies_within(const placement *place, int64_t base, int64_t nbytes)
{
    int64_t first = base, last = base, needed;
    if (place->slots < 1 || place->itemsize < 1 ||
        __builtin_mul_overflow(place->slots - 1, place->slot_bytes, &last) || __builtin_add_overflow(last, base, &last) ||
        __builtin_mul_overflow(place->slots, place->itemsize, &needed))
        return 0;
    for (int d = 0; d < place->ndim; d++) {
        int64_t reach;
        if (place->shape[d] < 1 || __builtin_mul_overflow(place->shape[d] - 1, place->strides[d], &reach) ||
            __builtin_add_overflow(reach < 0 ? first : last, reach, reach < 0 ? &first : &last) ||
            __builtin_mul_overflow(needed, place->shape[d], &needed))
            return 0;
    }
    return first >= 0 && !__builtin_add_overflow(last, place->itemsize, &last) && last <= nbytes && needed <= nbytes;
}

/* Read a RegionSpec; `*segment` and `*base` say where it lies. */
static placement *get_placement(wire_in *in, int64_t *segment, int64_t *base)
{
    wire_in part = wire_get_part(in);
    placement *place = calloc(1, sizeof *place);
    if (place == NULL)
        return NULL;
    place->region = wire_get_natural(&part);
    *segment = wire_get_natural(&part);
    *base = wire_get_natural(&part);
    place->slot_bytes = wire_get_natural(&part);
    place->slots = wire_get_natural(&part);
    size_t ndim = wire_get_count(&part);
    if (!part.bad && ndim <= HANDOFF_MAX_DIMENSIONS && (place->shape = calloc(2 * ndim + 1, sizeof(int64_t))) != NULL) {
        place->ndim = (int)ndim;
        place->strides = place->shape + ndim;
        for (size_t d = 0; d < ndim; d++)
            place->shape[d] = wire_get_natural(&part);
        if (wire_get_count(&part) != ndim)
            part.bad = 1;
        for (size_t d = 0; d < ndim; d++)
            place->strides[d] = wire_get_int(&part);
        place->dtype = wire_get_text(&part);
        place->itemsize = wire_get_natural(&part);
    }
    else
        part.bad = 1;
    if (part.bad) {
        placement_free(place);
        return NULL;
    }
    return place;
}

/* The part that waits for the memory of a region. */
static part *waiting_for(handoff_client *client, int64_t region)
{
    for (size_t a = 0; a < client->array_count; a++)
        for (size_t c = 0; c < client->arrays[a].chunk_count; c++)
            for (part *part = client->arrays[a].chunks[c].parts; part != NULL; part = part->next)
                if (part->region == region && part->place == NULL)
                    return part;
    return NULL;
}

/* Give parts that wait for it their memory. */
void client_provide(handoff_client *client)
{
    for (placement **link = &client->placements; *link != NULL;) {
        placement *place = *link, *next = place->next;
        part *owner = waiting_for(client, place->region);
        if (owner != NULL && client_settle_memory(owner, place) == 0)
            *link = next;
        else
            link = &place->next;
    }
}

int client_on_slots(handoff_client *client, wire_in *in, handoff_error *error)
{
    int descriptors[PROTOCOL_MAX_DESCRIPTORS];
    int64_t sizes[PROTOCOL_MAX_DESCRIPTORS];
    handoff_memory *segments[PROTOCOL_MAX_DESCRIPTORS];
    size_t count = wire_get_count(in), mapped = 0;
    int result = 0;
    if (in->bad || count > PROTOCOL_MAX_DESCRIPTORS)
        return client_malformed("Slots", error);
    for (size_t i = 0; i < count; i++)
        sizes[i] = wire_get_natural(in);
    size_t came = client->agent.descriptor_count;
    if (connection_take(&client->agent, descriptors, count) < 0)
        return fail(error, "ProtocolError",
                    "%zu memory segments were announced, %zu came along; is the limit on open files (ulimit -n) too small?",
                    count, came);
    for (; mapped < count && result == 0; mapped++)
        if ((segments[mapped] = memory_map(descriptors[mapped], sizes[mapped], 1, error)) == NULL)
            result = -1;
    if (result < 0) /* memory_map has closed the one that failed */
        for (size_t i = mapped--; i < count; i++)
            close(descriptors[i]);
    size_t regions = result == 0 ? wire_get_count(in) : 0;
    for (size_t i = 0; i < regions && result == 0; i++) {
        int64_t segment, base;
        placement *place = get_placement(in, &segment, &base);
        if (place == NULL || segment >= (int64_t)count || !lies_within(place, base, sizes[segment])) {
            placement_free(place);
            result = client_malformed("Slots", error);
            break;
        }
        place->memory = memory_retain(segments[segment]);
        place->base = segments[segment]->base + base;
        for (int64_t slot = 0; slot < place->slots; slot++)
            touch_strided(place->base + slot * place->slot_bytes, place->strides, place->shape, place->ndim,
                          place->itemsize);
        place->next = client->placements;
        client->placements = place;
    }
    for (size_t i = 0; i < mapped; i++)
        memory_release(segments[i]);
    client_provide(client);
    return result;
}
