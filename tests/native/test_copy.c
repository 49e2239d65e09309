/* Copying between arrays of any strides, compared with a copy that goes element by element. */

#include "check.h"

#include "copy.h"
#include "handoff.h"

#include <string.h>
#include <unistd.h>

#define ROUNDS 3000
#define MOST_DIMENSIONS 5

/* An array in memory of its own, which ends where the array ends: the first element lies at `data`. */
typedef struct {
    unsigned char *memory, *data;
    size_t nbytes;
    int64_t strides[HANDOFF_MAX_DIMENSIONS];
} array;

static array new_array(uint64_t *random, const int64_t *shape, int ndim, int64_t itemsize)
{
    array new = {0};
    int order[MOST_DIMENSIONS];
    int64_t step = itemsize, first = 0;
    for (int d = 0; d < ndim; d++) { /* any order of the axes */
        int at = (int)random_below(random, d + 1);
        order[d] = order[at];
        order[at] = d;
    }
    for (int d = 0; d < ndim; d++) {
        int axis = order[d];
        step += random_below(random, 3) == 0 ? itemsize * random_below(random, 3) : 0; /* gaps */
        new.strides[axis] = step;
        step *= shape[axis];
        if (random_below(random, 4) == 0) { /* backwards */
            first += (shape[axis] - 1) * new.strides[axis];
            new.strides[axis] = -new.strides[axis];
        }
    }
    int64_t last = first;
    for (int d = 0; d < ndim; d++)
        last += new.strides[d] > 0 ? (shape[d] - 1) * new.strides[d] : 0;
    new.nbytes = (size_t)(last + itemsize);
    CHECK((new.memory = malloc(new.nbytes)) != NULL);
    for (size_t i = 0; i < new.nbytes; i++)
        new.memory[i] = (unsigned char)next_random(random);
    new.data = new.memory + first;
    return new;
}

/* Where the elements lie, by their number in C order. */
static int64_t offset_of(const array *of, const int64_t *shape, int ndim, int64_t number)
{
    int64_t offset = 0;
    for (int d = ndim - 1; d >= 0; d--) {
        offset += number % shape[d] * of->strides[d];
        number /= shape[d];
    }
    return offset;
}

static void test_copies_of_any_arrays(void)
{
    static const int64_t itemsizes[] = {1, 2, 3, 4, 8, 12, 16, 24};
    uint64_t random = 7;
    for (int i = 0; i < ROUNDS; i++) {
        int ndim = (int)random_below(&random, MOST_DIMENSIONS + 1);
        int64_t itemsize = itemsizes[random_below(&random, sizeof itemsizes / sizeof *itemsizes)];
        int64_t shape[MOST_DIMENSIONS], elements = 1;
        for (int d = 0; d < ndim; d++) {
            shape[d] = 1 + random_below(&random, ndim > 2 ? 7 : 70); /* also more than a tile */
            elements *= shape[d];
        }
        array to = new_array(&random, shape, ndim, itemsize), from = new_array(&random, shape, ndim, itemsize);
        unsigned char *expected = malloc(to.nbytes);
        CHECK(expected != NULL);
        memcpy(expected, to.memory, to.nbytes); /* what lies in gaps stays */
        for (int64_t n = 0; n < elements; n++)
            memcpy(expected + (to.data - to.memory) + offset_of(&to, shape, ndim, n),
                   from.data + offset_of(&from, shape, ndim, n), (size_t)itemsize);
        copy_strided(to.data, to.strides, from.data, from.strides, shape, ndim, itemsize);
        CHECK(memcmp(expected, to.memory, to.nbytes) == 0);
        free(expected);
        free(to.memory);
        free(from.memory);
    }
}

static void test_an_array_of_as_many_dimensions_as_there_may_be(void)
{
    int64_t shape[HANDOFF_MAX_DIMENSIONS], strides[HANDOFF_MAX_DIMENSIONS];
    double one = 1.5, other = 0;
    for (int d = 0; d < HANDOFF_MAX_DIMENSIONS; d++) {
        shape[d] = 1;
        strides[d] = sizeof one;
    }
    copy_strided(&other, strides, &one, strides, shape, HANDOFF_MAX_DIMENSIONS, sizeof one);
    CHECK(other == one);
}

/* Touching writes into every page of the array, and into nothing else. */
static void test_touching(void)
{
    int64_t page = sysconf(_SC_PAGESIZE), shape[] = {5, 3 * page / 8}, strides[] = {shape[1] * 8 + 4096, 8};
    size_t nbytes = (size_t)(4 * strides[0] + shape[1] * 8);
    char *memory = malloc(nbytes);
    CHECK(memory != NULL);
    memset(memory, 1, nbytes);
    touch_strided(memory, strides, shape, 2, 8);
    for (size_t i = 0; i < nbytes; i++)
        CHECK(memory[i] == 1 || (memory[i] == 0 && (int64_t)i % strides[0] < shape[1] * 8));
    for (int64_t row = 0; row < shape[0]; row++) {
        char *start = memory + row * strides[0], *end = start + shape[1] * 8;
        while (start < end) {
            char *next = start + (page - (int64_t)((uintptr_t)start % (uintptr_t)page));
            next = next < end ? next : end;
            CHECK(memchr(start, 0, (size_t)(next - start)) != NULL);
            start = next;
        }
    }
    free(memory);
}

int main(void)
{
    RUN(test_copies_of_any_arrays);
    RUN(test_an_array_of_as_many_dimensions_as_there_may_be);
    RUN(test_touching);
    return 0;
}
