"""When does a refit help? One FFN cut alone, refitted on more and on less text, judged on text of other documents.

    python benchmarks/refit.py --model smollm2-135m --block 1 10 11 20 --calibration "C4=c4.jsonl[:800]" \
        --text WikiText-2=wiki.test.raw "C4=c4.jsonl[800:1000]" --out data/results/smollm2_refit.json
    python benchmarks/refit.py ... --calibration prose=prose --windows 5 20 80    # the same cut, text of another kind
    python benchmarks/refit.py --model llama-mini --block 1 3 5 --calibration code=code --text code=code prose=prose \
        --out data/results/llama-mini_refit.json

Everything in front of the FFN is dense, so one walk through the blocks gives the inputs for every row; the channels are
chosen once, by output energy on the largest sample of the first calibration text. A row refits level 2 to the module's
own whole output. Its error on held-out text, from moments alone, is given as a multiple of the error without a refit:
above 1 the refit does harm. Some rows run the rest of the model too: the rise of the loss over the dense model's in
nats per token, window by window. The rows with `norms` are the length of the dense model's stream at the first
positions of a window, median over windows, in front of every block and behind the last.

Adds the rows that are missing to the file, one by one: run it again to go on.
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from common import HeldOut, Record, digest, machine
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import greedy_helpers as gh
from greedy_helpers.data import calibration_tokens
from greedy_helpers.moments import Moments
from greedy_helpers.reconstruct import HELD_OUT
from greedy_helpers.stream import BlockStream, walk
from greedy_helpers.structure import Depth2Module, blocks_of, depth2_modules, weight_of

SEQ, RATIO, POSITIONS = 256, 0.25, 32
ALL, NO_FIRST, CLIPPED = "all", "without the first of each window", "clipped"
DAMPS = {ALL: (1e-4, 1e-2, 1e-1, 1.0, 10.0, HELD_OUT), NO_FIRST: (1e-2, HELD_OUT), CLIPPED: (1e-2, HELD_OUT)}
# (windows, tokens, damping) of the rows that run the rest of the model
RUN = {*itertools.product((20, 80, 320), (ALL,), (1e-2, HELD_OUT)), (80, NO_FIRST, 1e-2), (80, CLIPPED, 1e-2)}


class Judge:
    """A held-out text on its way through the blocks: all windows for errors, every fourth for losses."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        self.model, self.fourth = model, tokens[::4]
        self.every, self.few = BlockStream(model, tokens), BlockStream(model, self.fourth)

    def advance(self, block: nn.Module) -> None:
        for stream in (self.every, self.few):
            stream.advance(block)

    def moments(self, block: nn.Module, linear: nn.Module, stay: Tensor) -> tuple[Moments, Moments]:
        """Behind the cut: of all tokens, and without the first of each window."""
        z, weight = read_by(self.every, block, linear), weight_of(linear)
        whole, rest = Moments("all tokens"), Moments("without the first")
        whole.update(z.flatten(0, 1))
        rest.update(z[:, 1:].flatten(0, 1))
        return whole.aim_at(weight).select(stay), rest.aim_at(weight).select(stay)

    def losses(self) -> Tensor:
        """Mean loss of every window, from the hidden states in front of the stream's block on."""
        stream, found = self.few.share(), []
        for block in blocks_of(self.model)[stream.position :]:
            stream.advance(block)
        for place, hidden in enumerate(stream.hidden):
            labels = self.fourth[sum(map(len, stream.hidden[:place])) :][: len(hidden), 1:]
            logits = stream.head(place, hidden)[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            found.append(losses.view(len(labels), -1).mean(1))
        return torch.cat(found)


def read_by(stream: BlockStream, block: nn.Module, linear: nn.Module) -> Tensor:
    """What `linear` reads: [windows, seq, channels]."""
    return torch.cat([z for (z,) in stream.inputs(block, [linear])]).view(-1, SEQ, weight_of(linear).shape[1])


def of_tokens(z: Tensor, which: str, weight: Tensor) -> Tensor:
    """The rows of the least-squares problem, [windows, tokens, channels]."""
    if which == CLIPPED:  # a token whose target is longer than the median counts as if it were as long as that
        norms = (z @ weight.T).norm(dim=-1, keepdim=True)
        return z * (norms.median() / norms).clamp(max=1)
    return z[:, 1:] if which == NO_FIRST else z


def samples(z: Tensor, sizes: list[int]) -> Iterator[tuple[int, Moments]]:
    """The moments of the first windows, more and more of them; every fifth window is held out."""
    moments, start = Moments("level 2", hold_out=True), 0
    for size in sizes:
        held = (torch.arange(start, size) % 5 == 4)[:, None].expand(-1, z.shape[1])
        moments.update(z[start:size].flatten(0, 1), held_out=held.flatten())
        yield size, moments
        start = size


def norm_rows(model: PreTrainedModel, tokens: Tensor) -> Iterator[dict]:
    """The stream's length per position, median over windows."""
    stream = BlockStream(model, tokens)
    for index in range(len(blocks_of(model)) + 1):
        norms = torch.cat(stream.hidden).norm(dim=-1)
        energy = norms.double().square().sum(0)
        yield {
            "norms": index,
            "median over windows, first positions": [float(f"{x:.4g}") for x in norms.median(0).values[:POSITIONS]],
            "median, all positions": float(f"{norms.median():.4g}"),
            "share of the energy, first position": round((energy[0] / energy.sum()).item(), 4),
        }
        if index < len(blocks_of(model)):
            stream.advance(blocks_of(model)[index])


@torch.no_grad()
def measure(
    record: Record,
    ffn: Depth2Module,
    block: nn.Module,
    stream: BlockStream,
    name: str,
    sizes: list[int],
    judges: dict[str, Judge],
) -> None:
    """All rows of one block that are missing for the calibration text `name`, whose hidden states `stream` has."""
    linear, index = ffn.level2.linear, ffn.block
    whole = weight_of(linear).detach().clone()
    z = read_by(stream, block, linear)
    bare = record.known(block=index, damp="none")
    if bare:
        stay = torch.ones(ffn.n_units, dtype=torch.bool).index_fill_(0, torch.tensor(bare["removed channels"]), False)
        stay = stay.nonzero().flatten()
    else:
        energy = z.square().mean((0, 1)) * whole.square().sum(0)
        stay = gh.keep_best(energy, ffn.n_units - int(RATIO * ffn.n_units))
    unseen = {text: judge.moments(block, linear, stay) for text, judge in judges.items()}
    without = {text: [moments.relative_error(whole[:, stay]) for moments in pair] for text, pair in unseen.items()}
    dense: dict[str, Tensor] = {}

    def rises(weight: Tensor) -> dict[str, list[float]]:
        """By text, what the loss of each window rises by."""
        if not dense:
            dense.update({text: judge.losses() for text, judge in judges.items()})
        cut = torch.zeros_like(whole)
        cut[:, stay] = weight.to(whole)
        gh.set_weight(linear, cut)
        try:
            losses = {text: judge.losses() for text, judge in judges.items()}
        finally:
            gh.set_weight(linear, whole)
        return {f"rises, {text}": [round(x, 5) for x in (losses[text] - dense[text]).tolist()] for text in losses}

    if not bare:
        row = {"block": index, "damp": "none", "channels left": len(stay)}
        row |= {f"relative error, {text}": round(errors[0], 6) for text, errors in without.items()}
        for text, (every, rest) in unseen.items():
            row[f"share of the output's energy in first tokens, {text}"] = round(1 - (rest.yy / every.yy).item(), 4)
        gone = sorted({*range(ffn.n_units)} - {*stay.tolist()})
        record.add(row | rises(whole[:, stay]) | {"removed channels": gone})
    for which, damps in DAMPS.items():
        keys = {
            (size, damp): {"block": index, "calibration": name, "tokens": size * SEQ, "which": which, "damp": damp}
            for size in sizes
            for damp in damps
        }
        missing = [(size, damp) for (size, damp), key in keys.items() if not record.known(**key)]
        for size, moments in samples(of_tokens(z, which, whole), sizes) if missing else ():
            survivors = moments.aim_at(whole).select(stay)
            for damp in (damp for n, damp in missing if n == size):
                solution, row = gh.solve(survivors, whole[:, stay], damp=damp), keys[size, damp]
                if damp == HELD_OUT:
                    row |= {"chosen": solution.damp if math.isfinite(solution.damp) else "none"}
                for text, pair in unseen.items():
                    errors = [moments.relative_error(solution.weight) for moments in pair]
                    every, rest = (one / other for one, other in zip(errors, without[text], strict=True))
                    row |= {text: round(every, 4), f"{text}, without first tokens": round(rest, 4)}
                record.add(row | (rises(solution.weight) if (size, which, damp) in RUN else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="folder or name, as load_model takes it")
    parser.add_argument("--block", nargs="+", type=int, default=[1, 10, 11, 20])
    parser.add_argument("--calibration", required=True, metavar="NAME=SOURCE")
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=SOURCE", help="held-out text")
    parser.add_argument("--windows", nargs="+", type=int, default=[5, 20, 40, 80, 160, 320], help="of 256 tokens")
    parser.add_argument("--judged", type=int, default=32, help="windows of 256 held-out tokens per text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", "(?s).*determined by the damping")  # few tokens are what this is about

    model, tokenizer = gh.load_model(args.model, "cpu", torch.float32)
    held_out = HeldOut(tokenizer, args.text, args.judged, SEQ)
    settings = {
        "model": args.model,
        "ratio": RATIO,
        "norms": f"of every fourth window of {next(iter(held_out.texts))}",
        "losses": "of every fourth window of each text",
        **held_out.settings,
        **machine("cpu"),
    }
    record = Record(args.out, {"settings": settings, "calibration": {}}, parser)
    found = record.found
    name, source = args.calibration.split("=", 1)
    sizes = sorted(args.windows)
    calibration = calibration_tokens(tokenizer, sizes[-1], SEQ, source)
    sample = {"windows": len(calibration), "sha256": digest(calibration)}
    if found["calibration"].setdefault(name, sample) != sample:
        parser.error(f"{args.out} has {name} calibrated on {found['calibration'][name]}, not {sample}")

    if not record.known(norms=len(blocks_of(model))):
        found["rows"] = [row for row in found["rows"] if "norms" not in row]
        for row in norm_rows(model, next(iter(held_out.texts.values()))[::4]):
            record.add(row)
    judges = {text: Judge(model, tokens) for text, tokens in held_out.texts.items()}
    ffns = {module.block: module for module in depth2_modules(model, args.block) if module.kind != "attention"}
    with closing(walk(model, calibration, max(args.block))) as blocks:
        for block, stream in blocks:
            if stream.position in ffns:
                measure(record, ffns[stream.position], block, stream, name, sizes, judges)
            for judge in judges.values():
                judge.advance(block)


if __name__ == "__main__":
    main()
