#define _GNU_SOURCE
#include "memory.h"

#include "failure.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int map(handoff_memory *memory, int fd, int64_t nbytes, int writable, handoff_error *error)
{
    struct stat status;
    char shown[32];
    if (fstat(fd, &status) < 0)
        return fail_errno(error, "ProtocolError", "a memory segment cannot be looked at");
    if (status.st_size < nbytes || nbytes < 1) /* touching what is not there would kill the process */
        return fail(error, "ProtocolError", "a memory segment has %lld bytes, %lld were announced",
                    (long long)status.st_size, (long long)nbytes);
    void *base = mmap(NULL, (size_t)nbytes, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
    if (base == MAP_FAILED && errno == ENOMEM)
        return fail(error, "MemoryBoundError",
                    "this process may not map %s of chunk memory; raise the limit on its address space (ulimit -v), or use "
                    "smaller windows or a smaller max_simulation_ahead",
                    human_bytes(nbytes, shown, sizeof shown));
    if (base == MAP_FAILED)
        return fail_errno(error, "ProtocolError", "a memory segment cannot be mapped");
    (void)!madvise(base, (size_t)nbytes, MADV_HUGEPAGE); /* where `shmem_enabled` leaves that to the program */
    memory->base = base;
    memory->nbytes = (size_t)nbytes;
    atomic_init(&memory->references, 1);
    return 0;
}

handoff_memory *memory_map(int fd, int64_t nbytes, int writable, handoff_error *error)
{
    handoff_memory *memory = malloc(sizeof *memory);
    if (memory == NULL)
        fail(error, "MemoryBoundError", "no memory is left");
    else if (map(memory, fd, nbytes, writable, error) < 0) {
        free(memory);
        memory = NULL;
    }
    close(fd);
    return memory;
}

handoff_memory *memory_retain(handoff_memory *memory)
{
    atomic_fetch_add_explicit(&memory->references, 1, memory_order_relaxed);
    return memory;
}

void memory_release(handoff_memory *memory)
{
    if (memory != NULL && atomic_fetch_sub_explicit(&memory->references, 1, memory_order_acq_rel) == 1) {
        munmap(memory->base, memory->nbytes);
        free(memory);
    }
}
