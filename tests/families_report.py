"""What works for which family, measured on tiny random models in float64; the table in the README is made from it.

    python tests/families_report.py      # measure, write data/results/families.json, update README.md

The tests measure the same things again and compare.
"""

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tiny import CONFIGS, ENCODERS, VOCABULARY, tiny_model, unit_sets
from torch import Tensor

from greedy_helpers import depth2_modules, discover, export_plain, load_pruned, remove_units, save_pruned, zero_units
from greedy_helpers.structure import Depth2Module, family_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results" / "families.json"
MARKS = ("<!-- families: written by tests/families_report.py -->", "<!-- end of families -->")
ATTENTION = ("eager", "sdpa")


def some_tokens(batch: int = 3, seq: int = 20) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model) -> Tensor:
    return model(input_ids=some_tokens())[0]


def units_of(name: str) -> list[str]:
    """The choices of `unit` that this family offers; one where they mean the same."""
    grouped = any(module.group > 1 for module in depth2_modules(tiny_model(name), [0], unit="kv"))
    return ["query", "kv"] if grouped else ["query"]


def random_cut(module: Depth2Module, seed: int) -> tuple[Tensor, Tensor]:
    """(keep, cut): between a quarter and three quarters of the units of every set stay, in random order."""
    generator = torch.Generator().manual_seed(seed)
    share = 0.25 + 0.5 * torch.rand(1, generator=generator).item()
    sets = torch.arange(module.n_units).view(module.n_sets, -1)
    n_keep = min(sets.shape[1] - 1, max(1, round(share * sets.shape[1])))
    order = torch.stack([units[torch.randperm(len(units), generator=generator)] for units in sets])
    return order[:, :n_keep].flatten(), order[:, n_keep:].flatten()


def removed_and_zeroed(
    name: str, attention: str | None, blocks: list[int], unit: str = "query", dtype: torch.dtype = torch.float64
):
    """Two equal models, the same random units of each module removed from one and zeroed in the other."""
    removed, zeroed = tiny_model(name, dtype, attention), tiny_model(name, dtype, attention)
    pairs = zip(depth2_modules(removed, blocks, unit=unit), depth2_modules(zeroed, blocks, unit=unit), strict=True)
    for seed, (cut_here, zero_here) in enumerate(pairs):
        keep, cut = random_cut(cut_here, seed)
        remove_units(cut_here, keep)
        zero_units(zero_here, cut)
    return removed, zeroed


def assert_removing_equals_zeroing(model, unit: str = "query"):
    """Every second unit of every module of `model` is removed, and zeroed in a copy."""
    zeroed = copy.deepcopy(model)
    for a, b in zip(depth2_modules(model, unit=unit), depth2_modules(zeroed, unit=unit), strict=True):
        remove_units(a, unit_sets(a)[:, 1::2].flatten())
        zero_units(b, unit_sets(b)[:, ::2].flatten())
    torch.testing.assert_close(logits_of(model), logits_of(zeroed), rtol=0, atol=1e-10)


def supported_attention(name: str) -> list[str]:
    """The implementations that transformers offers for this class."""
    found = []
    for attention in ATTENTION:
        try:
            tiny_model(name, attention=attention)
            found.append(attention)
        except ValueError:
            pass
    return found


def greatest_difference(name: str, attention: str, blocks: list[int], unit: str) -> tuple[float, float]:
    """(removed against zeroed, removed against dense): the first has to vanish, the second must not."""
    removed, zeroed = removed_and_zeroed(name, attention, blocks, unit)
    a, b, dense = map(logits_of, (removed, zeroed, tiny_model(name, attention=attention)))
    return (a - b).abs().max().item(), (a - dense).abs().max().item()


