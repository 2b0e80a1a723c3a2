"""Families of one's own travel with their checkpoints: their files are saved beside the weights, and loaded there."""

import ast
import hashlib
import inspect
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location, spec_from_loader
from pathlib import Path
from typing import Any

import timm
from torch import nn
from transformers.utils import cached_file, logging

from stitchable.model.architectures import own_architectures
from stitchable.model.modeling_stitchable import StitchablePreTrainedModel

logger = logging.get_logger(__name__)

_OFFERED = {"Adapter", "Layout", "register_anchor", "register_family"}  # what a checkpoint's architectures.py has
_PACKAGE = Path(__file__).with_name("model")


def run_modules(paths: Sequence[str]) -> None:
    """Import Python files, which register models with timm and stitchable.

    Raises:
        ValueError: there is no such file.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"modules: there is no file {path}")
        if path.stem in sys.modules:
            if Path(getattr(sys.modules[path.stem], "__file__", None) or "").resolve() == path.resolve():
                continue
            raise ValueError(f"modules: there is a module {path.stem} already, give {path} another name")
        spec = spec_from_file_location(path.stem, path)
        assert spec
        assert spec.loader
        # timm's register_model looks its module up.
        sys.modules[path.stem] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            raise


def carry_families(model: StitchablePreTrainedModel, classes: Iterable[type[nn.Module]], folder: str | Path) -> None:
    """Copy the files of model classes that are not timm's into a folder where a model of them was saved.

    They import from `.architectures` there what they import from stitchable, so that the checkpoint loads, with
    `trust_remote_code=True`, where neither stitchable nor the file is. A file that cannot travel is left with a warning
    that says why: the checkpoint then loads only where the file was imported before.
    """
    folder = Path(folder)
    carried: dict[str, Path] = {}
    for model_class in sorted(classes, key=lambda model_class: model_class.__name__):
        name = model_class.__name__
        try:
            path, text = _read(model_class)
            if path.name in {other.name for other in carried.values() if other != path}:
                raise ValueError(f"two files are called {path.name}, that of {name} among them")
        except ValueError as error:
            logger.warning(f"{error}. So the checkpoint loads only where the file of this class was imported before")
            continue
        (folder / path.name).write_text(text, encoding="utf-8")
        carried[name] = path
    if carried:
        (folder / "families.py").write_text(
            _families_file({name: path.stem for name, path in carried.items()}), encoding="utf-8"
        )
    model.config.families = sorted(path.name for path in carried.values())


def _families_file(modules: Mapping[str, str]) -> str:
    """The text of a checkpoint's `families.py`.

    Args:
        modules: name of a class -> name of the module beside it that has the class.
    """
    imports = "".join(f"from .{module} import {name}\n" for name, module in modules.items())
    text = (_PACKAGE / "families.py").read_text(encoding="utf-8").replace("\nFAMILIES", f"\n{imports}\nFAMILIES")
    return text.replace("= ()", f"= ({', '.join(modules)},)")


def files_of_families(folder: Path, files: Collection[str], architectures: Collection[str]) -> set[str]:
    """Of the Python files of a checkpoint, those of its own families, `families.py` among them.

    They are what `families.py` imports, which does nothing else. Those that this process has registered must be the
    same, and where it has all architectures that are not timm's, there are no others.

    Args:
        folder: of the checkpoint.
        files: what its config names.
        architectures: those of its anchors.
    """
    own = {name for name in architectures if not _is_timms(name)}
    text = _text_of(folder / "families.py")
    found = re.findall(r"^from \.(\w+) import (\w+)$", text, re.MULTILINE)
    imported = {f"{module}.py" for module, _ in found}
    if not own or not imported <= set(files) or text != _families_file({name: module for module, name in found}):
        return set()
    registered = own_architectures()
    try:
        read = [_read(registered[name]) for name in sorted(own & set(registered))]
    except ValueError:  # such as a class of a notebook, which has no file that could travel
        return set()
    known = {path.name: text for path, text in read}
    has_all = own <= set(registered)
    same = {file for file in imported if file in known and _text_of(folder / file) == known[file]}
    return {"families.py", *same, *(set() if has_all else imported - set(known))}


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _is_timms(architecture: str) -> bool:
    return timm.is_model(architecture) and timm.models.model_entrypoint(architecture).__module__.startswith("timm.")


def import_families(source: str | Path, files: Sequence[str], **hub: Any) -> None:
    """Import the files that a checkpoint brings along, for the installed package.

    Args:
        source: a folder, or the id of a repository on the Hub.
        files: their names.
        hub: as for any file of the Hub: `revision`, `token`, `cache_dir`, ...

    Raises:
        OSError: the checkpoint lacks one.
    """
    for file in files:
        path = cached_file(source, file, **hub)
        assert path is not None  # else it raises
        text = re.sub(
            r"from \.(architectures|anchors) import", "from stitchable import", Path(path).read_text(encoding="utf-8")
        )
        # By content: another checkpoint may bring another file of this name.
        name = f"stitchable_{Path(file).stem}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if name in sys.modules:
            continue
        spec = spec_from_loader(name, loader=None, origin=path)
        assert spec is not None
        module = sys.modules[name] = module_from_spec(spec)  # timm's register_model looks it up
        module.__file__ = path
        try:
            exec(compile(text, path, "exec"), module.__dict__)  # what trust_remote_code stands for
        except BaseException:
            del sys.modules[name]
            raise


def check_families(source: str | Path, files: Sequence[str], architectures: Iterable[str], **hub: Any) -> None:
    """Refuse a checkpoint that brings other code of its architectures than what is registered in this process.

    Args:
        source: a folder, or the id of a repository on the Hub.
        files: the files that it brings along.
        architectures: those of its anchors.
        hub: as for any file of the Hub.

    Raises:
        ValueError: the files differ.
    """
    registered = own_architectures()
    for name in sorted(set(architectures) & set(registered)):
        try:
            own, text = _read(registered[name])
        except ValueError:  # such as a class of a notebook, which no file can equal
            continue
        path = cached_file(source, own.name, **hub) if own.name in files else None
        if path is None or Path(path).read_text(encoding="utf-8").split() != text.split():
            raise ValueError(
                f"{source} brings other code of {name} than the {own.name} that is registered here; load it in a "
                "process of its own, or without trust_remote_code to run what is registered"
            )


def _read(model_class: type[nn.Module]) -> tuple[Path, str]:
    """The file of a class, and its text as it travels.

    Raises:
        ValueError: it cannot travel.
    """
    name = model_class.__name__
    try:
        path = Path(inspect.getsourcefile(model_class) or "")
        text = path.read_text(encoding="utf-8")
    except (OSError, TypeError):
        raise ValueError(f"{name} was not defined in a file") from None
    if model_class.__module__ == "__main__":
        raise ValueError(f"{name} is defined in the program that runs, {path.name}, and not in a file of its own")
    if not path.stem.isidentifier():
        raise ValueError(f"{path.name} cannot be imported by name, rename it")
    if (_PACKAGE / path.name).exists():
        raise ValueError(f"{path.name} has the name of a file that every checkpoint has")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level and node.module not in ("architectures", "anchors"):
            raise ValueError(f"line {node.lineno} of {path.name} imports from a file beside it, and only one travels")
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        beside = [name for name in _top_levels(node) if path.with_name(f"{name}.py").exists()]
        if beside and not (isinstance(node, ast.ImportFrom) and node.level):
            raise ValueError(f"line {node.lineno} of {path.name} imports {beside[0]}.py, and only one file travels")
        if "stitchable" not in _top_levels(node):
            continue
        names = {alias.name for alias in node.names}
        plain = isinstance(node, ast.ImportFrom) and node.module == "stitchable"
        if not plain or names - _OFFERED or any(alias.asname for alias in node.names):
            offered = ", ".join(sorted(_OFFERED))
            raise ValueError(f"line {node.lineno} of {path.name} is not of the form `from stitchable import {offered}`")
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[first].encode()[: node.col_offset], lines[last].encode()[node.end_col_offset :]
        rewritten = f"{before.decode()}from .architectures import {', '.join(sorted(names))}{after.decode()}"
        if ";" in rewritten:
            raise ValueError(f"line {node.lineno} of {path.name} has another statement beside its import of stitchable")
        lines[first : last + 1] = [rewritten, *[""] * (last - first)]
    return path, "\n".join([*lines, ""])


def _top_levels(node: ast.Import | ast.ImportFrom) -> list[str]:
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return [module.split(".")[0] for module in modules]
