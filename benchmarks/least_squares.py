"""Claim: fitting all stitching layers of DeiT-Ti/S/B from 100 images takes at most a quarter of the time of a
pseudo-inverse per position, to the same or a smaller residual.

    python benchmarks/least_squares.py [--images 100]

Both read the same features (the anchors' forward passes are not timed). The images are random 224x224 crops of the two
photographs that scikit-learn ships; the anchors have random weights, since none can be downloaded everywhere: neither
changes the size of the problem. The baseline is what the authors' code does: pinv of [A 1] in float32 at every
position, then the mean over the positions of a layer.
"""

import argparse
import statistics
import time

import torch
from report import write_report
from sklearn.datasets import load_sample_images
from tqdm import tqdm

import stitchable
from stitchable import StitchableForImageClassification
from stitchable.initialization import Accumulator, CutRows, RowPair, anchor_features, rows_of_layers

ANCHORS = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]
REPEATS = 3  # rounds in turn; the median of each is reported
BATCH = 16  # as many images as initialize_stitches holds at once


def main() -> None:
    """Time both on the same features, print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = stitchable.from_anchors(ANCHORS, pretrained=False).eval()
    joints = rows_of_layers(model)
    batches = list(photographs(arguments.images, model).split(BATCH))
    with torch.no_grad():
        features = [anchor_features(model, batch, joints) for batch in tqdm(batches, desc="anchors")]

        whole = {key: torch.cat([batch[key] for batch in features]) for key in features[0]}
        times: dict[str, list[float]] = {"ours": [], "pinv": []}
        for _ in tqdm(range(REPEATS), desc="rounds"):
            started = time.perf_counter()
            ours = least_squares(joints, features)
            times["ours"].append(time.perf_counter() - started)
            started = time.perf_counter()
            baseline = pseudo_inverses(joints, whole)
            times["pinv"].append(time.perf_counter() - started)
    seconds_ours, seconds_baseline = statistics.median(times["ours"]), statistics.median(times["pinv"])

    rows = {}
    for name, shared in joints.items():
        rows[name] = {"ours": residual(*ours[name], shared, whole), "pinv": residual(*baseline[name], shared, whole)}
    figures = {
        "images": arguments.images,
        "seconds_ours": round(seconds_ours, 2),
        "seconds_pinv_per_position": round(seconds_baseline, 2),
        "ratio": round(seconds_ours / seconds_baseline, 4),
        "layers_with_larger_residual": [name for name, row in rows.items() if row["ours"] > row["pinv"] * (1 + 1e-6)],
        "mean_residual_ours": sum(row["ours"] for row in rows.values()) / len(rows),
        "mean_residual_pinv": sum(row["pinv"] for row in rows.values()) / len(rows),
        "residuals": rows,
    }
    print({key: value for key, value in figures.items() if key != "residuals"})
    print(f"wrote {write_report('least_squares', figures)}")


def photographs(number: int, model: StitchableForImageClassification) -> torch.Tensor:
    """Random crops (number, 3, 224, 224), normalised."""
    photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    crops = []
    for index in range(number):
        photo = photos[index % len(photos)]
        top, left = (int(torch.randint(0, size - 224, ())) for size in photo.shape[1:])
        crops.append(photo[:, top : top + 224, left : left + 224])
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.image_mean, model.config.image_std))
    return (torch.stack(crops) - mean) / std


def least_squares(joints: dict[str, list[RowPair]], features: list[dict[CutRows, torch.Tensor]]) -> dict[str, tuple]:
    """What `initialize_stitches` does after the anchors ran: weight (D2, D1) and bias (D2,) per layer."""
    accumulator = Accumulator(joints)
    for batch in features:
        accumulator.add(batch)
    return {name: accumulator.statistics(name).solve()[:2] for name in joints}


def pseudo_inverses(joints: dict[str, list[RowPair]], features: dict[CutRows, torch.Tensor]) -> dict[str, tuple]:
    """One pseudo-inverse per position, averaged per layer."""
    solutions = {}
    for name, shared in joints.items():
        each = []
        for joint in shared:
            a = features[joint.source]
            ones = torch.cat([a, torch.ones(len(a), 1)], dim=1)
            each.append(torch.linalg.pinv(ones) @ features[joint.target])
        mean = torch.stack(each).mean(0)
        solutions[name] = (mean[:-1].T, mean[-1])
    return solutions


def residual(
    weight: torch.Tensor, bias: torch.Tensor, shared: list[RowPair], features: dict[CutRows, torch.Tensor]
) -> float:
    """||A W^T + 1 b^T - B||_F over all positions of a layer, in float64."""
    weight, bias = weight.double(), bias.double()
    squares = [
        (features[joint.source].double() @ weight.T + bias - features[joint.target].double()).square().sum()
        for joint in shared
    ]
    return float(torch.stack(squares).sum().sqrt())


if __name__ == "__main__":
    main()
