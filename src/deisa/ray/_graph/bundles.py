"""Cut a Dask graph into bundles: few Ray tasks instead of one for each Dask task.

1. A leaf has a node. Every other task goes to the node that holds most of its input bytes, as far as they
   are known: those of chunks, and of parts that are cut out of them. Tasks that depend on no leaf follow the
   tasks that use them, and a graph without any leaf is spread over the nodes.
2. ``level(task)`` is the highest level among its inputs, plus one where such an input lives on
   another node.
3. All tasks of one (node, level) form a bundle. A bundle depends only on bundles of lower levels,
   or of its own node: the graph of bundles has no cycle.
4. What several bundles need of one is returned in groups: values needed by the same set
   of bundles travel together. Chunks, and parts of them, are not handed on within a node: they are
   views of memory that every process there can read, and each bundle makes its own.
5. Tasks that must run in the process that computes (`CALLER`) are a place of their own. What only they take is
   cut into bundles of at most `FEED_BYTES` of output, so that they can take one after the other.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeGuard

from deisa.ray._graph._dask import Alias, GraphNode, Task, getitem
from deisa.ray._graph.leaves import chunk_of
from deisa.ray._state.descriptions import Shape

Key = Hashable
ANYWHERE: str | None = None
_CUTTING = (operator.getitem, getitem)
GUESSED_BYTES = 1024  # size of a value of which nothing is known
FEED_BYTES = 64 * 2**20  # that a bundle returns for tasks of the caller
CALLER = "caller"  # stands among nodes for the process that computes
DRIVER = -1  # stands for the caller in the set of a value's users


@dataclass(frozen=True, slots=True)
class BundleInput:
    """A group of values from an earlier bundle: value i belongs to ``keys[i]``."""

    bundle: int
    group: int
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """Tasks that run together, in this order, on one node.

    Attributes
    ----------
    node_id : str or None
        None where any node will do.
    tasks : tuple of GraphNode
        In topological order.
    inputs : tuple of BundleInput
    given : tuple of Key
        Those among the values given to `partition` that its tasks need.
    outputs : tuple of tuple of Key
        Groups of keys whose values are returned.
    leaves, leaf_bytes : int
        Chunks that its tasks read, and their bytes.
    takers : tuple of frozenset of (str or None)
        For each group of outputs, the nodes other than its own that take it, `CALLER` among them.
    last : bool
        Whether nothing but the caller takes any of its outputs.
    feeds : bool
        Whether nothing but tasks that run in the caller takes any of its outputs.
    """

    node_id: str | None
    tasks: tuple[GraphNode, ...]
    inputs: tuple[BundleInput, ...]
    given: tuple[Key, ...]
    outputs: tuple[tuple[Key, ...], ...]
    leaves: int
    leaf_bytes: int
    takers: tuple[frozenset[str | None], ...]
    last: bool
    feeds: bool = False


@dataclass(frozen=True, slots=True)
class Partition:
    """Bundles in an order in which each comes after those it depends on.

    `results` says for each requested key which bundle, group and position hold its value.
    """

    bundles: tuple[Bundle, ...]
    results: Mapping[Key, tuple[int, int, int]]


def partition(
    graph: Mapping[Key, GraphNode],
    keys: Iterable[Key],
    nodes: Callable[[], Sequence[str | None]],
    given: Mapping[Key, str | None],
    in_caller: Set[Key] = frozenset(),
) -> Partition:
    """Cut a graph into bundles.

    Parameters
    ----------
    graph : mapping of key to GraphNode
        Every task; the chunks are tasks too.
    keys : iterable of key
        The results wanted; what they do not need is left out.
    nodes : callable
        Returns the nodes on which tasks without a place may run, at least one. Asked only if need be.
    given : mapping of key to str or None
        Keys whose values exist already, and the node that holds each, or `ANYWHERE`.
    in_caller : set of key
        Tasks that must run in the process that computes.
    """
    wanted = [key for key in dict.fromkeys(keys) if key not in given]
    order = _topological(graph, wanted, given)
    place, size = _place(graph, order, nodes, given, in_caller)
    views = _views(graph, order)
    part = _parts_for_caller(graph, order, place, size, views, given) if in_caller else {}
    bundle_of, members = _group_by_level(graph, order, place, given, part)
    needs = _Needs(graph, place, bundle_of, views, given)
    for key in order:
        for needed in graph[key].dependencies:
            needs.add(bundle_of[key], needed, place[key])
    users, again = needs.users, needs.again
    for key in wanted:
        users[key].add(DRIVER)

    groups: dict[int, dict[frozenset[int], list[Key]]] = defaultdict(lambda: defaultdict(list))
    for key in order:
        if key in users:
            groups[bundle_of[key]][frozenset(users[key])].append(key)
    inputs: dict[int, list[BundleInput]] = defaultdict(list)
    results: dict[Key, tuple[int, int, int]] = {}
    for number, by_users in groups.items():
        for group, (using, group_keys) in enumerate(by_users.items()):
            for user in using - {DRIVER}:
                inputs[user].append(BundleInput(number, group, tuple(group_keys)))
            if DRIVER in using:
                results.update((key, (number, group, i)) for i, key in enumerate(group_keys))

    bundles = []
    at = {key: i for i, key in enumerate(order)}
    new_number = {
        number: i for i, number in enumerate(sorted(groups))
    }  # of those whose values somebody takes
    for number in new_number:
        node_id, bundle_keys = members[number]
        returned = {key for group in groups[number].values() for key in group}
        if again[number]:
            bundle_keys = sorted((*again[number], *bundle_keys), key=at.__getitem__)
        tasks = _needed_in([graph[key] for key in bundle_keys], returned)
        taken = dict.fromkeys(key for task in tasks for key in task.dependencies if key in given)
        chunks = [chunk for task in tasks if (chunk := chunk_of(task)) is not None]
        takers = [{CALLER if user == DRIVER else members[user][0] for user in by} for by in groups[number]]
        bundles.append(
            Bundle(
                node_id,
                tasks,
                tuple(replace(taking, bundle=new_number[taking.bundle]) for taking in inputs[number]),
                tuple(taken),
                tuple(map(tuple, groups[number].values())),
                len(chunks),
                sum(chunk.nbytes for chunk in chunks),
                tuple(frozenset(taking - {node_id}) for taking in takers),
                all(using == {DRIVER} for using in groups[number]),
                node_id != CALLER and all(_takes_in_caller(using, members) for using in groups[number]),
            )
        )
    places = {key: (new_number[n], group, i) for key, (n, group, i) in results.items()}
    return Partition(tuple(bundles), places)


def _takes_in_caller(users: Iterable[int], members: Sequence[tuple[str | None, list[Key]]]) -> bool:
    return all(user != DRIVER and members[user][0] == CALLER for user in users)


class _Needs:
    """What bundles need of one another.

    Attributes
    ----------
    users : dict of key to set of int
        The bundles that take a value which another has made.
    again : dict of int to dict of key
        The views that a bundle makes again, each after those it is made from.
    """

    def __init__(
        self,
        graph: Mapping[Key, GraphNode],
        place: Mapping[Key, str | None],
        bundle_of: Mapping[Key, int],
        views: set[Key],
        given: Mapping[Key, str | None],
    ) -> None:
        self._graph, self._place, self._bundle_of = graph, place, bundle_of
        self._views, self._given = views, given
        self.users: dict[Key, set[int]] = defaultdict(set)
        self.again: dict[int, dict[Key, None]] = defaultdict(dict)

    def add(self, number: int, key: Key, node_id: str | None) -> None:
        """A bundle on a node needs a value."""
        if key in self._given or self._bundle_of[key] == number or key in self.again[number]:
            return
        if key in self._views and self._place[key] == node_id:
            for needed in self._graph[key].dependencies:
                self.add(number, needed, node_id)
            self.again[number][key] = None
        else:
            self.users[key].add(number)


def _needed_in(tasks: Sequence[GraphNode], returned: set[Key]) -> tuple[GraphNode, ...]:
    """Leave out the views that only other bundles need, which make them again."""
    needed = set(returned)
    kept = []
    for task in reversed(tasks):
        if task.key in needed:
            needed |= task.dependencies
            kept.append(task)
    return tuple(reversed(kept))


def _views(graph: Mapping[Key, GraphNode], order: Sequence[Key]) -> set[Key]:
    """Chunks and parts of them: to make one again on its node is cheaper than to hand it from bundle to bundle."""
    views: set[Key] = set()
    for key in order:
        task = graph[key]
        passes_on = isinstance(task, Alias) or _cuts(task)
        if chunk_of(task) is not None or (passes_on and task.dependencies and task.dependencies <= views):
            views.add(key)
    return views


def _topological(
    graph: Mapping[Key, GraphNode], wanted: Sequence[Key], given: Mapping[Key, str | None]
) -> list[Key]:
    """Order everything that `wanted` needs depth first, so that values are used soon after they are made."""
    order: list[Key] = []
    done: set[Key] = set(given)
    stack = list(reversed(wanted))
    open_: set[Key] = set()
    while stack:
        key = stack[-1]
        if key in done:
            stack.pop()
            continue
        needed = [d for d in graph[key].dependencies if d not in done]
        if needed:
            if key in open_:
                raise ValueError(f"the graph has a cycle at {key!r}")
            open_.add(key)
            stack.extend(needed)
        else:
            stack.pop()
            done.add(key)
            order.append(key)
    return order


def _place(
    graph: Mapping[Key, GraphNode],
    order: Sequence[Key],
    nodes: Callable[[], Sequence[str | None]],
    given: Mapping[Key, str | None],
    in_caller: Set[Key],
) -> tuple[dict[Key, str | None], dict[Key, int]]:
    """Give every task a place, and its value a guessed size (bytes)."""
    place: dict[Key, str | None] = {key: node for key, node in given.items() if node is not ANYWHERE}
    size: dict[Key, int] = dict.fromkeys(given, GUESSED_BYTES)
    shape: dict[Key, Shape] = {}
    floating: list[Key] = []
    for key in order:
        task = graph[key]
        chunk = chunk_of(task)
        if chunk is not None:
            place[key], size[key] = chunk.agent.node_id, chunk.nbytes
            if chunk.shape is not None:
                shape[key] = chunk.shape
            continue
        held: dict[str | None, int] = defaultdict(int)
        for needed in task.dependencies:
            if needed in place and place[needed] != CALLER:
                held[place[needed]] += size[needed]
        # What a task returns is not known, unless it cuts a part out; the largest of its inputs is a fair guess.
        largest = max(task.dependencies, key=size.__getitem__, default=None)
        size[key] = size[largest] if largest is not None else GUESSED_BYTES
        if largest in shape:
            shape[key] = whole = shape[largest]
            part = _shape_of_part(task, whole)
            if part is not None:
                shape[key] = part
                size[key] = size[key] * math.prod(part) // max(1, math.prod(whole))
        if key in in_caller:
            place[key] = CALLER
        elif held:
            place[key] = _heaviest(held)
        else:
            floating.append(key)
    if floating:
        _settle(graph, order, floating, place, nodes, given)
    return place, size


def _cuts(task: GraphNode) -> TypeGuard[Task]:
    return isinstance(task, Task) and task.func in _CUTTING


def _shape_of_part(task: GraphNode, whole: Shape) -> Shape | None:
    """Shape of what a task cuts out of its only input with slices and integers; None for any other task."""
    if not _cuts(task) or len(task.dependencies) != 1:
        return None
    index = task.args[1] if isinstance(task.args[1], tuple) else (task.args[1],)
    if len(index) > len(whole) or not all(isinstance(at, slice | int) for at in index):
        return None
    kept = [len(range(*at.indices(n))) for at, n in zip(index, whole, strict=False) if isinstance(at, slice)]
    return (*kept, *whole[len(index) :])


def _heaviest(held: Mapping[str | None, int]) -> str | None:
    """Return the node with the largest share; equal shares are told apart by name, sets having no order."""
    return max(held, key=lambda node: (held[node], str(node)))


def _settle(
    graph: Mapping[Key, GraphNode],
    order: Sequence[Key],
    floating: Sequence[Key],
    place: dict[Key, str | None],
    nodes: Callable[[], Sequence[str | None]],
    given: Mapping[Key, str | None],
) -> None:
    """Place the tasks that depend on no leaf: beside their users, or spread in even shares."""
    fallback = next((node for node in place.values() if node != CALLER), CALLER)
    if fallback != CALLER:
        user: dict[Key, Key] = {}
        for key in reversed(order):
            if key not in place:
                place[key] = place[user[key]] if key in user else fallback
            if place[key] != CALLER:
                for needed in graph[key].dependencies:
                    user.setdefault(needed, key)
        return
    roots = [
        key for key in floating if all(d in given or place.get(d) == CALLER for d in graph[key].dependencies)
    ]
    available = nodes()
    share = -(-len(roots) // len(available))
    place.update((key, available[number // share]) for number, key in enumerate(roots))
    for key in floating:
        if key not in place:
            held: dict[str | None, int] = defaultdict(int)
            for needed in graph[key].dependencies - given.keys():
                if place[needed] != CALLER:
                    held[place[needed]] += 1
            place[key] = _heaviest(held)


def _parts_for_caller(
    graph: Mapping[Key, GraphNode],
    order: Sequence[Key],
    place: Mapping[Key, str | None],
    size: Mapping[Key, int],
    views: set[Key],
    given: Mapping[Key, str | None],
) -> dict[Key, int]:
    """Number the parts in which tasks of the caller get their values: each at most `FEED_BYTES`, or one value.

    What one value is made from is in its part, as far as it is on the same node and no view. Values that share
    such tasks are in one part.
    """
    leader: dict[Key, Key] = {}

    def find(key: Key) -> Key:
        while leader.setdefault(key, key) != key:
            leader[key] = key = leader[leader[key]]
        return key

    fed: list[Key] = []
    for key in order:
        for needed in graph[key].dependencies - given.keys():
            if place[needed] == place[key]:
                if needed not in views:
                    leader[find(needed)] = find(key)
            elif place[key] == CALLER:
                fed.append(needed)
    part: dict[Key, int] = {}
    number: dict[Key, int] = {}
    current, filled = 0, 0
    for key in dict.fromkeys(fed):
        root = find(key)
        if root not in number:
            if not filled or filled + size[key] > FEED_BYTES:
                current, filled = current + 1, 0
            number[root] = current
        filled += size[key]
    for key in order:
        if place[key] != CALLER and (root := find(key)) in number:
            part[key] = number[root]
    return part


def _group_by_level(
    graph: Mapping[Key, GraphNode],
    order: Sequence[Key],
    place: Mapping[Key, str | None],
    given: Mapping[Key, str | None],
    part: Mapping[Key, int],
) -> tuple[dict[Key, int], list[tuple[str | None, list[Key]]]]:
    """Give every task its level and every (node, level, part) a bundle number, lower levels first."""
    level: dict[Key, int] = {}
    by_level: dict[tuple[int, str | None, int], list[Key]] = defaultdict(list)
    for key in order:
        here = place[key]
        level[key] = max(
            (level[d] + (place[d] != here) for d in graph[key].dependencies if d not in given), default=0
        )
        by_level[level[key], here, part.get(key, 0)].append(key)
    bundle_of: dict[Key, int] = {}
    members: list[tuple[str | None, list[Key]]] = []
    for (_, node_id, _), keys in sorted(by_level.items(), key=lambda item: item[0][0]):
        bundle_of.update(dict.fromkeys(keys, len(members)))
        members.append((node_id, keys))
    return bundle_of, members
