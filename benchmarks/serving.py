"""Claims: the server holds its target under bursts, and the simulator says how it will do.

    python benchmarks/serving.py --weights FOLDER --data FOLDER --released FOLDER

The CIFAR-10 ResNets with their published weights, stitched by least squares alone, are served by `stitchable serve` in
one thread; locust sends test images to it over the loopback interface in bursts of 3 to 5 times the mean, and each
answer is compared with the label. The target is three times the latency of the largest anchor. What each stitch is
worth was measured on other test images than those that are sent. Then the same with what `make release
MODEL=cifar10_resnets` has made of them (the folder `--released`), and the cascades that the measured images give; and
DeiT-Ti/S/B with random weights, for time. FOLDERs as in examples/cifar10_resnets/README.md.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from report import commit, write_report

import stitchable
from stitchable.card import Card
from stitchable.processing import image_processor
from stitchable.publishing import save_repository
from stitchable.serving.comparison import compare
from stitchable.serving.policy import Choice, Policy, Request
from stitchable.serving.traces import Arrivals, make_trace

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar10_resnets"
DEIT = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]
LAYERS = (20, 32, 44, 56)
MODELS = ("cifar10_resnets", "released_resnets", "deit")
RESULTS = Path(__file__).parent / "results" / "serving.json"
TARGET = 3.0  # latencies of the largest anchor
USERS = 200


def main() -> None:
    """Run everything and write benchmarks/results/serving.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the published checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--released", type=Path, help="the released repository of the ResNets")
    parser.add_argument("--folder", type=Path, default=Path("runs/serving"), help="where models and images are put")
    parser.add_argument("--seconds", type=float, default=120, help="of the trace")
    parser.add_argument("--soak", type=float, default=600, help="seconds")
    parser.add_argument("--num-measured", type=int, default=5000, help="test images that say what a stitch is worth")
    parser.add_argument("--num-sent", type=int, default=2000, help="other test images, which are sent")
    parser.add_argument("--only", choices=MODELS, help="measure one of them, and keep what is known of the others")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLE))
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, source in (("cifar10_resnets", None), ("released_resnets", given.released)):
        if given.only in (None, name) and not (given.folder / name).exists():
            prepare_resnets(given, name, source)
    if given.only in (None, "deit") and not (given.folder / "deit").exists():
        prepare_deit(given.folder)
    figures: dict[str, Any] = {"decision_us": measure_decisions()}
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["figures"] if given.only and RESULTS.exists() else {}
    for name in MODELS:
        if given.only in (None, name):
            made = {"command": " ".join(["python", *sys.argv]), "commit": commit()}
            figures[name] = {**made, **measure(given, name, soak=name == MODELS[0])}
        elif name in known:
            figures[name] = known[name]
    print(f"wrote {write_report('serving', figures)}")


def measure_decisions(num_choices: int = 71, num_runs: int = 1000) -> dict[str, float]:
    """Median microseconds of a decision for as many stitches as DeiT-Ti/S/B has, by how many requests wait."""
    rng = np.random.default_rng(0)
    choices = [
        Choice("stitch", i, 0.6 + rng.random() / 4, i, 2e-3 + 1e-4 * i, 1e-3 + 1e-4 * i) for i in range(num_choices)
    ]
    figures = {}
    for waiting in (1, 16, 64, 256):
        policy = Policy(choices, target=0.1)
        for now in range(16):
            policy.arrived(now / 100)
        queue = [Request(deadline) for deadline in np.sort(rng.uniform(0.2, 0.5, waiting)).tolist()]
        seconds = []
        for _ in range(num_runs):
            began = time.perf_counter()
            policy.decide(queue, 0.16)
            seconds.append(time.perf_counter() - began)
        figures[f"{waiting} waiting"] = round(1e6 * statistics.median(seconds), 1)
    return figures


# ---------------------------------------------------------------- models and images


