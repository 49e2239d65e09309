/* Bridges that are still open when their process ends.

   Whether a process ends in order is what its exit status says, and Python's `atexit` runs before there is one. The C
   library's `on_exit` hands it over, when the interpreter is gone already. So what is to be said then is prepared. */

#define _DEFAULT_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

typedef struct {
    pid_t pid; /* a forked child ends without a word */
    int fd;
    size_t in_order, otherwise; /* bytes of the two messages, one behind the other */
    char messages[];
} Ending;

static void end(int status, void *data)
{
    Ending *ending = data;
    if (getpid() != ending->pid)
        return;
    const char *message = ending->messages;
    size_t length = ending->in_order;
    if (status & 0xff) { /* as much of it as anybody sees */
        message += ending->in_order;
        length = ending->otherwise;
    }
    (void)!send(ending->fd, message, length, MSG_DONTWAIT | MSG_NOSIGNAL);
}

PyDoc_STRVAR(decide_doc,
             "decide_by_exit_status(fd, in_order, otherwise)\n--\n\n"
             "Send one of two messages when the process ends, depending on its exit status.");

static PyObject *decide(PyObject *module, PyObject *args)
{
    int fd;
    Py_buffer in_order, otherwise;
    if (!PyArg_ParseTuple(args, "iy*y*", &fd, &in_order, &otherwise))
        return NULL;
    Ending *ending = malloc(sizeof *ending + in_order.len + otherwise.len);
    int failed = ending == NULL;
    if (!failed) {
        ending->pid = getpid();
        ending->fd = fd;
        ending->in_order = in_order.len;
        ending->otherwise = otherwise.len;
        memcpy(ending->messages, in_order.buf, in_order.len);
        memcpy(ending->messages + in_order.len, otherwise.buf, otherwise.len);
        failed = on_exit(end, ending) != 0;
        if (failed)
            free(ending);
    }
    PyBuffer_Release(&in_order);
    PyBuffer_Release(&otherwise);
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"decide_by_exit_status", decide, METH_VARARGS, decide_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "deisa.ray._transport._ending",
    .m_doc = "What bridges say that are still open when their process ends.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__ending(void)
{
    return PyModuleDef_Init(&module);
}
