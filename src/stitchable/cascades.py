"""Find cascades: budgets per image on average, from the logits of one pass over labelled images."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers.utils import logging

from stitchable.cascade_search import Candidate, TwoFold, search_two_fold
from stitchable.cascade_stages import Costs
from stitchable.costs import check_counted, shared_flops
from stitchable.evaluation import measure_batch, record_figures, run_batches
from stitchable.fingerprints import Watch
from stitchable.front import Judgement, judge_two_fold, on_own_front, paired_interval
from stitchable.model.cascades import score
from stitchable.model.configuration_stitchable import StitchableConfig
from stitchable.model.modeling_stitchable import StitchableForImageClassification
from stitchable.model.routes import Cascade, find_stitch
from stitchable.plots import flops_unit

logger = logging.get_logger(__name__)

_NUM_BUDGETS = 24
"""Mean budgets, evenly spaced in log FLOPs, for which a cascade is kept: a front of hundreds helps nobody to choose."""
_FEW_IMAGES = 1000
_SUSPICIOUS = 0.995
_LOWEST = -6e4  # of float16, nearly


def find_cascades(
    model: StitchableForImageClassification,
    batches: Iterable[Any],
    stitch_ids: Sequence[int] | None = None,
    *,
    dataset: str = "",
    split: str = "",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Find the best cascades of a model's stitches, and measure every stitch in the same pass.

    The logits are kept in float16 in a temporary file (TMPDIR says where): two bytes per stitch, image and class.

    Args:
        model: it runs in evaluation mode, on its device. Its stitch table gets the figures that `evaluate` would write,
            its config the cascades that were found, in the place of those it has.
        batches: as for `evaluate`, of images that the model was **not** trained on; read once.
        stitch_ids: the stitches to search; all of them if None.
        dataset: what the images are, kept beside the cascades.
        split: of the data set, kept too.
        seed: of the halves of the images.

    Returns:
        The cascades as they are in `config.cascades`, the cheapest first, at most one for each of 24 budgets between
        the cheapest and the dearest stitch. Stages, `flops` (mean per image) and `max_flops` are chosen on all images;
        `metrics` are two-fold: what each half's choice within the same mean FLOPs gives on the other half.
        `metrics["gain"]` is the accuracy above that of the best stitch alone within these FLOPs, chosen alike, and
        `interval` the 95 % interval of this gain, from a bootstrap that is paired image by image.

    Raises:
        ValueError: an unknown stitch or one that this model leaves out, fewer than two stitches, a model of several
            labels per image, stitches without FLOPs, and of the data: as `evaluate`; logits that are not finite, images
            of one class, or fewer than two.
    """
    return _search(model, batches, stitch_ids, dataset, split, seed)[0]


def find_and_judge(
    model: StitchableForImageClassification,
    batches: Iterable[Any],
    *,
    dataset: str = "",
    split: str = "",
    seed: int = 0,
    metric: Literal["accuracy", "agreement"] = "accuracy",
) -> tuple[list[dict[str, Any]], Judgement | None, Judgement | None]:
    """As `find_cascades`, and two-fold from the same pass, what the stitches alone and all together are worth.

    Args:
        model: as for `find_cascades`, its anchors untouched; like the others.
        batches: see there.
        dataset: see there.
        split: see there.
        seed: see there.
        metric: what the labels make it; "agreement" where they are the answers of the largest anchor.

    Returns:
        The cascades, and the judgements of the stitches and of stitches and cascades against the anchors; None where
        there are not two anchors of which the dearer is the better.

    Raises:
        ValueError: as `find_cascades`.
    """
    cascades, found, ids = _search(model, batches, None, dataset, split, seed, metric)
    places = [place for place, i in enumerate(ids) if find_stitch(model.stitches, i).is_anchor]
    accuracies = [find_stitch(model.stitches, ids[place]).metrics["accuracy"] for place in places]
    if metric == "agreement":
        _call_it_agreement(model)
        cascades = model.config.cascades
    anchors = (found.stitches[0].of(places), found.stitches[1].of(places))
    if len(on_own_front(anchors[0].flops, accuracies)) < 2:
        return cascades, None, None
    stitches, together = (judge_two_fold(half, anchors, accuracies) for half in (found.stitches, found.cascades))
    return cascades, stitches, together