def prepare_resnets(given: argparse.Namespace, name: str, source: Path | None) -> None:
    """The stitched ResNets, fitted or released, with measured accuracies and cascades; and images to send."""
    if name == "released_resnets" and source is None:
        raise SystemExit("the released ResNets are served from --released FOLDER, which make release writes")
    import register_cifar_resnet  # noqa: F401  # registers the family
    from datasets import Dataset
    from reproduce_anchors import batches, find

    train, test = (
        Dataset.from_parquet([str(file) for file in find(given.data, f"{split}-*.parquet")])
        for split in ("train", "test")
    )
    if source is None:
        anchors = [
            {"architecture": f"cifar_resnet{layers}", "weights": find(given.weights, f"resnet{layers}-*.th")[0]}
            for layers in LAYERS
        ]
        model = stitchable.from_anchors(anchors, stages=[0, 1, 2], num_labels=10)
        stitchable.initialize_stitches(model, batches(train.select(range(100)), model.config), num_samples=100)
    else:
        model = stitchable.StitchableForImageClassification.from_pretrained(source, trust_remote_code=True)
        model.eval().cascades = []
        model.config.trained_on = model.config.latency = None
        model.config.id2label = {number: f"LABEL_{number}" for number in range(10)}  # as the fitted ones have them
    stitchable.find_cascades(model, list(batches(test.select(range(given.num_measured)), model.config)))
    sent = test.select(range(given.num_measured, given.num_measured + given.num_sent))
    images = given.folder / "images"
    images.mkdir(exist_ok=True)
    for number, image in enumerate(sent["img"]):
        image.save(images / f"{number}.png")
    save_repository(model, given.folder / name, image_processor(model.config, crop_pct=1.0), Card(name))
    (given.folder / "labels.json").write_text(json.dumps(list(sent["label"])), encoding="utf-8")


def prepare_deit(folder: Path) -> None:
    """DeiT-Ti/S/B with random weights; the larger is taken to be the better."""
    model = stitchable.from_anchors(DEIT, pretrained=False)
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": round(0.5 + (stitch.flops or 0) / 1e11, 4)})
    save_repository(model, folder / "deit", image_processor(model.config), Card("deit"))


# ---------------------------------------------------------------- the server and its load


@contextlib.contextmanager
def served(folder: Path, slo_ms: float = 10_000) -> Iterator[tuple[httpx.Client, int]]:
    """A client of `stitchable serve`, and the process id."""
    command = [sys.executable, "-W", "ignore", "-m", "stitchable_cli", "serve", str(folder), "--trust-remote-code"]
    command += ["--slo-ms", str(slo_ms), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            with httpx.Client(base_url=line.split()[-1], timeout=60, trust_env=False) as client:
                for _ in range(200):
                    with contextlib.suppress(httpx.ConnectError):
                        client.get("/readyz").raise_for_status()
                        break
                    time.sleep(0.05)
                yield client, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def send(
    client: httpx.Client, folder: Path, arrivals: Arrivals, num_images: int, path: str = "/v1/classify", broken: int = 0
) -> list[dict[str, Any]]:
    """What became of a trace of requests that locust sent; every so many are broken."""
    plan = {
        "images": str((folder / "images").absolute()),
        "num_images": num_images,
        "arrivals": arrivals.tolist(),
        "path": path,
        "broken_every": broken,
        "output": str((folder / "rows.json").absolute()),
    }
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "locust", "-f", str(Path(__file__).with_name("serving_load.py"))]
    command += ["--headless", "--host", str(client.base_url).rstrip("/"), "-u", str(USERS), "-r", str(USERS)]
    command += ["--run-time", f"{arrivals[-1] + 30:.0f}s", "--only-summary", "--loglevel", "WARNING"]
    environment = {**os.environ, "SERVING_PLAN": str(folder / "plan.json")}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return sorted(rows, key=lambda row: row["due"])


