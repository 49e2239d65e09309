/* A rank's client, for Python.

   Threads: no call waits for the client's lock, or for the agent, while it holds the interpreter. A chunk that is small and has
   a slot is handed over without letting go of the interpreter, which would take longer than the copy. */

#include "_native.h"

#include "memory_limits.h"

#include <structmember.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/ndarraytypes.h> /* the layout of arrays; no function of NumPy is called */

#ifndef Py_BEGIN_CRITICAL_SECTION /* before Python 3.13, the interpreter is held */
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

#define MOST_COPIED_BYTES (256 * 1024) /* by a thread that keeps the interpreter */

typedef struct {
    PyObject_HEAD
    PyObject *say; /* callable: level, text */
    handoff_client *client;
} ClientObject;

typedef struct {
    PyObject_HEAD
    ClientObject *owner;
    handoff_chunk *chunk;
    PyObject *dtype; /* of NumPy, or None: which arrays `send` takes */
    PyObject *lent;  /* the array over the slot that was given out, or None */
    PyTypeObject *ndarray_type;
    int64_t nbytes;
} ChunkObject;

typedef struct {
    PyObject_HEAD
    handoff_memory *memory;
} MemoryObject;

static native_state *state_of(PyTypeObject *type)
{
    return PyModule_GetState(PyType_GetModuleByDef(type, &native_module));
}

/* Raise what the library says has failed. */
static PyObject *raise_error(native_state *state, const handoff_error *error)
{
    if (strcmp(error->kind, "Interrupted") == 0 && PyErr_Occurred())
        return NULL; /* the signal's handler has raised */
    PyObject *text = PyUnicode_DecodeUTF8(error->text, (Py_ssize_t)strlen(error->text), "replace");
    PyObject *raised = text != NULL ? PyObject_CallFunction(state->named_error, "sO", error->kind, text) : NULL;
    if (raised != NULL)
        PyErr_SetObject((PyObject *)Py_TYPE(raised), raised);
    Py_XDECREF(raised);
    Py_XDECREF(text);
    return NULL;
}

/* Hooks of the library: called with or without the interpreter. */

static void say_hook(void *context, handoff_level level, const char *text)
{
    PyGILState_STATE held = PyGILState_Ensure();
    ClientObject *self = context;
    PyObject *said = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
    PyObject *result = said != NULL ? PyObject_CallFunction(self->say, "iO", (int)level, said) : NULL;
    if (result == NULL)
        PyErr_WriteUnraisable(self->say);
    Py_XDECREF(result);
    Py_XDECREF(said);
    PyGILState_Release(held);
}

static int interrupted_hook(void *context)
{
    (void)context;
    PyGILState_STATE held = PyGILState_Ensure();
    int raised = PyErr_CheckSignals() < 0;
    PyGILState_Release(held);
    return raised;
}

/* Descriptions: Python's tuples become what the library takes, in memory that goes with `storage`. */

typedef struct {
    void **blocks;
    size_t count, capacity;
} storage;

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

static void let_go(storage *kept)
{
    while (kept->count > 0)
        PyMem_Free(kept->blocks[--kept->count]);
    PyMem_Free(kept->blocks);
}

/* A tuple of `ndim` integers, or None (NULL, without an error). */
static int numbers_of(PyObject *tuple, int ndim, storage *kept, const int64_t **numbers)
{
    *numbers = NULL;
    if (tuple == Py_None)
        return 0;
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != ndim) {
        PyErr_SetString(PyExc_TypeError, "a shape must be a tuple of one integer for each dimension");
        return -1;
    }
    int64_t *values = allot(kept, (size_t)ndim * sizeof *values);
    if (values == NULL)
        return -1;
    for (int d = 0; d < ndim; d++) {
        values[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, d));
        if (values[d] == -1 && PyErr_Occurred())
            return -1;
    }
    *numbers = values;
    return 0;
}

