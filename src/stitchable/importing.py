"""Python files that no package holds."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def import_file(name: str, path: Path) -> ModuleType:
    """Import a file as the module `name`, which `sys.modules` holds unless the file fails.

    Raises:
        ImportError: it is no Python file.
        OSError: it cannot be read.
    """
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    # First, because the file may look its own module up, as timm's register_model does.
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
