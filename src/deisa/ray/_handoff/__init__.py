"""The hand-off: a C library that needs nothing but libc and pthreads, and the extension that Python's rank uses it through."""