static int describe_array(PyObject *described, storage *kept, handoff_array_description *array)
{
    PyObject *global_shape, *grid, *chunks;
    if (!PyArg_ParseTuple(described, "sziOOO!", &array->name, &array->dtype, &array->ndim, &global_shape, &grid,
                          &PyTuple_Type, &chunks))
        return -1;
    array->chunk_count = (size_t)PyTuple_GET_SIZE(chunks);
    handoff_chunk_description *places = allot(kept, array->chunk_count * sizeof *places);
    if (places == NULL || numbers_of(global_shape, array->ndim, kept, &array->global_shape) < 0 ||
        numbers_of(grid, array->ndim, kept, &array->grid) < 0)
        return -1;
    for (size_t c = 0; c < array->chunk_count; c++) {
        PyObject *shape, *position, *offset;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(chunks, c), "OOO", &shape, &position, &offset) ||
            numbers_of(shape, array->ndim, kept, &places[c].shape) < 0 ||
            numbers_of(position, array->ndim, kept, &places[c].position) < 0 ||
            numbers_of(offset, array->ndim, kept, &places[c].offset) < 0)
            return -1;
    }
    array->chunks = places;
    return 0;
}

static handoff_array_description *describe_arrays(PyObject *arrays, storage *kept)
{
    Py_ssize_t count = PyTuple_GET_SIZE(arrays);
    handoff_array_description *described = allot(kept, (size_t)count * sizeof *described);
    for (Py_ssize_t a = 0; described != NULL && a < count; a++)
        if (describe_array(PyTuple_GET_ITEM(arrays, a), kept, described + a) < 0)
            return NULL;
    return described;
}

static int parse_options(PyObject *args, PyObject *kwargs, handoff_options *options, PyObject **say, PyObject **arrays)
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

/* Memory */

static int Memory_getbuffer(MemoryObject *self, Py_buffer *view, int flags)
{
    return PyBuffer_FillInfo(view, (PyObject *)self, self->memory->base, (Py_ssize_t)self->memory->nbytes, 0, flags);
}

static void Memory_dealloc(MemoryObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    memory_release(self->memory);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot memory_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Chunk memory that is mapped for as long as anything refers to it.")},
    {Py_tp_dealloc, Memory_dealloc},
    {Py_bf_getbuffer, Memory_getbuffer},
    {0, NULL},
};

