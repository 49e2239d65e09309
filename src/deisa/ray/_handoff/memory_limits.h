/* The memory limits of control groups, as batch systems and containers set them. */

#ifndef DEISA_HANDOFF_MEMORY_LIMITS_H
#define DEISA_HANDOFF_MEMORY_LIMITS_H

#include <stddef.h>
#include <stdint.h>

#define LIMITS_MOST 64
#define LIMITS_ROOT "/sys/fs/cgroup"

/* A control group's limit, and what it may still take (bytes). `group` tells groups apart, also between containers, which
   see other paths. */
typedef struct {
    int64_t group;
    char path[512];
    int64_t limit, available;
} memory_limit;

/* The limits that this process is under: that of its own control group, and those of all above. `memberships` is what
   /proc/self/cgroup says (NULL: ask), `root` where control groups are mounted. Returns how many. */
size_t own_limits(const char *memberships, const char *root, memory_limit limits[LIMITS_MOST]);

#endif
