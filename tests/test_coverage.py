"""The table of timm's modules, and that the tests and the documentation cover it."""

import inspect
import pickle
import sys
from pathlib import Path
from types import FrameType

import pytest
from torch import nn

from stitchable import coverage
from stitchable.coverage import survey, timm_modules, to_markdown
from stitchable.families import adapters
from stitchable.families.adapter import Adapter
from timm_modules import PAIRS

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def test_a_module_says_how_many_and_why_not() -> None:
    coat, qwen, vit = survey(["vitamin", "qwen3_vit", "coat"])
    assert (qwen.architectures, qwen.supported, qwen.pattern) == (9, 6, "NHWC: `encoder.blocks`")
    assert qwen.reasons == ("it is an encoder without a classifier",)
    assert (vit.architectures, vit.supported, vit.reasons) == (13, 13, ())
    assert (coat.architectures, coat.supported, coat.pattern) == (8, 0, "")


def test_an_unknown_module_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no module 'convnet'; the nearest are .*convnext"):
        survey(["convnet"])


def test_every_module_is_tested_or_refused() -> None:
    modules = set(timm_modules())
    assert len(modules) == 98
    refused = {"coat", "crossvit", "dpn", "efficientvim", "hrnet", "mobilenetv5", "nasnet", "pnasnet", "selecsls"}
    assert set(PAIRS) == modules - refused


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_the_command_prints() -> None:
    modules = survey(timm_modules())  # other tests register families of their own
    assert PAGE.read_text(encoding="utf-8").endswith(f"{to_markdown(modules)}\n")
    assert {module.name for module in modules if module.supported} == set(PAIRS)
    assert sum(module.supported for module in modules) >= 0.9 * sum(module.architectures for module in modules)


def test_adapters_can_be_pickled() -> None:
    """A model is sent to other processes with its chains."""
    for made in adapters.ADAPTERS.values():
        assert type(pickle.loads(pickle.dumps(made))) is type(made)


def test_adapters_stay_descriptions() -> None:
    """No adapter is a program: none has 30 lines."""
    for made in adapters.ADAPTERS.values():
        if not isinstance(made, Adapter):
            assert len(inspect.getsource(made).splitlines()) < 30, made


def test_a_survey_neither_builds_models_nor_replaces_what_constructs_them(monkeypatch) -> None:
    """Building all of timm's takes minutes; a replaced `nn.Module.__init__` would be met by every other thread."""
    monkeypatch.setattr(coverage, "create_model", None)
    construct = nn.Module.__init__
    kept = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        kept.append(nn.Module.__init__ is construct)

    sys.setprofile(watch)
    try:
        survey(["convnext"])
    finally:
        sys.setprofile(None)
    assert set(kept) == {True}
