"""The checkers of notebook 10 accept right answers and say what is wrong with others."""

import json
import os
from pathlib import Path

import pytest
import torch

from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import NotYet


def weights(config, kv=None, dim=None, matrices=3, norms=2):
    d, h = config.hidden_size, config.num_attention_heads
    kv, dim = kv or config.num_key_value_heads, dim or config.head_dim
    return 2 * d * h * dim + 2 * d * kv * dim + matrices * d * config.intermediate_size + norms * d


def test_block_bytes():
    assert exercises.check_block_bytes(lambda c, s: s * weights(c)).startswith("correct")

    def in_place(config, itemsize):
        config.intermediate_size += 1
        return itemsize * weights(config)

    for wrong, message in [
        (lambda c, s: float(s * weights(c)), "expected a whole number"),
        (in_place, "changed the config"),
        (lambda c, s: weights(c), "not bytes"),
        (lambda c, s: s * weights(c) * c.num_hidden_layers, "all blocks"),
        (lambda c, s: s * weights(c, norms=0), "two norms"),
        (lambda c, s: s * weights(c, matrices=2), "three matrices"),
        (lambda c, s: s * weights(c, kv=c.num_attention_heads), "grouped-query attention.*fewer than the queries"),
        (lambda c, s: s * weights(c, dim=c.hidden_size // c.num_attention_heads), "config.head_dim"),
        (lambda c, s: 7, "expected .*, found 7"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_block_bytes(wrong)


def merged(parts):
    n = sum(part[0] for part in parts)
    return n, sum(part[0] * part[1] for part in parts) / n, sum(part[0] * part[2] for part in parts) / n


def test_merge():
    assert exercises.check_merge(merged).startswith("correct")

    def in_place(parts):
        for n, mean, second in parts:
            mean *= n
            second *= n
        total = sum(part[0] for part in parts)
        return total, sum(part[1] for part in parts) / total, sum(part[2] for part in parts) / total

    def covariance(parts):
        n, mean, second = merged(parts)
        return n, mean, second - torch.outer(mean, mean)

    for wrong, message in [
        (in_place, "changed its argument"),
        (lambda parts: merged(parts)[1:], "expected \\(n, mean, second\\)"),
        (lambda parts: (0, *merged(parts)[1:]), "expected 20 tokens"),
        (lambda p: (20, sum(q[1] for q in p) / len(p), merged(p)[2]), "unequal shares.*a larger share weighs more"),
        (lambda p: (20, merged(p)[1] * 20, merged(p)[2]), "sum over the tokens"),
        (lambda p: (20, merged(p)[1] + 1, merged(p)[2]), "expected the mean"),
        (covariance, "this is the covariance"),
        (lambda p: (20, merged(p)[1], sum(q[2] for q in p) / len(p)), "unequal shares: expected the mean of x x'"),
        (lambda p: (20, merged(p)[1][:2], merged(p)[2]), "expected shape"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_merge(wrong)


def largest(free, fixed, per_window, n):
    if fixed + per_window > free:
        raise ValueError(f"one window takes {fixed + per_window}, found {free}")
    size = 1
    while 2 * size <= n and fixed + 2 * size * per_window <= free:
        size *= 2
    return size


def test_micro_batch():
    assert exercises.check_micro_batch(largest).startswith("correct")

    def nameless(*arguments):
        try:
            return largest(*arguments)
        except ValueError:
            raise ValueError from None

    def silent(*arguments):
        try:
            return largest(*arguments)
        except ValueError:
            return 0

    for wrong, message in [
        (lambda *a: float(largest(*a)), "expected a whole number"),
        (lambda *a: 0, "at least one window"),
        (lambda free, fixed, each, n: int((free - fixed) / each), "no power of two"),
        (lambda free, fixed, each, n: largest(free, 0, each, n), "which takes 12.9 of 10.0"),
        (lambda free, fixed, each, n: largest(free, fixed, each, 10**6), "only 6 windows"),
        (lambda free, fixed, each, n: largest(free - 1e-9, fixed, each, n), "a larger batch fits"),
        (lambda *a: 1, "a larger batch fits"),
        (nameless, "has to say"),
        (silent, "expected a ValueError, found 0"),
    ]:
        with pytest.raises(NotYet, match=message):
            exercises.check_micro_batch(wrong)


def one_file_each(folder, items, work):
    results = []
    for number, item in enumerate(items):
        file = folder / f"{number}.json"
        if not file.exists():
            partial = folder / f"{number}.partial"
            partial.write_text(json.dumps(work(item)))
            os.replace(partial, file)
        results.append(json.loads(file.read_text()))
    return results


def one_file(folder, items, work):
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else []
    for item in items[len(results) :]:
        results.append(work(item))
        with open(folder / "results.tmp", "w") as partial:
            json.dump(results, partial)
        (folder / "results.tmp").replace(file)
    return results


@pytest.mark.parametrize("right", [one_file_each, one_file])
def test_resumable(right):
    assert exercises.check_resumable(right).startswith("correct: survived")


def not_atomic(folder, items, work):
    results = []
    for number, item in enumerate(items):
        file = folder / f"{number}.json"
        if not file.exists():
            file.write_text(json.dumps(work(item)))
        results.append(json.loads(file.read_text()))
    return results


def one_file_not_atomic(folder, items, work):
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else []
    for item in items[len(results) :]:
        results.append(work(item))
        file.write_text(json.dumps(results))
    return results


def only_at_the_end(folder, items, work):
    file = folder / "results.json"
    if not file.exists():
        (folder / "tmp").write_text(json.dumps([work(item) for item in items]))
        os.replace(folder / "tmp", file)
    return json.loads(file.read_text())


def same_item_once(folder, items, work):
    """Named after the item and not after its place: the second 1 is never worked on."""
    results = []
    for item in items:
        file = folder / f"{item}.json"
        if not file.exists():
            partial = Path(f"{file}.tmp")
            partial.write_text(json.dumps(work(item)))
            os.replace(partial, file)
        results.append(json.loads(file.read_text()))
    return results


def catches_everything(folder, items, work):
    results = []
    for item in items:
        try:
            results.append(work(item))
        except BaseException:
            results.append(None)
    return results


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda folder, items, work: tuple(map(work, items)), "expected a list"),
        (lambda folder, items, work: [0] * len(items), "resumable: expected"),
        (lambda folder, items, work: [work(item) for item in items], "nothing left to do: 10 items"),
        (same_item_once, "once each and in their order"),
        (only_at_the_end, "killed in the third item: 7 items"),
        (not_atomic, "killed in a write, number 1: .* half a file was taken for a whole one"),
        (one_file_not_atomic, "killed in a write, number 1: the next call failed on what was left: JSONDecodeError"),
    ],
)
def test_loops_that_do_not_survive(wrong, message):
    with pytest.raises(NotYet, match=message):
        exercises.check_resumable(wrong)


def test_an_interrupt_has_to_get_through():
    known = {}

    def swallowing(folder, items, work):
        if known.get(folder):
            return known[folder]
        found = catches_everything(folder, items, work)
        if None not in found:
            known[folder] = found
        return found

    with pytest.raises(NotYet, match="an interrupt has to get through"):
        exercises.check_resumable(swallowing)


def test_open_is_as_it_was():
    before = open, os.replace, os.rename
    exercises.check_resumable(one_file)
    assert (open, os.replace, os.rename) == before
