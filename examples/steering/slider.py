"""The feed rate as a slider, and what comes of it, in a browser or in a notebook.

    pip install ".[slider]"
    python -m panel serve examples/steering/slider.py --show

The analytics runs in a thread. Its callback hands the slider's value to the simulation with each timestep.
"""

import threading

import panel as pn

from deisa.ray.window_handler import Deisa
from examples.gray_scott.simulation import FEED
from examples.steering.analytics import STEADY, Seen, Steerer


def app() -> pn.Column:
    """The slider with what was seen last, and an analytics behind it that runs from now on."""
    slider = pn.widgets.FloatSlider(
        name="feed rate", start=0.02, end=0.08, step=0.0005, value=FEED, format="0.0000"
    )
    status = pn.pane.Markdown("waiting for the simulation", name="status")
    document = pn.state.curdoc  # of the browser's window; None in a notebook

    def tell(seen: Seen) -> None:
        text = f"t = {seen.t}, mean V = {seen.mean:.4f}, |dV/dt| = {seen.rate_of_change:.2e}, fed at {seen.feed:.4f}"
        show(text)

    def show(text: str) -> None:
        if document is not None:
            document.add_next_tick_callback(lambda: setattr(status, "object", text))
        else:
            status.object = text

    steerer = Steerer(FEED, STEADY, tell)
    slider.param.watch(lambda change: setattr(steerer, "feed", change.new), "value")

    def run() -> None:
        report = steerer.run(Deisa())
        show(f"the simulation has ended after {report.timesteps['V']} timesteps")

    threading.Thread(target=run, name="analytics", daemon=True).start()
    return pn.Column("## Gray-Scott, steered", slider, status)


if pn.state.served:
    app().servable()
