/* A rank's chunks, for Python.

   Threads: no call waits for the client's lock, or for the agent, while it holds the interpreter. A chunk that is small and has
   a slot is handed over without letting go of the interpreter, which would take longer than the copy. */

#include "_native.h"
#include "hot.h"

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
    int64_t itemsize, nbytes; /* of `dtype`: of an element, of the chunk */
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

HOT static int fits(const ChunkObject *self, PyObject *chunk)
{
    const PyArrayObject *array = (const PyArrayObject *)chunk;
    const handoff_chunk *own = self->chunk;
    return Py_TYPE(chunk) == self->ndarray_type && (PyObject *)PyArray_DESCR(array) == self->dtype &&
           PyArray_NDIM(array) == own->array->ndim &&
           memcmp(PyArray_DIMS(array), own->local, (size_t)own->array->ndim * sizeof(npy_intp)) == 0;
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
HOT static int hand_over(ChunkObject *self, PyObject *array, int64_t timestep, double time)
{
    handoff_error error;
    const void *data = array != NULL ? PyArray_DATA((PyArrayObject *)array) : NULL;
    const npy_intp *strides = array != NULL ? PyArray_STRIDES((PyArrayObject *)array) : NULL;
    int result = 0;
    _Static_assert(sizeof(npy_intp) == sizeof(int64_t), "NumPy's strides have 64 bits");
    if (data == NULL || self->nbytes <= MOST_COPIED_BYTES)
        result = client_hand_over_at_once(self->chunk, data, (const int64_t *)strides, timestep, time, &error);
    if (result == 0) {
        Py_BEGIN_ALLOW_THREADS;
        result = data == NULL ? handoff_commit(self->chunk, timestep, time, &error)
                              : handoff_send(self->chunk, data, (const int64_t *)strides, timestep, time, &error);
        Py_END_ALLOW_THREADS;
    }
    if (self->lent != NULL && !self->chunk->given_out)
        seal_lent(self); /* it has been handed over, though something may have failed after that */
    if (result >= 0)
        return 0;
    raise_error(state_of(Py_TYPE(self)), &error);
    return -1;
}

/* Whether an object is a finite number of the usual kinds, NumPy's 64-bit one among them; never an exception. */
static int is_time(PyObject *given, double *time)
{
    if (PyFloat_Check(given))
        *time = PyFloat_AS_DOUBLE(given);
    else if (PyLong_CheckExact(given))
        *time = PyLong_AsDouble(given);
    else
        return 0;
    if (*time == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return isfinite(*time);
}

PyDoc_STRVAR(send_doc, "send(chunk, timestep, time, /)\n--\n\n"
                       "Hand a chunk over. False: nothing has been done, because it is not exactly what was described.");

HOT static PyObject *Chunk_send(ChunkObject *self, PyObject *const *args, Py_ssize_t count)
{
    int overflow;
    if (count != 3 || !PyLong_CheckExact(args[1]))
        Py_RETURN_FALSE;
    double time = HANDOFF_NO_TIME;
    if (args[2] != Py_None && !is_time(args[2], &time))
        Py_RETURN_FALSE;
    long long timestep = PyLong_AsLongLongAndOverflow(args[1], &overflow);
    int is_lent = self->lent != NULL && args[0] == self->lent && self->lent != Py_None;
    if (overflow || !(is_lent || fits(self, args[0])))
        Py_RETURN_FALSE;
    if (hand_over(self, is_lent ? NULL : args[0], timestep, time) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

/* A physical time, or None. */
static int time_of(PyObject *given, double *time)
{
    *time = given == Py_None ? HANDOFF_NO_TIME : PyFloat_AsDouble(given);
    return PyErr_Occurred() ? -1 : 0;
}

/* NumPy's own function for that would have to be imported. */
static int has_itemsize(PyObject *array, int64_t nbytes)
{
    PyObject *itemsize = PyObject_GetAttrString(array, "itemsize");
    long long own = itemsize != NULL ? PyLong_AsLongLong(itemsize) : -1;
    Py_XDECREF(itemsize);
    PyErr_Clear();
    return own == nbytes;
}

PyDoc_STRVAR(put_doc, "put(array, timestep, time, /)\n--\n\n"
                      "Hand over an array of the described shape, with its halo, whose elements have the size and values of the dtype.");

static PyObject *Chunk_put(ChunkObject *self, PyObject *args)
{
    PyObject *array, *given_time;
    long long timestep;
    double time;
    if (!PyArg_ParseTuple(args, "OLO", &array, &timestep, &given_time) || time_of(given_time, &time) < 0)
        return NULL;
    const handoff_chunk *own = self->chunk;
    const PyArrayObject *given = (const PyArrayObject *)array;
    if (!PyObject_TypeCheck(array, self->ndarray_type) || PyArray_NDIM(given) != own->array->ndim ||
        memcmp(PyArray_DIMS(given), own->local, (size_t)own->array->ndim * sizeof(npy_intp)) != 0 ||
        !has_itemsize(array, self->itemsize)) {
        PyErr_SetString(PyExc_TypeError, "put() takes an array that fits");
        return NULL;
    }
    if (hand_over(self, array, timestep, time) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(commit_doc, "commit(timestep, time, /)\n--\n\nHand over the slot that was given out.");

static PyObject *Chunk_commit(ChunkObject *self, PyObject *args)
{
    PyObject *given_time;
    long long timestep;
    double time;
    if (!PyArg_ParseTuple(args, "LO", &timestep, &given_time) || time_of(given_time, &time) < 0 ||
        hand_over(self, NULL, timestep, time) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *new_memory(ChunkObject *self, handoff_memory *memory)
{
    MemoryObject *new = PyObject_New(MemoryObject, state_of(Py_TYPE(self))->memory_type);
    if (new == NULL)
        memory_release(memory);
    else
        new->memory = memory;
    return (PyObject *)new;
}

static PyObject *tuple_of(const int64_t *numbers, int count)
{
    PyObject *tuple = PyTuple_New(count);
    for (int d = 0; tuple != NULL && d < count; d++) {
        PyObject *number = PyLong_FromLongLong(numbers[d]);
        if (number == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, d, number);
    }
    return tuple;
}

PyDoc_STRVAR(slot_doc, "slot(timestep, /)\n--\n\n"
                       "Wait for the chunk's next slot, and return the memory, and the slot's offset and strides in it.\n\n"
                       "None stands for an array that is not handed over.");

static PyObject *Chunk_slot(ChunkObject *self, PyObject *arg)
{
    long long timestep = PyLong_AsLongLong(arg);
    handoff_error error;
    given_slot given;
    int result;
    if (timestep == -1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = client_give_slot(self->chunk, timestep, &given, &error);
    Py_END_ALLOW_THREADS;
    if (result < 0)
        return raise_error(state_of(Py_TYPE(self)), &error);
    if (result == 0)
        Py_RETURN_NONE;
    Py_ssize_t offset = given.at - given.memory->base; /* another thread may have closed the client by now */
    PyObject *memory = new_memory(self, given.memory), *strides = tuple_of(given.strides, self->chunk->array->ndim);
    PyObject *slot = memory != NULL && strides != NULL ? Py_BuildValue("OnO", memory, offset, strides) : NULL;
    Py_XDECREF(memory);
    Py_XDECREF(strides);
    return slot;
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

PyDoc_STRVAR(declare_doc, "declare_dtype(dtype, /)\n--\n\n"
                          "Say the dtype of the chunk's array, wait for the memory of all its chunks, and return its dtype.\n\n"
                          "That is another one if other bridges have declared it, and None for an array that is not handed over.");

static PyObject *Chunk_declare_dtype(ChunkObject *self, PyObject *arg)
{
    const char *dtype = PyUnicode_AsUTF8(arg);
    char *settled;
    handoff_error error;
    int result;
    if (dtype == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = client_declare_dtype(self->chunk->array, dtype, &settled, &error);
    Py_END_ALLOW_THREADS;
    if (result < 0)
        return raise_error(state_of(Py_TYPE(self)), &error);
    if (settled == NULL)
        Py_RETURN_NONE;
    PyObject *text = PyUnicode_FromString(settled);
    free(settled);
    return text;
}

static PyObject *Chunk_get_wanted(ChunkObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->chunk->array->streams != NULL);
}

static int Chunk_set_dtype(ChunkObject *self, PyObject *dtype, void *unused)
{
    (void)unused;
    if (dtype == NULL || dtype == Py_None) {
        PyErr_SetString(PyExc_TypeError, "the dtype of a chunk stays");
        return -1;
    }
    PyObject *number = PyObject_GetAttrString(dtype, "itemsize");
    if (number == NULL)
        return -1;
    int64_t itemsize = PyLong_AsLongLong(number), nbytes = itemsize;
    Py_DECREF(number);
    if (itemsize == -1 && PyErr_Occurred())
        return -1;
    for (int d = 0; d < self->chunk->array->ndim; d++)
        nbytes *= self->chunk->shape[d];
    self->itemsize = itemsize;
    self->nbytes = nbytes;
    self->chunk->array->itemsize = itemsize;
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
    {"commit", (PyCFunction)Chunk_commit, METH_VARARGS, commit_doc},
    {"slot", (PyCFunction)Chunk_slot, METH_O, slot_doc},
    {"check", (PyCFunction)Chunk_check, METH_O, check_doc},
    {"declare_dtype", (PyCFunction)Chunk_declare_dtype, METH_O, declare_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef chunk_members[] = {
    {"lent", T_OBJECT, offsetof(ChunkObject, lent), 0, PyDoc_STR("The array over the slot that was given out, or None.")},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef chunk_getset[] = {
    {"dtype", (getter)Chunk_get_dtype, (setter)Chunk_set_dtype, PyDoc_STR("NumPy's dtype of arrays that `send` takes."), NULL},
    {"wanted", (getter)Chunk_get_wanted, NULL, PyDoc_STR("Whether a callback asks for the array."), NULL},
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
    self->itemsize = self->nbytes = 0;
    PyObject_GC_Track(self);
    return (PyObject *)self;
}
