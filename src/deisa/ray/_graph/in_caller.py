"""Run the tasks of a plan that belong in this process, and have the others run beside them.

Values come to these tasks as results do, one group after the other: a group is let go of when its last task
here has run, and no more than a few bundles that only feed these tasks are under way at a time. So a file
can be written that is larger than this process's memory, or than Ray's object store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from deisa.ray._graph.bundles import CALLER, Bundle, BundleInput
from deisa.ray._graph.leaves import GroupHere, Handle, KeptResult

Key = Hashable
AHEAD = 2  # bundles that feed tasks here are started so many before they are needed


def launch_around_caller(
    bundles: Sequence[Bundle],
    kept: Mapping[Key, KeptResult],
    submit: Callable[[int, list[Handle]], list[Handle]],
    fetch: Callable[[Sequence[Handle]], list[Sequence[Any]]],
) -> dict[int, list[Handle]]:
    """Start all bundles, and run those of the caller; returns the groups of each.

    Parameters
    ----------
    bundles : sequence of Bundle
        Each after those it depends on.
    kept : mapping of key to KeptResult
    submit : callable
        Starts bundle number so-and-so, given the groups it takes of others.
    fetch : callable
        Brings groups here.
    """
    return _Launch(bundles, kept, submit, fetch).run()


class _Launch:
    def __init__(
        self,
        bundles: Sequence[Bundle],
        kept: Mapping[Key, KeptResult],
        submit: Callable[[int, list[Handle]], list[Handle]],
        fetch: Callable[[Sequence[Handle]], list[Sequence[Any]]],
    ) -> None:
        self._bundles = bundles
        self._kept = kept
        self._submit = submit
        self._fetch = fetch
        self._feeds = [number for number, bundle in enumerate(bundles) if bundle.feeds]
        self._takers = Counter((taken.bundle, taken.group) for bundle in bundles for taken in bundle.inputs)
        self._returned: dict[int, list[Handle]] = {}

    def run(self) -> dict[int, list[Handle]]:
        later: set[int] = set()  # those that need a value made here
        for number, bundle in enumerate(self._bundles):
            if bundle.node_id == CALLER or any(taken.bundle in later for taken in bundle.inputs):
                later.add(number)
            elif not bundle.feeds:
                self._start(number)
        for number in sorted(later):
            if self._bundles[number].node_id == CALLER:
                self._returned[number] = self._run_here(self._bundles[number])
            elif not self._bundles[number].feeds:
                self._start(number)
        return self._returned

    def _start(self, number: int) -> None:
        if number not in self._returned:
            groups = [self._group(taken) for taken in self._bundles[number].inputs]
            self._returned[number] = self._submit(number, groups)

    def _group(self, taken: BundleInput) -> Handle:
        return self._returned[taken.bundle][taken.group]

    def _run_here(self, bundle: Bundle) -> list[Handle]:
        source = {key: taken for taken in bundle.inputs for key in taken.keys}
        pending = Counter(key for task in bundle.tasks for key in task.dependencies)
        wanted = {key for group in bundle.outputs for key in group}
        values: dict[Key, Any] = {}
        for task in bundle.tasks:
            for key in task.dependencies:
                if key not in values:
                    self._bring(key, source, values)
            values[task.key] = task({key: values[key] for key in task.dependencies})
            for key in task.dependencies:
                pending[key] -= 1
                if not pending[key] and key not in wanted:
                    del values[key]
        return [GroupHere([values[key] for key in group]) for group in bundle.outputs]

    def _bring(self, key: Key, source: Mapping[Key, BundleInput], values: dict[Key, Any]) -> None:
        """Fetch the group that a value is in."""
        if key in self._kept:
            result = self._kept[key]
            values[key] = self._fetch([result.handle])[0][result.index]
            return
        taken = source[key]
        if self._bundles[taken.bundle].feeds:
            at = self._feeds.index(taken.bundle)
            for number in self._feeds[at : at + 1 + AHEAD]:
                if all(before.bundle in self._returned for before in self._bundles[number].inputs):
                    self._start(number)
        handle = self._group(taken)
        self._takers[taken.bundle, taken.group] -= 1
        if self._bundles[taken.bundle].feeds and not self._takers[taken.bundle, taken.group]:
            self._returned[taken.bundle][taken.group] = GroupHere(())  # lets go of it
        values.update(zip(taken.keys, self._fetch([handle])[0], strict=True))
