"""Storms, one after another and side by side: ``python -m tests.chaos --minutes 5``.

Prints a line for each session, and at the end the figures for docs/reliability.md. Ends with 1 if a promise was
broken: the same seed makes the same storm again, but for its timing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.chaos.storm import BrokenPromiseError, Figures, Storm
from tests.support.ray_node import AUTHENTICATION, RayNode


def main() -> int:
    """Run storms until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--side-by-side", type=int, default=2, help="sessions at a time")
    options = parser.parse_args()
    os.environ |= AUTHENTICATION
    figures, broken = Figures(), []
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp") as folder:
        node = RayNode.start(Path(folder))
        try:
            node.wait_started()
            os.environ["RAY_ADDRESS"] = node.address
            deadline = time.monotonic() + 60 * options.minutes
            lock, seed = threading.Lock(), options.seed

            def keep_going() -> None:
                nonlocal seed
                while time.monotonic() < deadline:
                    with lock:
                        own, seed = seed, seed + 1
                    logs = Path(folder, "logs", str(own))
                    logs.mkdir(parents=True)
                    storm = Storm(logs, f"chaos-{own}", own)
                    try:
                        storm.run()
                    except BrokenPromiseError as error:
                        broken.append(error)
                        print(f"seed {own}: BROKEN: {error}", flush=True)
                    with lock:
                        figures.add(storm.figures)
                    print(
                        f"seed {own}: {dict(storm.figures.events)} {dict(storm.figures.outcomes)}", flush=True
                    )

            threads = [threading.Thread(target=keep_going) for _ in range(options.side_by_side)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            node.stop()
    print(
        f"\n{figures.sessions} sessions, {figures.timesteps:,} timesteps, "
        f"{', '.join(f'{n} x {what}' for what, n in sorted(figures.events.items()))}; "
        f"ended {dict(figures.outcomes)}; promises broken: {len(broken)}"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
