"""Files as HDF5 sees them: `NewFile`, and `GrowingFile` for a change of an existing file in one step.

HDF5 may crash where it cannot write. So it never hears of that: it writes into these objects, and `check` raises
what the operating system has said.

HDF5 changes its tables in place when a file grows, so a file is broken while that happens, and stays broken if the
process is killed meanwhile. Here HDF5 writes through a `GrowingFile`:

- What lies behind the end that the file had goes there at once: nothing in the file refers to it yet. These are the
  values, and most of what is written.
- What lies before that end is kept in memory, by pages: tables of a few kilobytes. `commit` writes all of it to a
  *file journal* beside the file, gives that its name, copies it into the file, and removes it.

Until the journal has its name the file is as it was, but for bytes behind its end. From then on `recover` finishes what
was begun. A killed process leaves a file that is broken only if it was killed while the journal was being copied, and
then the journal is there.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

PAGE = 4096


def journal_of(path: Path) -> Path:
    """Where the journal of a file is, while there is one."""
    return path.with_name(f".{path.name}.journal")


def recover(path: Path) -> None:
    """Finish, or take back, what a process that was killed has begun on a file."""
    journal = journal_of(path)
    try:
        written = journal.read_bytes()
    except FileNotFoundError:
        return
    head, _, pages = written.partition(b"\n")
    noted = json.loads(head)
    with path.open("r+b") as file:
        if "offsets" in noted:
            _copy(file.fileno(), noted, pages)
        else:
            file.truncate(noted["end"])
    journal.unlink()


def _copy(descriptor: int, noted: Any, pages: bytes) -> None:
    at = 0
    for offset, size in noted["offsets"]:
        os.pwrite(descriptor, pages[at : at + size], offset)
        at += size
    os.truncate(descriptor, noted["end"])


class NewFile(io.RawIOBase):
    """A file that HDF5 makes; call `check` when HDF5 has closed it.

    Parameters
    ----------
    path : Path
        What is there already stays, as with mode ``r+``, unless HDF5 truncates it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
        self._end = self._file.seek(0, os.SEEK_END)
        self._at = 0
        self._error: OSError | None = None

    # What HDF5 calls.

    def readable(self) -> bool:
        """It is."""
        return True

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Return the offset."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read."""
        target = memoryview(buffer).cast("B")
        target = target[: max(0, self._end - self._at)]
        found = os.preadv(self._file.fileno(), [target], self._at)
        target[found:] = bytes(len(target) - found)
        self._read_changes(self._at, target)
        self._at += len(target)
        return len(target)

    def write(self, buffer: Any) -> int:
        """Write; an error is kept for `check`, and nothing more is written."""
        source = memoryview(buffer).cast("B")
        if self._error is None:
            try:
                self._write(self._at, source)
            except OSError as error:
                self._error = error
        self._at += len(source)
        self._end = max(self._end, self._at)
        return len(source)

    def truncate(self, size: int | None = None) -> int:
        """Set the end."""
        self._end = self._at if size is None else size
        return self._end

    # What this project calls.

    def check(self) -> None:
        """Raise what writing has raised, and give the file its length."""
        if self._error is not None:
            raise self._error
        os.truncate(self._file.fileno(), self._end)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            super().close()
            self._file.close()

    def _write(self, offset: int, source: memoryview) -> None:
        while source:
            written = os.pwrite(self._file.fileno(), source, offset)
            source, offset = source[written:], offset + written

    def _read_changes(self, start: int, target: memoryview) -> None:
        """Put what was changed, and is not in the file, into what was read."""


class GrowingFile(NewFile):
    """An existing file, to which HDF5 adds; `commit` makes the change, `close` without it takes it back."""

    def __init__(self, path: Path) -> None:
        recover(path)
        super().__init__(path)
        self._old_end = self._end
        self._pages: dict[int, bytearray] = {}
        self._journaled = False  # whether the journal has the change
        self._done = False
        self._put_journal({"end": self._old_end}, b"")

    def commit(self) -> None:
        """Make the change; HDF5 must have closed the file.

        Raises
        ------
        OSError
            What writing has raised; then nothing has changed.
        """
        if self._error is not None:
            raise self._error
        if os.fstat(self._file.fileno()).st_size < self._end:
            os.truncate(self._file.fileno(), self._end)
        numbers = sorted(number for number in self._pages if number * PAGE < self._end)
        offsets = [(number * PAGE, len(self._pages[number])) for number in numbers]
        noted = {"end": self._end, "offsets": offsets}
        pages = b"".join(self._pages[number] for number in numbers)
        self._journaled = True
        try:
            self._put_journal(noted, pages)
        except OSError:
            self._journaled = False
            raise
        _copy(self._file.fileno(), noted, pages)
        self._done = True

    def close(self) -> None:
        """Close the file, and take back what was not committed; `recover` finishes what was begun."""
        if self.closed:
            return
        if not self._journaled:
            os.truncate(self._file.fileno(), self._old_end)
        super().close()
        if self._done or not self._journaled:
            journal_of(self._path).unlink(missing_ok=True)

    def _read_changes(self, start: int, target: memoryview) -> None:
        stop = start + len(target)
        for number in range(start // PAGE, -(-min(stop, self._old_end) // PAGE)):
            page = self._pages.get(number)
            if page is not None:
                at = number * PAGE
                first, last = max(start, at), min(stop, at + len(page))
                target[first - start : last - start] = page[first - at : last - at]

    def _write(self, offset: int, source: memoryview) -> None:
        """Write: behind the old end at once, before it into pages."""
        inside = min(len(source), max(0, self._old_end - offset))
        if inside:
            self._change(offset, source[:inside])
        super()._write(offset + inside, source[inside:])

    def _change(self, start: int, source: memoryview) -> None:
        stop = start + len(source)
        for number in range(start // PAGE, -(-stop // PAGE)):
            at = number * PAGE
            page = self._pages.get(number)
            if page is None:
                size = min(PAGE, self._old_end - at)
                page = self._pages[number] = bytearray(os.pread(self._file.fileno(), size, at))
            first, last = max(start, at), min(stop, at + len(page))
            page[first - at : last - at] = source[first - start : last - start]

    def _put_journal(self, noted: Any, pages: bytes) -> None:
        journal = journal_of(self._path)
        new = journal.with_name(f"{journal.name}.new")
        new.write_bytes(json.dumps(noted).encode() + b"\n" + pages)
        new.replace(journal)
