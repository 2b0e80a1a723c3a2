"""Run the experiments of docs/reproduction.md: every variant of a study over several seeds, results as JSON.

    python benchmarks/reproduction/reproduce.py digits
    python benchmarks/reproduction/reproduce.py digits_defaults
    python benchmarks/reproduction/reproduce.py cifar10 data.files.train=GLOB data.files.test=GLOB
    python benchmarks/reproduction/reproduce.py cifar10_resnets data.files.train=GLOB data.files.test=GLOB \
        anchors.0.weights=FILE ...

Each run is a `training/train.py` of its own with one thread. Runs that the results hold already are not repeated, so an
interrupted study goes on; `--only VARIANT ...` runs some of them. `reproduction_report.py` makes the tables and
figures.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors.torch import save_file
from transformers.utils import logging

from crop_anchor import crop_anchor
from own_statistics import own_statistics
from stitchable import StitchableForImageClassification
from stitchable.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "reproduction"


@dataclass(frozen=True)
class Study:
    """Variants of one recipe that share their pretrained anchors, seed by seed.

    Attributes:
        recipe: below the root.
        settings: overrides for every run.
        variants: name -> overrides. Those of `from_scratch` begin with random weights instead of the anchors'.
        from_scratch: names of variants that are networks trained alone, or anchors without pretraining.
        cropped: name of variant -> the anchor of which blocks are left out afterwards (appendix H).
        own_statistics: names of variants that are measured again with batch norms' statistics of each stitch alone.
        pretrains: whether the recipe trains its anchors; then that is done once per seed and shared.
        seeds: how many.
    """

    recipe: str
    settings: list[str]
    variants: dict[str, list[str]]
    from_scratch: tuple[str, ...] = ()
    cropped: dict[str, int] = field(default_factory=dict)
    own_statistics: tuple[str, ...] = ()
    pretrains: bool = True
    seeds: int = 3


def alone(epochs: int, ids: list[int], schedule: list[str]) -> dict[str, list[str]]:
    """Table 1: single stitches, each trained alone from random weights with the anchors' own schedule."""
    settings = ["initialization.method=kaiming", f"training.epochs={epochs}", *schedule]
    return {f"alone-{i}": [*settings, f"sampling.stitches=[{i}]", f"evaluation.stitches=[{i}]"] for i in ids}


AS_PRINTED = ["sampling={stitches_per_step: 1}", "training.learning_rate=2e-3"]
"""Algorithm 1 of the paper: one stitch of all per step, each draw independent; at that the rate was chosen too."""

STUDIES = {
    "digits": Study(
        "training/recipes/digits.yaml",
        AS_PRINTED,
        {
            "base": [],
            "kaiming": ["initialization.method=kaiming"],
            "slow-to-fast": ["space.direction=slow_to_fast"],
            "not-nearest": ["space.nearest=false"],
            "layers-only": ["training.trainable=stitching_layers"],
            "kernel-2-stride-2": ["space.kernel_size=2", "space.stride=2"],
            "kernel-3-stride-3": ["space.kernel_size=3", "space.stride=3"],
            "kernel-4-stride-4": ["space.kernel_size=4", "space.stride=4"],
            "epochs-40": ["training.epochs=40"],
            "epochs-80": ["training.epochs=80"],
            "sandwich": ["sampling.method=sandwich", "distillation={kind: in_place}"],
            "soft-teacher": ["distillation={kind: soft, teacher: '{anchors}'}"],
            "hard-teacher": ["distillation={kind: hard, teacher: '{anchors}'}"],
            "samples-50": ["initialization.num_samples=50"],
            "samples-200": ["initialization.num_samples=200"],
            "drop-path": ["anchors.2.kwargs.drop_path_rate=0.5", "sampling.stitches=[2]"],
            "no-pretraining": [],
            **alone(60, [6, 10, 14, 22, 26, 30], ["training.learning_rate=5e-3", "training.warmup_epochs=5"]),
        },
        from_scratch=("no-pretraining", *(f"alone-{i}" for i in (6, 10, 14, 22, 26, 30))),
        cropped={"base": 2, "drop-path": 2},
    ),
    "digits_defaults": Study(
        "training/recipes/digits.yaml",
        [],
        {"base": []},
        seeds=5,
    ),
    "cifar10": Study(
        "training/recipes/cifar10.yaml",
        [
            "data.dataset=parquet",
            "data.train_split=train[:10000]",
            "data.test_split=test[:2000]",
            # A fifth of the images: as many steps as the recipe's ten epochs on all of them, nearly.
            "pretraining.epochs=40",
            "training.epochs=40",
        ],
        {
            "base": [],
            "kaiming": ["initialization.method=kaiming"],
            "slow-to-fast": ["space.direction=slow_to_fast"],
            **alone(40, [19, 24], ["training.anchor_learning_rate_scale=1"]),
        },
        from_scratch=("alone-19", "alone-24"),
        own_statistics=("base", "slow-to-fast"),
    ),
    "cifar10_resnets": Study(
        "examples/cifar10_resnets/recipe.yaml",
        [
            "data.dataset=parquet",
            "data.train_split=train[:10000]",
            "data.test_split=test[:2000]",  # the recipe's learning rate was chosen on others
        ],
        {"base": []},
        pretrains=False,
    ),
}


