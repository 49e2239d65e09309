"""What leads a run in the analytics' process, from the first bridge to the last callback; imports no Ray."""
