"""Claim: the ONNX graphs of all 71 stitches of DeiT-Ti/S/B take little more room than the weights of the model once.

    python benchmarks/export.py

Takes about ten minutes and 1 GB of disk for a while.
"""

import argparse
import tempfile
from pathlib import Path

from report import write_report

import stitchable
from stitchable.export import WEIGHTS, export_onnx

ANCHORS = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]


def main() -> None:
    """Export everything, weigh the folder, and write benchmarks/results/export.json."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    model = stitchable.from_anchors(ANCHORS, pretrained=False)
    with tempfile.TemporaryDirectory() as folder:
        graphs = [path.stat().st_size for path in export_onnx(model, Path(folder) / "graphs").values()]
        weights = (Path(folder) / "graphs" / WEIGHTS).stat().st_size
    of_model = sum(parameter.nbytes for parameter in model.parameters())
    apart = sum(graphs) + 4 * sum(stitch.params or 0 for stitch in model.stitches)  # float32
    result = {
        "graphs": len(graphs),
        "bytes_of_weights": weights,
        "bytes_of_graphs": sum(graphs),
        "against_the_weights_of_the_model": round((weights + sum(graphs)) / of_model, 3),
        "against_graphs_with_weights_of_their_own": round((weights + sum(graphs)) / apart, 4),
    }
    print(f"{len(graphs)} graphs: {(weights + sum(graphs)) / 1e6:,.0f} MB instead of {apart / 1e6:,.0f} MB")
    print(f"wrote {write_report('export', result)}")


if __name__ == "__main__":
    main()
