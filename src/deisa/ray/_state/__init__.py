"""What decides: plain classes that take events and answer; no Ray, no Dask, no sockets."""
