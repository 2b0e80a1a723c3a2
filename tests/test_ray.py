"""`stitchable serve --ray`: two replicas on this machine, and one that dies under load."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from test_serving import LONG, measured_model, noise, save, wait_for

pytestmark = pytest.mark.slow
PATIENCE = 180.0


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, psutil.Process]]:
    """The address, and the process that started all others."""
    place = tmp_path_factory.mktemp("ray")
    folder = save(measured_model(), place / "tiny")
    with httpx.Client(trust_env=False) as client, (place / "log").open("w", encoding="utf-8") as log:
        port = _free_port()
        command = [sys.executable, "-W", "ignore", "-m", "stitchable_cli", "serve", str(folder), "--ray"]
        command += ["--replicas", "2", "--port", str(port), "--slo-ms", "20000", "--threads", "1"]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + PATIENCE
        while not _ready(client, url):
            assert process.poll() is None, (place / "log").read_text(encoding="utf-8")
            assert time.monotonic() < end, (place / "log").read_text(encoding="utf-8")
            time.sleep(1)
        yield url, psutil.Process(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(LONG)


def _free_port() -> int:
    from stitchable.serving import server

    with server.bind("127.0.0.1", 0) as bound:
        return bound.getsockname()[1]


def _ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/readyz", timeout=10).json() == {"ready": True}
    except (httpx.HTTPError, ValueError):
        return False


def replicas(root: psutil.Process) -> list[psutil.Process]:
    named = "ServeReplica:default:Replica"
    return [child for child in root.children(recursive=True) if named in " ".join(child.cmdline()[:1])]


def test_two_replicas_answer_as_one_server_does(served) -> None:
    url, root = served
    wait_for(lambda: len(replicas(root)) == 2)
    with httpx.Client(base_url=url, timeout=LONG, trust_env=False) as client:
        found = client.post("/v1/classify?stitch_id=3&top_k=2", content=noise(0)).json()
        assert found["ran"] == "stitch 3"
        assert len(found["labels"]) == 2
        assert client.post("/v1/classify", content=b"").status_code == 400
        assert client.post("/v1/classify", content=bytes(20 * 2**20)).status_code == 413
        assert client.get("/v1/stitches").json()[0]["name"] == "stitch 0"
        assert "<title>stitchable</title>" in client.get("/").text


def test_a_replica_that_dies_under_load_costs_no_answer(served) -> None:
    url, root = served
    wait_for(lambda: len(replicas(root)) == 2)
    statuses: Counter[int] = Counter()
    stop = time.monotonic() + 8

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, timeout=LONG, trust_env=False) as client:
            while time.monotonic() < stop:
                statuses[client.post("/v1/classify", content=noise(number)).status_code] += 1

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, number) for number in range(8)]
        wait_for(lambda: statuses[200] > 50)
        replicas(root)[0].kill()
        for each in asking:
            each.result()
    assert set(statuses) == {200}, statuses
    end = time.monotonic() + PATIENCE
    while len(replicas(root)) < 2:  # Ray starts another one
        assert time.monotonic() < end
        time.sleep(1)
