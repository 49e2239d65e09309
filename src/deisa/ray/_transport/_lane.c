/* The usual `Bridge.send`, from the check of the chunk to waking the agent, in one call.

   A rank comes here after computing for a while, when the interpreter's code and data have left the processor's
   caches; what a send costs then is mostly bringing them back. This file does nothing that `bridge.py`, `client.py`
   and `pages.py` do not do, and leaves everything unusual to them: it answers that it has done nothing.

   It keeps no account of its own. Turns, timesteps and counters are words that it shares with the Python code. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/ndarraytypes.h> /* the layout of arrays; no function of NumPy is called */

#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

/* Larger chunks are copied by NumPy, which lets other threads run meanwhile. */
#define MOST_COPIED_BYTES (256 * 1024)

/* Words of a bridge, and of each of its outlets; see `client.Account`. */
enum { NEWEST, CHUNKS, BYTES, OPEN };
enum { TURN, SENT };

typedef struct {
    PyObject_HEAD
    Py_buffer account, board, outbox, tally;
    int64_t *bridge, *own; /* words of the account */
    int64_t *turns;        /* on the board: how many turns have a slot, then the slots */
    int64_t *row;          /* on the tally */
    int64_t *within;       /* of the account: chunks of this array handed over for a timestep that is not whole */
    Py_ssize_t slots, capacity, region, chunks, bridges, own_word, nbytes;
    Py_ssize_t run_bytes; /* a slot may lie in a box: so many bytes lie together in it */
    int outer;            /* dimensions over which runs are repeated */
    PyObject *memory; /* a tuple: the slots as arrays */
    PyObject *lent;   /* an array over a slot that was given out, or NULL */
    PyObject *look;   /* the message that wakes the agent */
    int fd;
} Lane;

static int words_of(PyObject *object, Py_buffer *view, int writable, Py_ssize_t at_least)
{
    if (PyObject_GetBuffer(object, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0)
        return -1;
    if (view->len < at_least * (Py_ssize_t)sizeof(int64_t) || (uintptr_t)view->buf % sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "a page is too small, or not aligned");
        return -1;
    }
    return 0;
}

static int Lane_init(Lane *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"account", "at", "within", "chunks", "board", "row", "slots", "outbox", "capacity",
                            "region", "tally", "first", "bridges", "own", "memory", "fd", "look", NULL};
    PyObject *account, *board, *outbox, *tally, *memory, *look;
    Py_ssize_t at, within, row, first, own;
    if (self->memory != NULL) {
        PyErr_SetString(PyExc_TypeError, "a lane is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OnnnOnnOnnOnnnO!iS", names, &account, &at, &within,
                                     &self->chunks, &board, &row, &self->slots, &outbox, &self->capacity, &self->region, &tally, &first,
                                     &self->bridges, &own, &PyTuple_Type, &memory, &self->fd, &look))
        return -1;
    if (self->slots < 1 || self->capacity < 1 || self->chunks < 1 || self->bridges < 1 || at <= OPEN ||
        within <= OPEN || row < 0 || first < 0 ||
        own < first || own >= first + self->bridges || PyTuple_GET_SIZE(memory) != self->slots) {
        PyErr_SetString(PyExc_ValueError, "a lane's places make no sense");
        return -1;
    }
    if (words_of(account, &self->account, 1, (at > within ? at : within) + SENT + 1) < 0 ||
        words_of(board, &self->board, 0, row + 1 + self->slots) < 0 ||
        words_of(outbox, &self->outbox, 1, 1 + 2 * self->capacity) < 0 ||
        words_of(tally, &self->tally, 1, first + self->bridges) < 0)
        return -1;
    for (Py_ssize_t i = 0; i < self->slots; i++)
        if (strcmp(Py_TYPE(PyTuple_GET_ITEM(memory, i))->tp_name, "numpy.ndarray") != 0) {
            PyErr_SetString(PyExc_TypeError, "slots must be NumPy arrays");
            return -1;
        }
    PyObject *nbytes = PyObject_GetAttrString(PyTuple_GET_ITEM(memory, 0), "nbytes");
    if (nbytes == NULL)
        return -1;
    self->nbytes = PyLong_AsSsize_t(nbytes);
    Py_DECREF(nbytes);
    if (self->nbytes < 0)
        return -1;
    PyArrayObject *slot = (PyArrayObject *)PyTuple_GET_ITEM(memory, 0);
    Py_ssize_t elements = 1;
    for (int d = 0; d < PyArray_NDIM(slot); d++)
        elements *= PyArray_DIM(slot, d);
    self->run_bytes = elements ? self->nbytes / elements : 0;
    self->outer = PyArray_NDIM(slot);
    while (self->outer > 0 && PyArray_STRIDE(slot, self->outer - 1) == self->run_bytes)
        self->run_bytes *= PyArray_DIM(slot, --self->outer);
    self->bridge = self->account.buf;
    self->within = self->bridge + within;
    self->own = self->bridge + at;
    self->turns = (int64_t *)self->board.buf + row;
    self->row = (int64_t *)self->tally.buf + first;
    self->own_word = own - first;
    self->memory = Py_NewRef(memory);
    self->look = Py_NewRef(look);
    return 0;
}

