"""Claim: `stitchable --help` and `stitchable eval --help` take less than half of the CPU time of `import torch`.

    python benchmarks/command_line.py [--rounds 9]

Each is a fresh Python process, and the four take turns, round by round, after one that warms up the files. "before" is
what the console script did while it was part of the package: it imported all that any command needs, then printed the
help. CPU seconds (user and system) are compared, since they depend little on what else the machine does.
"""

import argparse
import resource
import statistics
import subprocess
import sys

from report import write_report
from tqdm import tqdm

SCRIPT = "from stitchable_cli import main; main()"
PACKAGE = (
    "from stitchable import card, conversion, coverage, export, plots, processing, publishing",
    "from huggingface_hub.errors import HfHubHTTPError",
)
PROGRAMS = {
    "import torch": ["import torch"],
    "before": ["; ".join([*PACKAGE, SCRIPT]), "--help"],
    "stitchable --help": [SCRIPT, "--help"],
    "stitchable eval --help": [SCRIPT, "eval", "--help"],
}
LIMIT = 0.5


def main() -> None:
    """Time the programs in turn, print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for number in tqdm(range(-1, rounds), desc="rounds", leave=False):
        for name, arguments in PROGRAMS.items():
            taken = cpu_seconds(arguments)
            if number >= 0:  # round -1 reads the files once
                seconds[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratios = {name: round(median / medians["import torch"], 3) for name, median in medians.items()}
    figures = {
        "rounds": rounds,
        "cpu_seconds": {name: round(median, 3) for name, median in medians.items()},
        "ratio_to_import_torch": ratios,
        "limit": LIMIT,
        "within_limit": all(ratios[name] <= LIMIT for name in ratios if name.startswith("stitchable")),
        "rounds_cpu_seconds": seconds,
    }
    print({key: value for key, value in figures.items() if key != "rounds_cpu_seconds"})
    print(f"wrote {write_report('command_line', figures)}")


def cpu_seconds(arguments: list[str]) -> float:
    """User and system seconds of a Python process that runs the code `arguments[0]` with the other arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", *arguments], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