def _search(
    model: StitchableForImageClassification,
    batches: Iterable[Any],
    stitch_ids: Sequence[int] | None,
    dataset: str,
    split: str,
    seed: int,
    metric: str = "accuracy",
) -> tuple[list[dict[str, Any]], TwoFold, list[int]]:
    """The cascades, which the model has then, all that was found, and the ids of the stitches."""
    ids = _ids(model, stitch_ids)
    flops = [find_stitch(model.stitches, stitch_id).flops for stitch_id in ids]
    watched = Watch(batches, model.config)
    with LogitFile(ids) as logits:
        labels = measure_logits(model, watched, ids, logits)
        costs = Costs(np.array(flops), np.array(shared_flops(model, ids)))
        found = search_two_fold(logits, labels, costs, seed=seed)
    facts = {"images": len(labels), "dataset": dataset, "split": split}
    cascades = [{"id": place, **entry, **facts} for place, entry in enumerate(_kept(found, costs, ids))]
    _warn(cascades, found, watched, len(labels), metric)
    model.cascades = cascades
    return cascades, found, ids


def _call_it_agreement(model: StitchableForImageClassification) -> None:
    """Rename what was measured, so that nobody takes it for accuracy."""
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"agreement": stitch.metrics["accuracy"]})
    model.cascades = [
        {**cascade, "metrics": {"agreement": cascade["metrics"]["accuracy"], "gain": cascade["metrics"]["gain"]}}
        for cascade in model.config.cascades
    ]


def evaluate_with_cascades(
    model: StitchableForImageClassification,
    batches: Iterable[Any],
    stitch_ids: Sequence[int] | None = None,
    *,
    dataset: str = "",
    split: str = "",
) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
    """Measure stitches, and from their logits the model's cascades of them, in one pass over the data.

    A cascade that was found on other data than these gets what they say of it in `metrics`, in the place of its
    two-fold figures; one that was found on these keeps those, which are the honest ones.

    Args:
        model: as for `evaluate`, like the next two.
        batches: see there.
        stitch_ids: see there.
        dataset: what the images are.
        split: of the data set.

    Returns:
        What `evaluate` returns, and for each cascade id {"accuracy": top-1 in 0..1, "mean_flops": per image} on these
        images.

    Raises:
        ValueError: as `evaluate`.
    """
    from stitchable.metrics import IGNORED

    rows, num_images = [], 0
    sums: dict[int, tuple[float, float]] = {}  # of what is right, and of FLOPs
    for labels, logits in run_batches(model, batches, stitch_ids):
        rows.append(measure_batch(labels, logits))
        counts = (labels != IGNORED).cpu()
        num_images += int(counts.sum())
        for cascade in model.cascades:
            if cascade.stitch_ids <= set(logits):
                predictions, flops = _answers(cascade, logits)
                right, spent = sums.get(cascade.id, (0.0, 0.0))
                right += int((predictions == labels.cpu())[counts].sum())
                sums[cascade.id] = right, spent + float(flops.expand(len(counts))[counts].sum())
    stitches = record_figures(model, rows, stitch_ids, batches)
    found = {i: {"accuracy": x / num_images, "mean_flops": flops / num_images} for i, (x, flops) in sums.items()}
    model.cascades = [
        entry
        if (entry.get("dataset", ""), entry.get("split", "")) == (dataset, split)
        else {**{k: x for k, x in entry.items() if k != "interval"}, "metrics": found.get(entry["id"], {})}
        for entry in model.config.cascades
    ]
    return stitches, found


