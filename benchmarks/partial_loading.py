"""Claim: loading one Ti-S stitch of DeiT-Ti/S/B from a Hub downloads, reads and builds only what it needs.

    python benchmarks/partial_loading.py [--rounds 3]

The Hub is a server on this machine (that of the tests), so the times are those of reading and building more than of a
network; the bytes are what a network would carry. Whole model and single stitch take turns, each in a fresh process
with an empty cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from report import write_report

import stitchable

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from hub_server import Hub, Repository  # noqa: E402  # after the path is known

ANCHORS = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]
STITCH = 24  # 8 blocks of DeiT-Ti, 5 of DeiT-S
REPO = "someone/deit"
LOAD = f"""
import json, re, sys, time
import stitchable, torch
from stitchable import StitchableForImageClassification
def peak_kib():  # of this process since it began; getrusage would count what its parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status", encoding="utf-8").read())[1])
before = peak_kib()
started = time.perf_counter()
model = StitchableForImageClassification.from_pretrained("{REPO}", **json.loads(sys.argv[1]))
seconds = time.perf_counter() - started
with torch.inference_mode():
    model(torch.zeros(1, 3, 224, 224), stitch_id={STITCH})
peak = peak_kib() - before
print(json.dumps({{"seconds": seconds, "peak_memory_mb": peak * 1024 / 1e6, "parameters": model.num_parameters()}}))
"""


def main() -> None:
    """Measure both, print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with Hub() as hub, tempfile.TemporaryDirectory() as folder:
        model = stitchable.from_anchors(ANCHORS, pretrained=False)
        model.save_pretrained(folder)
        hub.repositories[REPO] = repository = Repository()
        repository.commit("main", {path.name: path.read_bytes() for path in Path(folder).iterdir()}, "")
        del model
        measured: dict[str, list[dict[str, float]]] = {"whole": [], "stitch": []}
        for _ in range(rounds):
            measured["whole"].append(load(hub, {}))
            measured["stitch"].append(load(hub, {"stitch_id": STITCH}))
    medians = {
        way: {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
        for way, runs in measured.items()
    }
    ratios = {name: round(medians["stitch"][name] / value, 3) for name, value in medians["whole"].items()}
    print(json.dumps({"medians": medians, "stitch_to_whole": ratios}, indent=1))
    figures = {"stitch_id": STITCH, "medians": medians, "stitch_to_whole": ratios, "rounds": measured}
    print(f"wrote {write_report('partial_loading', figures)}")


def load(hub: Hub, arguments: dict[str, int]) -> dict[str, float]:
    """Load in a fresh process with an empty cache; what it says, and the bytes of weights that were fetched."""
    hub.log[:] = [("MARK", "start", 0)]
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [sys.executable, "-c", LOAD, json.dumps(arguments)],
            env={**os.environ, **hub.environment(cache)},
            capture_output=True,
            text=True,
            check=True,
        )
    fetched = {name: size for name, size in hub.downloads("start").items() if name.endswith(".safetensors")}
    if arguments:
        assert "model-anchor-2.safetensors" not in fetched, "the largest anchor must not be touched"
    return {**json.loads(result.stdout), "fetched_mb": sum(fetched.values()) / 1e6}


if __name__ == "__main__":
    main()
