"""When requests arrive: seconds from the beginning, ascending. Pure numpy, each with a generator of its own."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrivals = NDArray[np.float64]
KINDS = ("poisson", "bursty", "diurnal")


def make_trace(kind: str, rate: float, seconds: float, seed: int = 0) -> Arrivals:
    """A trace of a kind, with `rate` requests per second on average.

    Args:
        kind: "poisson"; "bursty", which is quiet most of the time and in bursts of one to three seconds 3 to 5 times
            the mean; or "diurnal", a sine from 0.2 to 1.8 times the mean, one period long.
        rate: requests per second, the mean of the trace.
        seconds: its length.
        seed: of the draws.

    Raises:
        ValueError: another kind, a rate or length that is not above 0, or so little of them that no request arrives.
    """
    if kind not in KINDS:
        raise ValueError(f"a trace is {', '.join(KINDS)}, or a file of arrival times; got {kind!r}")
    if not (rate > 0 and seconds > 0 and math.isfinite(rate * seconds)):
        raise ValueError(f"rate and seconds of a trace must be above 0, got {rate} and {seconds}")
    rng = np.random.default_rng(seed)
    if kind == "poisson":
        arrivals = _thinned(rng, seconds, rate, lambda t: np.full_like(t, rate))
    elif kind == "diurnal":
        arrivals = _thinned(rng, seconds, 1.8 * rate, lambda t: rate * (1 - 0.8 * np.cos(2 * np.pi * t / seconds)))
    else:
        edges, rates = _bursts(rng, rate, seconds)
        arrivals = _thinned(rng, seconds, max(rates), lambda t: rates[np.searchsorted(edges, t, side="right") - 1])
    if not len(arrivals):
        raise ValueError(f"no request arrives in {seconds:g} s at {rate:g} per second; make one of them larger")
    return arrivals


def read_trace(path: str | Path) -> Arrivals:
    """A file with one arrival time per line, in seconds; the first request comes at 0.

    Raises:
        ValueError: no such file, or no numbers, or not finite ones; says in which line.
    """
    if not Path(path).is_file():
        raise ValueError(f"a trace is {', '.join(KINDS)}, or a file of arrival times; there is no file {path}")
    times = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            times.append(float(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: an arrival time is a number of seconds, got {line!r}") from None
        if not math.isfinite(times[-1]):
            raise ValueError(f"{path}, line {number}: an arrival time must be finite, got {line!r}")
    if not times:
        raise ValueError(f"{path} has no arrival times")
    arrivals = np.sort(np.array(times))
    return arrivals - arrivals[0]


def _bursts(rng: np.random.Generator, rate: float, seconds: float) -> tuple[Arrivals, Arrivals]:
    """Where the load changes, and the requests per second from there on: a tenth of the time is bursts."""
    edges, rates, now = [0.0], [1.0], 0.0
    while (now := now + rng.uniform(10, 30) * min(1.0, seconds / 60)) < seconds:
        length = min(rng.uniform(1, 3) * min(1.0, seconds / 60), seconds - now)
        edges += [now, now + length]
        rates += [rng.uniform(3, 5), 1.0]
        now += length
    lengths, levels = np.diff([*edges, seconds]), np.array(rates)
    in_bursts = levels > 1
    # What the bursts leave of the mean is the load of the quiet time.
    quiet = (seconds - (lengths * levels)[in_bursts].sum()) / lengths[~in_bursts].sum()
    levels[~in_bursts] = max(quiet, 0.1)
    return np.array(edges), rate * levels


def _thinned(rng: np.random.Generator, seconds: float, most: float, rate: Callable[[Arrivals], Arrivals]) -> Arrivals:
    """A Poisson process whose rate changes: drawn at its highest, of which a part is kept (Lewis and Shedler, 1979)."""
    times = np.sort(rng.uniform(0, seconds, rng.poisson(most * seconds)))
    return times[rng.uniform(0, most, len(times)) < rate(times)]