def _answers(cascade: Cascade, logits: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The class (N,) that a cascade answers with, and its FLOPs (N,), from the logits of its stitches."""
    total = flops = torch.zeros(())
    undecided, answers = torch.tensor(True), torch.tensor(0)
    for number, stage in enumerate(cascade.stages, 1):
        own = logits[stage.stitch].float().cpu()
        total = total + own / stage.temperature
        given = total / number if stage.combine == "mean" else own
        answers, flops = given.argmax(1).where(undecided, answers), flops + undecided.double() * stage.flops
        undecided = undecided & (score(own, stage) < (stage.threshold or 0))
    return answers, flops


def runnable(config: StitchableConfig) -> list[dict[str, Any]]:
    """The cascades of a config all of whose stitches it has."""
    ids = {stitch["id"] for stitch in config.stitches}
    return [cascade for cascade in config.cascades if {stage["stitch"] for stage in cascade["stages"]} <= ids]


def _ids(model: StitchableForImageClassification, stitch_ids: Sequence[int] | None) -> list[int]:
    if model.config.problem_type in ("multi_label_classification", "regression"):
        raise ValueError(
            f"a cascade asks which one class is the most probable, and this model's problem_type is "
            f"{model.config.problem_type!r}; only single_label_classification has cascades"
        )
    wanted = [stitch.id for stitch in model.stitches] if stitch_ids is None else stitch_ids
    ids = list(dict.fromkeys(find_stitch(model.stitches, i, model.config.left_out).id for i in wanted))
    if len(ids) < 2:
        raise ValueError(f"a cascade needs at least two stitches, got {ids}")
    check_counted(model, ids)
    return ids


def cascade_table(cascades: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of cascades as `find_cascades` returns them, and what its figures are.

    Where no labels were at hand, they have an agreement with the largest anchor in the place of an accuracy. Figures
    and gains are in percent and points, FLOPs are multiply-adds plus normalisation terms. What is known of no cascade
    has no column.
    """
    if not cascades:
        return "no cascade is better than the best stitch of its cost"
    unit, divisor = flops_unit(max(cascade["max_flops"] for cascade in cascades))
    metric = "agreement" if any("agreement" in cascade.get("metrics", {}) for cascade in cascades) else "accuracy"
    rows = []
    for cascade in cascades:
        metrics, interval = cascade.get("metrics", {}), [100 * bound for bound in cascade.get("interval") or ()]
        rows.append(
            {
                "id": str(cascade["id"]),
                "stages": stages_in_words(cascade["stages"]),
                f"{unit}, mean": f"{metrics.get('mean_flops', cascade['flops']) / divisor:.3f}",
                "at most": f"{cascade['max_flops'] / divisor:.3f}",
                metric: f"{100 * metrics[metric]:.2f} %" if metric in metrics else "",
                "gain": f"{100 * metrics['gain']:+.2f}" if "gain" in metrics else "",
                "interval of the gain": "{:+.2f} to {:+.2f}".format(*interval) if interval else "",
                "ms, mean": f"{cascade['latency_ms']:.2f}" if "latency_ms" in cascade else "",
                "ms, 95 %": f"{cascade['latency_p95_ms']:.2f}" if "latency_p95_ms" in cascade else "",
            }
        )
    always = ("id", "stages", f"{unit}, mean", "at most", metric)
    columns = [name for name in rows[0] if name in always or any(row[name] for row in rows)]
    lines = [columns, [":---" if name == "stages" else "---:" for name in columns]]
    lines += [[row[name] for name in columns] for row in rows]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *_what_figures_are(cascades)])


