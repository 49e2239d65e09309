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

/* A rank's client. */
typedef struct {
    PyObject_HEAD
    PyObject *say; /* callable: level, text */
    handoff_client *client;
} ClientObject;

native_state *state_of(PyTypeObject *type);

/* Raise what the library says has failed; returns NULL. */
PyObject *raise_error(native_state *state, const handoff_error *error);

/* _native_options.c: what a client is opened with. */
typedef struct {
    void **blocks;
    size_t count, capacity;
} storage;

void say_hook(void *context, handoff_level level, const char *text);
int interrupted_hook(void *context);
int parse_options(PyObject *args, PyObject *kwargs, handoff_options *options, PyObject **say, PyObject **arrays);
handoff_array_description *describe_arrays(PyObject *arrays, storage *kept);
void let_go(storage *kept);

/* _native_chunk.c */
extern PyType_Spec chunk_spec, memory_spec;
PyObject *new_chunk(ClientObject *owner, handoff_chunk *chunk, native_state *state);

/* _native_feedback.c: methods of a client. */
#define GET_DOC \
    "get(key, timestep, wait_s, /)\n--\n\nReturn the value of a key at a timestep as bytes, or None; wait_s is None or seconds."
#define GET_QUEUE_DOC "get_queue(key, /)\n--\n\nReturn all values of a key, as pairs of a timestep and bytes, or None."

PyObject *Client_get(ClientObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *Client_get_queue(ClientObject *self, PyObject *key);

/* Of the rank: _native_client.c; the agent's words: _native_words.c. */
int client_exec(PyObject *module);
extern PyMethodDef words_methods[], client_methods[];

#endif
