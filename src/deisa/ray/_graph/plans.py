"""Plans: a graph that has been cut into bundles once is not cut again at the next timestep.

A callback builds the same graph at every timestep, on other slots and under other names: Dask's names carry
random or hashed tokens. `structure_of` writes a graph down before its layers are expanded into tasks, as what
a worker would be sent, with each token replaced by the order in which it first appears. Two graphs
written alike compute the same from the slots they are given, and one plan serves both.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deisa.ray._graph._dask import (
    Layer,
    MaterializedLayer,
    Task,
    TaskRef,
    graphs_in,
    optimization_settings,
    state_of,
)
from deisa.ray._graph.assemble import StepLayer
from deisa.ray._graph.bundles import Partition
from deisa.ray._graph.leaves import StepSlots, fetch_kept, step_of
from deisa.ray._graph.purity import WatchingPickler
from deisa.ray._graph.script_modules import states_of

Key = Hashable
PLANS_KEPT = 32
_TOKEN = re.compile(rb"[0-9a-f]{32}")  # as dask.base.tokenize and uuid4().hex write them


@dataclass(frozen=True, slots=True)
class Structure:
    """A graph without the names and slots of its timestep.

    Attributes
    ----------
    digest : bytes
        The same for graphs of the same structure.
    step_keys : tuple of str
        Keys of the slots in the graph, in an order that depends on the structure only.
    steps : tuple of StepSlots
        The slots themselves.
    """

    digest: bytes
    step_keys: tuple[str, ...]
    steps: tuple[StepSlots, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A graph cut into bundles, and what each bundle has become for the executor.

    Attributes
    ----------
    partition : Partition
        Its bundles without their tasks.
    prepared : tuple
        For each bundle, what the executor submits.
    wanted : tuple of Key
        The keys asked for.
    step_keys : tuple of str
        As in `Structure`.
    may_be_kept : bool
        Whether it serves other graphs: not one whose tasks touch objects of this process.
    """

    partition: Partition
    prepared: tuple[Any, ...]
    wanted: tuple[Key, ...]
    step_keys: tuple[str, ...]
    may_be_kept: bool


class Plans:
    """The plans used last, by structure; threads of the analytics may compute at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: OrderedDict[bytes, Plan] = OrderedDict()

    def get(self, structure: Structure) -> Plan | None:
        """Return the plan for a structure, if there is one."""
        with self._lock:
            plan = self._plans.get(structure.digest)
            if plan is not None:
                self._plans.move_to_end(structure.digest)
            return plan

    def keep(self, structure: Structure, plan: Plan) -> None:
        """Keep a plan; the one that was not used for longest makes room."""
        with self._lock:
            self._plans[structure.digest] = plan
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)


class _NotAlikeError(Exception):
    """The graph holds something that belongs to one timestep only."""


class _Pickler(WatchingPickler):
    """Writes tasks down by what they do, without what Dask derives from that, and without the slots of a timestep.

    Attributes
    ----------
    steps : dict of str to StepSlots
        Slots in layers that Dask has expanded already (``dask.optimize``, ``clone``), by key.
    """

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        self.steps: dict[str, StepSlots] = {}

    def reducer_override(self, obj: Any) -> Any:
        step = step_of(obj)
        if step is not None:
            self.steps[obj.key] = step
            return StepSlots, (obj.key,)
        if isinstance(obj, StepSlots):
            raise _NotAlikeError  # it is no node of the graph
        if isinstance(obj, Task):
            if obj.func is fetch_kept:
                raise _NotAlikeError
            return type(obj), (obj.key, obj.func, obj.args, obj.kwargs)
        if isinstance(obj, TaskRef):
            return TaskRef, (obj.key,)
        if type(obj).__module__.split(".")[0] == "ray":
            raise _NotAlikeError  # a reference to an object, whose pickling would keep it forever
        return super().reducer_override(obj)


def structure_of(dsk: Any, wanted: Sequence[Key]) -> Structure | None:
    """Write a graph's structure down without materializing it.

    Parameters
    ----------
    dsk : dask expression or HighLevelGraph
    wanted : sequence of Key

    Returns
    -------
    Structure or None
        None where a plan could not be reused: no chunk of a timestep in it, results kept on the nodes, or
        something that cannot be pickled.
    """
    found = graphs_in(dsk)
    if found is None:
        return None
    layers = {name: layer for graph, _ in found for name, layer in graph.layers.items()}
    steps = {layer.step_key: layer.step for layer in layers.values() if isinstance(layer, StepLayer)}
    buffer = io.BytesIO()
    try:
        # One pickler for all, so that what layers share is written once.
        pickler = _Pickler(buffer)
        pickler.dump(optimization_settings())
        for _, optimizer in found:
            pickler.dump(optimizer)
        for name, layer in layers.items():
            pickler.dump((name, *_written(layer)))
        pickler.dump(wanted)
    except _NotAlikeError:
        return None
    except Exception:  # whatever a foreign __reduce__ raises
        return None
    steps |= pickler.steps
    if not steps:
        return None
    digest = hashlib.blake2b(_number_tokens(buffer.getvalue(), layers))
    for module in states_of(pickler.modules):
        digest.update(module.values + module.code)
    return Structure(digest.digest(), tuple(steps), tuple(steps.values()))


def _written(layer: Layer) -> tuple[Any, ...]:
    if isinstance(layer, StepLayer):
        return (StepLayer, layer.home.uid)
    return (type(layer).__module__, type(layer).__qualname__, state_of(layer))


def _number_tokens(written: bytes, layers: Mapping[str, Layer]) -> bytes:
    """Replace the tokens in the names of layers and tasks, and no others, by their order of appearance."""
    names: set[Any] = set(layers)
    for layer in layers.values():
        if isinstance(layer, MaterializedLayer):
            names.update(key[0] if type(key) is tuple else key for key in layer.mapping)
        else:
            names.update(str(value) for value in vars(layer).values() if isinstance(value, str))
    tokens = {token for name in names for token in _TOKEN.findall(str(name).encode())}
    numbers: dict[bytes, bytes] = {}

    def number(match: re.Match[bytes]) -> bytes:
        token = match.group()
        return numbers.setdefault(token, b"%032d" % len(numbers)) if token in tokens else token

    return _TOKEN.sub(number, written)
