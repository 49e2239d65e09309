/* Threads of the tests in C, and places where they meet. */

#ifndef DEISA_TESTS_THREADS_H
#define DEISA_TESTS_THREADS_H

#include "check.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#ifndef EMULATED /* whether another processor than this one is played, whose orders this one does not keep */
#define EMULATED 0
#endif

static inline pthread_t started(void *(*function)(void *), void *argument)
{
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, function, argument) == 0);
    return thread;
}

static inline void *finished(pthread_t thread)
{
    void *result;
    CHECK(pthread_join(thread, &result) == 0);
    return result;
}

/* A place where two threads meet, and which they leave at the same time, as closely as can be. */
typedef struct {
    atomic_int arrived, round;
} meeting;

#define SPINS 2000 /* then the other one may need this processor */

static inline void meet(meeting *at)
{
    int round = atomic_load_explicit(&at->round, memory_order_acquire);
    if (atomic_fetch_add_explicit(&at->arrived, 1, memory_order_acq_rel) == 1) {
        atomic_store_explicit(&at->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&at->round, round + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&at->round, memory_order_acquire) == round; spins++)
        if (spins > SPINS)
            sched_yield();
}

#endif
