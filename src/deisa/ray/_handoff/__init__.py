"""The hand-off of a rank: a C library that needs only libc and pthreads, the extension around it, and its process."""
