/* A rank's client, for Python. */

#include "_native.h"

#include "memory_limits.h"

static int open_client(ClientObject *self, PyObject *args, PyObject *kwargs)
{
    handoff_options options = {.say = say_hook, .interrupted = interrupted_hook};
    handoff_error error;
    storage kept = {0};
    PyObject *say, *arrays;
    if (parse_options(args, kwargs, &options, &say, &arrays) < 0)
        return -1;
    handoff_array_description *described = describe_arrays(arrays, &kept);
    if (described == NULL) {
        let_go(&kept);
        return -1;
    }
    self->say = Py_NewRef(say);
    Py_BEGIN_ALLOW_THREADS;
    self->client = handoff_open(&options, described, (size_t)PyTuple_GET_SIZE(arrays), &error);
    Py_END_ALLOW_THREADS;
    let_go(&kept);
    if (self->client != NULL)
        return 0;
    raise_error(state_of(Py_TYPE(self)), &error);
    return -1;
}

static PyObject *Client_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    ClientObject *self = (ClientObject *)type->tp_alloc(type, 0);
    if (self != NULL && open_client(self, args, kwargs) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
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

/* Text of an object, to be released; what in it cannot be written stands there by its code. NULL with an exception. */
static PyObject *shown(PyObject *object, int as_repr)
{
    PyObject *text = as_repr ? PyObject_Repr(object) : PyObject_Str(object);
    PyObject *bytes = text != NULL ? PyUnicode_AsEncodedString(text, "utf-8", "backslashreplace") : NULL;
    Py_XDECREF(text);
    return bytes;
}

/* The name that an object is, or NULL, without an exception. */
static const char *name_of(PyObject *object)
{
    Py_ssize_t length;
    const char *name = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &length) : NULL;
    PyErr_Clear(); /* characters that UTF-8 does not have */
    return name != NULL && strlen(name) == (size_t)length ? name : NULL;
}

static asked_index index_of(PyObject *object)
{
    asked_index asked = {1, HANDOFF_ONLY_CHUNK, NULL};
    if (object == Py_None)
        return asked;
    PyObject *number = PyBool_Check(object) ? NULL : PyNumber_Index(object);
    int overflow;
    asked.is_integer = number != NULL;
    asked.index = number != NULL ? PyLong_AsLongLongAndOverflow(number, &overflow) : -1;
    if (asked.index == HANDOFF_ONLY_CHUNK)
        asked.index = -1;
    Py_XDECREF(number);
    PyErr_Clear();
    return asked;
}

PyDoc_STRVAR(find_doc, "find(array, index, /)\n--\n\n"
                       "Return the numbers of an array and of a chunk in it; an index of None stands for the only one.\n\n"
                       "Both may be anything: what is no name or no index is refused as such.");

static PyObject *Client_find(ClientObject *self, PyObject *args)
{
    PyObject *array, *asked;
    handoff_error error;
    handoff_chunk *chunk;
    if (!PyArg_ParseTuple(args, "OO", &array, &asked))
        return NULL;
    asked_index index = index_of(asked);
    PyObject *array_text = shown(array, 1), *index_text = shown(asked, !index.is_integer);
    if (array_text == NULL || index_text == NULL) {
        Py_XDECREF(array_text);
        Py_XDECREF(index_text);
        return NULL;
    }
    asked_name name = {name_of(array), PyBytes_AS_STRING(array_text)};
    index.shown = PyBytes_AS_STRING(index_text);
    Py_BEGIN_ALLOW_THREADS;
    chunk = client_find(self->client, &name, &index, &error);
    Py_END_ALLOW_THREADS;
    Py_DECREF(array_text);
    Py_DECREF(index_text);
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
    PyObject *reason = PyUnicode_AsEncodedString(arg, "utf-8", "replace"); /* file names of errors may be no text */
    if (reason == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    handoff_abort(self->client, PyBytes_AS_STRING(reason));
    Py_END_ALLOW_THREADS;
    Py_DECREF(reason);
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
    handoff_close_in_child(self->client);
    Py_RETURN_NONE;
}

static PyObject *Client_get_stats(ClientObject *self, void *unused)
{
    (void)unused;
    handoff_stats stats = handoff_get_stats(self->client);
    return Py_BuildValue("LLdL", (long long)stats.chunks, (long long)stats.bytes_handed_over, stats.held_up_s,
                         (long long)stats.bytes_left_out);
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
    {"get", (PyCFunction)(void (*)(void))Client_get, METH_FASTCALL, PyDoc_STR(GET_DOC)},
    {"get_queue", (PyCFunction)Client_get_queue, METH_O, PyDoc_STR(GET_QUEUE_DOC)},
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
    {Py_tp_new, Client_new},
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
    handoff_options options = {.say = say_hook, .interrupted = interrupted_hook};
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
