/* What a client is opened with: Python's arguments become what the library takes. */

#include "_native.h"

/* Hooks of the library: called with or without the interpreter. */

void say_hook(void *context, handoff_level level, const char *text)
{
    PyGILState_STATE held = PyGILState_Ensure();
    PyObject *say = context;
    PyObject *said = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
    PyObject *result = said != NULL ? PyObject_CallFunction(say, "iO", (int)level, said) : NULL;
    if (result == NULL)
        PyErr_WriteUnraisable(say);
    Py_XDECREF(result);
    Py_XDECREF(said);
    PyGILState_Release(held);
}

int interrupted_hook(void *context)
{
    (void)context;
    PyGILState_STATE held = PyGILState_Ensure();
    int raised = PyErr_CheckSignals() < 0;
    PyGILState_Release(held);
    return raised;
}

/* Descriptions are tuples; what the library takes of them lies in memory that goes with `storage`. */

static void *allot(storage *kept, size_t nbytes)
{
    if (kept->count == kept->capacity) {
        size_t capacity = kept->capacity ? 2 * kept->capacity : 64;
        void **blocks = PyMem_Realloc(kept->blocks, capacity * sizeof *blocks);
        if (blocks == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
        kept->blocks = blocks;
        kept->capacity = capacity;
    }
    void *block = PyMem_Calloc(1, nbytes ? nbytes : 1);
    if (block == NULL)
        PyErr_NoMemory();
    else
        kept->blocks[kept->count++] = block;
    return block;
}

void let_go(storage *kept)
{
    while (kept->count > 0)
        PyMem_Free(kept->blocks[--kept->count]);
    PyMem_Free(kept->blocks);
}

/* A tuple of `count` integers, or None (NULL, without an error). */
static int numbers_of(PyObject *tuple, int count, storage *kept, const int64_t **numbers)
{
    *numbers = NULL;
    if (tuple == Py_None)
        return 0;
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != count) {
        PyErr_SetString(PyExc_TypeError, "a shape must be a tuple of one integer for each dimension, a halo of two");
        return -1;
    }
    int64_t *values = allot(kept, (size_t)count * sizeof *values);
    if (values == NULL)
        return -1;
    for (int i = 0; i < count; i++) {
        values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
        if (values[i] == -1 && PyErr_Occurred())
            return -1;
    }
    *numbers = values;
    return 0;
}

/* Attributes: a tuple of (name, encoded value). */
static int attributes_of(PyObject *tuple, storage *kept, const handoff_attribute **attrs, size_t *count)
{
    *count = (size_t)PyTuple_GET_SIZE(tuple);
    handoff_attribute *found = allot(kept, *count * sizeof *found);
    if (found == NULL)
        return -1;
    for (size_t i = 0; i < *count; i++) {
        const char *data;
        Py_ssize_t nbytes;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(tuple, i), "sy#", &found[i].name, &data, &nbytes))
            return -1;
        found[i].value = (handoff_value){.kind = HANDOFF_ENCODED, .data = data, .nbytes = (size_t)nbytes};
    }
    *attrs = found;
    return 0;
}

/* Coordinates: a tuple of (name, dimension, first, length or 0, encoded values, attributes). */
static int coordinates_of(PyObject *tuple, storage *kept, handoff_chunk_description *chunk)
{
    chunk->coord_count = (size_t)PyTuple_GET_SIZE(tuple);
    handoff_coordinate *found = allot(kept, chunk->coord_count * sizeof *found);
    if (found == NULL)
        return -1;
    for (size_t i = 0; i < chunk->coord_count; i++) {
        const char *data;
        Py_ssize_t nbytes;
        long long first, length;
        PyObject *attrs;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(tuple, i), "siLLy#O!", &found[i].name, &found[i].dimension, &first, &length,
                              &data, &nbytes, &PyTuple_Type, &attrs) ||
            attributes_of(attrs, kept, &found[i].attrs, &found[i].attr_count) < 0)
            return -1;
        found[i].first = first;
        found[i].length = length;
        found[i].values = (handoff_value){.kind = HANDOFF_ENCODED, .data = data, .nbytes = (size_t)nbytes};
    }
    chunk->coords = found;
    return 0;
}