def summarise(rows: list[dict[str, Any]], slo_ms: float, labels: list[int] | None, worth: dict[str, float]) -> dict:
    """Attainment by the client's clock, accuracy of the answers in time, by labels and as the stitch table expects."""
    in_time = [row for row in rows if row["status"] == 200 and row["ms"] <= slo_ms]
    taken = [row["ms"] for row in rows if row["status"] == 200]
    right = [row["label"] == f"LABEL_{labels[row['image']]}" for row in in_time] if labels else []
    return {
        "requests": len(rows),
        "attainment": round(len(in_time) / len(rows), 4),
        "accuracy_by_labels": round(statistics.mean(right), 4) if right else None,
        "accuracy_expected": round(statistics.mean(worth[row["ran"]] for row in in_time), 4) if in_time else None,
        "p50_p95_p99_ms": [round(x, 2) for x in np.percentile(taken, (50, 95, 99)).tolist()] if taken else None,
        "refused": sum(row["status"] == 503 for row in rows),
        "answers": dict(Counter(row["ran"] for row in in_time).most_common(8)),
        "sent_late_ms_p99": round(float(np.percentile([row["late_ms"] for row in rows], 99)), 2),
    }


def measure(given: argparse.Namespace, name: str, soak: bool = True) -> dict[str, Any]:
    """All figures of one model."""
    folder = given.folder
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    with served(folder / name) as (client, pid):
        before = client.get("/v1/stitches").json()
        anchors = range(3 if name == "deit" else 4)
        largest, smallest = max(anchors), min(anchors)
        slo_ms = TARGET * before[largest]["latency_ms"]
        client.put("/v1/target", json={"slo_ms": slo_ms}).raise_for_status()
        overhead = {str(i): measure_overhead(client, folder, name, i) for i in (smallest, largest)}
        # So that the smallest anchor in batches of 8, with the HTTP of each request, can carry 5 times the mean.
        row = before[smallest]
        alone = row["latency_ms"] - row["per_image_ms"]
        rate = 1e3 / (6 * (row["per_image_ms"] + alone / 8 + overhead[str(smallest)]["overhead_ms"]))
        arrivals = make_trace("bursty", rate, given.seconds, seed=0)
        own_labels = None if name == "deit" else labels
        worth = {row["name"]: row["accuracy"] for row in before}
        real = {}
        for server, path in {
            "policy": "/v1/classify",
            "largest anchor alone": f"/v1/classify?stitch_id={largest}",
            "smallest anchor alone": f"/v1/classify?stitch_id={smallest}",
        }.items():
            rows = send(client, folder, arrivals, given.num_sent, path)
            real[server] = summarise(rows, slo_ms, own_labels, worth)
            print(name, server, real[server], flush=True)
        after = client.get("/v1/stitches").json()
        simulated = simulate(after, list(anchors), arrivals, slo_ms)
        result = {
            "slo_ms": round(slo_ms, 2),
            "requests_per_second": round(rate, 1),
            "overhead_ms": overhead,
            "real": real,
            "simulated": simulated,
        }
        if soak:
            result["soak"] = measure_soak(client, pid, folder, rate / 2, given)
    print(json.dumps(result, indent=1), flush=True)
    return result


def simulate(rows: list[dict[str, Any]], anchors: list[int], arrivals: Arrivals, slo_ms: float) -> dict[str, Any]:
    """What the simulator says of the same trace with the latencies that the server has seen."""
    choices = [
        Choice(
            row["kind"],
            row["id"],
            row["accuracy"],
            row["flops"],
            (row["latency_ms"] - row["per_image_ms"]) / 1e3,
            row["per_image_ms"] / 1e3,
            row["worst"],
        )
        for row in rows
    ]
    outcomes = compare(choices, anchors, arrivals, slo_ms / 1e3)
    return {
        name: {key: None if value is None else round(value, 4) for key, value in outcome.summary().items()}
        for name, outcome in outcomes.items()
        if name in ("policy", "oracle", "load threshold") or name.startswith("anchor")
    }


