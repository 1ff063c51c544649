"""The figures: small, the same bytes every time, legible where curves coincide, and honest about what is absent."""

from __future__ import annotations

import copy
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread

from bwsk.files import read_json
from bwsk.study.params import Params
from bwsk.study.plots import _log_scale, _panels, draw
from bwsk.study.repository import PLOTS
from bwsk.study.results import read_results
from tests.unit.published_results import published_params, published_results


def trainings(study: Path, params: Params) -> dict[str, Any]:
    return {name: read_json(study / "results" / name / "training_results.json") for name in params.variant_names}


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels, from its header."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_the_same_figures_give_the_same_small_files(study: Path, params: Params, tmp_path: Path) -> None:
    first, second = (
        draw(read_results(study), trainings(study, params), tmp_path / name) for name in ("first", "second")
    )
    assert [path.name for path in first] == list(PLOTS)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes() == (study / "results/figures" / one.name).read_bytes()
        assert one.stat().st_size <= 150_000
        assert b"Software" not in one.read_bytes()


def test_all_three_modes_show_where_their_curves_coincide(study: Path, params: Params, tmp_path: Path) -> None:
    records = trainings(study, params)
    curves = {tuple(record["val_perplexity_curve"]) for record in records.values()}
    assert len(curves) == 2  # one per initialisation: the modes do coincide
    draw(read_results(study), records, tmp_path)
    pixels = imread(tmp_path / "perplexity.png")[60:, :, :3].reshape(-1, 3)  # below the legend
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x4D, 0x40)):
        near = np.abs(pixels - np.array(colour) / 255).max(axis=1) < 0.06
        assert near.sum() > 100, colour
    pale = np.abs(pixels - np.array([0xA3, 0xD3, 0xF1]) / 255).max(axis=1) < 0.06  # translucent on white
    assert pale.sum() > 400


def test_memory_is_drawn_measured_or_predicted_or_not_at_all(study: Path, params: Params, tmp_path: Path) -> None:
    records = trainings(study, params)
    absent = read_results(study)
    predicted = copy.deepcopy(absent)
    for figures in predicted["variants"].values():
        figures["predicted_peak_memory_mb"] = 100.0
    measured = copy.deepcopy(predicted)
    for figures in measured["variants"].values():
        figures["peak_memory_mb"] = 100.0
    drawn = [draw(results, records, tmp_path / str(n))[2] for n, results in enumerate((absent, predicted, measured))]
    assert size(drawn[0])[0] < size(drawn[1])[0] == size(drawn[2])[0]
    assert drawn[1].read_bytes() != drawn[2].read_bytes()  # the title says which


def test_a_study_of_one_variant_and_a_long_one_can_be_drawn(study: Path, params: Params, tmp_path: Path) -> None:
    record = trainings(study, params)["scratch-conventional"]
    record |= {"train_loss_steps": [1], "train_loss_curve": [3.0], "val_steps": [1], "val_perplexity_curve": [20.0]}
    alone = published_params(variants={"inits": ["scratch"], "modes": ["conventional"]})
    draw(published_results(alone), {"scratch-conventional": record}, tmp_path / "one")
    steps = list(range(50, 13_900, 50))
    long = {**record, "train_loss_steps": steps, "train_loss_curve": [3 + 100 / step for step in steps]}
    draw(published_results(alone), {"scratch-conventional": long}, tmp_path / "long")
    assert (tmp_path / "long/loss.png").stat().st_size <= 150_000


def test_a_perplexity_of_any_range_has_plain_ticks() -> None:
    for low, high in ((94.0, 137.0), (20.1, 20.9), (30.0, 700.0), (25.0, 32_000.0)):
        picture, (axes,) = _panels(1)
        axes.plot([1, 2], [high, low])
        _log_scale(axes)
        picture.canvas.draw()
        bottom, top = axes.get_ylim()
        labels = [
            label.get_text()
            for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
            if bottom <= tick <= top
        ]
        assert 3 <= len(labels) <= 12, (low, high, labels)
        assert not any("$" in label or "e" in label or not label for label in labels), labels


def test_drawing_leaves_matplotlib_as_the_caller_has_set_it_up() -> None:
    code = """if True:
        import sys, tempfile
        import matplotlib
        matplotlib.use("svg")
        before = dict(matplotlib.rcParams)
        from pathlib import Path
        from bwsk.study.plots import draw
        from tests.unit.published_results import published_params, published_results
        curves = {"train_loss_steps": [1, 2], "train_loss_curve": [3.0, 2.0], "val_steps": [1, 2]}
        curves |= {"val_perplexity_curve": [20.0, 10.0], "init": "scratch", "mode": "conventional"}
        alone = published_params(variants={"inits": ["scratch"], "modes": ["conventional"]})
        drawn = draw(published_results(alone), {"scratch-conventional": curves}, Path(tempfile.mkdtemp()) / "out")
        assert all(path.is_file() for path in drawn)
        assert matplotlib.get_backend() == "svg", matplotlib.get_backend()
        assert dict(matplotlib.rcParams) == before
        assert "matplotlib.pyplot" not in sys.modules
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
