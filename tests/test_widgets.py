"""Explorers: counts against independent computations, the slider moved in-process, life without ipywidgets."""

import base64
import importlib.util
import io
import sys
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest
import torch

from greedy_helpers import Moments
from greedy_helpers.course import widgets

ROOT = Path(__file__).resolve().parent.parent


def on_a_line(*places):
    places = torch.tensor(places)
    return (places[:, None] - places).abs()


@pytest.fixture
def chain():
    """Heads 0, 1, 2 in a row, each near the next, and one far away: Algorithm 2 marks 0 and 1, which orphans 0."""
    return widgets.tau_explorer(on_a_line(0.0, 0.1, 0.2, 0.9), [0.05, 0.15, 0.25], start=0.05)


@pytest.fixture
def refitted():
    generator = torch.Generator().manual_seed(0)
    x, new, target, weight = (torch.randn(n, 6, generator=generator).double() for n in (20, 50, 2, 2))
    seen, unseen = Moments("seen"), Moments("new")
    seen.update(x, x @ target.T)
    unseen.update(new, new @ target.T)
    made = widgets.ridge_explorer(seen, {"new": unseen}, weight, [1e-3, 1.0], start=1.0)
    made.given = x, new, target, weight
    return made


def sentences(explorer):
    return [explorer.look(i)[1] for i in range(len(explorer.widget.children[0].options))]


def pixels(png):
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def test_tau_explorer_counts_marked_heads_and_orphans(chain):
    orphans = "of them with no similar head among those that stay"
    assert sentences(chain) == [
        f"tau = 0.05 nats: 0 of 4 heads go, 0 {orphans}",
        f"tau = 0.15 nats: 2 of 4 heads go, 1 {orphans}",
        f"tau = 0.25 nats: 2 of 4 heads go, 0 {orphans}",
    ]
    modules = {f"block {i}": on_a_line(0.0, 0.1 + i, 50.0) for i in range(8)}
    first, second = sentences(widgets.tau_explorer(modules, [0.15, 1.5]))
    assert first.startswith("tau = 0.15 nats: 1 of 24 heads go")
    assert second.startswith("tau = 1.5 nats: 2 of 24 heads go")


def test_ridge_explorer_gives_the_errors_of_a_stacked_least_squares_problem(refitted):
    x, new, target, weight = refitted.given
    for damp, sentence in zip([1e-3, 1.0], sentences(refitted), strict=True):
        root = (damp * x.square().sum() / 6).sqrt()
        above = torch.cat([x, root * torch.eye(6).double()])
        w = torch.linalg.lstsq(above, torch.cat([x @ target.T, root * weight.T])).solution
        errors = [((z @ target.T - z @ w).square().sum() / (z @ target.T).square().sum()).item() for z in (x, new)]
        assert f"relative error {errors[0]:.3g} on calibration, {errors[1]:.3g} on new;" in sentence
        decided = sum(s > root**2 for s in torch.linalg.svdvals(x) ** 2)  # s / (s + lam) > 1/2
        assert sentence.endswith(f"more than half in {decided} of 6 directions")


@pytest.mark.parametrize("name", ["chain", "refitted"])
def test_moving_the_slider_changes_picture_and_sentence(name, request):
    explorer = request.getfixturevalue(name)
    slider, image, label = explorer.widget.children
    assert slider.value == explorer.start
    places = range(len(slider.options))
    for place in (*places, *reversed(places)):
        slider.value = place
        assert (image.value, label.value) == explorer.look(place)
        assert explorer.look(place) is explorer.look(place), "drawn once"
    shown = [pixels(explorer.look(place)[0]) for place in places]
    assert all((one != other).any() for one, other in zip(shown[1:], shown[:-1], strict=True))
    assert shown[0].shape[:2] == (380, 900)
    np.testing.assert_array_equal(shown[0][0, 0], np.ones(4), "white")


def test_a_front_end_gets_the_widget_and_the_picture(chain):
    """And run.py keeps the picture without its widget, and nothing of a progress bar."""
    data, metadata = chain._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == chain.look(0)[0]
    assert metadata["image/png"]["alt"] == data["text/plain"] == chain.look(0)[1]
    view = "application/vnd.jupyter.widget-view+json"
    assert data[view]["model_id"] == chain.widget.model_id
    spec = importlib.util.spec_from_file_location("run", ROOT / "notebooks" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    bar = nbformat.v4.new_output("display_data", {"text/plain": "HBox()", view: data[view]})
    kept = run.committed([nbformat.v4.new_output("execute_result", data, metadata=metadata, execution_count=1), bar])
    assert [set(output.data) for output in kept] == [{"text/plain", "image/png"}]


def test_without_ipywidgets_the_picture_is_left(chain, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(chain._repr_mimebundle_()[0]) == {"text/plain", "image/png"}
    assert chain.widget is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: widgets.tau_explorer({}), "at least one module"),
        (lambda: widgets.tau_explorer(torch.zeros(2, 3)), r"\[heads, heads\], found \[2, 3\]"),
        (lambda: widgets.tau_explorer(torch.zeros(2, 2), [-1.0]), "tau >= 0"),
        (lambda: widgets.tau_explorer(torch.zeros(2, 2), []), "at least one value"),
        (lambda: widgets.ridge_explorer(Moments(), {}, torch.zeros(2, 2), [0.0]), "damps > 0"),
        (lambda: widgets.ridge_explorer(Moments("mine"), {}, torch.zeros(2, 2)), "found no targets in 'mine'"),
    ],
)
def test_what_cannot_be_shown_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