def measure_overhead(
    client: httpx.Client, folder: Path, name: str, stitch_id: int, num_blocks: int = 20, num_runs: int = 20
) -> dict[str, float]:
    """Median milliseconds of a request alone, and of calling the model on its pixel values: blocks of both in turns.

    In blocks, because a processor runs what it has just run faster than what another process has pushed out of its
    caches; by Python's own HTTP client, because httpx takes as long as the server.
    """
    from stitchable import StitchableForImageClassification

    model = StitchableForImageClassification.from_pretrained(folder / name, trust_remote_code=True).eval()
    pixel_values = torch.randn(1, 3, *model.config.image_size)
    content, headers = (folder / "images" / "0.png").read_bytes(), {"Content-Type": "image/png"}
    seconds: dict[str, list[float]] = {"request_ms": [], "run_ms": [], "model_ms": []}
    for _ in range(num_blocks):
        connection = HTTPConnection(client.base_url.host, client.base_url.port)  # the server closes one that is idle
        connection.connect()
        for _ in range(num_runs):
            began = time.perf_counter()
            connection.request("POST", f"/v1/classify?slo_ms=10000&stitch_id={stitch_id}", content, headers)
            answer = json.loads(connection.getresponse().read())
            seconds["request_ms"].append(1e3 * (time.perf_counter() - began))
            seconds["run_ms"].append(answer["run_ms"])
        connection.close()
        with torch.inference_mode():
            for _ in range(num_runs):
                began = time.perf_counter()
                model(pixel_values, stitch_id=stitch_id)
                seconds["model_ms"].append(1e3 * (time.perf_counter() - began))
    medians = {key: round(statistics.median(values), 3) for key, values in seconds.items()}
    return {**medians, "overhead_ms": round(medians["request_ms"] - medians["model_ms"], 3)}


def measure_soak(
    client: httpx.Client, pid: int, folder: Path, rate: float, given: argparse.Namespace
) -> dict[str, Any]:
    """Many minutes with 1 % of broken requests: whether each answer is that of its image, and the server's memory."""
    send(client, folder, make_trace("bursty", rate, min(given.soak, 20), seed=1), given.num_sent, broken=100)
    began = resident_mb(pid)
    rows = send(client, folder, make_trace("bursty", rate, given.soak, seed=2), given.num_sent, broken=100)
    memory = [began, resident_mb(pid)]
    sound = [row for row in rows if row["status"] == 200]
    truth = predictions(folder, given.num_sent, sorted({row["stitch_id"] for row in sound}))
    return {
        "seconds": given.soak,
        "requests": len(rows),
        "statuses": dict(Counter(str(row["status"]) for row in rows)),
        "broken_answered_otherwise_than_400": sum(row["broken"] and row["status"] != 400 for row in rows),
        "answers_of_another_image": sum(
            row["label"] != f"LABEL_{truth[row['stitch_id']][row['image']]}" for row in sound
        ),
        "memory_mb_before_and_after": memory,
    }


def predictions(folder: Path, num_images: int, ids: list[int]) -> dict[int, list[int]]:
    """The class that each of some stitches says of each image, without a server."""
    from stitchable import StitchableForImageClassification
    from stitchable.evaluation import run_stitches
    from stitchable.serving.images import reader

    model = StitchableForImageClassification.from_pretrained(folder / "cifar10_resnets", trust_remote_code=True).eval()
    read = reader(image_processor(model.config, crop_pct=1.0))
    said: dict[int, list[int]] = {i: [] for i in ids}
    for first in range(0, num_images, 100):
        numbers = range(first, min(first + 100, num_images))
        pixel_values = torch.stack([read((folder / "images" / f"{n}.png").read_bytes()) for n in numbers])
        with torch.inference_mode():
            for stitch_id, logits in run_stitches(model, pixel_values, ids):
                said[stitch_id] += logits.argmax(-1).tolist()
    return said


def resident_mb(pid: int) -> float:
    """Resident memory of a process, in 10^6 bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


if __name__ == "__main__":
    main()
