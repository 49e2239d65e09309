"""The hand-off in C, as Python sees it."""

def load(page: memoryview, word: int, /) -> int:
    """Return a word, and see what was published before it."""

def store(page: memoryview, word: int, value: int, /) -> None:
    """Publish what has been written before, by a word."""

def exchange(page: memoryview, word: int, value: int, /) -> int:
    """Store a word and return what it was, in one step."""

def wake(page: memoryview, word: int, /) -> None:
    """Change a word and wake all that wait for it."""

def wait(page: memoryview, word: int, value: int, seconds: float, /) -> None:
    """Wait while a word has a value, and not longer than that."""
