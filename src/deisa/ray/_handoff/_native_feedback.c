/* What the analytics has set, for Python. */

#include "_native.h"

PyObject *Client_get(ClientObject *self, PyObject *const *args, Py_ssize_t count)
{
    handoff_error error;
    handoff_answer value;
    int result;
    if (count != 3) {
        PyErr_Format(PyExc_TypeError, "get() takes 3 arguments, got %zd", count);
        return NULL;
    }
    const char *key = PyUnicode_AsUTF8(args[0]);
    long long timestep = PyLong_AsLongLong(args[1]);
    double wait_s = args[2] == Py_None ? -1 : PyFloat_AsDouble(args[2]);
    if (key == NULL || PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = handoff_get(self->client, key, timestep, wait_s, &value, &error);
    Py_END_ALLOW_THREADS;
    if (result < 0)
        return raise_error(state_of(Py_TYPE(self)), &error);
    if (result == 0)
        Py_RETURN_NONE;
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)value.bytes, (Py_ssize_t)value.length);
    handoff_answer_free(&value);
    return bytes;
}

PyObject *Client_get_queue(ClientObject *self, PyObject *arg)
{
    handoff_error error;
    handoff_answer *values;
    size_t count;
    int result;
    const char *key = PyUnicode_AsUTF8(arg);
    if (key == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = handoff_get_queue(self->client, key, &values, &count, &error);
    Py_END_ALLOW_THREADS;
    if (result < 0)
        return raise_error(state_of(Py_TYPE(self)), &error);
    if (result == 0)
        Py_RETURN_NONE;
    PyObject *all = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; all != NULL && i < count; i++) {
        PyObject *bytes = PyBytes_FromStringAndSize((const char *)values[i].bytes, (Py_ssize_t)values[i].length);
        PyObject *pair = bytes == NULL ? NULL : Py_BuildValue("(LN)", (long long)values[i].timestep, bytes);
        if (pair == NULL)
            Py_CLEAR(all);
        else
            PyTuple_SET_ITEM(all, (Py_ssize_t)i, pair);
    }
    handoff_answers_free(values, count);
    return all;
}
