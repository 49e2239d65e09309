/* The Python extension over the hand-off library. */

#include "_native.h"

native_state *state_of(PyTypeObject *type)
{
    return PyModule_GetState(PyType_GetModuleByDef(type, &native_module));
}

/* Raise what the library says has failed. */
PyObject *raise_error(native_state *state, const handoff_error *error)
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

static int native_exec(PyObject *module)
{
    if (PyModule_AddFunctions(module, words_methods) < 0 || PyModule_AddFunctions(module, client_methods) < 0)
        return -1;
    return client_exec(module);
}

static int native_traverse(PyObject *module, visitproc visit, void *arg)
{
    native_state *state = PyModule_GetState(module);
    Py_VISIT(state->client_type);
    Py_VISIT(state->chunk_type);
    Py_VISIT(state->memory_type);
    Py_VISIT(state->ndarray_type);
    Py_VISIT(state->named_error);
    return 0;
}

static int native_clear(PyObject *module)
{
    native_state *state = PyModule_GetState(module);
    Py_CLEAR(state->client_type);
    Py_CLEAR(state->chunk_type);
    Py_CLEAR(state->memory_type);
    Py_CLEAR(state->ndarray_type);
    Py_CLEAR(state->named_error);
    return 0;
}

static void native_free(void *module)
{
    native_clear(module);
}

static PyModuleDef_Slot native_slots[] = {
    {Py_mod_exec, native_exec},
#ifdef Py_mod_multiple_interpreters /* from Python 3.12 on */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* hooks come by PyGILState */
#endif
#ifdef Py_mod_gil /* from Python 3.13 on */
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

struct PyModuleDef native_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "deisa.ray._handoff._native",
    .m_doc = PyDoc_STR("The hand-off in C."),
    .m_size = sizeof(native_state),
    .m_slots = native_slots,
    .m_traverse = native_traverse,
    .m_clear = native_clear,
    .m_free = native_free,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&native_module);
}
