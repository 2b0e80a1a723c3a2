"""Run a cascade that was exported to ONNX, with numpy and onnxruntime alone: `export_onnx` puts this file beside it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def load_cascade(folder: str | Path) -> list[tuple[dict[str, Any], Any]]:
    """The stages of the cascade in a folder, each with its session."""
    sessions = {path.stem: onnxruntime.InferenceSession(str(path)) for path in Path(folder).glob("stitch-*.onnx")}
    metadata = next(iter(sessions.values())).get_modelmeta().custom_metadata_map if sessions else {}
    if "cascade" not in metadata:
        raise ValueError(f"there is no exported cascade in {folder}")
    return [(stage, sessions[f"stitch-{stage['stitch']}"]) for stage in json.loads(metadata["cascade"])["stages"]]


def run_cascade(stages: list[tuple[dict[str, Any], Any]], pixel_values: Any) -> tuple[Any, Any]:
    """Logits (N, classes) and the ids (N,) of the stitches that answered, of float32 images (N, C, H, W)."""
    images, ids, logits, total = np.arange(len(pixel_values)), np.zeros(len(pixel_values), int), None, 0.0
    for number, (stage, session) in enumerate(stages, 1):
        (own,) = session.run(None, {"pixel_values": pixel_values[images]})
        scaled = own / stage["temperature"]
        total = total + scaled
        logits = np.empty_like(own) if logits is None else logits
        logits[images], ids[images] = total / number if stage["combine"] == "mean" else own, stage["stitch"]
        if "threshold" not in stage:
            break
        exponentials = np.exp(scaled - scaled.max(1, keepdims=True))
        second, first = np.sort(exponentials / exponentials.sum(1, keepdims=True), 1)[:, -2:].T
        goes_on = (first - second if stage["score"] == "margin" else first) < stage["threshold"]
        images, total = images[goes_on], total[goes_on]
        if not len(images):
            break
    return logits, ids
