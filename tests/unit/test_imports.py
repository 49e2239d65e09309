"""Who imports whom, and what a rank pays for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deisa.ray
from tests.support.patience import PATIENCE_S

ROOT = Path(deisa.ray.__file__).parent
MODULES = {
    ".".join(("deisa.ray", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def imports(name: str) -> set[str]:
    """Everything a module imports anywhere in it, except for type checkers only."""
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            module = node.module or ""
            inside = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inside if module in PACKAGES and inside else {module}
    return found


def room(module: str) -> str:
    """The part of deisa.ray that a module belongs to."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["deisa", "ray"] and len(parts) > 2 else parts[0]


ALLOWED = {
    "_state": {"_state", "errors", "numpy"},
    "_handoff": {"_handoff", "errors"},
    "_transport": {"_transport", "_handoff", "_state", "errors", "config", "numpy"},
    "bridge": {"_handoff", "_state", "errors", "config", "compliance", "numpy"},
    "compliance": set(),
    "errors": set(),
    "config": {"errors"},
    "types": {"_graph", "_state", "files", "labels", "display", "errors", "numpy", "xarray"},
    "labels": {"_state", "types", "errors", "numpy", "dask", "xarray"},
    "display": {"_state", "types"},
    "files": {"_files", "errors", "dask"},
    "_files": {"_files", "files", "errors", "numpy", "dask"},
    "_graph": {"_graph", "_transport", "_state", "errors", "config", "types", "numpy", "dask", "cloudpickle"},
    "_session": {
        *(
            "_session",
            "_graph",
            "_transport",
            "_state",
            "errors",
            "config",
            "types",
            "labels",
            "report",
            "bridge",
        ),
        "numpy",
    },
    "_engine": {
        *("_engine", "_session", "_graph", "_transport", "_state", "errors", "config", "report"),
        *("numpy", "ray"),
    },
}


@pytest.mark.parametrize("name", [m for m in MODULES if room(m) in ALLOWED])
def test_imports_point_one_way(name: str) -> None:
    used = {room(module) for module in imports(name)} - sys.stdlib_module_names
    assert used <= ALLOWED[room(name)]


def test_decisions_are_made_without_sockets() -> None:
    for name in MODULES:
        if room(name) == "_state":
            assert not imports(name) & {"socket", "select", "selectors", "mmap", "threading", "time"}


def test_only_the_engine_knows_ray() -> None:
    users = {name for name in MODULES if any(m.split(".")[0] == "ray" for m in imports(name))}
    assert users
    assert {room(name) for name in users} == {"_engine"}


def test_only_those_above_know_the_session() -> None:
    users = {room(name) for name in MODULES if any(room(module) == "_session" for module in imports(name))}
    assert users <= {"_session", "_engine", "window_handler"}


def test_only_those_above_know_the_engine() -> None:
    users = {room(name) for name in MODULES if any(room(module) == "_engine" for module in imports(name))}
    assert users <= {"_engine", "window_handler", "scheduler"}


ADAPTER = "deisa.ray._graph._dask"


def test_one_module_alone_imports_what_dask_does_not_document() -> None:
    users = {
        name: found for name in MODULES if (found := {m for m in imports(name) if m.split(".")[0] == "dask"})
    }
    assert {"dask._task_spec", "dask._expr"} <= users.pop(ADAPTER)
    assert users
    assert set().union(*users.values()) <= {"dask", "dask.array"}


def test_what_is_below_the_arrays_is_only_the_adapter() -> None:
    assert {m for m in imports("deisa.ray.types") if room(m) == "_graph"} == {ADAPTER}
    assert {m for m in imports(ADAPTER) if m.startswith("deisa")} == {"deisa.ray.errors"}


UNDOCUMENTED = {
    *(
        "_name",
        "_chunks",
        "_meta",
        "_keys",
        "__name",
        "hlg",
        "low_level_optimizer",
        "operands",
        "has_legacy_tasks",
    ),
    *("array_plugins", "split_every", "optimization.fuse.active", "optimization"),
}


def words(name: str) -> set[str]:
    """The attributes that a module names, and its strings but for docstrings."""
    nodes = list(ast.walk(ast.parse(MODULES[name].read_text())))
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return named | {
        node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize("name", [m for m in MODULES if room(m) in ("_graph", "types") and m != ADAPTER])
def test_one_module_alone_names_what_dask_does_not_document(name: str) -> None:
    assert not words(name) & UNDOCUMENTED


RANK = """
import sys, threading
from deisa.ray import Bridge
from deisa.ray._state.plan import NodePlan, StartPlan
from deisa.ray._state.streams import Part, Stream
from deisa.ray._transport.server import AgentServer
from deisa.ray._state.events import BridgeJoined, StepComplete
from deisa.ray.config import Settings
import deisa.ray.bridge, numpy as np

settings = Settings(session=sys.argv[1])
server = AgentServer(settings, "run", "node")

def analytics():
    while not any(isinstance(e, BridgeJoined) for e in server.poll(10)):
        pass
    plan = StartPlan({"a": Stream("a", "a")}, {"a": 1}, {"a": np.dtype("f8")}, ("c",))
    server.start(plan, NodePlan({"a": [Part(0, 0, 0, (0,), (1,), (4,))]}))

thread = threading.Thread(target=analytics)
thread.start()
said = {"chunk_shape": (4,), "global_shape": (4,), "chunk_position": (0,), "dtype": "f8"}
with Bridge(bridge_id=0, arrays_metadata={"a": said}, system_metadata={"world_size": 1}, settings=settings) as bridge:
    thread.join()
    bridge.send("a", np.ones(4), 0)
server.close()
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_a_rank_imports_neither_ray_nor_dask(session_name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RANK, session_name],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"numpy", "deisa"} <= loaded
    assert not loaded & {"ray", "dask", "distributed", "cloudpickle", "pandas", "asyncio"}


BRIDGE = """
import sys
before = set(sys.modules)
import deisa.ray.bridge
print(*sorted(set(sys.modules) - before))
"""


def test_a_rank_imports_the_hand_off_and_numpy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BRIDGE], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    loaded = set(done.stdout.split())
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"numpy", "deisa"}
    assert {room(name) for name in loaded if name.startswith("deisa.ray.")} == {
        *("bridge", "_handoff", "_state", "compliance", "config", "errors")
    }


def test_public_names_are_lazy() -> None:
    code = "import sys, deisa.ray; assert 'numpy' not in sys.modules; print(*dir(deisa.ray))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert set(deisa.ray.__all__) <= set(done.stdout.split())
    assert set(deisa.ray.__all__) == {*deisa.ray._HOMES, "Timestep"}
    with pytest.raises(AttributeError, match="no attribute 'Brigde'"):
        _ = deisa.ray.Brigde


def test_deisa_is_shared_with_others() -> None:
    import deisa
    import deisa.core

    assert deisa.__file__ is None
    assert not (ROOT.parent / "__init__.py").exists()
    assert ROOT.parent != Path(deisa.core.__file__ or "").parent.parent
    assert {str(ROOT.parent), str(Path(deisa.core.__file__ or "").parent.parent)} <= set(
        map(str, deisa.__path__)
    )