/* A tuple of one text for each dimension, or None. */
static int dims_of(PyObject *tuple, int ndim, storage *kept, const char *const **dims)
{
    if (tuple == Py_None)
        return 0;
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != ndim) {
        PyErr_SetString(PyExc_TypeError, "dims must be a tuple of one text for each dimension");
        return -1;
    }
    const char **names = allot(kept, (size_t)ndim * sizeof *names);
    for (int d = 0; names != NULL && d < ndim; d++)
        if ((names[d] = PyUnicode_AsUTF8(PyTuple_GET_ITEM(tuple, d))) == NULL)
            return -1;
    *dims = names;
    return names != NULL ? 0 : -1;
}

static int describe_array(PyObject *described, storage *kept, handoff_array_description *array)
{
    PyObject *global_shape, *grid, *chunks, *dims, *attrs;
    if (!PyArg_ParseTuple(described, "sziOOO!OO!", &array->name, &array->dtype, &array->ndim, &global_shape, &grid,
                          &PyTuple_Type, &chunks, &dims, &PyTuple_Type, &attrs) ||
        dims_of(dims, array->ndim, kept, &array->dims) < 0 ||
        attributes_of(attrs, kept, &array->attrs, &array->attr_count) < 0)
        return -1;
    array->chunk_count = (size_t)PyTuple_GET_SIZE(chunks);
    handoff_chunk_description *places = allot(kept, array->chunk_count * sizeof *places);
    if (places == NULL || numbers_of(global_shape, array->ndim, kept, &array->global_shape) < 0 ||
        numbers_of(grid, array->ndim, kept, &array->grid) < 0)
        return -1;
    for (size_t c = 0; c < array->chunk_count; c++) {
        PyObject *shape, *position, *offset, *halo, *coords;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(chunks, c), "OOOOO!", &shape, &position, &offset, &halo, &PyTuple_Type,
                              &coords) ||
            coordinates_of(coords, kept, places + c) < 0 ||
            numbers_of(shape, array->ndim, kept, &places[c].shape) < 0 ||
            numbers_of(position, array->ndim, kept, &places[c].position) < 0 ||
            numbers_of(offset, array->ndim, kept, &places[c].offset) < 0 ||
            numbers_of(halo, 2 * array->ndim, kept, &places[c].halo) < 0)
            return -1;
    }
    array->chunks = places;
    return 0;
}

handoff_array_description *describe_arrays(PyObject *arrays, storage *kept)
{
    Py_ssize_t count = PyTuple_GET_SIZE(arrays);
    handoff_array_description *described = allot(kept, (size_t)count * sizeof *described);
    for (Py_ssize_t a = 0; described != NULL && a < count; a++)
        if (describe_array(PyTuple_GET_ITEM(arrays, a), kept, described + a) < 0)
            return NULL;
    return described;
}

int parse_options(PyObject *args, PyObject *kwargs, handoff_options *options, PyObject **say, PyObject **arrays)
{
    static char *names[] = {"session", "socket_path", "bridge_id", "world_size", "connect_timeout_s",
                            "start_timeout_s", "send_timeout_s", "warn_every_s", "on_lost", "disabled",
                            "say", "arrays", NULL};
    static const char *const on_lost_names[] = {"wait", "continue", "raise"};
    const char *on_lost;
    long long bridge_id, world_size;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$szLLddddspOO!", names, &options->session, &options->socket_path,
                                     &bridge_id, &world_size, &options->connect_timeout_s, &options->start_timeout_s,
                                     &options->send_timeout_s, &options->warn_every_s, &on_lost, &options->disabled, say,
                                     &PyTuple_Type, arrays))
        return -1;
    options->context = *say;
    options->bridge_id = bridge_id;
    options->world_size = world_size;
    for (int i = 0; i < 3; i++)
        if (strcmp(on_lost, on_lost_names[i]) == 0) {
            options->on_lost = (handoff_on_lost)i;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "on_lost is %s", on_lost);
    return -1;
}
