/* A rank's chunks, for Python.

   Threads: no call waits for the client's lock, or for the agent, while it holds the interpreter. A chunk that is small and has
   a slot is handed over without letting go of the interpreter, which would take longer than the copy. */

#include "_native.h"

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

PyType_Spec memory_spec = {
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

PyType_Spec chunk_spec = {
    "deisa.ray._handoff._native.Chunk", sizeof(ChunkObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, chunk_slots,
};

PyObject *new_chunk(ClientObject *owner, handoff_chunk *chunk, native_state *state)
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
