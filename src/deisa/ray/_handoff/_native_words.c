/* The agent's end of the pages, for Python: single words of a buffer, in the orders of pages.h. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_native.h"
#include "pages.h"

/* The word of a buffer that a call is about; the buffer is held until `release`. */
static page_word *word_of(PyObject *buffer, PyObject *index, int writable, Py_buffer *view)
{
    Py_ssize_t at = PyLong_AsSsize_t(index);
    if (at == -1 && PyErr_Occurred())
        return NULL;
    if (PyObject_GetBuffer(buffer, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0)
        return NULL;
    if (at < 0 || at >= view->len / (Py_ssize_t)sizeof(page_word) || (uintptr_t)view->buf % sizeof(page_word)) {
        PyBuffer_Release(view);
        PyErr_Format(PyExc_IndexError, "a page of %zd bytes has no word %zd", view->len, at);
        return NULL;
    }
    return (page_word *)view->buf + at;
}

static int expect(Py_ssize_t count, Py_ssize_t expected, const char *name)
{
    if (count == expected)
        return 1;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", name, expected, count);
    return 0;
}

static PyObject *words_load(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    Py_buffer view;
    page_word *word;
    if (!expect(count, 2, "load") || (word = word_of(args[0], args[1], 0, &view)) == NULL)
        return NULL;
    int64_t value = word_acquire(word);
    PyBuffer_Release(&view);
    return PyLong_FromLongLong(value);
}

static PyObject *words_store(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    Py_buffer view;
    page_word *word;
    if (!expect(count, 3, "store"))
        return NULL;
    long long value = PyLong_AsLongLong(args[2]);
    if (value == -1 && PyErr_Occurred())
        return NULL;
    if ((word = word_of(args[0], args[1], 1, &view)) == NULL)
        return NULL;
    word_publish(word, value);
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *words_exchange(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    Py_buffer view;
    page_word *word;
    if (!expect(count, 3, "exchange"))
        return NULL;
    long long value = PyLong_AsLongLong(args[2]);
    if (value == -1 && PyErr_Occurred())
        return NULL;
    if ((word = word_of(args[0], args[1], 1, &view)) == NULL)
        return NULL;
    int64_t before = word_exchange(word, value);
    PyBuffer_Release(&view);
    return PyLong_FromLongLong(before);
}

static PyObject *words_fence(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    word_fence();
    Py_RETURN_NONE;
}

static PyObject *words_wake(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    Py_buffer view;
    page_word *word;
    if (!expect(count, 2, "wake") || (word = word_of(args[0], args[1], 1, &view)) == NULL)
        return NULL;
    word_publish(word, (uint32_t)(word_peek(word) + 1)); /* no overflow: the lower half counts round */
    word_wake(word);
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *words_wait(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    Py_buffer view;
    page_word *word;
    if (!expect(count, 4, "wait"))
        return NULL;
    long long value = PyLong_AsLongLong(args[2]);
    double seconds = PyFloat_AsDouble(args[3]);
    if (PyErr_Occurred() || (word = word_of(args[0], args[1], 0, &view)) == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    word_wait(word, value, seconds);
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&view);
    if (PyErr_CheckSignals() < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyMethodDef words_methods[] = {
    {"load", (PyCFunction)(void (*)(void))words_load, METH_FASTCALL,
     PyDoc_STR("load(page, word, /)\n--\n\nReturn a word, and see what was published before it.")},
    {"store", (PyCFunction)(void (*)(void))words_store, METH_FASTCALL,
     PyDoc_STR("store(page, word, value, /)\n--\n\nPublish what has been written before, by a word.")},
    {"exchange", (PyCFunction)(void (*)(void))words_exchange, METH_FASTCALL,
     PyDoc_STR("exchange(page, word, value, /)\n--\n\nStore a word and return what it was, in one step.")},
    {"fence", words_fence, METH_NOARGS,
     PyDoc_STR("fence()\n--\n\nHave all that was written before come before all that is read or written later.")},
    {"wake", (PyCFunction)(void (*)(void))words_wake, METH_FASTCALL,
     PyDoc_STR("wake(page, word, /)\n--\n\nChange a word and wake all that wait for it.")},
    {"wait", (PyCFunction)(void (*)(void))words_wait, METH_FASTCALL,
     PyDoc_STR("wait(page, word, value, seconds, /)\n--\n\nWait while a word has a value, and not longer than that.")},
    {NULL, NULL, 0, NULL},
};
