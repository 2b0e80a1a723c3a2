"""Code run in a Python process of its own, as by someone who has only what it imports."""

import os
import subprocess
import sys
from pathlib import Path


def run_python(code: str, *arguments: object, cwd: Path, **variables: str) -> str:
    """What the code prints, run in a folder with further environment variables; it must not fail."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env={**os.environ, **variables},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
