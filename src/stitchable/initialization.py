"""Initialisation of the stitching layers by least squares (Pan et al., CVPR 2023, equations 4 and 5).

For a stitching layer, the rows of A are the features at the front anchor's cut, of every image and position of the
grid, the rows of B those at the back anchor's; the layer becomes the minimiser of ||A W^T + 1 b^T - B||_F. Where the
authors' code takes the mean of one solution per position of a window, here all positions that share a layer are solved
together: that minimises the summed residual, which the mean of the minimisers does not.

Only sums of products are kept, in float64 (for each cut 1^T A and A^T A, for each layer A^T B), so memory does not grow
with the samples, and each anchor runs once.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from transformers.utils import logging

from stitchable.batches import unpack_batch
from stitchable.evaluation import evaluation_mode
from stitchable.model.modeling_stitchable import Step, StitchablePreTrainedModel
from stitchable.model.operations import Grid
from stitchable.model.routes import check_integer
from stitchable.model.stitching import Side, grid_of, resize

logger = logging.get_logger(__name__)

_CHUNK = 16
"""Images whose features are held at once, however large a batch is."""


class CutRows(NamedTuple):
    """Features as rows: an anchor, one of its cuts, the prefix tokens that count, and the grid they are resized to."""

    anchor: int
    cut: int
    tokens: tuple[int, ...]
    grid: Grid


class RowPair(NamedTuple):
    """What a stitching layer maps at one joint: the rows at the cut it comes from and at the cut it goes to."""

    source: CutRows
    target: CutRows


@torch.no_grad()
def initialize_stitches(
    model: StitchablePreTrainedModel,
    batches: Iterable[Any] = (),
    *,
    num_samples: int = 100,
    method: Literal["least_squares", "kaiming"] = "least_squares",
) -> dict[str, float]:
    """Fit every stitching layer of the model in place.

    Args:
        model: a stitchable model whose anchors are trained; they run in evaluation mode, on the model's device.
        batches: pixel values (N, C, H, W), or mappings or sequences that hold them as "pixel_values" or first; read
            until `num_samples` images were seen, so they must be shuffled. Where they hold labels too, and all are
            equal, a warning says so.
        num_samples: images to fit on; 100 in the paper.
        method: "least_squares", or "kaiming" for PyTorch's random initialisation (the ablation of figure 8), which
            needs no batches.

    Returns:
        The relative residual ||A W^T + 1 b^T - B||_F / ||B - mean(B)||_F of each stitching layer by name: 0 is a
        perfect fit, 1 no better than a constant. Empty for "kaiming".

    Raises:
        ValueError: an unknown method, fewer images than asked for or than the fit needs, or non-finite activations.
    """
    layers = {name: model.get_stitching_layer(name) for stitch in model.stitches for name in stitch.layers}
    if method == "kaiming":
        for layer in layers.values():
            layer.linear.reset_parameters()
        return {}
    if method != "least_squares":
        raise ValueError(f"method must be 'least_squares' or 'kaiming', got {method!r}")
    if check_integer(num_samples, "num_samples") < 1:
        raise ValueError(f"num_samples must be a positive number of images, got {num_samples!r}")

    for name, layer in layers.items():
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise ValueError(f"the weights of stitching layer {name} are offloaded and cannot be fitted; load them")
    accumulator = Accumulator(rows_of_layers(model))
    _check_complete(model, accumulator.joints)
    with evaluation_mode(model):
        num_chunks = -(-num_samples // _CHUNK)
        for pixel_values in logging.tqdm(
            _first_images(batches, num_samples), total=num_chunks, desc="fitting stitching layers", leave=False
        ):
            accumulator.add(anchor_features(model, pixel_values, accumulator.joints))
    statistics = {name: accumulator.statistics(name) for name in layers}
    for name, layer in layers.items():
        _check_rows(name, layer.source.channels + 1, accumulator.distinct_rows(name), num_samples)
    residuals = {}
    for name, statistic in statistics.items():
        weight, bias, residuals[name] = statistic.solve()
        layers[name].linear.weight.copy_(weight)
        layers[name].linear.bias.copy_(bias)
    return residuals


def rows_of_layers(model: StitchablePreTrainedModel) -> dict[str, list[RowPair]]:
    """The joints of each stitching layer, of all stitches, each once."""
    rows: dict[str, dict[RowPair, None]] = {}
    for stitch in model.stitches:
        for joint in stitch.joints:
            layer = model.get_stitching_layer(joint.layer)
            # Tokens that the front lacks are not the layer's to make.
            pairs = [(source, target) for target, source in enumerate(layer.carried) if source is not None]
            source = CutRows(joint.front, joint.stop, tuple(source for source, _ in pairs), layer.target.grid)
            target = CutRows(joint.back, joint.start, tuple(target for _, target in pairs), layer.target.grid)
            rows.setdefault(joint.layer, {})[RowPair(source, target)] = None
    return {name: list(unique) for name, unique in rows.items()}


@dataclass
class LeastSquares:
    """Sufficient statistics of min ||A W^T + 1 b^T - B||_F, all in float64, A and B measured from two origins.

    Attributes:
        count: rows N.
        origin_a, origin_b: points near the means, (D1,) and (D2,), that were subtracted from every row of A and B.
        sum_a, sum_b: 1^T A of shape (D1,) and 1^T B of shape (D2,).
        gram: A^T A, (D1, D1).
        cross: A^T B, (D1, D2).
        square_b: ||B||_F^2.
    """

    count: int
    origin_a: torch.Tensor
    origin_b: torch.Tensor
    sum_a: torch.Tensor
    sum_b: torch.Tensor
    gram: torch.Tensor
    cross: torch.Tensor
    square_b: torch.Tensor

    def solve(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weight (D2, D1), bias (D2,) and the relative residual.

        The solution of minimum norm: directions in which A hardly varies (dead or collinear channels) get no weight.
        """
        mean_a, mean_b = self.sum_a / self.count, self.sum_b / self.count
        gram = self.gram - torch.outer(self.sum_a, mean_a)
        cross = self.cross - torch.outer(self.sum_a, mean_b)
        # In units of each channel's own deviation, so that a massive channel does not make the others look dead.
        # A channel that varies no more than float32 rounds it is dead.
        deviation = gram.diagonal().clamp(min=0).sqrt()
        epsilon = torch.finfo(torch.float32).eps
        rounding = 4 * epsilon * self.count**0.5 * (self.origin_a + mean_a).abs()
        scale = torch.where(deviation > rounding, 1 / deviation, 0)
        gram, cross = scale[:, None] * gram * scale, scale[:, None] * cross
        eigenvalues, eigenvectors = torch.linalg.eigh(gram)
        # Eigenvalues are squares of singular values of A, whose entries were computed in float32: what is smaller than
        # its rounding is noise.
        threshold = eigenvalues[-1] * (len(gram) * epsilon) ** 2
        inverse = torch.where(eigenvalues > threshold, 1 / eigenvalues, 0)
        projected = eigenvectors.T @ cross
        weight = (scale[:, None] * (eigenvectors @ (inverse[:, None] * projected))).T
        bias = self.origin_b + mean_b - weight @ (self.origin_a + mean_a)
        total = self.square_b - self.count * mean_b.square().sum()
        explained = (inverse[:, None] * projected.square()).sum()
        residual = (1 - explained / total).clamp(min=0).sqrt() if total > 0 else torch.zeros(())
        return weight, bias, float(residual)


