"""The hand-off: a C library that needs nothing but libc and pthreads, and the extension that makes it a rank's client."""
