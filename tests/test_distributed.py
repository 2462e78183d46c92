"""Several processes give what one gives; and when one of them dies, none waits for ever."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import calibration, quiet, threads
from tiny import tiny_model

from greedy_helpers import (
    blocks_of,
    exact_greedy,
    flap,
    load_model,
    load_pruned,
    output_energy,
    scores_of,
    second_moment,
)
from greedy_helpers.large import distributed
from greedy_helpers.similarity import divergences_of, redundant_first

TOKENS = calibration(10, 20)  # three processes get 4, 3 and 3 windows
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threads(1):  # a forked process has none of its parent's threads
        yield


def together(size, run, folder, patience=60):
    """`run(rank)` in `size` processes joined by gloo: (exit codes, what those that finished returned)."""

    def one(rank):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=20)
        )
        torch.save(run(rank), folder / f"{rank}.pt")
        distributed.finish()

    (folder / "meet").unlink(missing_ok=True)
    processes = [fork.Process(target=one, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    waiting = [process for process in processes if process.is_alive()]
    for process in waiting:
        process.kill()
        process.join()
    assert not waiting, f"{len(waiting)} processes were still waiting after {patience} s"
    files = [folder / f"{rank}.pt" for rank in range(size)]
    found = [torch.load(file, weights_only=False) for file in files if file.exists()]
    return [process.exitcode for process in processes], found


def assert_close(found, expected, rel=1e-6):
    """Weights and report of a run against those of one process."""
    (state, report), (expected_state, expected_report) = found, expected
    for name, value in expected_state.items():
        error = (state[name] - value).double().norm() / value.double().norm().clamp(min=1e-30)
        assert error <= rel, (name, error)
    assert report.tokens == expected_report.tokens
    assert report.stream_errors == pytest.approx(expected_report.stream_errors, rel=rel)
    for a, b in zip(report.steps, expected_report.steps, strict=True):
        assert a.keep.tolist() == b.keep.tolist()
        assert a.error == pytest.approx(b.error, rel=rel, abs=1e-9)
        torch.testing.assert_close(a.scores, b.scores, rtol=rel, atol=1e-9)


HOW = {"ratio": 0.4, "criterion": exact_greedy, "remedy": "both, residual", "batch_size": 3}
CASES = {
    "both": ("llama-gqa", HOW),
    # windows in their order, attention maps, means of the dense model
    "bias": (
        "gpt2",
        {"ratio": 0.4, "remedy": "bias", "criterion": partial(flap, published_code=True), "batch_size": 2},
    ),
    "maps": ("llama", {"ratio": 0.5, "remedy": "pre", "criterion": partial(redundant_first, tau=0.6)}),
}


def pruned(case, _rank=0):
    name, how = CASES[case]
    model = tiny_model(name, attention="eager")
    report = quiet(model, TOKENS, **how)
    return model.state_dict(), report


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_several_processes_equal_one(case, size, tmp_path):
    codes, found = together(size, partial(pruned, case), tmp_path)
    assert codes == [0] * size
    expected = pruned(case)
    for rank in range(size):
        assert_close(found[rank], expected)
    first = found[0]
    for other in found[1:]:
        assert all(torch.equal(first[0][name], other[0][name]) for name in first[0])


def test_single_precision_too(tmp_path):
    """On the embedded model, in float32, where activations and their products round."""
    tokens = calibration(8, 64)

    def run(_rank=0):
        model, _ = load_model("llama-mini", "cpu")
        report = quiet(model, tokens, 0.25, remedy="post", criterion=output_energy, batch_size=4, blocks=[0, 1])
        return model.state_dict(), report

    codes, found = together(2, run, tmp_path)
    assert codes == [0, 0]
    expected = run()
    for step, other in zip(found[0][1].steps, expected[1].steps, strict=True):
        assert step.keep.tolist() == other.keep.tolist()
        assert step.error == pytest.approx(other.error, rel=1e-4, abs=2e-6)


def test_scores_and_divergences(tmp_path):
    def run(_rank=0):
        model = tiny_model("llama-gqa", attention="eager")
        return scores_of(model, TOKENS), divergences_of(model, TOKENS)

    codes, found = together(2, run, tmp_path)
    assert codes == [0, 0]
    for one, expected in zip(found[1], run(), strict=True):
        assert one.keys() == expected.keys()
        for name in one:
            torch.testing.assert_close(one[name], expected[name], rtol=1e-9, atol=1e-12)


def test_windows_come_in_their_order(tmp_path):
    windows = torch.arange(10.0)[:, None].expand(10, 4)

    def run(_rank):
        return list(distributed.all_windows(distributed.share_of(windows).split(2)))

    codes, found = together(3, run, tmp_path)
    assert codes == [0, 0, 0]
    for batches in found:
        assert torch.equal(torch.cat(batches), windows)
    assert [len(batch) for batch in found[0]] == [6, 4]
    assert torch.equal(torch.cat(list(distributed.all_windows(windows.split(3)))), windows)


def test_a_work_folder_serves_all_of_them(tmp_path):
    """Stopped in block 1 and continued, by two processes that share the folder."""

    def run(_rank, stop):
        def criterion(module, seen):
            if module.block == stop:
                raise KeyboardInterrupt
            return HOW["criterion"](module, seen)

        criterion.__name__ = "greedy"
        model = tiny_model("llama-gqa", attention="eager")
        report = quiet(model, TOKENS, **HOW | {"criterion": criterion}, work_dir=tmp_path / "work")
        return model.state_dict(), report

    codes, found = together(2, partial(run, stop=1), tmp_path)
    assert 0 not in codes
    assert not found
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [
        "block-00000.json",
        "block-00000.safetensors",
        "settings.json",
    ]
    codes, found = together(2, partial(run, stop=None), tmp_path)
    assert codes == [0, 0]
    codes, whole = together(2, partial(pruned, "both"), tmp_path)
    for one, other in zip(found, whole, strict=True):
        assert one[1].stream_errors == other[1].stream_errors
        assert all(torch.equal(one[0][name], other[0][name]) for name in other[0])
    with pytest.raises(ValueError, match="processes was 2, is now 1"):
        run(0, stop=None)


# --- what goes wrong


def test_a_dead_process_is_not_waited_for(tmp_path):
    def run(rank):
        def criterion(module, seen):
            if module.block == 1 and rank == 1:
                os._exit(7)  # no good-bye
            return second_moment(module, seen)

        quiet(tiny_model("llama"), TOKENS, 0.5, criterion=criterion)

    started = time.monotonic()
    codes, found = together(2, run, tmp_path)
    assert codes[1] == 7
    assert codes[0] not in (0, None)
    assert not found
    assert time.monotonic() - started < 50


def test_an_error_in_one_process_ends_all(tmp_path):
    def run(rank):
        model = tiny_model("llama", torch.float32)
        if rank == 1:
            with torch.no_grad():
                blocks_of(model)[1].mlp.up_proj.weight.mul_(1e38)
                blocks_of(model)[1].mlp.gate_proj.weight.abs_().mul_(1e3)
        quiet(model, TOKENS, 0.5)

    codes, found = together(2, run, tmp_path)
    assert 0 not in codes
    assert not found


def test_processes_that_disagree_are_stopped(tmp_path):
    def run(rank):
        def criterion(module, seen):
            return second_moment(module, seen) * (-1 if rank == 1 and module.block == 1 else 1)

        model = tiny_model("llama")
        try:
            quiet(model, TOKENS, 0.5, criterion=criterion)
        except RuntimeError as error:
            return str(error)

    codes, found = together(2, run, tmp_path)
    assert codes == [0, 0]
    for message in found:
        assert "model.layers.1.self_attn: the units to keep: expected the same in all 2 processes" in message


def test_more_processes_than_windows(tmp_path):
    def run(_rank):
        with pytest.raises(ValueError, match="at least one calibration window for each of 2 processes, found 1"):
            quiet(tiny_model("llama"), TOKENS[:1], 0.5)

    assert together(2, run, tmp_path)[0] == [0, 0]


def test_the_command_line_under_torchrun(tmp_path):
    """Two processes: the first saves and speaks."""
    arguments = ["llama-mini", str(tmp_path / "pruned"), "--criterion", "output energy", "--remedy", "post"]
    arguments += ["--blocks", "0:1", "--calibration", "4", "--seq", "64", "--source", "code", "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "greedy_helpers", "--json", "prune", *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)  # one object, from one process
    assert said["tokens"] == 4 * 64
    model, _ = load_pruned(tmp_path / "pruned", "cpu")
    assert said["parameters"]["total"][1] == model.num_parameters()
