/* The words that an agent and the ranks of its node share: loads, stores, and the order between them.

   This is the one place where orders are chosen. protocol.h says where the words are, `docs/protocol.md` what they mean.

   - What is *published* is written before the word that counts it, and that word is stored with release order; the other
     side loads it with acquire order, and then sees what was published. So it is with `submitted` (the entry, and the
     chunk in its slot), `granted` (the number of the slot) and `passed` (the entries before it). On x86-64 these are
     plain loads and stores, which the processor keeps in order; on aarch64 they are LDAR and STLR.
   - `whole` and `passed` of the arrival counters answer "am I the last one?". Each rank stores its own word and then loads
     the others'. With release and acquire order alone, two ranks could both load the old word of the other one (a store may
     wait in a buffer while a later load is done), and nobody would notify the agent. In sequentially consistent order one of
     the two stores comes first, and the other rank's load sees it. On x86-64 that costs an XCHG for each store.
   - `notified` is only exchanged, by both sides. A rank that finds 1 relies on another one's message: the agent's exchange,
     when that message has come, follows this rank's in the order of that word, so it reads the value of this rank or of a later
     exchange in the same release sequence, and sees what this rank had published.
   - `wake` is a futex. The agent stores `granted` first, then changes `wake`, then wakes. A rank loads `wake` first, then
     `granted`, then waits with the value loaded: if the agent came in between, the wait ends at once.
   - The feedback page is changed between two stores of `changes`, which is odd meanwhile. Fences keep what is changed between
     the stores, and what a rank reads between its two loads of `changes`: if it loads the same even number twice, nothing was
     changed in between.
   - "Has a bridge had an answer?" is "am I the last one?" again: a rank notes its question and then looks whether the question
     is closed, both in sequentially consistent order; the agent closes it and then looks at the notes, with a fence in between.
     At least one sees the other. */

#ifndef DEISA_HANDOFF_PAGES_H
#define DEISA_HANDOFF_PAGES_H

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef _Atomic int64_t page_word;

_Static_assert(sizeof(page_word) == 8, "a word of a page is 64 bits, with nothing beside them");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "words are shared between processes: locks would not be");

static inline int64_t word_acquire(const page_word *word)
{
    return atomic_load_explicit((page_word *)word, memory_order_acquire);
}

static inline void word_publish(page_word *word, int64_t value)
{
    atomic_store_explicit(word, value, memory_order_release);
}

/* For a word of one's own, and for words whose order does not matter. */
static inline int64_t word_peek(const page_word *word)
{
    return atomic_load_explicit((page_word *)word, memory_order_relaxed);
}

static inline void word_note(page_word *word, int64_t value)
{
    atomic_store_explicit(word, value, memory_order_relaxed);
}

static inline int64_t word_load(const page_word *word)
{
    return atomic_load_explicit((page_word *)word, memory_order_seq_cst);
}

static inline void word_store(page_word *word, int64_t value)
{
    atomic_store_explicit(word, value, memory_order_seq_cst);
}

static inline int64_t word_exchange(page_word *word, int64_t value)
{
    return atomic_exchange_explicit(word, value, memory_order_seq_cst);
}

/* Have all that was written before come before all that is read later, in one total order of all threads; and, after reading
   what may have been overwritten meanwhile, have the word that says so be read after it. GCC's thread sanitizer knows no
   fences: there an exchange stands for one. */
#ifdef __SANITIZE_THREAD__
static inline void word_fence(void)
{
    page_word unused = 0;
    atomic_exchange(&unused, 1);
}
#define word_fence_reads word_fence
#else
static inline void word_fence(void)
{
    atomic_thread_fence(memory_order_seq_cst);
}

static inline void word_fence_reads(void)
{
    atomic_thread_fence(memory_order_acquire);
}
#endif

/* The half of a word that the kernel looks at. */
static inline uint32_t *futex_of(page_word *word)
{
    return (uint32_t *)word + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__);
}

/* Wait while the futex has a value, and not longer than so many seconds. Not FUTEX_PRIVATE_FLAG: several processes wait. */
static inline void word_wait(page_word *word, int64_t value, double seconds)
{
    struct timespec limit = {.tv_sec = (time_t)seconds};
    limit.tv_nsec = (long)((seconds - (double)limit.tv_sec) * 1e9);
    syscall(SYS_futex, futex_of(word), FUTEX_WAIT, (uint32_t)value, &limit, NULL, 0);
}

static inline void word_wake(page_word *word)
{
    syscall(SYS_futex, futex_of(word), FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

#endif
