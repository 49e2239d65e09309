/* What the tests in C share: a check that fails ends the program, and says where. */

#ifndef DEISA_TESTS_CHECK_H
#define DEISA_TESTS_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: in %s: not so: %s\n", __FILE__, __LINE__, __func__, #condition);                   \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#define RUN(test) (fprintf(stderr, "%s\n", #test), test())

/* The next of a sequence of numbers that look random, and are the same in each run. */
static inline uint64_t next_random(uint64_t *state)
{
    *state += 0x9e3779b97f4a7c15;
    uint64_t mixed = (*state ^ (*state >> 30)) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
    return mixed ^ (mixed >> 31);
}

/* One below a limit. */
static inline int64_t random_below(uint64_t *state, int64_t limit)
{
    return (int64_t)(next_random(state) % (uint64_t)limit);
}

#endif
