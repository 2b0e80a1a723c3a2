"""The studies of docs/reproduction.md: their recipes are valid, and their tables are what the results say."""

import re
from pathlib import Path

import pytest

from reproduce import STUDIES
from reproduction_report import PAGE, RESULTS, fill, judge_run, rank_correlations, read_runs
from stitchable.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
VARIANTS = [(study, variant) for study in STUDIES for variant in STUDIES[study].variants]


@pytest.mark.parametrize(("study", "variant"), VARIANTS, ids=lambda value: str(value))
def test_every_variant_is_a_valid_recipe(study: str, variant: str, tmp_path) -> None:
    settings = STUDIES[study]
    overrides = [override.replace("{anchors}", str(tmp_path)) for override in settings.variants[variant]]
    files = ["data.files.train=a", "data.files.test=b"] if "data.dataset=parquet" in settings.settings else []
    recipe = load_recipe(ROOT / settings.recipe, [*files, *settings.settings, *overrides, "output=x"])
    plain = load_recipe(ROOT / settings.recipe, [*files, *settings.settings, "output=x"])
    assert (recipe == plain) == (variant in ("base", "no-pretraining"))
    assert set(settings.from_scratch) <= set(settings.variants)


def test_rank_correlations_are_per_pair_with_its_anchors() -> None:
    routes = {
        "0": [[0, 0, 3]],
        "1": [[1, 0, 3]],
        "2": [[2, 0, 3]],
        "3": [[0, 0, 1], [1, 1, 3]],
        "4": [[0, 0, 2], [1, 2, 3]],
        "5": [[1, 0, 1], [2, 1, 3]],
        "6": [[0, 0, 1], [1, 1, 2], [2, 2, 3]],
    }
    flops = {"0": 1, "1": 4, "2": 9, "3": 3, "4": 2, "5": 5, "6": 100}
    accuracy = {"0": 0.1, "1": 0.4, "2": 0.2, "3": 0.3, "4": 0.2, "5": 0.3, "6": 0.0}
    run = {"stitches": {i: {"route": routes[i], "flops": flops[i]} for i in routes}, "trained": accuracy}
    assert rank_correlations(run, "trained") == pytest.approx({(0, 1): 1.0, (1, 2): -1.0})


def test_the_front_is_judged_against_the_anchors_as_they_were() -> None:
    stitches = {
        "0": {"route": [[0, 0, 2]], "flops": 1},
        "1": {"route": [[1, 0, 2]], "flops": 4},
        "2": {"route": [[0, 0, 1], [1, 1, 2]], "flops": 2},
    }
    run = {"stitches": stitches, "trained": {"0": 0.4, "1": 0.7, "2": 0.8}}
    found = judge_run(run, {"0": 0.5, "1": 0.9})
    # Half of the range 0.4, half 0.8, against 0.5 and a line with 0.7 in the middle.
    assert (found.area, found.null_line) == (pytest.approx(0.6), pytest.approx(0.5))
    assert found.share == pytest.approx(0.5)


def test_the_page_shows_what_the_results_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    studies = {path.stem for path in RESULTS.glob("*.json")}
    assert studies == set(STUDIES)
    for study in studies:
        assert fill(text, study) == text
        runs = read_runs(study)
        assert set(runs) == set(STUDIES[study].variants)
        assert all(len(seeds) == STUDIES[study].seeds for seeds in runs.values())
        assert f"reproduction/{study}.png" in text
        assert (RESULTS / f"{study}.png").exists()
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b", text)  # no place left to fill in
