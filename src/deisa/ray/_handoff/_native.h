/* What the files of the Python extension share. */

#ifndef DEISA_HANDOFF_NATIVE_H
#define DEISA_HANDOFF_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "client.h"

/* Of the module. */
typedef struct {
    PyTypeObject *client_type, *chunk_type, *memory_type;
    PyTypeObject *ndarray_type;
    PyObject *named_error; /* deisa.ray.errors.named_error */
} native_state;

extern struct PyModuleDef native_module;

/* Of the rank: _native_client.c; the agent's words: _native_words.c. */
int client_exec(PyObject *module);
extern PyMethodDef words_methods[], client_methods[];

#endif