static void Lane_dealloc(Lane *self)
{
    PyObject_GC_UnTrack(self);
    Py_buffer *views[] = {&self->account, &self->board, &self->outbox, &self->tally};
    for (int i = 0; i < 4; i++)
        if (views[i]->obj != NULL)
            PyBuffer_Release(views[i]);
    Py_CLEAR(self->memory);
    Py_CLEAR(self->lent);
    Py_CLEAR(self->look);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int Lane_traverse(Lane *self, visitproc visit, void *arg)
{
    Py_VISIT(self->memory);
    Py_VISIT(self->lent);
    return 0;
}

static int fits(PyObject *chunk, PyArrayObject *slot)
{
    PyArrayObject *array = (PyArrayObject *)chunk;
    int wanted = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED;
    return Py_TYPE(chunk) == Py_TYPE(slot) && PyArray_DESCR(array) == PyArray_DESCR(slot) &&
           (PyArray_FLAGS(array) & wanted) == wanted && PyArray_NDIM(array) == PyArray_NDIM(slot) &&
           memcmp(PyArray_DIMS(array), PyArray_DIMS(slot), PyArray_NDIM(slot) * sizeof(npy_intp)) == 0;
}

static void copy(Lane *self, PyArrayObject *slot, PyArrayObject *chunk)
{
    char *to = PyArray_DATA(slot);
    const char *from = PyArray_DATA(chunk), *end = from + self->nbytes;
    npy_intp at[NPY_MAXDIMS] = {0};
    while (from < end) {
        memcpy(to, from, self->run_bytes);
        from += self->run_bytes;
        for (int d = self->outer - 1; d >= 0; d--) {
            to += PyArray_STRIDE(slot, d);
            if (++at[d] < PyArray_DIM(slot, d))
                break;
            to -= at[d] * PyArray_STRIDE(slot, d);
            at[d] = 0;
        }
    }
}

static int is_last(Lane *self)
{
    if (++*self->within < self->chunks)
        return 0;
    *self->within = 0;
    int64_t whole = (int64_t)((uint64_t)self->row[self->own_word] + 1); /* others can write here: no overflow */
    __atomic_store_n(&self->row[self->own_word], whole, __ATOMIC_SEQ_CST);
    for (Py_ssize_t i = 0; i < self->bridges; i++)
        if (__atomic_load_n(&self->row[i], __ATOMIC_SEQ_CST) < whole)
            return 0;
    return 1;
}

PyDoc_STRVAR(send_doc,
             "send(chunk, timestep)\n--\n\n"
             "Hand a chunk over. False: nothing has been done. None: it has, but the agent must be heard or told.");

static PyObject *Lane_send(Lane *self, PyObject *const *args, Py_ssize_t count)
{
    int overflow;
    int64_t *bridge = self->bridge, *own = self->own;
    if (count != 2 || !bridge[OPEN] || /* never open in a forked child, where the kernel wipes the account */
        !PyLong_CheckExact(args[1]))
        Py_RETURN_FALSE;
    long long timestep = PyLong_AsLongLongAndOverflow(args[1], &overflow);
    if (overflow || timestep < bridge[NEWEST] || timestep == INT64_MIN || (own[TURN] && own[SENT] == timestep))
        Py_RETURN_FALSE;
    int64_t turn = own[TURN];
    if (turn >= __atomic_load_n(&self->turns[0], __ATOMIC_ACQUIRE))
        Py_RETURN_FALSE; /* held up */
    int64_t number = self->turns[1 + turn % self->slots];
    if (number < 0 || number >= self->slots)
        Py_RETURN_FALSE;
    PyArrayObject *slot = (PyArrayObject *)PyTuple_GET_ITEM(self->memory, number);
    if (self->lent == NULL || self->lent == Py_None) {
        if (self->nbytes > MOST_COPIED_BYTES || !fits(args[0], slot))
            Py_RETURN_FALSE;
        copy(self, slot, (PyArrayObject *)args[0]);
    }
    else {
        if (args[0] != self->lent)
            Py_RETURN_FALSE;
        PyArray_CLEARFLAGS((PyArrayObject *)self->lent, NPY_ARRAY_WRITEABLE);
        Py_CLEAR(self->lent);
    }
    int64_t *outbox = self->outbox.buf, added = outbox[0];
    int64_t *entry = outbox + 1 + 2 * (added % self->capacity);
    entry[0] = self->region;
    entry[1] = timestep;
    __atomic_store_n(&outbox[0], added + 1, __ATOMIC_RELEASE);
    own[TURN] = turn + 1;
    own[SENT] = bridge[NEWEST] = timestep;
    bridge[CHUNKS] += 1;
    bridge[BYTES] += self->nbytes;
    if (is_last(self)) {
        Py_ssize_t length = PyBytes_GET_SIZE(self->look);
        if (send(self->fd, PyBytes_AS_STRING(self->look), length, MSG_DONTWAIT | MSG_NOSIGNAL) != length)
            Py_RETURN_NONE;
    }
    struct pollfd heard = {.fd = self->fd, .events = POLLIN};
    if (poll(&heard, 1, 0) != 0)
        Py_RETURN_NONE;
    Py_RETURN_TRUE;
}

static PyMethodDef Lane_methods[] = {
    {"send", (PyCFunction)(void (*)(void))Lane_send, METH_FASTCALL, send_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef Lane_members[] = {
    {"lent", T_OBJECT, offsetof(Lane, lent), 0, "The array over a slot that was given out, or None."},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject LaneType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "deisa.ray._transport._lane.Lane",
    .tp_doc = PyDoc_STR("Where a chunk is handed over."),
    .tp_basicsize = sizeof(Lane),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)Lane_init,
    .tp_dealloc = (destructor)Lane_dealloc,
    .tp_traverse = (traverseproc)Lane_traverse,
    .tp_methods = Lane_methods,
    .tp_members = Lane_members,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "deisa.ray._transport._lane",
    .m_doc = "The usual Bridge.send in one call.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__lane(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made != NULL && PyModule_AddType(made, &LaneType) < 0)
        Py_CLEAR(made);
    return made;
}