class Accumulator:
    """The sums behind every stitching layer's `LeastSquares`, batch by batch.

    What several layers share (1^T A and A^T A of a cut) is kept once per cut; A^T B is kept per layer. Everything is
    summed about a fixed point near the mean, the `shift` of each cut, or large means would drown small variations.
    """

    def __init__(self, joints: Mapping[str, Sequence[RowPair]]) -> None:
        """`joints` are the joints of each layer, as `rows_of_layers` returns them."""
        self.joints = joints
        self.sources = {joint.source for shared in joints.values() for joint in shared}
        self.counts: Counter[CutRows] = Counter()
        self.shifts: dict[CutRows, torch.Tensor] = {}
        self.totals: dict[CutRows, torch.Tensor] = {}
        self.squares: dict[CutRows, torch.Tensor] = {}
        self.grams: dict[CutRows, torch.Tensor] = {}
        self.crosses: dict[str, torch.Tensor] = {}

    def add(self, features: Mapping[CutRows, torch.Tensor]) -> None:
        """Add the features (rows, channels) of every cut that a layer reads or writes."""
        # Apple's GPUs have no float64.
        features = {key: x.cpu() if x.device.type == "mps" else x for key, x in features.items()}
        rows = {}
        for key, x in features.items():
            x = x.to(_product_dtype(x.device))
            x = rows[key] = x - self.shifts.setdefault(key, x.mean(0))
            self.counts[key] += len(x)
            _add(self.totals, key, x.sum(0))
            _add(self.squares, key, torch.linalg.vector_norm(x).double().square())
            if key in self.sources:
                _add(self.grams, key, _gram(x.double()))
        for name, shared in self.joints.items():
            for sources, targets in _products(shared):
                a, b = (sum((rows[key] for key in keys[1:]), rows[keys[0]]) for keys in (sources, targets))
                _add(self.crosses, name, a.T @ b)

    def distinct_rows(self, name: str) -> int:
        """Rows of A that a layer is fitted on, each counted once however many positions it serves."""
        return sum(self.counts[source] for source in {joint.source for joint in self.joints[name]})

    def statistics(self, name: str) -> LeastSquares:
        """The statistics of one stitching layer, over all its positions."""
        shared = self.joints[name]
        # Cuts have shifts of their own; a layer needs one origin for all its sources, and one for all its targets.
        origin_a, origin_b = (self.shifts[key].double() for key in (shared[0].source, shared[0].target))
        sums: dict[str, torch.Tensor] = {"cross": self.crosses[name].clone()}
        for source, target in shared:
            count = self.counts[source]
            move_a, move_b = self.shifts[source] - origin_a, self.shifts[target] - origin_b
            total_a, total_b = self.totals[source], self.totals[target]
            _add(sums, "a", total_a + count * move_a)
            _add(sums, "b", total_b + count * move_b)
            outer = torch.outer(total_a, move_a)
            _add(sums, "gram", self.grams[source] + outer + outer.T + count * torch.outer(move_a, move_a))
            _add(
                sums,
                "cross",
                torch.outer(total_a, move_b) + torch.outer(move_a, total_b) + count * torch.outer(move_a, move_b),
            )
            _add(sums, "square", self.squares[target] + 2 * total_b @ move_b + count * move_b @ move_b)
        return LeastSquares(
            count=sum(self.counts[joint.source] for joint in shared),
            origin_a=origin_a,
            origin_b=origin_b,
            sum_a=sums["a"],
            sum_b=sums["b"],
            gram=sums["gram"],
            cross=sums["cross"],
            square_b=sums["square"],
        )


