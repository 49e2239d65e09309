"""Recordings, and running the analytics on them, or on other data sets, in place of a simulation."""
