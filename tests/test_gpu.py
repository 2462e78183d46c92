"""What the CPU does, a GPU does too. Skipped where there is none: `pytest tests/test_gpu.py -o addopts=` on one."""

import copy

import pytest
import torch
from tiny import VOCABULARY, tiny_model

import greedy_helpers as gh
from greedy_helpers.course.cost import peak_memory
from greedy_helpers.similarity import divergences_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
RECIPES = {"paper": gh.PAPER, "recommended": gh.RECOMMENDED, "flap": gh.FLAP, "osscar": gh.OSSCAR}


def tokens_(n=20, seq=24):
    return torch.randint(0, VOCABULARY, (n, seq), generator=torch.Generator().manual_seed(5))


def pruned(name, recipe, dtype=torch.float64, home="cpu", **where):
    model = tiny_model(name, dtype).to(home)
    report = gh.prune(model, tokens_(), 0.5, recipe, batch_size=7, progress=False, **where)
    return model, report


def assert_same(found, expected, tolerance=1e-6):
    (model, report), (other, other_report) = found, expected
    for a, b in zip(report.steps, other_report.steps, strict=True):
        assert a.keep.tolist() == b.keep.tolist(), a.name
        assert a.error == pytest.approx(b.error, rel=tolerance, abs=1e-9)
    theirs = other.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            error = (value.cpu() - theirs[name].cpu()).norm() / theirs[name].cpu().norm().clamp(min=1e-30)
            assert error <= tolerance, (name, error)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bloom", "phi"])
def test_the_model_on_the_gpu(name, recipe):
    assert_same(pruned(name, RECIPES[recipe], home="cuda"), pruned(name, RECIPES[recipe]))


@pytest.mark.parametrize("where", [{}, {"store": "cpu"}])
@pytest.mark.parametrize("recipe", ["paper", "recommended"])
def test_one_block_at_a_time_on_the_gpu(recipe, where):
    model, report = pruned("llama-gqa", RECIPES[recipe], device="cuda", **where)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_same((model, report), pruned("llama-gqa", RECIPES[recipe]))


def test_blocks_on_the_disk_and_the_gpu(tmp_path):
    tiny_model("llama-gqa", torch.float32).save_pretrained(tmp_path / "dense")
    lazy, _ = gh.load_model(tmp_path / "dense", "cuda", torch.float32, lazy=True)
    report = gh.prune(lazy, tokens_(), 0.5, batch_size=7, device="cuda", work_dir=tmp_path / "work", progress=False)
    expected, expected_report = pruned("llama-gqa", gh.RECOMMENDED, torch.float32)
    assert [s.keep.tolist() for s in report.steps] == [s.keep.tolist() for s in expected_report.steps]
    gh.save_pruned(lazy, tmp_path / "pruned", report=report)
    model, _ = gh.load_model(tmp_path / "pruned", "cuda")
    with torch.no_grad():
        logits = model(tokens_(4).cuda()).logits.cpu()
        torch.testing.assert_close(logits, expected(tokens_(4)).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_ends_near_full_precision(dtype, precision):
    _, expected = pruned("llama", gh.RECOMMENDED, torch.float32)
    _, report = pruned("llama", gh.RECOMMENDED, dtype, home="cuda", precision=precision)
    for a, b in zip(report.steps, expected.steps, strict=True):
        assert a.error == pytest.approx(b.error, rel=0.1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_exact_to_float32(dtype):
    x = torch.randn(4096, 700, device="cuda").to(dtype)
    moments = gh.Moments()
    for part in x.split(500):
        moments.update(part, part[:, :30])
    exact = x.double().T @ x.double()
    assert ((moments.xx - exact).norm() / exact.norm()).item() < 1e-5  # what tensor cores leave of float32
    assert ((moments.xy - exact[:, :30]).norm() / exact.norm()).item() < 1e-5  # what tensor cores leave of float32


def test_divergences_scores_perplexity_and_text():
    model = tiny_model("llama", torch.float32, attention="eager")
    other = copy.deepcopy(model).cuda()
    for name, values in divergences_of(model, tokens_(4)).items():
        torch.testing.assert_close(divergences_of(other, tokens_(4))[name], values, rtol=1e-3, atol=1e-5)
    for name, values in gh.scores_of(model, tokens_(), gh.second_moment).items():
        torch.testing.assert_close(gh.scores_of(other, tokens_(), gh.second_moment)[name], values, rtol=1e-3, atol=1e-6)
    assert gh.perplexity(other, tokens_()) == pytest.approx(gh.perplexity(model, tokens_()), rel=1e-3)


def test_peak_memory_counts_tensors_on_the_gpu():
    with peak_memory("cuda") as memory:
        torch.empty(2**22, device="cuda")
    assert memory.rise == 4 * 2**22
