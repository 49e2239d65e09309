/* The Python extension over the hand-off library. */

#include "_native.h"

static int native_exec(PyObject *module)
{
    return PyModule_AddFunctions(module, words_methods);
}

static PyModuleDef_Slot native_slots[] = {
    {Py_mod_exec, native_exec},
    {0, NULL},
};

static struct PyModuleDef native_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "deisa.ray._handoff._native",
    .m_doc = PyDoc_STR("The hand-off in C."),
    .m_size = 0,
    .m_slots = native_slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&native_module);
}