def beside_stitches(config: StitchableConfig, num_budgets: int = 2) -> str:
    """What cascades as `find_cascades` left them give within mean budgets, beside the best stitch of the same cost.

    The budgets are evenly spaced in log FLOPs between the cheapest and the dearest anchor.
    """
    flops = [stitch["flops"] for stitch in config.stitches if len(stitch["route"]) == 1]
    budgets = np.geomspace(min(flops), max(flops), num_budgets + 2)[1:-1]
    unit, divisor = flops_unit(max(flops))
    cascades = [cascade for cascade in runnable(config) if "gain" in cascade["metrics"]]
    lines = []
    for budget in budgets:
        said = f"{budget / divisor:.2f} {unit} per image on average: "
        within = [cascade for cascade in cascades if cascade["flops"] <= budget]
        if within:
            best = max(within, key=lambda cascade: cascade["metrics"]["accuracy"])
            accuracy, gain = best["metrics"]["accuracy"], best["metrics"]["gain"]
            low, high = (100 * bound for bound in best["interval"])
            said += (
                f"cascade {best['id']} ({stages_in_words(best['stages'])}) takes {best['flops'] / divisor:.2f} and has "
                f"{100 * accuracy:.2f} %, the best stitch of that cost {100 * (accuracy - gain):.2f} % "
                f"({100 * gain:+.2f} points, {low:+.2f} to {high:+.2f})"
            )
        else:
            said += "no cascade is better than the best stitch"
        lines.append(said)
    return "\n".join(lines)