@torch.no_grad()
def cache_equals_recomputation(name: str, unit: str) -> bool:
    removed, _ = removed_and_zeroed(name, None, [0], unit)
    prompt = some_tokens(1, 6)
    written = removed.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    again = removed(written.sequences[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    with_cache = torch.stack(written.logits, dim=1)
    return torch.allclose(with_cache.double(), again.double(), rtol=0, atol=1e-4)  # some cast logits to float32


def discovery_agrees(name: str) -> bool:
    """Probing finds every module of the table and no other, with the same layouts; stale attributes are a subset."""
    model = tiny_model(name)
    table, found = family_of(model), discover(model)
    layouts = [[(m.owner, m.kind, m.level1, m.level2) for m in family.modules] for family in (table, found)]
    if found.blocks != table.blocks or layouts[0] != layouts[1] or bool(found.whole) != bool(table.whole):
        return False
    return all(
        mine.attributes.items() <= theirs.attributes.items() and mine.lists.items() <= theirs.lists.items()
        for mine, theirs in zip(found.modules, table.modules, strict=True)
    )


def reloads(name: str, unit: str, folder: Path) -> bool:
    # float32, as loaded: Gemma's embedding scale is rounded when the model is built, not when it is cast
    model, _ = removed_and_zeroed(name, None, [0, 1], unit, torch.float32)
    again, _ = load_pruned(save_pruned(model, folder), device="cpu")
    return torch.equal(logits_of(again), logits_of(model))


def export(name: str, unit: str, folder: Path) -> str:
    """Export with about half the units in every block: what a plain config can say, and the logits beside it."""
    for words, kinds in (("heads and FFN", None), ("FFN", {"ffn", "gated_ffn"})):
        model = tiny_model(name, torch.float32)
        for module in depth2_modules(model, kinds=kinds, unit=unit):
            remove_units(module, unit_sets(module)[:, ::2].flatten())
        try:
            export_plain(model, folder / f"{name}+{unit}")
        except ValueError:  # no config can say it
            continue
        torch.save(logits_of(model), folder / f"{name}+{unit}.logits")
        has_attention = any(module.kind == "attention" for module in depth2_modules(model))
        return words if has_attention else "FFN"
    return "no"


# What a user without this package does; it never imports greedy_helpers.
PLAIN_LOADER = """
import sys, torch, transformers
from pathlib import Path
folder, tokens = Path(sys.argv[1]), torch.load(sys.argv[1] + "/tokens")
for logits in sorted(folder.glob("*.logits")):
    config = transformers.AutoConfig.from_pretrained(logits.with_suffix(""))
    auto = transformers.AutoModelForMaskedLM if config.model_type == "bert" else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(logits.with_suffix(""), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        difference = (model(input_ids=tokens)[0] - torch.load(logits)).abs().max().item()
    print(logits.stem, type(model).__name__, difference)
assert "greedy_helpers" not in sys.modules
"""


def load_plainly(folder: Path) -> dict[str, tuple[str, float]]:
    """Every exported folder, loaded by a fresh process that imports only transformers: name -> (class, difference)."""
    torch.save(some_tokens(), folder / "tokens")
    command = [sys.executable, "-I", "-c", PLAIN_LOADER, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    rows = [line.split() for line in done.stdout.splitlines() if line.count(" ") == 2]
    return {name: (cls, float(difference)) for name, cls, difference in rows}


def measure(name: str, folder: Path) -> dict:
    """One row of the table, the export aside."""
    model = tiny_model(name)
    units, attention = units_of(name), supported_attention(name)
    heads = "query or KV heads" if len(units) > 1 else "heads"
    kinds = {"attention": heads, "ffn": "FFN", "gated_ffn": "FFN"}
    return {
        "model_type": model.config.model_type,
        "cuts": " and ".join(kinds[layout.kind] for layout in family_of(model).modules),
        "discovered": discovery_agrees(name),
        "attention": attention,
        "removed_minus_zeroed": max(
            greatest_difference(name, a, blocks, unit)[0]
            for unit in units
            for a in attention
            for blocks in ([0], [1], [0, 1])
        ),
        "cache": None if name in ENCODERS else all(cache_equals_recomputation(name, unit) for unit in units),
        "reloaded": all(reloads(name, unit, folder / f"{name}+{unit}") for unit in units),
    }


def render(results: dict) -> str:
    """The README's table."""
    lines = [
        "| family | what can be cut | discovered by probing | removed = zeroed | with KV cache | saved, reloaded | "
        "plain transformers export |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results["families"].items():
        exact = f"yes ({', '.join(row['attention'])})" if row["removed_minus_zeroed"] <= 1e-10 else "NO"
        yes = {True: "yes", False: "NO", None: "encoder"}
        discovered, cache, reloaded = (yes[row[key]] for key in ("discovered", "cache", "reloaded"))
        cells = [name, row["cuts"], discovered, exact, cache, reloaded, row["export"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = {name: measure(name, folder / "pruned") for name in CONFIGS}
        (folder / "plain").mkdir()
        words = {name: {export(name, unit, folder / "plain") for unit in units_of(name)} for name in CONFIGS}
        loaded = load_plainly(folder / "plain")
    for name, row in rows.items():
        (row["export"],) = words[name]  # the same with either unit
        found = [loaded[key][1] for unit in units_of(name) if (key := f"{name}+{unit}") in loaded]
        row["export_difference"] = max(found, default=None)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    results = {"what": "tiny random models, two blocks, float64, CPU", **versions, "families": rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    readme = (ROOT / "README.md").read_text()
    before, _, rest = readme.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    (ROOT / "README.md").write_text(f"{before}{MARKS[0]}\n{render(results)}\n{MARKS[1]}{after}")
    print(render(results))


if __name__ == "__main__":
    main()