@dataclass
class Runner:
    """Runs a study and keeps its results file complete after every run."""

    name: str
    study: Study
    overrides: list[str]
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    @property
    def path(self) -> Path:
        """The results file."""
        return RESULTS / f"{self.name}.json"

    def run(self, only: list[str] | None, jobs: int) -> None:
        """Run what the results lack."""
        self.results = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {"runs": {}}
        wanted = only or list(self.study.variants)
        unknown = set(wanted) - set(self.study.variants)
        if unknown:
            raise SystemExit(f"error: there is no variant {min(unknown)}; there are {', '.join(self.study.variants)}")
        seeds = range(self.study.seeds)
        with ThreadPoolExecutor(jobs) as pool:
            if self.study.pretrains:
                list(pool.map(self.pretrain, seeds))
            list(pool.map(lambda job: self.variant(*job), [(name, seed) for seed in seeds for name in wanted]))

    def pretrain(self, seed: int) -> None:
        """Train the anchors of a seed alone and leave each as a file of its own."""
        output = self.folder / f"anchors-{seed}"
        if not (output / "anchor-0.safetensors").exists():
            measure = ["evaluation.throughput=false", "evaluation.stitches=[0]"]
            self.train([f"seed={seed}", "training.epochs=0", *measure], output)
            logging.disable_progress_bar()
            model = StitchableForImageClassification.from_pretrained(output)
            for number, anchor in reversed(list(enumerate(model.anchors))):
                save_file(anchor.state_dict(), output / f"anchor-{number}.safetensors")

    def variant(self, name: str, seed: int) -> None:
        """Run one variant with one seed and note its results."""
        if str(seed) in self.results["runs"].get(name, {}):
            return
        output = self.folder / f"{name}-{seed}"
        settings = [f"seed={seed}", "evaluation.throughput=false"]
        if name in self.study.from_scratch:
            settings += ["pretrained=false", "pretraining=null"]
        elif self.study.pretrains:
            anchors = self.folder / f"anchors-{seed}"
            settings += ["pretrained=true", "pretraining=null"]
            settings += [f"anchors.{path.stem[-1]}.weights={path}" for path in sorted(anchors.glob("anchor-*"))]
        anchors_folder = str(self.folder / f"anchors-{seed}")
        own = [override.replace("{anchors}", anchors_folder) for override in self.study.variants[name]]
        command = self.train([*settings, *own], output)
        more = self.crop(self.study.cropped[name], output) if name in self.study.cropped else {}
        more |= self.measure_own_statistics(output) if name in self.study.own_statistics else {}
        with self.lock:
            self.results["runs"].setdefault(name, {})[str(seed)] = {
                "command": command,
                **json.loads(Path(f"{output}.provenance.json").read_text(encoding="utf-8")),
                **read_results(output),
                **more,
            }
            runs = self.results["runs"]
            self.results["runs"] = {name: runs[name] for name in self.study.variants if name in runs}
            RESULTS.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.results, indent=None, allow_nan=False) + "\n", encoding="utf-8")

    def crop(self, anchor: int, output: Path) -> dict[str, Any]:
        """FLOPs and accuracy of an anchor with some of its blocks left out."""
        return {"crops": [asdict(crop) for crop in crop_anchor(output, self.recipe(), anchor)]}

    def measure_own_statistics(self, output: Path) -> dict[str, Any]:
        """Accuracies with batch norms' statistics of each stitch alone, by its id."""
        _, own = own_statistics(output, self.recipe())
        return {"own_statistics": {str(stitch_id): round(accuracy, 6) for stitch_id, accuracy in own.items()}}

    def recipe(self) -> Recipe:
        """With the settings of every run."""
        return load_recipe(ROOT / self.study.recipe, [*self.overrides, *self.study.settings])

    def train(self, overrides: list[str], output: Path) -> str:
        """One `train.py`, its output in a log beside it, going on where an interrupted one was; returns the command."""
        settings = [*self.overrides, *self.study.settings, *overrides, f"output={output}"]
        command = ["training/train.py", "--recipe", self.study.recipe, *settings]
        if (output / "config.json").exists():
            return " ".join(["python", *command])
        resume = ["--resume"] if (Path(f"{output}-run") / "recipe.yaml").exists() else []
        output.parent.mkdir(parents=True, exist_ok=True)
        if not resume:  # now, because the working tree may have changed when the run ends
            Path(f"{output}.provenance.json").write_text(json.dumps(provenance(), allow_nan=False), encoding="utf-8")
        print(" ".join(command), flush=True)
        with Path(f"{output}.log").open("a", encoding="utf-8") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            started = [sys.executable, *command, *resume]
            if subprocess.run(started, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False).returncode:
                raise SystemExit(f"error: the run failed; see {output}.log")
        return " ".join(["python", *command])


def read_results(output: Path) -> dict[str, Any]:
    """Routes, FLOPs, and accuracies before, after the initialisation, and after the training, by stitch id."""
    table = json.loads((output / "config.json").read_text(encoding="utf-8"))["stitches"]
    stages = json.loads((Path(f"{output}-run") / "results.json").read_text(encoding="utf-8"))
    accuracies = {
        stage: {i: round(metrics["accuracy"], 6) for i, metrics in measured.items()}
        for stage, measured in stages.items()
    }
    stitches = {str(stitch["id"]): {"route": stitch["route"], "flops": stitch["flops"]} for stitch in table}
    return {"stitches": stitches, **accuracies}


def provenance() -> dict[str, Any]:
    """The commit and versions that made the results."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    versions = {name: version(name) for name in ("stitchable", "torch", "timm", "transformers", "accelerate")}
    return {"commit": commit.stdout.strip(), "versions": versions}


def main() -> None:
    """Run a study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="which variants; all of them if left out")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at the same time")
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduction"), help="for runs and logs")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for every run, such as paths of data")
    arguments = parser.parse_intermixed_args()
    os.chdir(ROOT)  # the paths in commands and recipes are relative to it
    folder = arguments.folder / arguments.study
    Runner(arguments.study, STUDIES[arguments.study], arguments.overrides, folder).run(arguments.only, arguments.jobs)


if __name__ == "__main__":
    main()