def _what_figures_are(cascades: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    said = f"{cascades[0].get('images') or 0:,} images"
    if any(cascade.get("interval") for cascade in cascades):
        yield (
            f"Two-fold on {said}: each half chose for the other. The gain is in points above the best stitch of the "
            "same cost, with its 95 % interval."
        )
    else:
        yield f"Thresholds were chosen on {said} of other data; the figures are of the data that the stitches' are of."


def stages_in_words(stages: Sequence[Mapping[str, Any]]) -> str:
    """Which stitch runs, and below which score the next one does: "0, where p < 0.9 → 57"."""
    words = {"max_probability": "p", "margin": "margin"}
    parts = [
        f"{stage['stitch']}"
        + (f", where {words[stage['score']]} < {stage['threshold']:.3g}" if "score" in stage else "")
        for stage in stages
    ]
    return " → ".join(parts) + (", mean" if stages[-1].get("combine") == "mean" else "")


class LogitFile:
    """The logits of every stitch in float16, in a temporary file that is mapped to memory a stitch at a time.

    Each image's logits are kept less their largest, which changes no probability and is where float16 is finest.
    """

    def __init__(self, stitch_ids: Sequence[int]) -> None:
        self._ids = list(stitch_ids)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        self._sizes: list[tuple[int, int]] = []

    def __enter__(self) -> "LogitFile":
        """As it is."""
        return self

    def __exit__(self, *_: object) -> None:
        """The file goes."""
        self._file.close()

    def append(self, logits: Sequence[torch.Tensor]) -> None:
        """Add images: for each stitch logits (n, num_labels).

        Raises:
            ValueError: one is infinite or no number.
        """
        for stitch_id, logits_NC in zip(self._ids, logits, strict=True):
            relative = logits_NC.float() - logits_NC.float().amax(1, keepdim=True)
            if not relative.isfinite().all():
                raise ValueError(
                    f"the logits of stitch {stitch_id} are not finite for "
                    f"{int((~relative.isfinite().all(1)).sum())} of {len(relative)} images of a batch"
                )
            self._file.write(relative.clamp(min=_LOWEST).half().cpu().numpy().tobytes())
        self._sizes.append((len(logits[0]), logits[0].shape[1]))

    def __len__(self) -> int:
        """The number of stitches."""
        return len(self._ids)

    def __getitem__(self, stitch: int) -> npt.NDArray[np.float16]:
        """The logits (N, num_labels) of the stitch at this place."""
        self._file.flush()
        numbers = np.memmap(self._file, np.float16, mode="r")  # a new one each time, so that no page stays
        parts, start = [], 0
        for num_images, num_labels in self._sizes:
            size = num_images * num_labels
            parts.append(numbers[start + stitch * size : start + (stitch + 1) * size].reshape(num_images, num_labels))
            start += len(self) * size
        return np.concatenate(parts)


def measure_logits(
    model: StitchableForImageClassification, batches: Iterable[Any], ids: Sequence[int], logits: LogitFile
) -> npt.NDArray[np.int64]:
    """Run stitches over labelled images and keep their logits; the figures go into the stitch table.

    Args:
        model: as for `find_cascades`.
        batches: as for `find_cascades`.
        ids: of the stitches.
        logits: of these stitches, empty; where the logits go, of the images whose label is not -100.

    Returns:
        The labels (N,) of these images.

    Raises:
        ValueError: no image counts, a label that is none of the classes, or logits that are not finite.
    """
    from stitchable.metrics import IGNORED

    rows, counted = [], []
    for labels, by_id in run_batches(model, batches, ids):
        rows.append(measure_batch(labels, by_id))
        counts = labels != IGNORED
        if counts.any():
            logits.append([each[counts.to(each.device)] for each in by_id.values()])
            counted.append(labels[counts].cpu().numpy())
    if not counted:
        raise ValueError("there is no data to find cascades on: the batches are empty, or every label is -100")
    record_figures(model, rows, ids)
    return np.concatenate(counted)


def _kept(found: TwoFold, costs: Costs, ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A cascade for each budget that is better than the ones before and than the stitches, with two-fold figures."""
    best, done = -1.0, set()
    for budget in np.geomspace(costs.flops.min(), costs.flops.max(), _NUM_BUDGETS):
        candidate = [candidate for candidate in found.candidates if candidate.flops <= budget * (1 + 1e-9)][-1]
        if not candidate.is_cascade or candidate in done:
            continue
        done.add(candidate)
        correct, alone = found.within(candidate.flops)
        accuracy, gain = float(correct.mean()), float(correct.mean() - alone.mean())
        if accuracy > best and gain > 0:
            best = accuracy
            yield {
                "stages": stages_of(candidate, ids, costs),
                "flops": candidate.flops,
                "max_flops": candidate.max_flops,
                "metrics": {"accuracy": accuracy, "gain": gain},
                "interval": list(paired_interval(correct.astype(float) - alone.astype(float))),
            }


def stages_of(candidate: Candidate, ids: Sequence[int], costs: Costs) -> list[dict[str, Any]]:
    """The stages in JSON types, as `config.json` has them: stitches by id, the FLOPs that each adds, who reaches it."""
    stages = []
    for place, stage in enumerate(candidate.stages):
        earlier = [before.stitch for before in candidate.stages[:place]]
        entry: dict[str, Any] = {"stitch": ids[stage.stitch], "flops": costs.added(stage.stitch, earlier)}
        entry["reached"] = candidate.reached[place]
        if stage.score is not None:
            entry |= {"score": stage.score, "threshold": stage.threshold}
        stages.append({**entry, "temperature": stage.temperature, "combine": stage.combine})
    return stages


def _warn(cascades: Sequence[dict[str, Any]], found: TwoFold, watched: Watch, num_images: int, metric: str) -> None:
    if watched.num_known:
        logger.warning(
            f"{watched.num_known} of the {num_images} images are among those that the model was trained on, where it "
            "is surer than it will be; find cascades on others"
        )
    best = max(found.candidates, key=lambda candidate: candidate.accuracy).accuracy
    if metric == "accuracy" and not watched.has_fingerprints and best >= _SUSPICIOUS:
        logger.warning(
            f"{100 * best:.1f} % of the images are right, which is a lot: if the anchors were trained on them, "
            "thresholds will not hold on others"
        )
    if num_images < _FEW_IMAGES:
        logger.warning(
            f"only {num_images} images decide; thresholds chosen on fewer than {_FEW_IMAGES} hold badly on others"
        )
    if not cascades:
        logger.warning("no cascade is better than the best stitch of its cost; none is kept")
    unsure = [cascade["id"] for cascade in cascades if cascade["interval"][0] <= 0]
    if unsure:
        logger.warning(
            f"the interval of the gain contains zero for {len(unsure)} of {len(cascades)} cascades (ids {unsure}): "
            "more images would tell whether they are better than a stitch"
        )
