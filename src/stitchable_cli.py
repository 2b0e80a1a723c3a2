"""The command `stitchable`: from anchors to a published model, one subcommand per step.

It lies outside the package, which takes seconds to import (it registers its classes with transformers), and imports it
inside the commands: so help, completion and mistakes in the options are answered at once.
"""

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="One checkpoint that is many networks: make, measure, cut, publish stitchable models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or the id of a Hub repository.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint, of which table and card are updated.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code of models that the checkpoint brings.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, mps, ...")]

Modules = Annotated[list[Path] | None, typer.Option(help="Python file that registers your own models.")]

_IMAGES, _SPACE = "Images", "Which stitches there are"  # panels of the help

F = TypeVar("F", bound=Callable[..., Any])


def command(function: F) -> F:
    """Register a command. What a user did wrong is a line on stderr and exit status 1, without a traceback."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, ImportError, SafetensorError) as error:  # HfHubHTTPError is an OSError
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error

    name = function.__name__.strip("_")
    app.command(name, rich_help_panel=_PANELS.get(name))(run)
    return function


_MAKE, _LOOK, _GIVE = "Make a model", "Look at it and measure it", "Give it away"
_PANELS = {
    **dict.fromkeys(("build", "make", "train", "tune", "convert", "families"), _MAKE),
    **dict.fromkeys(("table", "plot", "eval", "select", "cascade", "calibrate", "simulate", "app"), _LOOK),
    **dict.fromkeys(("prune", "extract", "export", "push", "serve"), _GIVE),
}


@command
def build(
    anchors: Annotated[list[str], typer.Argument(help="timm names of at least two classifiers, in any order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder of images, or data set of the Hub, to fit the stitching layers on.", rich_help_panel=_IMAGES
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of these images.", rich_help_panel=_IMAGES)] = None,
    image_column: Annotated[str, typer.Option(help="Of a data set of the Hub.", rich_help_panel=_IMAGES)] = "image",
    num_samples: Annotated[int, typer.Option(help="Images to fit on.", rich_help_panel=_IMAGES)] = 100,
    weights: Annotated[
        list[Path] | None,
        typer.Option(help="Checkpoint file of an anchor, instead of timm's weights; once for each anchor, in order."),
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Load timm's weights from the Hub.")] = True,
    kernel_size: Annotated[
        int, typer.Option(help="Of the window of positions that share a stitching layer.", rich_help_panel=_SPACE)
    ] = 2,
    stride: Annotated[int, typer.Option(help="Of that window.", rich_help_panel=_SPACE)] = 1,
    direction: Annotated[
        str, typer.Option(help="fast_to_slow or slow_to_fast.", rich_help_panel=_SPACE)
    ] = "fast_to_slow",
    nearest: Annotated[bool, typer.Option(help="Stitch only neighbours in FLOPs.", rich_help_panel=_SPACE)] = True,
    pairs: Annotated[
        str | None,
        typer.Option(help="all or forward positions of a window; as the authors do.", rich_help_panel=_SPACE),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Stages to stitch, such as 0,1,2; as the authors do.", rich_help_panel=_SPACE)
    ] = None,
    resize: Annotated[
        str | None, typer.Option(help="bilinear, to join grids of different sizes too.", rich_help_panel=_SPACE)
    ] = None,
    module: Modules = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels; the anchors' own if left out.")] = None,
    num_labels: Annotated[int | None, typer.Option(help="Classes; the anchors' own if left out.")] = None,
) -> None:
    """Make a stitchable checkpoint of timm models, its stitching layers fitted by least squares."""
    import stitchable
    from stitchable.card import Card
    from stitchable.families.registry import run_modules
    from stitchable.processing import image_processor
    from stitchable.publishing import check_new_folder, save_repository

    check_new_folder(output)
    run_modules([str(path) for path in module or ()])
    if weights and len(weights) != len(anchors):
        raise ValueError(f"--weights is given once for each anchor: {len(anchors)} anchors, {len(weights)} files")
    files = [{"architecture": name, "weights": file} for name, file in zip(anchors, weights or (), strict=False)]
    model = stitchable.from_anchors(
        files or anchors,
        pretrained=pretrained,
        kernel_size=kernel_size,
        stride=stride,
        direction=direction,
        nearest=nearest,
        pairs=pairs,
        stages=_numbers(stages, "--stages"),
        resize=resize,
        image_size=image_size,
        num_labels=num_labels,
    )
    processor = image_processor(model.config)
    if images is None:
        typer.echo("no --images: the stitching layers stay random, and only the anchors are of use", err=True)
    else:
        batches = _batches(images, processor, split=split, image_column=image_column, batch_size=min(64, num_samples))
        stitchable.initialize_stitches(model, batches, num_samples=num_samples)
    save_repository(model, output, processor, Card(output.resolve().name))
    typer.echo(f"{output}: {len(model.stitches)} stitches of {len(anchors)} anchors")


@command
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe of ours, such as digits.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Values to change in the recipe.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of this recipe.")] = False,
) -> None:
    """Make a stitchable model by a recipe: anchors in, every stitch trained and measured out."""
    try:
        from stitchable.training import train as training
        from stitchable.training.processes import RunStopped
    except ModuleNotFoundError as error:
        raise ImportError(f"training needs {error.name}: pip install 'stitchable[training]'") from error
    try:
        training.train(recipe, overrides or (), resume=resume)
    except RunStopped as error:
        raise ValueError(str(error)) from error


@command
def tune(
    folder: Folder,
    images: Annotated[str, typer.Option(help="Folder of images, or data set of the Hub.", rich_help_panel=_IMAGES)],
    labels: Annotated[
        bool,
        typer.Option("--labels", help="Teach by these too; they are the model's classes.", rich_help_panel=_IMAGES),
    ] = False,
    split: Annotated[str | None, typer.Option(help="Of these images.", rich_help_panel=_IMAGES)] = None,
    image_column: Annotated[str, typer.Option(help="Of a data set of the Hub.", rich_help_panel=_IMAGES)] = "image",
    label_column: Annotated[str, typer.Option(help="Of a data set of the Hub.", rich_help_panel=_IMAGES)] = "label",
    num_images: Annotated[int, typer.Option(help="At most, kept in memory.", rich_help_panel=_IMAGES)] = 10_000,
    stitches: Annotated[str | None, typer.Option(help="Ids, such as 3,24; all but the anchors if left out.")] = None,
    steps: Annotated[int, typer.Option(help="Updates of each stitch.")] = 600,
    rank: Annotated[int, typer.Option(help="Of the updates of its stitching layers.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Images of an update.")] = 128,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Make stitches better by what their back anchors say of images without labels; the anchors stay as they are.

    An interrupted run goes on behind the stitches that are finished, which FOLDER-tune keeps meanwhile.
    """
    from stitchable.publishing import card_of, processor_of, update_repository

    try:
        from stitchable.training.own import Teaching
        from stitchable.training.tuning import first_images
        from stitchable.training.tuning import tune as tune_stitches
    except ModuleNotFoundError as error:
        raise ImportError(f"tuning needs {error.name}: pip install 'stitchable[training]'") from error
    card_of(folder)  # refuses one that cannot be written anew before anything is taught
    model = _to(_load(folder, trust_remote_code), device)
    read = _batches(
        images,
        processor_of(model),
        config=model.config if labels else None,
        split=split,
        image_column=image_column,
        label_column=label_column,
        batch_size=batch_size,
    )
    pixel_values, known = first_images(read, num_images)
    work = Path(f"{folder}-tune")
    scores = tune_stitches(
        model,
        pixel_values,
        known if labels else None,
        _numbers(stitches, "--stitches"),
        Teaching(steps=steps, rank=rank, labels=1.0 if labels else 0.0),
        batch_size=batch_size,
        folder=work,
        say=lambda line: typer.echo(line, err=True),
    )
    model.save_pretrained(folder)
    update_repository(model, folder)
    shutil.rmtree(work)
    if as_json:
        typer.echo(json.dumps({i: list(pair) for i, pair in scores.items()}, indent=1, allow_nan=False))
        return
    what = "is right" if labels else "agrees with the largest anchor"
    for stitch_id, (before, after) in scores.items():
        typer.echo(f"stitch {stitch_id} {what} on {100 * before:.2f} -> {100 * after:.2f} % of the images held out")
    typer.echo(f"{folder}: stitchable eval measures accuracy on images with labels")


