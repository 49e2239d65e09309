/* What the files of the Python extension share. */

#ifndef DEISA_HANDOFF_NATIVE_H
#define DEISA_HANDOFF_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef words_methods[];

#endif
