"""The page of `stitchable app`, which is the example Space: examples/space, which a wheel carries too."""

import sys
from pathlib import Path
from types import ModuleType

from stitchable.importing import import_file


def load_page() -> ModuleType:
    """The module of the example Space: `create_page`, `launch` and what they are made of.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    name = "stitchable_page"
    return sys.modules[name] if name in sys.modules else import_file(name, space_folder() / "app.py")


def space_folder() -> Path:
    """The folder of the example Space: app.py, requirements.txt, README.md."""
    installed = Path(__file__).with_name("example_space")
    # In an editable installation it lies where the repository keeps it.
    return installed if installed.exists() else Path(__file__).parents[2] / "examples" / "space"
