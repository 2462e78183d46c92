"""benchmarks/recipes.py on the embedded model and very little text: what a row says, and that it goes on."""

import json
import sys
from pathlib import Path

import pytest

from greedy_helpers import count_parameters, load_model, load_pruned

RIVALS = ["blocks dropped", "recommended, slope 1", "recommended, influence 0.3", "recommended, twice"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import recipes

    return recipes


def run(script, monkeypatch, out, *more):
    small = "--windows 5 --text code=code --judged 1 --judged-seq 64 --unit query --ratio 0.5 --calibration code"
    asked = ["recipes.py", "--model", "llama-mini", *small.split(), "--out", str(out), *map(str, more)]
    monkeypatch.setattr(sys, "argv", asked)
    script.main()
    return json.loads(out.read_text())


def test_rows_meet_one_budget_and_what_is_there_is_not_measured_again(script, monkeypatch, tmp_path):
    out, kept = tmp_path / "record.json", tmp_path / "models"
    found = run(script, monkeypatch, out, "--recipe", *RIVALS, "--save", kept)
    rows = {row["recipe"]: row for row in found["rows"]}
    dropped = rows["blocks dropped"]
    assert len(dropped["dropped"]) == 3
    assert dropped["blocks removed"] == 0.5
    for name in RIVALS[1:]:
        assert rows[name]["modules removed"] == pytest.approx(0.5, abs=0.002)
        assert rows[name]["remedy"] == "post, local"
        assert rows[name]["damp"] == "held out"
    first, *_, last = rows["recommended, slope 1"]["units left"][1::2]
    assert first > last
    assert rows["recommended, influence 0.3"]["units left"] != rows["recommended, slope 1"]["units left"]
    assert len(list(kept.iterdir())) == 3
    (folder,) = kept.glob("recommended, slope 1*")
    model, _ = load_pruned(folder)
    whole = count_parameters(load_model("llama-mini")[0])["total"]
    assert 1 - count_parameters(model)["total"] / whole == pytest.approx(
        rows["recommended, slope 1"]["total removed"], abs=1e-5
    )
    monkeypatch.setattr(script.gh, "prune", None)
    assert run(script, monkeypatch, out, "--recipe", *RIVALS) == found


def test_other_settings_do_not_share_a_file(script, monkeypatch, tmp_path):
    out = tmp_path / "record.json"
    run(script, monkeypatch, out, "--recipe", "blocks dropped")
    before = out.read_text()
    with pytest.raises(SystemExit):
        run(script, monkeypatch, out, "--recipe", "blocks dropped", "--judged-seq", 32)
    assert out.read_text() == before
    assert len(run(script, monkeypatch, out, "--recipe", "blocks dropped", "--windows", 4)["rows"]) == 2


def test_the_readme_repeats_the_record(script, monkeypatch, tmp_path):
    root = Path(__file__).parent.parent
    readme = tmp_path / "README.md"
    readme.write_text((root / "README.md").read_text())
    recipes = ["recommended", "OSSCAR", "exact greedy, both, residual", "FLAP", "paper"]
    asked = ["--out", root / "data/results/smollm2_recipes.json", "--readme", readme, "--recipe", *recipes]
    monkeypatch.setattr(sys, "argv", ["recipes.py", *map(str, asked)])
    script.main()
    assert readme.read_text() == (root / "README.md").read_text()
    assert all(f"| {name} | " in readme.read_text() for name in ("dense", *recipes))
