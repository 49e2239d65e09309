/* The orders of pages.h, between threads: what docs/protocol.md says that a reader sees, it sees.

   On x86-64 a processor lets a load overtake an earlier store, and nothing else. So here two ranks both miss that they are
   the last one, if a weaker order is chosen for their words; where the other orders are weakened, ThreadSanitizer tells: it
   knows what C promises on any processor. QEMU shows that the code for aarch64 works, but not its orders: it
   runs on this processor, and even lets an LDAR overtake an STLR, which no aarch64 does. With -DEMULATED=1 that test is
   left out; another one looks at the instructions. */

#define _GNU_SOURCE
#include "check.h"
#include "threads.h"

#include "pages.h"

#include <sched.h>

#define ROUNDS 50000
#define CAPACITY 4
#define SLOTS 3
#define CHUNK 16

/* One rank and one agent: a ring of entries, and slots that are used again and again. */
static struct {
    page_word submitted, granted, wake;
    page_word entries[CAPACITY], slots[SLOTS];
    int64_t memory[SLOTS][CHUNK]; /* plain: only the orders of words keep the two sides apart */
} node;

static void *rank(void *unused)
{
    for (int64_t n = 0; n < ROUNDS; n++) {
        for (;;) {
            int64_t seen = word_acquire(&node.wake);
            if (word_acquire(&node.granted) > n)
                break;
            word_wait(&node.wake, seen, 600); /* a wake that gets lost is noticed by whoever runs this test */
        }
        int64_t *slot = node.memory[word_peek(&node.slots[n % SLOTS])];
        for (int i = 0; i < CHUNK; i++)
            slot[i] = n;
        word_note(&node.entries[n % CAPACITY], n);
        word_publish(&node.submitted, n + 1);
    }
    return unused;
}

static void test_an_agent_sees_what_was_submitted_and_a_rank_what_was_granted(void)
{
    uint64_t random = 3;
    for (int slot = 0; slot < SLOTS; slot++)
        word_note(&node.slots[slot], slot);
    word_publish(&node.granted, SLOTS);
    pthread_t thread = started(rank, NULL);
    int64_t free_slots[SLOTS], granted = SLOTS, released = 0;
    for (int64_t seen = 0; seen < ROUNDS;) {
        int64_t submitted = word_acquire(&node.submitted);
        if (submitted == seen)
            sched_yield();
        for (; seen < submitted; seen++) {
            int64_t slot = word_peek(&node.slots[seen % SLOTS]);
            CHECK(word_peek(&node.entries[seen % CAPACITY]) == seen);
            for (int i = 0; i < CHUNK; i++)
                CHECK(node.memory[slot][i] == seen);
            free_slots[released++] = slot;
            if (released == SLOTS || random_below(&random, 2)) { /* granted again in any order */
                while (released > 0) {
                    int64_t at = random_below(&random, released), chosen = free_slots[at];
                    free_slots[at] = free_slots[--released];
                    word_note(&node.slots[granted % SLOTS], chosen);
                    word_publish(&node.granted, ++granted);
                }
                word_publish(&node.wake, (uint32_t)(word_peek(&node.wake) + 1));
                word_wake(&node.wake);
            }
        }
    }
    CHECK(finished(thread) == NULL);
}

/* Two ranks that complete timesteps of many arrays at the same time: of each one of them finds itself the last one.
   Words lie far apart: a store takes longest where the other processor has that part of memory. */
#define ARRAYS 256
#define MEETINGS 10000 /* the more, the likelier that both threads have a processor in some */

static struct {
    struct {
        page_word whole;
        char apart[120];
    } entries[2][ARRAYS];
    int found_last[2][ARRAYS];
    meeting start, end;
} node_of_two;

static void *complete(void *which)
{
    int own = which != NULL;
    for (int64_t n = 1; n <= MEETINGS; n++) {
        meet(&node_of_two.start);
        for (int a = 0; a < ARRAYS; a++) {
            word_store(&node_of_two.entries[own][a].whole, n);
            node_of_two.found_last[own][a] = word_load(&node_of_two.entries[!own][a].whole) >= n;
        }
        meet(&node_of_two.end);
        for (int a = 0; own && a < ARRAYS; a++)
            CHECK(node_of_two.found_last[0][a] || node_of_two.found_last[1][a]);
    }
    return NULL;
}

static void test_of_two_ranks_at_the_same_time_one_is_the_last(void)
{
    pthread_t one = started(complete, NULL), other = started(complete, &node_of_two);
    CHECK(finished(one) == NULL && finished(other) == NULL);
}

/* A rank that finds `notified` set relies on the message of another one: the agent sees what both have published. */
static struct {
    page_word submitted[2], notified, messages;
} notices;

static void *submit_and_notify(void *which)
{
    int own = which != NULL;
    for (int64_t n = 1; n <= ROUNDS; n++) {
        word_publish(&notices.submitted[own], n);
        if (word_exchange(&notices.notified, 1) == 0)
            while (word_exchange(&notices.messages, 1) != 0) /* as a socket, it holds one */
                sched_yield();
    }
    return NULL;
}

static void test_an_agent_that_was_notified_sees_what_every_rank_has_submitted(void)
{
    pthread_t one = started(submit_and_notify, NULL), other = started(submit_and_notify, &notices);
    int64_t seen[2] = {0, 0};
    while (seen[0] < ROUNDS || seen[1] < ROUNDS) { /* ends, unless a notice gets lost */
        while (word_exchange(&notices.messages, 0) == 0)
            sched_yield();
        word_exchange(&notices.notified, 0);
        for (int i = 0; i < 2; i++)
            seen[i] = word_acquire(&notices.submitted[i]);
    }
    CHECK(finished(one) == NULL && finished(other) == NULL);
}

int main(void)
{
    RUN(test_an_agent_sees_what_was_submitted_and_a_rank_what_was_granted);
    if (!EMULATED)
        RUN(test_of_two_ranks_at_the_same_time_one_is_the_last);
    RUN(test_an_agent_that_was_notified_sees_what_every_rank_has_submitted);
    return 0;
}
