"""What every benchmark result carries: the figures, and how to get them again."""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Of the working folder, marked where it differs."""
    described = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()


def write_report(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `results/NAME.json` with the figures, command, commit, versions and machine; or NAME.json of a folder."""
    import torch

    from stitchable.timing import processor_name

    report = {
        "figures": figures,
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "versions": {name: version(name) for name in ("stitchable", "torch", "timm", "transformers")},
        "machine": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        },
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path
