"""What `pip install` brings, alone: a wheel, built and installed into an empty folder, trains and is used."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = ["pretraining.epochs=1", "pretraining.warmup_epochs=0", "training.epochs=1", "training.warmup_epochs=0"]
SHORT += ["initialization.num_samples=20"]


@pytest.mark.slow
def test_a_wheel_trains_and_its_quick_start_runs(tmp_path) -> None:
    """Of what is installed here it has its dependencies only; the working directory is empty."""
    wheels, site, empty = (tmp_path / name for name in ("wheels", "site", "empty"))
    empty.mkdir()

    def python(*arguments: object, **variables: str) -> str:
        command = [sys.executable, "-W", "ignore", *map(str, arguments)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
        result = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, ROOT)
    (wheel,) = wheels.iterdir()
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    alone = {"PYTHONPATH": str(site)}
    assert python("-c", "import stitchable; print(stitchable.__file__)", **alone).startswith(str(site))
    printed = python(site / "bin" / "stitchable", "train", "digits", *SHORT, **alone)
    assert "6/6 saving runs/digits" in printed
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block
    assert "MFLOPs: stitch" in python("-c", block[1], **alone)
    assert "| id | route |" in python(site / "bin" / "stitchable", "table", "runs/digits", **alone)
    assert {path.name for path in empty.iterdir()} == {"runs"}
