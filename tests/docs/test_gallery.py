"""The gallery's entries compute what they say, and draw the pictures that the page shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.docs.gallery import ENTRIES, PICTURES, pictures_of_page, run
from tests.docs.pages import Block

SIZE, STEPS = 128, 24
Y, X = np.mgrid[:SIZE, :SIZE]


def centres(t: float) -> list[tuple[float, float]]:
    angles = np.pi / 2 * (np.arange(4) + t / STEPS)
    return [(64 + 36 * np.sin(angle), 64 + 36 * np.cos(angle)) for angle in angles]


def field(t: int) -> np.ndarray:
    spots = sum(np.exp(-((Y - y) ** 2 + (X - x) ** 2) / 50) for y, x in centres(t))
    return spots + 0.1 * np.cos(2 * np.pi * (8 * X / SIZE - t / STEPS))


FIELDS = np.stack([field(t) for t in range(STEPS)])


def check_derivative(names: dict[str, Any]) -> None:
    drawn = names["images"][0].reshape(SIZE, SIZE)
    np.testing.assert_allclose(drawn, 5 * (FIELDS[21] - FIELDS[19]), atol=1e-12)


def check_gradient(names: dict[str, Any]) -> None:
    drawn = names["images"][0].reshape(SIZE, SIZE)
    np.testing.assert_allclose(drawn, np.hypot(*np.gradient(FIELDS[20])), atol=1e-12)


def check_spectrum(names: dict[str, Any]) -> None:
    powers = np.array(names["powers"])
    expected = (abs(np.fft.rfft(FIELDS, axis=2)) ** 2).mean(axis=1)
    np.testing.assert_allclose(powers, expected, rtol=1e-9, atol=1e-9)
    assert powers.mean(axis=0)[4:].argmax() == 8 - 4


def check_histogram(names: dict[str, Any]) -> None:
    expected = [np.histogram(values, names["edges"])[0] for values in FIELDS]
    np.testing.assert_allclose(names["columns"], expected, atol=2)  # values that lie on an edge
    assert {sum(column) for column in names["columns"]} == {SIZE * SIZE}


def check_tracking(names: dict[str, Any]) -> None:
    tracks = np.array(names["tracks"])
    assert tracks.shape == (4, STEPS, 2)
    for t in range(STEPS):
        apart = np.hypot(*(tracks[:, t, None] - np.array(centres(t))).transpose(2, 0, 1))
        assert set(apart.argmin(axis=1)) == {0, 1, 2, 3}
        assert apart.min(axis=1).max() < 1


def check_pca(names: dict[str, Any]) -> None:
    samples = FIELDS[:, ::2, ::2].reshape(STEPS, -1)
    samples = samples - samples.mean(axis=0)
    variances = np.linalg.svd(samples, compute_uv=False) ** 2
    ratios = names["pca"].explained_variance_ratio_
    assert names["pca"].n_samples_seen_ == STEPS
    np.testing.assert_allclose(ratios[:2], (variances / variances.sum())[:2], atol=0.05)


def check_event(names: dict[str, Any]) -> None:
    there = [t for t in range(STEPS) if FIELDS[t, 89, 89] > 0.8]
    timesteps = list(range(there[0] - 2, there[-1] + 3))
    assert len(there) > 2
    saved = names["saved"]
    assert saved.timestep.values.tolist() == timesteps
    np.testing.assert_allclose(saved.values, FIELDS[timesteps])
    assert saved.units == "K"


def check_steering(names: dict[str, Any]) -> None:
    plate, heating, expected = 0.0, 1.0, []
    for _ in range(40):
        plate += heating - 0.05 * plate
        expected.append(plate)
        heating = 0.0 if plate > 11 else 1.0 if plate < 9 else heating
    np.testing.assert_allclose(names["means"], expected)
    assert max(expected) > 11 and np.count_nonzero(np.diff(np.sign(np.diff(expected)))) > 4


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "derivative.png": check_derivative,
    "spectrum.png": check_spectrum,
    "gradient.png": check_gradient,
    "histogram.png": check_histogram,
    "tracking.png": check_tracking,
    "pca.png": check_pca,
    "event.png": check_event,
    "steering.png": check_steering,
}


@pytest.mark.parametrize(
    ("block", "picture"), list(zip(ENTRIES, pictures_of_page(), strict=True)), ids=pictures_of_page()
)
def test_entry(block: Block, picture: str, tmp_path: Path) -> None:
    names = run(block, tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == [picture]
    drawn, shown = plt.imread(tmp_path / picture), plt.imread(PICTURES / picture)
    assert drawn.std() > 0.05
    assert shown.std() == pytest.approx(drawn.std(), rel=0.25)
    CHECKS[picture](names)