def anchor_features(
    model: StitchablePreTrainedModel, pixel_values: torch.Tensor, joints: Mapping[str, Sequence[RowPair]]
) -> dict[CutRows, torch.Tensor]:
    """The features (rows, channels) of every cut that a stitching layer reads or writes, each anchor run once.

    Raises:
        ValueError: non-finite activations (names the anchor and the cut).
    """
    wanted = {key for shared in joints.values() for joint in shared for key in (joint.source, joint.target)}
    features = {}
    for anchor in model.chains:
        keys = [key for key in wanted if key.anchor == anchor]
        flow, shape = model.start(pixel_values), model.shapes[anchor]
        for cut in range(max((key.cut for key in keys), default=-1) + 1):
            flow = model.run_step(Step("block", anchor, cut - 1) if cut else Step("stem", anchor), flow)
            here = [key for key in keys if key.cut == cut]
            if here and not torch.isfinite(flow.features).all():
                raise ValueError(f"the activations of anchor {anchor} at cut {cut} are not finite")
            for key in here:
                features[key] = rows_of(flow.features, Side.of(shape, cut), key.tokens, key.grid)
    return features


def rows_of(features: torch.Tensor, side: Side, tokens: Sequence[int], grid: Grid) -> torch.Tensor:
    """Features as rows (N * positions, channels): the prefix `tokens`, then the grid, resized to `grid`."""
    if side.is_tokens and tuple(tokens) == tuple(range(side.prefix_tokens)) and grid == side.grid:
        return features.flatten(0, -2)
    x = resize(grid_of(features, side), grid).flatten(1, 2)
    return torch.cat([features[:, list(tokens)], x], dim=1).flatten(0, -2) if tokens else x.flatten(0, -2)


