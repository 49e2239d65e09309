/* Memory that the agent has created and this process has mapped. */

#ifndef DEISA_HANDOFF_MEMORY_H
#define DEISA_HANDOFF_MEMORY_H

#include "handoff.h"

#include <stdatomic.h>
#include <stddef.h>

/* A mapping, for as long as anything refers to it. */
typedef struct {
    char *base;
    size_t nbytes;
    atomic_int references;
} handoff_memory;

/* Map what a descriptor stands for, and close the descriptor. Returns NULL for failure. */
handoff_memory *memory_map(int fd, int64_t nbytes, int writable, handoff_error *error);

handoff_memory *memory_retain(handoff_memory *memory);
void memory_release(handoff_memory *memory);

#endif
