"""The cases, one module for each question."""