def _check_complete(model: StitchablePreTrainedModel, joints: Mapping[str, Sequence[RowPair]]) -> None:
    for shared in joints.values():
        for key in (key for joint in shared for key in (joint.source, joint.target)):
            missing = {"stem", *range(key.cut)} - model.parts[key.anchor]
            if missing:
                raise ValueError(
                    f"least squares runs anchor {key.anchor} up to cut {key.cut}, but this model does not hold its "
                    f"{sorted(missing, key=str)}; fit the whole model before extracting a stitch"
                )


def _check_rows(name: str, needed: int, rows: int, num_samples: int) -> None:
    if rows < needed:
        raise ValueError(
            f"stitching layer {name} maps {needed - 1} channels and needs at least {needed} rows, but "
            f"{num_samples} images give {rows}; pass a larger num_samples"
        )


def _product_dtype(device: torch.device) -> torch.dtype:
    """The precision of A^T B before it is summed in float64.

    A^T A must be exact, since its inverse multiplies errors by the square of the condition number of A. A^T B enters
    once, and on a CPU float32 halves the time of the fit. An accelerator may be set to round float32 products to ten
    bits (TF32), which is too little.
    """
    return torch.float32 if device.type == "cpu" else torch.float64


def _products(joints: Sequence[RowPair]) -> list[tuple[list[CutRows], list[CutRows]]]:
    """A layer's A^T B, a sum over its joints, in as few products as its sources with different targets.

    Sources that share all their targets are added first: a whole window of k x k joints needs one product, not k^2.
    """
    targets_of: dict[CutRows, list[CutRows]] = {}
    for joint in joints:
        targets_of.setdefault(joint.source, []).append(joint.target)
    sources_of: dict[tuple[CutRows, ...], list[CutRows]] = {}
    for source, targets in targets_of.items():
        sources_of.setdefault(tuple(sorted(targets)), []).append(source)
    return [(sources, list(targets)) for targets, sources in sources_of.items()]


def _gram(x: torch.Tensor) -> torch.Tensor:
    """x^T x at three quarters of the work: it is symmetric, so one of its four blocks is another one transposed."""
    half = x.shape[1] // 2
    left, right = x[:, :half], x[:, half:]
    upper = left.T @ x
    lower = torch.cat([upper[:, half:].T, right.T @ right], dim=1)
    return torch.cat([upper, lower])


def _add(sums: dict[Any, torch.Tensor], key: Any, value: torch.Tensor) -> None:
    if key in sums:
        sums[key] += value  # in float64, whatever the dtype of the value
    else:
        sums[key] = value.double()


def _first_images(batches: Iterable[Any], num_samples: int) -> Iterable[torch.Tensor]:
    seen, labels = 0, []
    for batch in batches:
        pixel_values, numbers = unpack_batch(batch, labels="optional")
        pixel_values = pixel_values[: num_samples - seen]
        yield from pixel_values.split(_CHUNK)
        seen += len(pixel_values)
        if numbers is not None:
            labels.append(numbers[: len(pixel_values)].cpu())
        if seen == num_samples:
            _warn_of_one_class(labels)
            return
    raise ValueError(f"least squares was asked to fit {num_samples} images, but the batches hold only {seen}")


def _warn_of_one_class(labels: Sequence[torch.Tensor]) -> None:
    known = torch.cat([numbers[numbers >= 0] for numbers in labels]) if labels else torch.empty(0)
    if len(known) > 1 and (known == known[0]).all():
        logger.warning(
            f"all {len(known)} images that the stitching layers are fitted on have the label {int(known[0])}. Stitches "
            "fitted on one class are bad at the others: shuffle the images, which may be sorted by class"
        )
