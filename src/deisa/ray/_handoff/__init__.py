"""The hand-off: a C library that needs only libc and pthreads, and the extension that makes it a client."""
