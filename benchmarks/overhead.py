"""Claim: a call of a stitchable model costs hardly more than the modules it runs.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py --before FOLDER

One thread, batch 1, two things timed in turns (A, B, B, A), the median over the rounds of their ratio: a call of an
anchor of two blocks, and of a stitch, against the same modules called by hand; a call of the anchor DeiT-Ti against
timm's own; and how often a weight is written by `save_pretrained` and a model made by `from_pretrained`. With
`--before`, a checkout of an earlier commit, the same is measured there, in a process of its own right before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import stitchable
from stitchable import StitchableForImageClassification

SMALL = {"img_size": 32, "patch_size": 8, "num_heads": 2, "depth": 2}


def main() -> None:
    """Print and store the ratios, here and at the earlier commit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--print", action="store_true", help="print JSON only, and store nothing")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.before:
        environment = {**os.environ, "PYTHONPATH": str(arguments.before / "src")}
        command = [sys.executable, __file__, "--print"]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        described = subprocess.run(
            ["git", "-C", str(arguments.before), "describe", "--always"], capture_output=True, text=True, check=True
        )
        figures["before"] = {"commit": described.stdout.strip(), **json.loads(output.splitlines()[-1])}
    figures["now"] = measure()
    if arguments.print:
        print(json.dumps(figures["now"]))
        return
    from report import write_report

    for when, measured in figures.items():
        print(f"{when}: {measured}")
    print(f"wrote {write_report('overhead', figures)}")


def measure() -> dict[str, float]:
    """All figures, of the stitchable that is imported."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    anchors = [{"architecture": "vit_tiny_patch16_224", "kwargs": {**SMALL, "embed_dim": width}} for width in (64, 128)]
    small = stitchable.from_anchors(anchors, num_labels=10, pretrained=False).eval()
    deit = stitchable.from_anchors(["deit_tiny_patch16_224", "deit_small_patch16_224"], pretrained=False).eval()
    x, large = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 224, 224)
    first, second = small.anchors
    stitch = small.stitches[2]
    layer = small.get_stitching_layer(stitch.layers[0])

    def stitched() -> torch.Tensor:
        y = embed(first, x)
        for block in first.blocks[: stitch.route[0].stop]:
            y = block(y)
        y = layer.linear(y)
        for block in second.blocks[stitch.route[1].start :]:
            y = block(y)
        return second.forward_head(second.norm(y))

    with torch.inference_mode():
        assert torch.equal(stitched(), small(x, stitch_id=stitch.id).logits)
        ratios = {
            "anchor of two blocks": ratio(lambda: small(x, stitch_id=0), lambda: by_hand(first, x), 200),
            "stitch of two blocks": ratio(lambda: small(x, stitch_id=stitch.id), stitched, 200),
            "anchor DeiT-Ti": ratio(lambda: deit(large, stitch_id=0), lambda: deit.anchors[0](large), 10),
        }
    return {**ratios, **counts(small)}


def embed(vit: Any, x: torch.Tensor) -> torch.Tensor:
    """What a ViT of timm does before its blocks."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))


def by_hand(vit: Any, x: torch.Tensor) -> torch.Tensor:
    """A ViT, module by module."""
    y = embed(vit, x)
    for block in vit.blocks:
        y = block(y)
    return vit.forward_head(vit.norm(y))


def ratio(one: Callable[[], Any], other: Callable[[], Any], number: int, rounds: int = 31) -> float:
    """The median of the times of `one` over those of `other`."""

    def seconds(function: Callable[[], Any]) -> float:
        started = time.perf_counter()
        for _ in range(number):
            function()
        return time.perf_counter() - started

    ratios = []
    for _ in range(rounds):
        a, b, c, d = seconds(one), seconds(other), seconds(other), seconds(one)
        ratios.append((a + d) / (b + c))
    return round(statistics.median(ratios), 4)


def counts(model: nn.Module) -> dict[str, float]:
    """How often a weight is written when a model is saved, and a model is made when it is loaded."""
    import transformers.modeling_utils as modeling

    from stitchable.model import shards

    written, made = [], []
    save, init = safetensors.torch.save_file, StitchableForImageClassification.__init__
    for module, name in ((modeling, "safe_save_file"), (shards, "save_file")):
        setattr(module, name, lambda tensors, *a, **k: (written.extend(tensors), save(tensors, *a, **k)))
    StitchableForImageClassification.__init__ = lambda self, *a, **k: (made.append(1), init(self, *a, **k))[1]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        StitchableForImageClassification.from_pretrained(folder)
    return {"writes of a weight": len(written) / len(model.state_dict()), "models made": len(made)}


if __name__ == "__main__":
    main()