static PyType_Spec memory_spec = {
    "deisa.ray._handoff._native.Memory", sizeof(MemoryObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, memory_slots,
};

/* Chunk */

static int fits(const ChunkObject *self, PyObject *chunk)
{
    const PyArrayObject *array = (const PyArrayObject *)chunk;
    const handoff_chunk *own = self->chunk;
    return Py_TYPE(chunk) == self->ndarray_type && (PyObject *)PyArray_DESCR(array) == self->dtype &&
           PyArray_NDIM(array) == own->array->ndim &&
           memcmp(PyArray_DIMS(array), own->shape, (size_t)own->array->ndim * sizeof(npy_intp)) == 0;
}

/* Whoever still has the slot that was given out must not write into what is handed over. */
static void seal_lent(ChunkObject *self)
{
    PyObject *lent;
    Py_BEGIN_CRITICAL_SECTION(self);
    lent = self->lent;
    self->lent = NULL;
    Py_END_CRITICAL_SECTION();
    if (lent != NULL && Py_TYPE(lent) == self->ndarray_type)
        PyArray_CLEARFLAGS((PyArrayObject *)lent, NPY_ARRAY_WRITEABLE);
    Py_XDECREF(lent);
}

/* Hand over an array (NULL: the slot that was given out); 0 or -1 with an exception. */
static int hand_over(ChunkObject *self, PyObject *array, int64_t timestep)
{
    handoff_error error;
    const void *data = array != NULL ? PyArray_DATA((PyArrayObject *)array) : NULL;
    const npy_intp *strides = array != NULL ? PyArray_STRIDES((PyArrayObject *)array) : NULL;
    int result = 0;
    _Static_assert(sizeof(npy_intp) == sizeof(int64_t), "NumPy's strides have 64 bits");
    if (data == NULL)
        result = client_commit_at_once(self->chunk, timestep, &error);
    else if (self->nbytes <= MOST_COPIED_BYTES)
        result = client_send_at_once(self->chunk, data, (const int64_t *)strides, timestep, &error);
    if (result == 0) {
        Py_BEGIN_ALLOW_THREADS;
        result = data == NULL ? handoff_commit(self->chunk, timestep, &error)
                              : handoff_send(self->chunk, data, (const int64_t *)strides, timestep, &error);
        Py_END_ALLOW_THREADS;
    }
    if (self->lent != NULL && !self->chunk->given_out)
        seal_lent(self); /* it has been handed over, though something may have failed after that */
    if (result >= 0)
        return 0;
    raise_error(state_of(Py_TYPE(self)), &error);
    return -1;
}

PyDoc_STRVAR(send_doc, "send(chunk, timestep, /)\n--\n\n"
                       "Hand a chunk over. False: nothing has been done, because it is not exactly what was described.");

static PyObject *Chunk_send(ChunkObject *self, PyObject *const *args, Py_ssize_t count)
{
    int overflow;
    if (count != 2 || !PyLong_CheckExact(args[1]))
        Py_RETURN_FALSE;
    long long timestep = PyLong_AsLongLongAndOverflow(args[1], &overflow);
    int is_lent = self->lent != NULL && args[0] == self->lent && self->lent != Py_None;
    if (overflow || !(is_lent || fits(self, args[0])))
        Py_RETURN_FALSE;
    if (hand_over(self, is_lent ? NULL : args[0], timestep) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

/* NumPy's own function for that would have to be imported. */
static int has_itemsize(PyObject *array, const handoff_chunk *own)
{
    PyObject *itemsize = PyObject_GetAttrString(array, "itemsize");
    long long nbytes = itemsize != NULL ? PyLong_AsLongLong(itemsize) : -1;
    Py_XDECREF(itemsize);
    PyErr_Clear();
    return own->place == NULL ? nbytes > 0 : nbytes == own->place->itemsize;
}

PyDoc_STRVAR(put_doc, "put(array, timestep, /)\n--\n\n"
                      "Hand over an array of the described shape, whose elements have the size and values of the dtype.");

static PyObject *Chunk_put(ChunkObject *self, PyObject *args)
{
    PyObject *array;
    long long timestep;
    if (!PyArg_ParseTuple(args, "OL", &array, &timestep))
        return NULL;
    const handoff_chunk *own = self->chunk;
    const PyArrayObject *given = (const PyArrayObject *)array;
    if (!PyObject_TypeCheck(array, self->ndarray_type) || PyArray_NDIM(given) != own->array->ndim ||
        memcmp(PyArray_DIMS(given), own->shape, (size_t)own->array->ndim * sizeof(npy_intp)) != 0 ||
        !has_itemsize(array, own)) {
        PyErr_SetString(PyExc_TypeError, "put() takes an array that fits");
        return NULL;
    }
    if (hand_over(self, array, timestep) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(commit_doc, "commit(timestep, /)\n--\n\nHand over the slot that was given out.");

static PyObject *Chunk_commit(ChunkObject *self, PyObject *arg)
{
    long long timestep = PyLong_AsLongLong(arg);
    if ((timestep == -1 && PyErr_Occurred()) || hand_over(self, NULL, timestep) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(slot_doc, "slot(timestep, /)\n--\n\n"
                       "Wait for the chunk's next slot, and return its offset in the memory; None where nothing is handed over.");

static PyObject *Chunk_slot(ChunkObject *self, PyObject *arg)
{
    long long timestep = PyLong_AsLongLong(arg);
    handoff_error error;
    char *slot;
    if (timestep == -1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    slot = handoff_slot(self->chunk, timestep, &error);
    Py_END_ALLOW_THREADS;
    if (slot != NULL)
        return PyLong_FromSsize_t(slot - self->chunk->place->memory->base);
    if (error.kind[0] != '\0')
        return raise_error(state_of(Py_TYPE(self)), &error);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(check_doc, "check(timestep, /)\n--\n\nRaise what `send` would for this timestep.");

static PyObject *Chunk_check(ChunkObject *self, PyObject *arg)
{
    long long timestep = PyLong_AsLongLong(arg);
    handoff_error error;
    int result;
    if (timestep == -1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = handoff_check(self->chunk, timestep, &error);
    Py_END_ALLOW_THREADS;
    if (result < 0)
        return raise_error(state_of(Py_TYPE(self)), &error);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(declare_doc, "declare_dtype(dtype, itemsize, /)\n--\n\n"
                          "Say the dtype of the chunk's array, and wait for the memory of all its chunks.");

static PyObject *Chunk_declare_dtype(ChunkObject *self, PyObject *args)
{
    const char *dtype;
    long long itemsize;
    handoff_error error;
    int result;
    if (!PyArg_ParseTuple(args, "sL", &dtype, &itemsize))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = handoff_declare_dtype(self->chunk->array, dtype, itemsize, &error);
    Py_END_ALLOW_THREADS;
    if (result < 0)
        return raise_error(state_of(Py_TYPE(self)), &error);
    Py_RETURN_NONE;
}

static PyObject *Chunk_get_memory(ChunkObject *self, void *unused)
{
    (void)unused;
    const placement *place = self->chunk->place;
    if (place == NULL)
        Py_RETURN_NONE;
    native_state *state = state_of(Py_TYPE(self));
    MemoryObject *memory = PyObject_New(MemoryObject, state->memory_type);
    if (memory != NULL)
        memory->memory = memory_retain(place->memory);
    return (PyObject *)memory;
}

static PyObject *Chunk_get_strides(ChunkObject *self, void *unused)
{
    (void)unused;
    const placement *place = self->chunk->place;
    if (place == NULL)
        Py_RETURN_NONE;
    PyObject *strides = PyTuple_New(place->ndim);
    for (int d = 0; strides != NULL && d < place->ndim; d++) {
        PyObject *number = PyLong_FromLongLong(place->strides[d]);
        if (number == NULL)
            Py_CLEAR(strides);
        else
            PyTuple_SET_ITEM(strides, d, number);
    }
    return strides;
}

static PyObject *Chunk_get_memory_dtype(ChunkObject *self, void *unused)
{
    (void)unused;
    const placement *place = self->chunk->place;
    return place != NULL ? PyUnicode_FromString(place->dtype) : Py_NewRef(Py_None);
}

static PyObject *Chunk_get_wanted(ChunkObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->chunk->array->wanted);
}

static int Chunk_set_dtype(ChunkObject *self, PyObject *dtype, void *unused)
{
    (void)unused;
    if (dtype == NULL || dtype == Py_None) {
        PyErr_SetString(PyExc_TypeError, "the dtype of a chunk stays");
        return -1;
    }
    PyObject *itemsize = PyObject_GetAttrString(dtype, "itemsize");
    if (itemsize == NULL)
        return -1;
    int64_t nbytes = PyLong_AsLongLong(itemsize);
    Py_DECREF(itemsize);
    if (nbytes == -1 && PyErr_Occurred())
        return -1;
    for (int d = 0; d < self->chunk->array->ndim; d++)
        nbytes *= self->chunk->shape[d];
    self->nbytes = nbytes;
    Py_XSETREF(self->dtype, Py_NewRef(dtype));
    return 0;
}

static PyObject *Chunk_get_dtype(ChunkObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef(self->dtype != NULL ? self->dtype : Py_None);
}

static int Chunk_traverse(ChunkObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->owner);
    Py_VISIT(self->dtype);
    Py_VISIT(self->lent);
    return 0;
}

static int Chunk_clear(ChunkObject *self)
{
    Py_CLEAR(self->dtype);
    Py_CLEAR(self->lent);
    return 0; /* the owner stays: it has the memory of `chunk` */
}

static void Chunk_dealloc(ChunkObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Chunk_clear(self);
    Py_CLEAR(self->owner);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef chunk_methods[] = {
    {"send", (PyCFunction)(void (*)(void))Chunk_send, METH_FASTCALL, send_doc},
    {"put", (PyCFunction)Chunk_put, METH_VARARGS, put_doc},
    {"commit", (PyCFunction)Chunk_commit, METH_O, commit_doc},
    {"slot", (PyCFunction)Chunk_slot, METH_O, slot_doc},
    {"check", (PyCFunction)Chunk_check, METH_O, check_doc},
    {"declare_dtype", (PyCFunction)Chunk_declare_dtype, METH_VARARGS, declare_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef chunk_members[] = {
    {"lent", T_OBJECT, offsetof(ChunkObject, lent), 0, PyDoc_STR("The array over the slot that was given out, or None.")},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef chunk_getset[] = {
    {"dtype", (getter)Chunk_get_dtype, (setter)Chunk_set_dtype, PyDoc_STR("NumPy's dtype of arrays that `send` takes."), NULL},
    {"wanted", (getter)Chunk_get_wanted, NULL, PyDoc_STR("Whether a callback asks for the array."), NULL},
    {"memory", (getter)Chunk_get_memory, NULL, PyDoc_STR("The memory that the slots lie in, or None."), NULL},
    {"strides", (getter)Chunk_get_strides, NULL, PyDoc_STR("Those of a slot, in bytes, or None."), NULL},
    {"memory_dtype", (getter)Chunk_get_memory_dtype, NULL, PyDoc_STR("The dtype of the slots as a text, or None."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot chunk_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Where one chunk is handed over.")},
    {Py_tp_dealloc, Chunk_dealloc},
    {Py_tp_traverse, Chunk_traverse},
    {Py_tp_clear, Chunk_clear},
    {Py_tp_methods, chunk_methods},
    {Py_tp_members, chunk_members},
    {Py_tp_getset, chunk_getset},
    {0, NULL},
};

static PyType_Spec chunk_spec = {
    "deisa.ray._handoff._native.Chunk", sizeof(ChunkObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, chunk_slots,
};

/* Client */

static PyObject *new_chunk(ClientObject *owner, handoff_chunk *chunk, native_state *state)
{
    ChunkObject *self = PyObject_GC_New(ChunkObject, state->chunk_type);
    if (self == NULL)
        return NULL;
    self->owner = (ClientObject *)Py_NewRef(owner);
    self->chunk = chunk;
    self->dtype = self->lent = NULL;
    self->ndarray_type = state->ndarray_type;
    self->nbytes = 0;
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

static int Client_init(ClientObject *self, PyObject *args, PyObject *kwargs)
{
    native_state *state = state_of(Py_TYPE(self));
    handoff_options options = {.context = self, .say = say_hook, .interrupted = interrupted_hook};
    handoff_error error;
    storage kept = {0};
    PyObject *say, *arrays;
    if (self->client != NULL) {
        PyErr_SetString(PyExc_TypeError, "a client is opened once");
        return -1;
    }
    if (parse_options(args, kwargs, &options, &say, &arrays) < 0)
        return -1;
    handoff_array_description *described = describe_arrays(arrays, &kept);
    if (described == NULL) {
        let_go(&kept);
        return -1;
    }
    Py_XSETREF(self->say, Py_NewRef(say));
    Py_BEGIN_ALLOW_THREADS;
    self->client = handoff_open(&options, described, (size_t)PyTuple_GET_SIZE(arrays), &error);
    Py_END_ALLOW_THREADS;
    let_go(&kept);
    if (self->client == NULL) {
        raise_error(state, &error);
        return -1;
    }
    return 0;
}

static PyObject *Client_get_chunks(ClientObject *self, void *unused)
{
    (void)unused;
    native_state *state = state_of(Py_TYPE(self));
    PyObject *arrays = PyTuple_New((Py_ssize_t)self->client->array_count);
    for (size_t a = 0; arrays != NULL && a < self->client->array_count; a++) {
        handoff_array *array = self->client->arrays + a;
        PyObject *chunks = PyTuple_New((Py_ssize_t)array->chunk_count);
        for (size_t c = 0; chunks != NULL && c < array->chunk_count; c++) {
            PyObject *chunk = new_chunk(self, array->chunks + c, state);
            if (chunk == NULL)
                Py_CLEAR(chunks);
            else
                PyTuple_SET_ITEM(chunks, (Py_ssize_t)c, chunk);
        }
        if (chunks == NULL)
            Py_CLEAR(arrays);
        else
            PyTuple_SET_ITEM(arrays, (Py_ssize_t)a, chunks);
    }
    return arrays;
}

PyDoc_STRVAR(find_doc, "find(array, index, /)\n--\n\n"
                       "Return the numbers of an array and of a chunk in it; an index of None stands for the only one.");

static PyObject *Client_find(ClientObject *self, PyObject *args)
{
    const char *name;
    PyObject *asked;
    handoff_error error;
    handoff_chunk *chunk;
    if (!PyArg_ParseTuple(args, "sO", &name, &asked))
        return NULL;
    long long index = asked == Py_None ? HANDOFF_ONLY_CHUNK : PyLong_AsLongLong(asked);
    if (index == -1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    chunk = handoff_find(self->client, name, index, &error);
    Py_END_ALLOW_THREADS;
    if (chunk == NULL)
        return raise_error(state_of(Py_TYPE(self)), &error);
    return Py_BuildValue("nL", (Py_ssize_t)(chunk->array - self->client->arrays), (long long)chunk->index);
}

PyDoc_STRVAR(advance_doc, "advance(timestep, /)\n--\n\nSay that nothing older than a timestep will come.");

static PyObject *Client_advance(ClientObject *self, PyObject *arg)
{
    long long timestep = PyLong_AsLongLong(arg);
    handoff_error error;
    int result;
    if (timestep == -1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = handoff_advance(self->client, timestep, &error);
    Py_END_ALLOW_THREADS;
    if (result < 0)
        return raise_error(state_of(Py_TYPE(self)), &error);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(close_doc, "close()\n--\n\nEnd in order.");

static PyObject *Client_close(ClientObject *self, PyObject *unused)
{
    (void)unused;
    handoff_error error;
    int result;
    Py_BEGIN_ALLOW_THREADS;
    result = handoff_close(self->client, &error);
    Py_END_ALLOW_THREADS;
    if (result < 0)
        return raise_error(state_of(Py_TYPE(self)), &error);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(abort_doc, "abort(reason, /)\n--\n\n"
                        "End because of an error, or (without a reason) as a dying rank does; calls that wait in other threads fail.");

static PyObject *Client_abort(ClientObject *self, PyObject *arg)
{
    const char *reason = PyUnicode_AsUTF8(arg);
    if (reason == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    handoff_abort(self->client, reason);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(close_with_process_doc, "close_with_process(otherwise, /)\n--\n\n"
                                     "End as the process does: in order if its exit status is 0, else with that reason.");

static PyObject *Client_close_with_process(ClientObject *self, PyObject *arg)
{
    const char *otherwise = PyUnicode_AsUTF8(arg);
    if (otherwise == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    handoff_close_with_process(self->client, otherwise);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(close_in_child_doc, "close_in_child()\n--\n\nClose a forked child's copies of the descriptors.");

static PyObject *Client_close_in_child(ClientObject *self, PyObject *unused)
{
    (void)unused;
    if (self->client != NULL)
        handoff_close_in_child(self->client);
    Py_RETURN_NONE;
}

static PyObject *Client_get_stats(ClientObject *self, void *unused)
{
    (void)unused;
    handoff_stats stats = handoff_get_stats(self->client);
    return Py_BuildValue("LLd", (long long)stats.chunks, (long long)stats.bytes_handed_over, stats.held_up_s);
}

static PyObject *Client_get_newest(ClientObject *self, void *unused)
{
    (void)unused;
    return self->client->newest_any ? PyLong_FromLongLong(self->client->newest) : Py_NewRef(Py_None);
}

static PyObject *Client_get_closed(ClientObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->client->closed);
}

static PyObject *Client_get_detached(ClientObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->client->detached);
}

static int Client_traverse(ClientObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->say);
    return 0;
}

static void Client_dealloc(ClientObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->client != NULL) {
        self->client->options.say = NULL;
        handoff_free(self->client);
    }
    Py_CLEAR(self->say);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef client_object_methods[] = {
    {"find", (PyCFunction)Client_find, METH_VARARGS, find_doc},
    {"advance", (PyCFunction)Client_advance, METH_O, advance_doc},
    {"close", (PyCFunction)Client_close, METH_NOARGS, close_doc},
    {"abort", (PyCFunction)Client_abort, METH_O, abort_doc},
    {"close_with_process", (PyCFunction)Client_close_with_process, METH_O, close_with_process_doc},
    {"close_in_child", (PyCFunction)Client_close_in_child, METH_NOARGS, close_in_child_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef client_getset[] = {
    {"chunks", (getter)Client_get_chunks, NULL, PyDoc_STR("New objects for all chunks, array by array."), NULL},
    {"stats", (getter)Client_get_stats, NULL, PyDoc_STR("Chunks, bytes, and seconds spent in waiting for slots."), NULL},
    {"newest", (getter)Client_get_newest, NULL, PyDoc_STR("The timestep that this rank is at, or None."), NULL},
    {"closed", (getter)Client_get_closed, NULL, PyDoc_STR("Whether the end was said."), NULL},
    {"detached", (getter)Client_get_detached, NULL, PyDoc_STR("Whether nothing goes anywhere (any more)."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot client_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("A rank's client; opening one waits until the session has started.")},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, Client_init},
    {Py_tp_dealloc, Client_dealloc},
    {Py_tp_traverse, Client_traverse},
    {Py_tp_methods, client_object_methods},
    {Py_tp_getset, client_getset},
    {0, NULL},
};

static PyType_Spec client_spec = {
    "deisa.ray._handoff._native.Client", sizeof(ClientObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, client_slots,
};

/* Functions of the module. */

PyDoc_STRVAR(refuse_doc, "refuse(reason, /, **options)\n--\n\n"
                         "Connect only to say why this rank cannot join; the options are those of a client.");

static PyObject *native_refuse(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    handoff_options options = {.interrupted = interrupted_hook};
    PyObject *say, *arrays, *nothing = PyTuple_New(0);
    const char *reason;
    int parsed = nothing != NULL && PyArg_ParseTuple(args, "s", &reason) &&
                 parse_options(nothing, kwargs, &options, &say, &arrays) == 0;
    Py_XDECREF(nothing);
    if (!parsed)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    handoff_refuse(&options, reason);
    Py_END_ALLOW_THREADS;
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(limits_doc, "own_limits(memberships=None, root=None, /)\n--\n\n"
                         "Return the memory limits that this process is under, as (group, path, limit, available).");

static PyObject *native_own_limits(PyObject *module, PyObject *args)
{
    (void)module;
    const char *memberships = NULL, *root = NULL;
    if (!PyArg_ParseTuple(args, "|zz", &memberships, &root))
        return NULL;
    memory_limit *limits = PyMem_Calloc(LIMITS_MOST, sizeof *limits);
    if (limits == NULL)
        return PyErr_NoMemory();
    size_t count = own_limits(memberships, root != NULL ? root : LIMITS_ROOT, limits);
    PyObject *found = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; found != NULL && i < count; i++) {
        PyObject *limit = Py_BuildValue("LsLL", (long long)limits[i].group, limits[i].path, (long long)limits[i].limit,
                                        (long long)limits[i].available);
        if (limit == NULL)
            Py_CLEAR(found);
        else
            PyTuple_SET_ITEM(found, (Py_ssize_t)i, limit);
    }
    PyMem_Free(limits);
    return found;
}

PyDoc_STRVAR(socket_path_doc, "check_socket_path(path, /)\n--\n\n"
                              "Raise `ConfigurationError` where no socket can be at a path, now or later.");

static PyObject *native_check_socket_path(PyObject *module, PyObject *arg)
{
    handoff_error error;
    const char *path = PyUnicode_AsUTF8(arg);
    if (path == NULL)
        return NULL;
    if (check_socket_path(path, &error) < 0)
        return raise_error(PyModule_GetState(module), &error);
    Py_RETURN_NONE;
}

PyMethodDef client_methods[] = {
    {"refuse", (PyCFunction)(void (*)(void))native_refuse, METH_VARARGS | METH_KEYWORDS, refuse_doc},
    {"own_limits", native_own_limits, METH_VARARGS, limits_doc},
    {"check_socket_path", native_check_socket_path, METH_O, socket_path_doc},
    {NULL, NULL, 0, NULL},
};

static PyObject *attribute_of(const char *module, const char *name)
{
    PyObject *imported = PyImport_ImportModule(module);
    PyObject *found = imported != NULL ? PyObject_GetAttrString(imported, name) : NULL;
    Py_XDECREF(imported);
    return found;
}

int client_exec(PyObject *module)
{
    native_state *state = PyModule_GetState(module);
    state->ndarray_type = (PyTypeObject *)attribute_of("numpy", "ndarray");
    state->named_error = attribute_of("deisa.ray.errors", "named_error");
    state->client_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &client_spec, NULL);
    state->chunk_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &chunk_spec, NULL);
    state->memory_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &memory_spec, NULL);
    if (state->ndarray_type == NULL || state->named_error == NULL || state->client_type == NULL ||
        state->chunk_type == NULL || state->memory_type == NULL)
        return -1;
    return PyModule_AddType(module, state->client_type);
}
