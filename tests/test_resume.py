"""Runs that are killed go on: whatever the moment, the end is the same to the last bit."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import assert_same_model, assert_same_report, assert_untouched, calibration, quiet, state_of, threads
from tiny import tiny_model

from greedy_helpers import blocks_of, exact_greedy, load_model, output_energy, random_scores
from greedy_helpers.__main__ import main
from greedy_helpers.large import resume
from greedy_helpers.large.lazy import read_weight
from greedy_helpers.recipes import name_of

HOW = {"ratio": 0.4, "criterion": exact_greedy, "remedy": "both, residual", "batch_size": 4}
fork = multiprocessing.get_context("fork")  # a process of its own to kill, without the seconds that imports take


def deep_model(name="llama", blocks=4, dtype=torch.float32):
    """Four blocks, so that there is something between the first and the last."""
    model = tiny_model(name, dtype)
    blocks_of(model).extend(
        [*tiny_model(name, dtype).model.layers, *tiny_model(name, dtype).model.layers][: blocks - 2]
    )
    for place, block in enumerate(blocks_of(model)):
        block.self_attn.layer_idx = place
    model.config.num_hidden_layers = blocks
    return model


TOKENS = calibration(10, 20)


def assert_same(model, report, expected_model, expected_report):
    assert_same_model(model, expected_model)
    assert_same_report(report, expected_report)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A forked process has none of its parent's threads, and another number of threads rounds otherwise."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def uninterrupted(one_thread):
    model = deep_model()
    return model, quiet(model, TOKENS, **HOW)


def in_a_process(run):
    process = fork.Process(target=run)
    process.start()
    return process


# --- killed


def test_killed_at_random_moments(tmp_path, uninterrupted):
    """Killed, started again, killed again ... until a run is through; the last one returns what all have done."""
    generator, kills = random.Random(0), 0
    started = time.perf_counter()
    quiet(deep_model(), TOKENS, **HOW, work_dir=tmp_path / "timed")
    usual = time.perf_counter() - started
    for _ in range(40):
        process = in_a_process(lambda: quiet(deep_model(), TOKENS, **HOW, work_dir=tmp_path / "work"))
        process.join(generator.uniform(0.1, 0.8) * usual)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0 and kills:
            break
        if process.exitcode == 0:  # the timed run was slow, on a busy machine: again from the start, with less patience
            shutil.rmtree(tmp_path / "work")
            usual /= 2
    model = deep_model()
    report = quiet(model, TOKENS, **HOW, work_dir=tmp_path / "work")
    assert kills > 0
    assert_same(model, report, *uninterrupted)
    assert not list((tmp_path / "work").glob(".*")), "something half-written was left"


@pytest.mark.parametrize("what", ["save_file", "os.fsync", "os.replace", "Path.write_text"])
def test_killed_at_every_step_of_a_commit(what, tmp_path, uninterrupted):
    """The process dies in the very call, before or after its work is done (or half done: a text), one call later every
    time."""
    place, name = (
        {"save_file": resume, "os.fsync": os, "os.replace": os, "Path.write_text": Path}[what],
        what.split(".")[-1],
    )
    original = getattr(place, name)

    def run(call, after):
        count = itertools.count(1)

        def dying(*args, **kwargs):
            now = next(count) == call
            if now and not after:
                if name == "write_text":
                    original(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            original(*args, **kwargs)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(place, name, dying)
        quiet(deep_model(), TOKENS, **HOW, work_dir=tmp_path / "work")

    ends = []
    for call, after in itertools.product(range(1, 20), (False, True)):
        process = in_a_process(partial(run, call, after))
        process.join()
        ends.append(process.exitcode)
        if process.exitcode == 0:
            break
    assert set(ends) == {-signal.SIGKILL, 0}
    model = deep_model()
    report = quiet(model, TOKENS, **HOW, work_dir=tmp_path / "work")
    assert_same(model, report, *uninterrupted)


# --- interrupted


def stops_in(block, criterion):
    def stopping(module, seen):
        if module.block == block and module.kind != "attention":
            raise KeyboardInterrupt
        return criterion(module, seen)

    stopping.__name__ = name_of(criterion)
    return stopping


def test_interrupted_the_model_is_whole_and_the_folder_keeps_what_was_done(tmp_path, uninterrupted):
    model, work = deep_model(), tmp_path / "work"
    before = state_of(model)
    for block in (1, 1, 3):
        with pytest.raises(KeyboardInterrupt):
            quiet(model, TOKENS, **HOW | {"criterion": stops_in(block, HOW["criterion"])}, work_dir=work)
        assert_untouched(model, before)
        assert len(list(work.glob("block-*.json"))) == block

    asked = []
    counting = lambda module, seen: (asked.append(module.block), HOW["criterion"](module, seen))[1]  # noqa: E731
    counting.__name__ = name_of(HOW["criterion"])
    report = quiet(model, TOKENS, **HOW | {"criterion": counting}, work_dir=work)
    assert set(asked) == {3}, "finished blocks were not scored again"
    assert_same(model, report, *uninterrupted)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("bloom", {"ratio": 0.4, "remedy": "pre", "batch_size": 4}),  # heads' alibi slices are a buffer
        ("llama-gqa", {"ratio": 0.4, "remedy": "bias", "criterion": output_energy}),
        ("llama", {"ratio": 0.4, "remedy": "bias", "criterion": output_energy}),  # biases that the dense model lacks
        ("gpt2", {"ratio": 0.4, "remedy": "both", "blocks": [1]}),
        ("stablelm", {"ratio": 0.5, "criterion": partial(random_scores, seed=3), "kinds": {"attention"}}),
    ],
)
def test_what_was_committed_comes_back_in_every_family(name, how, tmp_path):
    expected, model = tiny_model(name, torch.float32), tiny_model(name, torch.float32)
    expected_report = quiet(expected, TOKENS, **how)
    quiet(tiny_model(name, torch.float32), TOKENS, **how, work_dir=tmp_path / "work")
    (tmp_path / "work" / "block-00001.json").unlink()  # as if killed just before
    report = quiet(model, TOKENS, **how, work_dir=tmp_path / "work")
    assert_same(model, report, expected, expected_report)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_a_smaller_batch_is_remembered(tmp_path):
    """Memory ran out in block 1 of the run that was stopped: the next one goes on with batches of the same size."""

    def criterion(times, stop):
        left = [times]

        def scores(module, seen):
            if module.block == 1 and left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if module.block == stop:
                raise KeyboardInterrupt
            return output_energy(module, seen)

        scores.__name__ = "energy"
        return scores

    how = {"ratio": 0.4, "remedy": "both", "batch_size": 8}
    expected, model = deep_model(), deep_model()
    with pytest.warns(UserWarning, match="going on with 4 windows"):
        expected_report = quiet(expected, TOKENS, **how, criterion=criterion(1, None))
    with pytest.warns(UserWarning, match="going on with 4 windows"), pytest.raises(KeyboardInterrupt):
        quiet(model, TOKENS, **how, criterion=criterion(1, 2), work_dir=tmp_path / "work")
    report = quiet(model, TOKENS, **how, criterion=criterion(0, None), work_dir=tmp_path / "work")
    assert_same(model, report, expected, expected_report)


def test_a_lazy_model_goes_on_too(tmp_path):
    deep_model().save_pretrained(tmp_path / "dense")
    expected, _ = load_model(tmp_path / "dense", "cpu")
    expected_report = quiet(expected, TOKENS, **HOW)
    lazy, _ = load_model(tmp_path / "dense", "cpu", lazy=True)
    stopping = stops_in(2, HOW["criterion"])
    with pytest.raises(KeyboardInterrupt):
        quiet(lazy, TOKENS, **HOW | {"criterion": stopping}, work_dir=tmp_path / "work")
    again, _ = load_model(tmp_path / "dense", "cpu", lazy=True)
    report = quiet(again, TOKENS, **HOW, work_dir=tmp_path / "work")
    for name, value in expected.state_dict().items():
        on_disk = name in again.weights_on_disk
        assert torch.equal(read_weight(again, name) if on_disk else again.state_dict()[name], value), name
    assert report.stream_errors == expected_report.stream_errors


# --- refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.5}, "ratio was 0.4, is now 0.5"),
        ({"damp": 0.1}, "damp was 0.01, is now 0.1"),
        ({"remedy": "post"}, "remedy was 'both, residual', is now 'post'"),
        ({"plan": {"model.layers.0.mlp": 40}, "ratio": None}, "plan was None, is now .*; ratio was 0.4, is now None"),
        (
            {"criterion": partial(random_scores, seed=1)},
            r"criterion was 'exact greedy', is now 'random_s.*seed=1\)'",
        ),
        ({"blocks": [0]}, r"blocks was \[0, 1\], is now \[0\]"),
        ({"kinds": {"gated_ffn"}}, r"kinds was \['attention', 'gated_ffn'\], is now \['gated_ffn'\]"),
        ({"batch_size": 5}, "batch_size was 4, is now 5"),
        ({"precision": torch.float32}, "precision was 'torch.float64'"),
        ({"calibration": calibration(10, 20, seed=6)}, r"calibration was '\[10, 20\] "),
        ({"ratio": 0.5, "damp": 0.1}, "damp was .*; ratio was"),
    ],
)
def test_other_settings_are_refused_by_name(change, message, tmp_path_factory, finished_work):
    model = tiny_model("llama", torch.float32)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"holds a run with other settings: .*{message}"):
        quiet(model, **{"calibration": TOKENS} | HOW | change, work_dir=finished_work)
    assert_untouched(model, before)


@pytest.fixture(scope="module")
def finished_work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "work"
    quiet(tiny_model("llama", torch.float32), TOKENS, **HOW, work_dir=folder)
    return folder


def test_another_model_is_refused(finished_work):
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        blocks_of(model)[1].mlp.up_proj.weight[3, 5] += 1e-6  # one weight
    with pytest.raises(ValueError, match="other settings: model was"):
        quiet(model, TOKENS, **HOW, work_dir=finished_work)
    pruned = tiny_model("llama", torch.float32)
    quiet(pruned, TOKENS, 0.5)
    with pytest.raises(ValueError, match="other settings: model was"):
        quiet(pruned, TOKENS, **HOW, work_dir=finished_work)


def test_a_damaged_block_is_refused(finished_work):
    file = finished_work / "block-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    model = tiny_model("llama", torch.float32)
    before = state_of(model)
    try:
        with pytest.raises(ValueError, match=r"block-00001\.safetensors is not the file that was written"):
            quiet(model, TOKENS, **HOW, work_dir=finished_work)
    finally:
        file.write_bytes(whole)
    assert_untouched(model, before)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"work_dir: expected a folder, or nothing, at .*thesis, found a file"):
        quiet(tiny_model("llama", torch.float32), TOKENS, **HOW, work_dir=tmp_path / "thesis")
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_settings_can_be_read_by_people(finished_work):
    settings = json.loads((finished_work / "settings.json").read_text())
    assert (settings["criterion"], settings["remedy"], settings["damp"]) == ("exact greedy", "both, residual", 0.01)
    assert settings["processes"] == 1


def test_the_command_line_streams_into_a_work_folder(tmp_path, capsys):
    arguments = ["--criterion", "output energy", "--remedy", "post", "--blocks", "0:1", "--calibration", "4"]
    arguments += ["--seq", "64", "--source", "code", "--device", "cpu"]
    streamed = ["--lazy", "--work-dir", str(tmp_path / "work"), *arguments]
    assert main(["prune", "llama-mini", str(tmp_path / "whole"), *arguments]) == 0
    assert main(["prune", "llama-mini", str(tmp_path / "streamed"), *streamed]) == 0
    whole, found = (load_model(tmp_path / name, "cpu")[0].state_dict() for name in ("whole", "streamed"))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert main(["prune", "llama-mini", str(tmp_path / "other"), *streamed, "--damp", "0.5"]) == 1
    assert "damp was 'held out', is now 0.5" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
