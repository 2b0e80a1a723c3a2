"""Claim: the search for cascades of 71 stitches on 50,000 images takes less than a minute after the pass over them, and
less than 2 GB of memory; with 1,000 classes it does not yet.

    python benchmarks/cascade_search.py

The two-fold search (on all images, and on each half for the other) in one thread, on logits of 100 and of 1,000 classes
that are made up (the latter take 7 GB of the temporary folder): all stitches are unsure of the same images, and the
dearer ones are better. CPU seconds are stored beside elapsed ones, since they do not depend on what else the machine
does; memory is the peak of the process so far, imports included.
"""

import resource
import time
from typing import Any

import numpy as np
import torch
from report import write_report

from stitchable.cascade_search import search_two_fold
from stitchable.cascade_stages import Costs
from stitchable.cascades import LogitFile


def main() -> None:
    """Measure, print and store."""
    torch.set_num_threads(1)
    figures = []
    for num_labels in (100, 1000):
        figures.append(search_time(num_labels=num_labels))
        print(figures[-1], flush=True)
    print(f"wrote {write_report('cascade_search', figures)}")


def search_time(num_stitches: int = 71, num_images: int = 50_000, num_labels: int = 100) -> dict[str, Any]:
    """Seconds of the whole two-fold search, one thread, on logits that are made up: surer and dearer together."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, num_labels, num_images)
    flops = np.sort(np.exp(generator.uniform(0, 3, num_stitches)))
    ease = 3.5 + 2 * generator.standard_normal(num_images)
    with LogitFile(range(num_stitches)) as logits:
        for start in range(0, num_images, 500):
            part = slice(start, start + 500)
            noise = generator.standard_normal((num_stitches, 500, num_labels), dtype=np.float32) * 1.5
            right = ease[part] + 0.6 * np.log(flops)[:, None] + generator.standard_normal((num_stitches, 500))
            noise[:, np.arange(500), labels[part]] += right.astype(np.float32)
            logits.append(list(torch.from_numpy(noise)))
        shared = np.minimum.outer(flops, flops) * 0.3
        np.fill_diagonal(shared, flops)
        started, before = time.perf_counter(), time.process_time()
        found = search_two_fold(logits, labels, Costs(flops, shared))
        seconds, cpu = time.perf_counter() - started, time.process_time() - before
    result = {
        "stitches": num_stitches,
        "images": num_images,
        "classes": num_labels,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "on_the_front": len(found.candidates),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    return result


if __name__ == "__main__":
    main()
