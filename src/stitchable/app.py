"""The page of `stitchable app`, which is the example Space: examples/space, which a wheel carries too."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_page() -> ModuleType:
    """The module of the example Space: `create_page`, `launch` and what they are made of.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    name = "stitchable_page"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, space_folder() / "app.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"{space_folder()} has no app.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def space_folder() -> Path:
    """The folder of the example Space: app.py, requirements.txt, README.md."""
    installed = Path(__file__).with_name("example_space")
    # In an editable installation it lies where the repository keeps it.
    return installed if installed.exists() else Path(__file__).parents[2] / "examples" / "space"