@command
def make(
    anchors: Annotated[
        list[str], typer.Argument(help="At least two classifiers: timm names, ids on the Hub, or files of weights.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder, or that of an interrupted run.")],
    images: Annotated[
        str, typer.Option(help="Folder of images, in one folder per class if known, or data set of the Hub.")
    ],
    architecture: Annotated[
        list[str] | None, typer.Option(help="timm name; once for each file of weights, in order.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="How long it may take; more teach the stitches better.")] = 30.0,
    split: Annotated[str | None, typer.Option(help="Of the images.", rich_help_panel=_IMAGES)] = None,
    image_column: Annotated[str, typer.Option(help="Of a data set of the Hub.", rich_help_panel=_IMAGES)] = "image",
    label_column: Annotated[str, typer.Option(help="Of a data set of the Hub.", rich_help_panel=_IMAGES)] = "label",
    image_size: Annotated[int | None, typer.Option(help="Pixels; the anchors' own if left out.")] = None,
    module: Modules = None,
    device: Device = "cpu",
) -> None:
    """Make an elastic model of two models and a folder of images, from stitching to cascades and card, in one go."""
    from stitchable import making

    plan = making.Plan(
        anchors=_anchors(anchors, architecture or []),
        images=images,
        split=split,
        image_column=image_column,
        label_column=label_column,
        modules=[str(path) for path in module or ()],
        image_size=image_size,
    )
    making.make(plan, output, minutes=minutes, device=device, say=typer.echo)
    typer.echo(f"{output}: stitchable table {output}; stitchable push {output} USER/NAME")


@command
def select(
    folder: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
    images: Annotated[str, typer.Option(help="Folder of images, or data set of the Hub.", rich_help_panel=_IMAGES)],
    number: Annotated[int | None, typer.Option(help="Stitches to keep at most, beside the anchors.")] = None,
    spacing: Annotated[float | None, typer.Option(help="Or one for each such factor of FLOPs, such as 1.1.")] = None,
    num_samples: Annotated[int, typer.Option(help="Images that score the stitches.", rich_help_panel=_IMAGES)] = 300,
    split: Annotated[str | None, typer.Option(help="Of these images.", rich_help_panel=_IMAGES)] = None,
    image_column: Annotated[str, typer.Option(help="Of a data set of the Hub.", rich_help_panel=_IMAGES)] = "image",
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Keep the anchors and the most promising stitches, before any training; images need no labels."""
    import stitchable
    from stitchable.card import Card
    from stitchable.publishing import check_new_folder, processor_of, save_repository

    check_new_folder(output)
    model = _to(_load(folder, trust_remote_code), device)
    processor = processor_of(model)
    size = max(1, min(50, num_samples))
    batches = _batches(images, processor, split=split, image_column=image_column, batch_size=size)
    first = itertools.islice(batches, -(-num_samples // size))
    kept = stitchable.select(model, first, number=number, spacing=spacing)
    save_repository(kept, output, processor, Card.of(kept.config, output.resolve().name))
    typer.echo(_what_is_kept(output, kept, model))


@command
def prune(
    folder: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
    metric: Annotated[str | None, typer.Option(help="Measured figure, better when higher.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Drop the stitches that another one beats in both FLOPs and accuracy; no budget would choose them."""
    import stitchable
    from stitchable.card import Card
    from stitchable.model.routes import measured_by
    from stitchable.publishing import check_new_folder, processor_of, save_repository

    check_new_folder(output)
    model = _load(folder, trust_remote_code)
    kept = stitchable.prune(model, metric or measured_by(model.stitches))
    save_repository(kept, output, processor_of(model), Card.of(kept.config, output.resolve().name))
    typer.echo(_what_is_kept(output, kept, model))


@command
def families(
    modules: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Modules of timm, such as convnext; all if none.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table, as in docs/families.md.")
    ] = False,
    module: Modules = None,
    as_json: Json = False,
) -> None:
    """Print which architectures of timm can be stitched, by module, and why the others cannot."""
    from stitchable import coverage
    from stitchable.families.registry import run_modules

    run_modules([str(path) for path in module or ()])
    rows = coverage.survey(modules or ())
    if as_json:
        typer.echo(json.dumps(coverage.to_dicts(rows), indent=2))
    elif markdown:
        typer.echo(coverage.to_markdown(rows))
    else:
        width = max(len(row.name) for row in rows)
        for row in rows:
            why = f"{row.pattern}  {'; '.join(row.reasons)}".strip().replace("`", "")
            typer.echo(f"{row.name:<{width}}  {row.supported:>4} of {row.architectures:<4} {why}")
        typer.echo(coverage.total(rows))


@command
def table(
    model: Source,
    pareto: Annotated[bool, typer.Option("--pareto", help="Only stitches that no other beats.")] = False,
    as_json: Json = False,
) -> None:
    """Print the stitches of a model, then its cascades: routes or stages, costs, measured figures."""
    from stitchable import StitchableConfig, pareto_front
    from stitchable.card import Card, short_names, stitch_table
    from stitchable.cascades import cascade_table, runnable
    from stitchable.front import in_words, judge_stitches
    from stitchable.model.routes import Stitch, measured_by

    config = StitchableConfig.from_pretrained(model)
    stitches = [Stitch.from_dict(stitch) for stitch in config.stitches]
    if not stitches:
        raise ValueError(f"{model} has no config.json of a stitchable model")
    chosen = pareto_front(stitches, measured_by(stitches)) if pareto else stitches
    if not chosen:
        raise ValueError(f"no stitch of {model} has been measured; stitchable eval does")
    if as_json:
        rows = [*(stitch.to_dict() for stitch in chosen), *runnable(config)]
        typer.echo(json.dumps(rows, indent=1, allow_nan=False))
    else:
        typer.echo(stitch_table(chosen, short_names(config)))
        judged = judge_stitches(stitches, Card.of(config, "").accuracy_before)
        if judged:
            typer.echo(f"\n{in_words(judged)}")
        if runnable(config):
            typer.echo(f"\n{cascade_table(runnable(config))}")


@command
def plot(
    model: Source,
    output: Annotated[Path, typer.Argument(help="An image file: .png, .svg, .pdf.")],
    metric: Annotated[str | None, typer.Option(help="What to draw over the FLOPs.")] = None,
) -> None:
    """Draw accuracy against FLOPs of all stitches, the anchors starred."""
    from stitchable import StitchableConfig
    from stitchable.card import Card, short_names
    from stitchable.cascades import runnable
    from stitchable.front import untouched_anchors
    from stitchable.model.routes import Stitch, measured_by
    from stitchable.plots import plot_stitches

    config = StitchableConfig.from_pretrained(model)
    if output.exists():
        raise ValueError(f"{output} exists; choose another name, or remove it")
    stitches = [Stitch.from_dict(stitch) for stitch in config.stitches]
    metric = metric or measured_by(stitches)
    untouched = untouched_anchors(stitches, Card.of(config, "").accuracy_before) if metric == "accuracy" else None
    cascades = runnable(config)
    plot_stitches(stitches, short_names(config), metric, untouched=untouched, cascades=cascades).savefig(output)
    typer.echo(str(output))


@command
def eval(  # the name of the command
    folder: Folder,
    data: Annotated[str, typer.Argument(help="Folder with a folder of images per class, or data set of the Hub.")],
    split: Annotated[str | None, typer.Option(help="Of the data.", rich_help_panel=_IMAGES)] = None,
    image_column: Annotated[str, typer.Option(help="Of a data set of the Hub.", rich_help_panel=_IMAGES)] = "image",
    label_column: Annotated[str, typer.Option(help="Of a data set of the Hub.", rich_help_panel=_IMAGES)] = "label",
    stitches: Annotated[str | None, typer.Option(help="Ids, such as 0,1,24; all if left out.")] = None,
    batch_size: int = 64,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure top-1, top-5 and loss of every stitch over one pass of the data, and the cascades that there are."""
    from stitchable.cascades import evaluate_with_cascades
    from stitchable.publishing import update_repository

    columns = {"split": split, "image_column": image_column, "label_column": label_column}
    model, batches, dataset, is_other = _to_measure(
        folder, data, device, trust_remote_code, batch_size=batch_size, **columns
    )
    ids = _numbers(stitches, "--stitches")
    measured, of_cascades = evaluate_with_cascades(model, batches, ids, dataset=dataset, split=split or "")
    if is_other:
        for stitch in model.stitches:  # what was measured on other data does not stand beside it
            model.record(stitch.id, metrics=measured.get(stitch.id, {}))
    update_repository(model, folder, dataset=dataset, split=split or "")
    if as_json:
        shown: dict[Any, Any] = {**measured, **({"cascades": of_cascades} if of_cascades else {})}
        typer.echo(json.dumps(shown, indent=1, allow_nan=False))
    else:
        _print_table(model)


@command
def cascade(
    folder: Folder,
    data: Annotated[str, typer.Argument(help="Folder with a folder of images per class, or data set of the Hub.")],
    split: Annotated[str | None, typer.Option(help="Of the data.", rich_help_panel=_IMAGES)] = None,
    image_column: Annotated[str, typer.Option(help="Of a data set of the Hub.", rich_help_panel=_IMAGES)] = "image",
    label_column: Annotated[str, typer.Option(help="Of a data set of the Hub.", rich_help_panel=_IMAGES)] = "label",
    stitches: Annotated[str | None, typer.Option(help="Ids to search, such as 0,1,24; all if left out.")] = None,
    batch_size: int = 64,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Find cascades, which run a dearer stitch where a cheaper one is unsure, and measure the stitches in that pass."""
    from stitchable import find_cascades
    from stitchable.cascades import cascade_table
    from stitchable.publishing import update_repository

    columns = {"split": split, "image_column": image_column, "label_column": label_column}
    model, batches, dataset, is_other = _to_measure(
        folder, data, device, trust_remote_code, batch_size=batch_size, **columns
    )
    if is_other:
        for stitch in model.stitches:  # what was measured on other data does not stand beside it
            model.record(stitch.id, metrics={})
    found = find_cascades(model, batches, _numbers(stitches, "--stitches"), dataset=dataset, split=split or "")
    update_repository(model, folder, dataset=dataset, split=split or "")
    if as_json:
        typer.echo(json.dumps(found, indent=1, allow_nan=False))
    else:
        typer.echo(cascade_table(found))


@command
def calibrate(
    folder: Folder,
    batch_sizes: Annotated[
        str, typer.Option(help="Images per call; of several, such as 1,8,32, the first is for the table.")
    ] = "1",
    num_runs: Annotated[int, typer.Option(help="Timed rounds.")] = 20,
    threads: Annotated[int | None, typer.Option(help="Of a CPU; PyTorch's default if left out.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks first.")] = False,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Predict latency and memory of every stitch on this device, and latency of cascades, to be used as budgets."""
    import torch

    import stitchable
    from stitchable.publishing import card_of, update_repository

    card_of(folder)  # refuses one that cannot be written anew before anything is measured
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    model = _load(folder, trust_remote_code)
    running = _to(copy.deepcopy(model), device, getattr(torch, dtype))
    if compiled:
        running.compile_blocks()
    sizes = _numbers(batch_sizes, "--batch-sizes") or ()
    result = stitchable.calibrate(running, batch_sizes=sizes, num_runs=num_runs)
    for stitch in running.stitches:  # the folder keeps the data type of its weights
        model.record(stitch.id, latency_ms=stitch.latency_ms, memory_mb=stitch.memory_mb)
    model.config.latency, model.cascades = result, running.config.cascades
    update_repository(model, folder)
    if as_json:
        typer.echo(json.dumps(result, indent=1, allow_nan=False))
    else:
        _print_table(model)
        typer.echo(f"predicted for {result['device']}, {result['dtype']}, batches of {result['batch_size']}")
        for kind, facts in {"stitches": result, "cascades": result.get("cascades", {})}.items():
            if facts.get("verified"):
                number, error = len(facts["verified"]), 100 * facts["median_error"]
                typer.echo(f"of {number} {kind} that were measured, the median error is {error:.1f} %")


@command
def extract(
    model: Source,
    places: Annotated[
        list[str],
        typer.Argument(metavar="[STITCH_ID] OUTPUT", help="Which stitch, unless --cascade is given, and a new folder."),
    ],
    cascade: Annotated[int | None, typer.Option(help="Which cascade, in the place of a stitch.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Save one stitch or one cascade as a checkpoint of its own, with only its weights."""
    from stitchable.card import Card
    from stitchable.publishing import check_new_folder, processor_of, save_repository

    if len(places) != (2 if cascade is None else 1):
        raise ValueError(f"extract MODEL STITCH_ID OUTPUT, or MODEL OUTPUT --cascade ID; got {' '.join(places)!r}")
    output = Path(places[-1])
    check_new_folder(output)
    part = {"cascade": cascade} if cascade is not None else {"stitch_id": _number(places[0])}
    alone = _load(model, trust_remote_code, **part)
    save_repository(alone, output, processor_of(alone), Card.of(alone.config, output.resolve().name))
    chosen = alone.stitch if cascade is None else next(x for x in alone.cascades if x.id == cascade)
    name = f"stitch {chosen.id}" if cascade is None else f"cascade {chosen.id} of {len(alone.stitches)} stitches"
    flops = f"{chosen.flops:,} FLOPs" if cascade is None else f"{chosen.flops:,.0f} FLOPs on average"
    typer.echo(f"{output}: {name}, {alone.num_parameters():,} parameters, {flops}")


@command
def export(
    model: Source,
    output: Annotated[Path, typer.Argument(help="New folder for ONNX, new file *.pt2 for a program of torch.export.")],
    stitches: Annotated[str | None, typer.Option(help="Ids, such as 0,1,24; all if left out.")] = None,
    cascade: Annotated[int | None, typer.Option(help="Which cascade, in the place of stitches; ONNX only.")] = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write stitches for other runtimes: ONNX graphs that share one file of weights, or one program of torch.export."""
    from stitchable.export import export_onnx, export_program
    from stitchable.publishing import processor_of

    ids = _numbers(stitches, "--stitches")
    is_program = output.suffix == ".pt2"
    if is_program and (ids is None or len(ids) != 1):
        raise ValueError(f"a program holds one stitch: give --stitches ID for {output}, or a folder for ONNX")
    loaded = _load(model, trust_remote_code)
    processor = processor_of(loaded)
    if is_program and ids:
        export_program(loaded, output, ids[0], processor=processor)
        typer.echo(f"{output}: stitch {ids[0]}")
    else:
        paths = export_onnx(loaded, output, ids, cascade=cascade, processor=processor, opset=opset)
        size = sum(path.stat().st_size for path in output.iterdir())
        typer.echo(f"{output}: {len(paths)} graphs and their weights, {size:,} bytes")


@command
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A file that the authors of the paper released (.pth).")],
    output: Annotated[Path, typer.Argument(help="New folder.")],
    family: Annotated[str, typer.Option(help="One of deit, swin, resnet, resnet_swin, levit.")],
) -> None:
    """Make a stitchable checkpoint of the authors' weights, each stitch computing what their code computes."""
    from stitchable import conversion
    from stitchable.card import Card
    from stitchable.processing import image_processor
    from stitchable.publishing import check_new_folder, save_repository

    check_new_folder(output)
    model = conversion.convert(checkpoint, family)
    save_repository(model, output, image_processor(model.config), Card(output.resolve().name, license="other"))
    typer.echo(f"{output}: {len(model.stitches)} stitches of {len(model.config.anchors)} anchors")


@command
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it does not exist.")] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.")] = "Upload a stitchable model",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
) -> None:
    """Publish a folder as one commit: weights, config, code, image processor, card and figure."""
    from stitchable.publishing import push_folder

    info = push_folder(
        folder,
        repo_id,
        private=private or None,
        revision=revision,
        commit_message=message,
        create_pr=create_pr,
    )
    typer.echo(info.pr_url or info.commit_url)


@command
def app_(
    model: Source,
    images: Annotated[Path | None, typer.Option(help="Folder of images to pick from.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of the page; the first free one from 7860 if left out.")
    ] = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Show a page to try the model on: upload an image, move a budget, compare two stitches."""
    try:
        from stitchable.app import load_page
        from stitchable.publishing import processor_of

        page = load_page()
    except ModuleNotFoundError as error:
        raise ImportError(f"the page needs {error.name}: pip install 'stitchable[app]'") from error
    if images is not None and not images.is_dir():
        raise ValueError(f"there is no folder {images}")
    loaded = _to(_load(model, trust_remote_code), device)
    title = Path(model).resolve().name if Path(model).is_dir() else model
    pictures = page.pictures_of(loaded, images)
    page.launch(page.create_page(loaded, processor_of(loaded), title, pictures), port)


@command
def serve(
    model: Source,
    slo_ms: Annotated[float, typer.Option(help="Target from a request's arrival to its answer.")] = 50,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="STITCHABLE_TOKEN", help="Bearer token that requests must bring.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a CPU; PyTorch's default if left out.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="On Ray Serve; --device cuda is then a GPU per replica.")] = False,
    replicas: Annotated[str, typer.Option(help="With --ray: how many, or auto.")] = "1",
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Answer images over HTTP within a target of latency, by cheaper stitches when requests pile up."""
    import torch

    try:
        from stitchable.serving import http, server
    except ModuleNotFoundError as error:
        raise ImportError(f"the server needs {error.name}: pip install 'stitchable[serve]'") from error
    from stitchable.publishing import processor_of
    from stitchable.serving.engine import Engine

    if not 0 < slo_ms < float("inf"):
        raise ValueError(f"--slo-ms must be above 0, got {slo_ms:g}")
    http.check_token(token)
    if ray:
        common = {"slo_ms": slo_ms, "token": token, "threads": threads, "trust_remote_code": trust_remote_code}
        _serve_on_ray(model, host, port, replicas, num_gpus=float(device.startswith("cuda")), **common)
        return
    with server.bind(host, port) as bound:
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = _to(_load(model, trust_remote_code), device)
        title = Path(model).resolve().name if Path(model).is_dir() else model
        engine = Engine(loaded, processor_of(loaded), slo_ms / 1e3)
        bound.listen()  # who reads the next line may connect at once, and waits for the warm-up
        address = f"http://{host}:{bound.getsockname()[1]}"
        typer.echo(f"{title}: {len(engine.policy.choices)} choices, target {slo_ms:g} ms, {address}")
        server.make_server(http.create_app(engine, title, token)).run(sockets=[bound])


@command
def simulate(
    model: Source,
    trace: Annotated[str, typer.Option(help="poisson, bursty, diurnal, or a file of arrival times, one per line.")],
    slo_ms: Annotated[float, typer.Option(help="Target from a request's arrival to its answer.")] = 50,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, the mean, unless the trace is a file.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of the trace, unless it is a file.")] = 120,
    seed: Annotated[int, typer.Option(help="Of the trace, unless it is a file.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Image file for a figure over time.")] = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Say how a server of this model would do on a trace of requests, beside simpler servers and an oracle."""
    from stitchable.serving import comparison
    from stitchable.serving.choices import choices_of
    from stitchable.serving.traces import KINDS, make_trace, read_trace

    if not 0 < slo_ms < float("inf"):
        raise ValueError(f"--slo-ms must be above 0, got {slo_ms:g}")
    if output is not None and output.exists():
        raise ValueError(f"{output} exists; choose another name, or remove it")
    if trace in KINDS and rate is None:
        raise ValueError(f"a {trace} trace needs --rate, in requests per second")
    arrivals = make_trace(trace, rate or 0, seconds, seed) if trace in KINDS else read_trace(trace)
    loaded = _to(_load(model, trust_remote_code), device)
    choices = choices_of(loaded)
    anchors = [stitch.id for stitch in loaded.stitches if stitch.is_anchor]
    outcomes = comparison.compare(choices, anchors, arrivals, slo_ms / 1e3)
    if output is not None:
        names = ["policy", *(name for name in outcomes if name.startswith("anchor")), "oracle"]
        comparison.plot(outcomes, names).savefig(output)
    if as_json:
        summaries = {name: outcome.summary() for name, outcome in outcomes.items()}
        typer.echo(json.dumps(summaries, indent=1, allow_nan=False))
    else:
        typer.echo(f"{len(arrivals)} requests in {arrivals[-1]:.0f} s, target {slo_ms:g} ms")
        typer.echo(comparison.to_text(outcomes))


def _serve_on_ray(model: str, host: str, port: int, replicas: str, **arguments: Any) -> None:
    if replicas != "auto" and not (replicas.isdecimal() and int(replicas)):
        raise ValueError(f"--replicas must be a number from 1 on, or auto, got {replicas!r}")
    try:
        from stitchable.serving import ray
    except ModuleNotFoundError as error:
        raise ImportError(f"--ray needs {error.name}: pip install 'stitchable[ray]'") from error
    source = str(Path(model).resolve()) if Path(model).is_dir() else model
    number = "auto" if replicas == "auto" else int(replicas)
    typer.echo(f"{model}: {replicas} replicas, target {arguments['slo_ms']:g} ms, http://{host}:{port}")
    ray.run(ray.Arguments(model=source, num_replicas=number, **arguments), host, port)


def _anchors(given: list[str], architectures: list[str]) -> list[str | dict[str, str]]:
    """Anchors as `make_config` takes them: files with their architectures, ids on the Hub as timm has them, names."""
    files = [name for name in given if Path(name).is_file()]
    if len(files) != len(architectures):
        raise ValueError(
            f"--architecture is given once for each file of weights: {len(files)} files, {len(architectures)} "
            "architectures" + ("" if files else "; timm names and ids on the Hub need none")
        )
    left = iter(architectures)
    return [
        {"architecture": next(left), "weights": name}
        if name in files
        else f"hf-hub:{name}"
        if "/" in name and ":" not in name
        else name
        for name in given
    ]


def _what_is_kept(output: Path, kept: Any, model: Any) -> str:
    ids = ", ".join(str(stitch.id) for stitch in kept.stitches if not stitch.is_anchor)
    return f"{output}: {len(kept.stitches)} of {len(model.stitches)} stitches, beside the anchors {ids or 'none'}"


def _to_measure(
    folder: Path, data: str, device: str, trust_remote_code: bool, *, split: str | None, **options: Any
) -> tuple[Any, Any, str, bool]:
    """A model, batches of labelled images, what these are, and whether what it was measured on is something else."""
    from stitchable.card import Card
    from stitchable.publishing import card_of, processor_of

    card_of(folder)  # refuses one that cannot be written anew before anything is measured
    model = _to(_load(folder, trust_remote_code), device)
    known = Card.of(model.config, "")  # refuses facts that are none before anything is measured
    batches = _batches(data, processor_of(model), config=model.config, split=split, seed=None, **options)
    dataset = Path(data).name if Path(data).is_dir() else data
    return model, batches, dataset, (known.dataset, known.split) != (dataset, split or "")


def _batches(*arguments: Any, **options: Any) -> Any:
    from stitchable.images import read_batches

    return read_batches(*arguments, **options)


def _load(source: str | Path, trust_remote_code: bool, **arguments: Any) -> Any:
    if isinstance(source, Path) and not source.is_dir():
        raise ValueError(f"there is no folder {source}")

    from stitchable import StitchableForImageClassification

    return StitchableForImageClassification.from_pretrained(
        str(source), trust_remote_code=trust_remote_code, **arguments
    )


def _to(model: Any, device: str, dtype: "torch.dtype | None" = None) -> Any:
    try:
        return model.to(device, dtype) if dtype else model.to(device)
    except (RuntimeError, AssertionError) as error:  # of PyTorch, one for unknown devices, one for absent ones
        raise ValueError(f"the model cannot be put on {device!r}: {str(error).splitlines()[0]}") from error


def _numbers(text: str | None, option: str) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between, such as 0,1,2; got {text!r}") from None


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"the id of a stitch is a number, got {text!r}") from None


def _print_table(model: Any) -> None:
    from stitchable.card import short_names, stitch_table
    from stitchable.cascades import cascade_table, runnable

    typer.echo(stitch_table(model.stitches, short_names(model.config)))
    if runnable(model.config):
        typer.echo(f"\n{cascade_table(runnable(model.config))}")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
