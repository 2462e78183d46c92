"""What pruning buys in speed: prefill and decoding of dense and pruned models, beside what was removed.

    python benchmarks/latency.py    # on the CPU, one thread; --clock work where other jobs run beside it
    python benchmarks/latency.py --device cuda --dtype float16 --batches 1 8 64

The models are gpt2-mini and a random LLaMA of width 1,024. Speed depends on shapes alone, so units are cut without
scoring them. All variants of a model take turns in one process (see greedy_helpers.course.cost.cost_table); writes
data/results/latency_DEVICE.json with the load of the machine before and after. Two variants of the wide model lose 30%
of the blocks' parameters, one of them with FFN widths on multiples of 64.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping

import torch
from common import load_average, machine, results_file, save
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import greedy_helpers as gh
from greedy_helpers.course.cost import cost_table

CLOCKS = {"wall": time.perf_counter, "work": time.process_time}


def cut(dense: PreTrainedModel, keep: Mapping[str, int]) -> PreTrainedModel:
    """A copy that keeps the first `keep[name]` units of every module."""
    model = copy.deepcopy(dense)
    for module in gh.depth2_modules(model):
        gh.remove_units(module, torch.arange(keep[module.name]))
    return model


def share(model: PreTrainedModel, ratio: float) -> dict[str, int]:
    return {module.name: module.n_units - int(ratio * module.n_units) for module in gh.depth2_modules(model)}


def wide_llama(blocks: int = 4) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=blocks,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def variants() -> dict[str, dict[str, PreTrainedModel]]:
    small, _ = gh.load_model("gpt2-mini", "cpu")
    wide = wide_llama()
    modules, budget = gh.depth2_modules(wide), gh.budget(wide, 0.3)
    found = {
        name: {"dense": dense, "25% of the units": cut(dense, share(dense, 0.25)), "50%": cut(dense, share(dense, 0.5))}
        for name, dense in (("gpt2-mini", small), ("random llama, width 1024, 4 blocks", wide))
    }
    found["random llama, width 1024, 4 blocks"] |= {
        "30% of the parameters": cut(wide, gh.uniform_plan(modules, budget)),
        "30%, multiples of 64": cut(wide, gh.uniform_plan(modules, budget, multiple=64)),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seq", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="work: CPU seconds, for a busy machine")
    args = parser.parse_args()
    if args.clock == "work" and (args.device != "cpu" or args.threads != 1):
        parser.error("--clock work means something on one CPU thread only")
    torch.set_num_threads(args.threads)
    settings = machine(args.device) | {
        "dtype": args.dtype,
        "prompt": args.seq,
        "new tokens": args.new_tokens,
        "repeats": f"{args.repeats}, medians; the variants of a model take turns",
        "seconds": {"wall": "by the clock", "work": "of the process's CPU time, one thread"}[args.clock],
    }
    out, rows, load = results_file("latency", args.device), [], [load_average()]
    for name, models in variants().items():
        models = {label: model.to(args.device, getattr(torch, args.dtype)) for label, model in models.items()}
        for batch in args.batches:
            tokens = gh.random_tokens(models["dense"], batch, args.seq)
            how = {"new_tokens": args.new_tokens, "repeats": args.repeats, "clock": CLOCKS[args.clock]}
            table = cost_table(models, tokens, **how)
            print(
                f"\n{name}, batch {batch}\n{table.filter(regex='speedup|macs_ratio').round(3).to_string()}", flush=True
            )
            for label, row in table.iterrows():
                numbers = {key: float(f"{value:.5g}") if value % 1 else int(value) for key, value in row.items()}
                rows.append({"model": name, "variant": label, "batch": batch} | numbers)
    load.append(load_average())
    save({"settings": settings, "load average before and after": load, "rows": rows}, out)


if __name__ == "__main__":
    main()
