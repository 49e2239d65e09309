"""What a bundle does, packed for the process that does it, and done there.

Both engines do packed work: on the local one too, user code gets a copy of what it refers to, and what it changes
there is gone with the run. Only pure work (see `purity`) is kept unpacked from run to run, and only
pure work runs in the process of the analytics when the engine has others.
"""

from __future__ import annotations

import itertools
import pickle
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np

from deisa.ray._graph._dask import GraphNode, sizeof
from deisa.ray._graph.execute import Picks, pick, run_bundle
from deisa.ray._graph.failures import Failure
from deisa.ray._graph.leaves import StepSlots
from deisa.ray._graph.purity import pack
from deisa.ray._graph.script_modules import ModuleState, bring_up_to_date, states_of
from deisa.ray._graph.unpicklable import explain, unpicklable
from deisa.ray.errors import NotPicklableError

Key = Hashable
WORK_KEPT_BYTES = 64 * 2**20  # pickled size of the work that a process keeps unpacked

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_PROCESS, _numbers = uuid.uuid4().hex, itertools.count()  # a random name for each would wait for the kernel
_unpacked: OrderedDict[str, tuple[Work, int]] = OrderedDict()
_unpacking = threading.Lock()


@dataclass(frozen=True, slots=True)
class Work:
    """What a bundle does, without what differs from timestep to timestep."""

    tasks: Sequence[GraphNode]
    picks: Sequence[Picks]
    outputs: Sequence[Sequence[Hashable]]
    threads: int


@dataclass(frozen=True, slots=True)
class PackedWork:
    """Pickled work.

    Attributes
    ----------
    uid : str
    nbytes : int
    packed : sequence
        One item, the bytes or whatever `fetch` makes them from: in a list Ray leaves a reference as it is.
    pure : bool
        Whether it may be kept unpacked, and run in any process.
    modules : tuple of ModuleState
        What the script holds of its own modules, where tasks use them.
    """

    uid: str
    nbytes: int
    packed: Sequence[Any]
    pure: bool
    modules: tuple[ModuleState, ...]

    def unpack(self, fetch: Callable[[Any], bytes]) -> Work:
        """Return the work: new objects, but where it is pure and this process has done it before."""
        if not self.pure:
            return self._load(fetch)
        with _unpacking:
            known = _unpacked.pop(self.uid, None)
            if known is None:
                known = (self._load(fetch), self.nbytes)
            _unpacked[self.uid] = known  # the last is the one used last
            while len(_unpacked) > 1 and sum(nbytes for _, nbytes in _unpacked.values()) > WORK_KEPT_BYTES:
                _unpacked.popitem(last=False)
        return known[0]

    def _load(self, fetch: Callable[[Any], bytes]) -> Work:
        (packed,) = self.packed
        data = packed if isinstance(packed, bytes) else fetch(packed)
        try:
            return pickle.loads(data)
        except ImportError as error:
            error.add_note(
                "a worker process imports what tasks use by name: packages that are installed there, and modules in "
                "its PYTHONPATH; put the module there, install it, or give it with ray.init(runtime_env=...)"
            )
            raise


class UnpicklableTasksError(Exception):
    """Some tasks cannot be pickled: `keys` says which, `error` is what the user is to be told."""

    def __init__(self, keys: Sequence[Key], error: NotPicklableError) -> None:
        super().__init__(keys, error)
        self.keys = keys
        self.error = error


def pack_work(work: Work) -> PackedWork:
    """Pickle work.

    Raises
    ------
    UnpicklableTasksError
    """
    try:
        packed = pack(work)
    except Exception as exc:  # whatever a foreign __reduce__ raises
        culprits = list(unpicklable(work.tasks))
        if not culprits:
            raise
        raise UnpicklableTasksError([task.key for task, _ in culprits], explain(*culprits[0])) from exc
    modules = states_of(packed.modules)
    return PackedWork(f"{_PROCESS}-{next(_numbers)}", len(packed.data), [packed.data], packed.pure, modules)


@dataclass(frozen=True, slots=True)
class Ended:
    """The last value that a bundle returns.

    Attributes
    ----------
    run_s : float
        How long it ran (seconds).
    nbytes : tuple of int
        Sizes of its groups of outputs (bytes).
    taken_bytes : int
        Size of what it took from other bundles.
    """

    run_s: float
    nbytes: tuple[int, ...]
    taken_bytes: int


def do_work(
    work: PackedWork,
    steps: Mapping[Hashable, StepSlots],
    groups: Sequence[Any],
    fetch: Callable[[Any], bytes],
    most_threads: int | None = None,
) -> tuple[Any, ...]:
    """Run a bundle, in `most_threads` at most; returns its groups of values, and `Ended`."""
    started = time.perf_counter()
    own = work.unpack(fetch)
    threads = own.threads if most_threads is None else min(own.threads, most_threads)
    values = run_bundle(own.tasks, {**pick(groups, own.picks), **steps}, own.outputs, threads)
    run_s = time.perf_counter() - started
    return (*values, Ended(run_s, tuple(map(_size, values)), sum(map(_size, groups))))


def do_work_for_others(
    work: PackedWork,
    returns: int,
    steps: Mapping[Hashable, StepSlots],
    groups: Sequence[Any],
    fetch: Callable[[Any], bytes],
    most_threads: int | None = None,
) -> tuple[Any, ...]:
    """Run a bundle in a worker; what a task raises, also one of an earlier bundle, is returned in every place."""
    for group in groups:
        if isinstance(group, Failure):
            return (group,) * returns
    try:
        if work.modules:
            work.unpack(fetch)  # imports them
            bring_up_to_date(work.modules)
        return do_work(work, steps, groups, fetch, most_threads)
    except BaseException as error:  # sys.exit() in a task is no reason for a worker to end
        return (Failure.of(error),) * returns


def _size(group: Sequence[Any]) -> int:
    return sum(map(sizeof, group))


def result_error(error: BaseException) -> NotPicklableError:
    """Build the error for a value that a task has returned and that cannot be pickled."""
    return NotPicklableError(
        f"a task returned a value that cannot be handed from process to process ({str(error).strip():.200}); "
        "return arrays, numbers or plain Python objects"
    )


def portable(value: Any) -> Any:
    """Return a copy of a value as another process would get it.

    Raises
    ------
    NotPicklableError
    """
    try:
        return pickle.loads(cloudpickle.dumps(value, protocol=5))
    except Exception as exc:  # whatever a foreign __reduce__ raises
        error = result_error(exc)
    raise error  # without `exc`, whose frames would keep the timestep's slots


def independent(value: Any, *, copy_all: bool = False) -> Any:
    """Copy a result if it may lie in memory that is not its own: chunk memory will be used again when its lease ends.

    A worker process does the same by writing results into Ray's object store.

    Parameters
    ----------
    value : Any
    copy_all : bool
        Copy all arrays: where tasks will run again, one that they only hand on is still theirs.

    Raises
    ------
    NotPicklableError
        For objects that another process could not be given.
    """
    if isinstance(value, _PLAIN):
        return value
    if type(value) is np.ndarray and not value.dtype.hasobject:
        return value.copy() if copy_all or value.base is not None else value
    if type(value) in (list, tuple):
        return type(value)(independent(item, copy_all=copy_all) for item in value)
    if type(value) is dict:
        return {key: independent(item, copy_all=copy_all) for key, item in value.items()}
    return portable(value)
