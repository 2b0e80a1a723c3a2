"""The server: real requests over the loopback interface to a real model (see test_policy.py, test_simulator.py)."""

import asyncio
import base64
import io
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import BadRequestError
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from families import make
from odd_images import broken, picture, readable
from stitchable.card import Card
from stitchable.processing import image_processor
from stitchable.publishing import save_repository
from stitchable.serving import bodies, server, statistics
from stitchable.serving.engine import Engine
from stitchable.serving.http import create_app
from stitchable.serving.images import MAX_BYTES, decode, reader
from stitchable.serving.statistics import Statistics
from stitchable_cli import app

LONG = 60.0  # seconds: a target that no machine misses
PNG = {"Content-Type": "image/png"}


def measured_model():
    model = make("vit", id2label={i: f"class {i}" for i in range(5)})
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": round((stitch.flops or 0) / 1e6, 4)})
    return model


class Served:
    """An application that is served in a thread, and what a client needs of it."""

    def __init__(self, target: float = LONG, token: str | None = None, model: Any = None, **options: int) -> None:
        model = model or measured_model()
        self.model = model
        self.processor = image_processor(model.config, crop_pct=1.0)
        self.engine = Engine(model, self.processor, target, **options)
        self.server = server.make_server(create_app(self.engine, "tiny", token))
        self.bound = server.bind("127.0.0.1", 0)
        self.port = self.bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.bound]})

    def __enter__(self) -> "Served":
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.client = httpx.Client(base_url=self.url, timeout=LONG, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.stop()
        self.bound.close()

    def stop(self) -> None:
        """What SIGTERM does."""
        self.server.should_exit = True
        self.thread.join(LONG)
        assert not self.thread.is_alive()

    @contextmanager
    def busy_device(self) -> Iterator[None]:
        """Nothing runs within the block: the device has something else to do."""
        release, begun = threading.Event(), threading.Event()

        def occupy() -> None:
            begun.set()
            release.wait(LONG)

        self.engine._device.submit(occupy)
        begun.wait(LONG)
        try:
            yield
        finally:
            release.set()

    def wait_for_a_batch(self) -> None:
        """Until a batch is chosen, and waits for the busy device."""
        wait_for(lambda: self.engine._device._work_queue.qsize() == 1)

    def expected(self, content: bytes, stitch_id: int) -> list[float]:
        with torch.inference_mode():
            pixel_values = reader(self.processor)(content)[None]
            return self.model(pixel_values, stitch_id=stitch_id).logits.softmax(-1)[0].tolist()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def png(image: Image.Image | None = None) -> bytes:
    content = io.BytesIO()
    (image or picture()).save(content, "PNG")
    return content.getvalue()


def noise(seed: int) -> bytes:
    return png(Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype="uint8")))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served() as served:
        yield served


def check(answer: httpx.Response, served: Served, content: bytes) -> dict:
    assert answer.status_code == 200, answer.text
    found = answer.json()
    scores = served.expected(content, found["stitch_id"])
    best = sorted(range(5), key=lambda i: -scores[i])[: len(found["labels"])]
    assert [label["label"] for label in found["labels"]] == [f"class {i}" for i in best]
    assert [label["score"] for label in found["labels"]] == pytest.approx([scores[i] for i in best], abs=1e-5)
    assert found["ran"] == f"stitch {found['stitch_id']}"
    stitch = served.model.stitches[found["stitch_id"]]
    assert (found["accuracy"], found["flops"]) == (stitch.metrics["accuracy"], stitch.flops)
    return found


def test_an_image_is_answered_whichever_way_it_comes(served) -> None:
    content = noise(0)
    in_base64 = base64.b64encode(content).decode()
    answers = [
        served.client.post("/v1/classify", content=content, headers=PNG),
        served.client.post("/v1/classify", content=content),  # without a content type
        served.client.post("/v1/classify", files={"image": content}),
        served.client.post("/v1/classify", json={"image": in_base64}),
    ]
    for answer in answers:
        found = check(answer, served, content)
        assert len(found["labels"]) == 5
        assert found["stitch_id"] == 4  # the most accurate
        assert found["batch_size"] == 1
        assert found["in_time"]
        assert found["run_ms"] > 0
        assert found["queue_ms"] > 0


def test_options_stand_in_the_query_the_form_or_the_json(served) -> None:
    content = noise(1)
    in_base64 = base64.b64encode(content).decode()
    for answer in (
        served.client.post("/v1/classify?top_k=2&stitch_id=3", content=content, headers=PNG),
        served.client.post("/v1/classify", files={"image": content}, data={"top_k": "2", "stitch_id": "3"}),
        served.client.post("/v1/classify", json={"image": in_base64, "top_k": 2, "stitch_id": 3}),
    ):
        found = check(answer, served, content)
        assert found["stitch_id"] == 3
        assert len(found["labels"]) == 2


def test_a_request_may_bound_accuracy_and_cost(served) -> None:
    content = noise(2)
    least = served.model.stitches[3].metrics["accuracy"]
    found = check(served.client.post(f"/v1/classify?min_accuracy={least}", content=content), served, content)
    assert found["accuracy"] >= least
    most = served.model.stitches[0].flops
    found = check(served.client.post(f"/v1/classify?mean_flops={most}", content=content), served, content)
    assert found["stitch_id"] == 0


def test_answers_are_not_mixed_up(served) -> None:
    def ask(number: int) -> tuple[int, httpx.Response, bytes]:
        content, wanted = noise(number), (None, 0, 3)[number % 3]
        query = "" if wanted is None else f"?stitch_id={wanted}"
        return number, served.client.post(f"/v1/classify{query}", content=content), content

    with ThreadPoolExecutor(16) as pool:
        sizes = []
        for number, answer, content in pool.map(ask, range(60)):
            found = check(answer, served, content)
            sizes.append(found["batch_size"])
            assert number % 3 == 0 or found["stitch_id"] == (number % 3 == 2) * 3


def test_requests_that_wait_run_together(served) -> None:
    contents = [noise(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        with served.busy_device():
            first = pool.submit(served.client.post, "/v1/classify", content=contents[0])
            served.wait_for_a_batch()
            rest = [pool.submit(served.client.post, "/v1/classify", content=content) for content in contents[1:]]
            wait_for(lambda: served.engine.queue_length == 7)
        sizes = [
            check(answer.result(), served, content)["batch_size"]
            for answer, content in zip((first, *rest), contents, strict=True)
        ]
    assert sorted(sizes) == [1, 1, 2, 2, 4, 4, 4, 4]


def test_odd_images_are_answered(served, tmp_path) -> None:
    for path, shown in readable(tmp_path).values():
        answer = served.client.post("/v1/classify", content=path.read_bytes())
        check(answer, served, png(shown))


def big_png() -> bytes:
    return png(Image.new("1", (6000, 6000)))


def bomb() -> bytes:
    return png(Image.new("1", (20_000, 20_000)))


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"", PNG, 400, "the body is empty"),
        (b"This is no image.", PNG, 400, "the body is no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, 400, "the body is no image"),
        ("truncated", PNG, 400, "the image cannot be read"),
        ("line", PNG, 400, "more than 50 times the other"),
        ("float", {}, 400, "floating-point"),
        (big_png, PNG, 413, "32,000,000 pixels, this one has 6000x6000"),
        (bomb, PNG, 413, "pixels"),
        (bytes(20 * 2**20), PNG, 413, "an image may have 10 MiB"),
        (bytes(MAX_BYTES + 1), PNG, 413, "an image may have 10 MiB"),
        (b"x", {"Content-Type": "text/plain"}, 415, "'text/plain' holds no image; send image/jpeg"),
        (b"{", {"Content-Type": "application/json"}, 400, "no JSON"),
        (b"[" * 100_000, {"Content-Type": "application/json"}, 400, "no JSON"),
        (b"[1]", {"Content-Type": "application/json"}, 400, "an object with 'image' in base64"),
        (b'{"image": "%"}', {"Content-Type": "application/json"}, 400, "'image' is no base64"),
        (b'{"inputs": "", "parameters": 3}', {"Content-Type": "application/json"}, 400, "must be an object"),
        (b'{"image": ""}', {"Content-Type": "application/json"}, 400, "the body is empty"),
        (b"x", {"Content-Type": "multipart/form-data"}, 400, "the form cannot be read"),
        (b"x", {"Content-Type": "multipart/form-data; boundary=y"}, 400, "form"),
    ],
)
def test_a_bad_body_gets_a_clear_error(content, headers, status, message, served, tmp_path) -> None:
    if isinstance(content, str):
        content = broken(tmp_path)[content].read_bytes()
    answer = served.client.post("/v1/classify", content=content() if callable(content) else content, headers=headers)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]
    check(served.client.post("/v1/classify", content=noise(3)), served, noise(3))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("stitch_id=99", "this model has stitches 0..8; the nearest is 8"),
        ("stitch_id=three", "stitch_id: Input should be a valid integer"),
        ("slo_ms=0.0001", "no answer is possible within 0.0001 ms: the quickest that may give it, stitch "),
        ("slo_ms=-1", "slo_ms: Input should be greater than 0"),
        ("slo_ms=nan", "slo_ms"),
        ("min_accuracy=0.99", "no measured stitch or cascade has min_accuracy 0.99; the most accurate is stitch 4"),
        ("mean_flops=5", "the cheapest stitch 0 with"),
        ("min_accuracy=2", "min_accuracy"),
        ("top_k=0", "top_k"),
        ("top=5", "top: Extra inputs are not permitted"),
    ],
)
def test_options_that_cannot_be_met_are_refused(query, message, served) -> None:
    answer = served.client.post(f"/v1/classify?{query}", content=noise(0))
    assert answer.status_code == 400
    assert message in answer.json()["detail"]


def test_the_hubs_client_works(served, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # this machine is not the Hub
    content = noise(5)
    (tmp_path / "image.png").write_bytes(content)
    client = InferenceClient(model=f"{served.url}/hub")
    scores = served.expected(content, 4)
    for image in (content, tmp_path / "image.png"):
        found = client.image_classification(image)
        assert [element.label for element in found] == [
            f"class {i}" for i in sorted(range(5), key=lambda i: -scores[i])
        ]
        assert found[0].score == pytest.approx(max(scores), abs=1e-5)
    assert len(client.image_classification(content, top_k=2, function_to_apply="softmax")) == 2
    with pytest.raises(BadRequestError, match="function_to_apply can only be 'softmax'"):
        client.image_classification(content, function_to_apply="sigmoid")
    headers = served.client.post("/hub", content=content).headers
    assert headers["X-Stitchable-Ran"] == "stitch 4"
    assert headers["X-Stitchable-Stitch"] == "4"
    assert float(headers["X-Stitchable-Run-Ms"]) > 0
    assert float(headers["X-Stitchable-Queue-Ms"]) > 0


def test_what_can_run_is_listed(served) -> None:
    rows = served.client.get("/v1/stitches").json()
    assert [row["id"] for row in rows] == list(range(9))
    assert all(row["latency_ms"] >= row["per_image_ms"] > 0 and row["kind"] == "stitch" for row in rows)
    assert {4} <= {row["id"] for row in rows if row["on_front"]} < set(range(9))


def test_cascades_are_choices_like_stitches() -> None:
    model = measured_model()
    small, large = model.stitches[0], model.stitches[1]
    stages = [
        {"stitch": 0, "flops": small.flops, "score": "margin", "threshold": 1.0},
        {"stitch": 1, "flops": large.flops, "reached": 0.5},
    ]
    costs = {"flops": small.flops + 0.125, "max_flops": small.flops + large.flops}
    model.cascades = [{"id": 3, "stages": stages, **costs, "metrics": {"accuracy": 0.99}}]
    with Served(model=model) as served:
        (row,) = [row for row in served.client.get("/v1/stitches").json() if row["kind"] == "cascade"]
        assert (row["id"], row["flops"], row["on_front"]) == (3, small.flops + 0.125, True)
        assert row["worst"] > 1
        found = served.client.post("/v1/classify", content=noise(0)).json()
        assert (found["ran"], found["stitch_id"]) == ("cascade 3", 1)  # no image's margin reaches 1
        assert found["flops"] == small.flops + large.flops
        best = max(found["labels"], key=lambda label: label["score"])
        assert best["score"] == pytest.approx(max(served.expected(noise(0), 1)), abs=1e-5)


def test_health_metrics_and_the_api_page(served) -> None:
    assert served.client.get("/healthz").json() == {"status": "ok"}
    assert served.client.get("/readyz").json() == {"ready": True}
    check(served.client.post("/v1/classify?stitch_id=2", content=noise(0)), served, noise(0))
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(served.client.get("/metrics").text)
        for sample in family.samples
    }
    assert samples["stitchable_requests_total", "in_time"] >= 1
    assert samples["stitchable_answers_total", "stitch 2"] >= 1
    assert samples["stitchable_latency_seconds_count",] >= samples["stitchable_run_seconds_count",] >= 1
    assert samples["stitchable_queue_length",] == 0
    assert samples["stitchable_attainment",] == 1
    api = served.client.get("/openapi.json").json()
    classify = api["paths"]["/v1/classify"]["post"]
    assert {"image/*", "multipart/form-data", "application/json"} == set(classify["requestBody"]["content"])
    assert {row["name"] for row in classify["parameters"]} == {
        *("top_k", "slo_ms", "min_accuracy", "stitch_id", "mean_flops")
    }
    assert served.client.get("/docs").status_code == 200


def test_the_target_can_be_changed(served) -> None:
    status = served.client.get("/v1/status").json()
    assert status["slo_ms"] == 1e3 * LONG
    assert served.client.put("/v1/target", json={"slo_ms": 2e3 * LONG}).status_code == 200
    assert served.client.get("/v1/status").json()["slo_ms"] == 2e3 * LONG
    answer = served.client.put("/v1/target", json={"slo_ms": status["least_slo_ms"] / 100})
    assert answer.status_code == 400
    assert "no answer is possible" in answer.json()["detail"]
    served.client.put("/v1/target", json={"slo_ms": 1e3 * LONG})


def test_switching_allocates_no_weights(served) -> None:
    before = [tensor.data_ptr() for tensor in served.model.state_dict().values()]
    for stitch in served.model.stitches:
        check(served.client.post(f"/v1/classify?stitch_id={stitch.id}", content=noise(0)), served, noise(0))
    assert [tensor.data_ptr() for tensor in served.model.state_dict().values()] == before


def test_a_device_that_fails_costs_one_batch(served) -> None:
    def fail(*_: object) -> None:
        handle.remove()
        raise RuntimeError("out of memory")

    handle = served.model.register_forward_pre_hook(fail)
    answer = served.client.post("/v1/classify", content=noise(0))
    assert answer.status_code == 500
    assert answer.json()["detail"] == "stitch 4 failed: out of memory"
    check(served.client.post("/v1/classify", content=noise(0)), served, noise(0))


def test_a_loop_that_ends_by_a_fault_leaves_nobody_waiting(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a fault of ours")

    with Served() as served, ThreadPoolExecutor(2) as pool:
        with served.busy_device():
            first = pool.submit(served.client.post, "/v1/classify", content=noise(0))
            served.wait_for_a_batch()
            second = pool.submit(served.client.post, "/v1/classify", content=noise(1))
            wait_for(lambda: served.engine.queue_length == 1)
            monkeypatch.setattr(served.engine.policy, "decide", fail)
        check(first.result(), served, noise(0))
        for answer in (second.result(), served.client.post("/v1/classify", content=noise(2))):
            assert answer.status_code == 503
            assert "must be started again" in answer.json()["detail"]
        assert served.client.get("/readyz").status_code == 503


def test_a_client_that_hangs_up_is_not_computed_for(served) -> None:
    def gone() -> int:
        return served.engine.statistics.last_minute()["ends"].get("gone", 0)

    with ThreadPoolExecutor(2) as pool, served.busy_device():
        first = pool.submit(served.client.post, "/v1/classify", content=noise(0))  # its batch has begun
        served.wait_for_a_batch()
        before = gone()
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            content = noise(1)
            head = f"POST /v1/classify HTTP/1.1\r\nHost: here\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            wait_for(lambda: served.engine.queue_length == 1)
        wait_for(lambda: gone() == before + 1)
        second = pool.submit(served.client.post, "/v1/classify", content=noise(2))
        wait_for(lambda: served.engine._inside == 2)
        wait_for(lambda: served.engine.queue_length == 2)  # the one that is gone is swept when the device is free
    check(first.result(), served, noise(0))
    assert check(second.result(), served, noise(2))["batch_size"] == 1


def test_connections_that_send_nothing_do_not_block_others(served, monkeypatch) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.5)
    silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(1000)]
    for connection in silent[:500]:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\n")  # and no more
    check(served.client.post("/v1/classify", content=noise(0)), served, noise(0))
    for connection in silent:
        connection.settimeout(LONG)
        assert connection.recv(1) == b""  # closed by the server
        connection.close()
    check(served.client.post("/v1/classify", content=noise(0)), served, noise(0))


def test_a_connection_that_trickles_after_an_answer_is_closed(served, monkeypatch) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.settimeout(LONG)
        for _ in range(2):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
            answer = b""
            while b"}" not in answer:
                answer += connection.recv(4096)
        connection.sendall(b"G")  # and no more, for which uvicorn alone would wait
        assert connection.recv(1) == b""


def test_a_body_that_does_not_come_is_given_up(served, monkeypatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\nabc")
        answer = b""
        while b"}" not in answer:
            answer += connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"did not come within 0.2 seconds" in answer


def test_a_token_is_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Served(token="a secret") as served:
        for method, path in (("POST", "/v1/classify"), ("POST", "/hub"), ("GET", "/v1/stitches"), ("GET", "/metrics")):
            for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": "Basic a secret"}):
                answer = served.client.request(method, path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        right = {"Authorization": "Bearer a secret"}
        check(served.client.post("/v1/classify", content=noise(0), headers=right), served, noise(0))
        client = InferenceClient(model=f"{served.url}/hub", token="a secret")
        assert len(client.image_classification(noise(0))) == 5
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert served.client.get(path).status_code == 200


def test_what_cannot_be_answered_in_time_is_refused() -> None:
    with Served(max_queue=3) as served, ThreadPoolExecutor(3) as pool:
        with served.busy_device():
            first = pool.submit(served.client.post, "/v1/classify", content=noise(0))
            served.wait_for_a_batch()
            hurried = pool.submit(served.client.post, "/v1/classify?slo_ms=50", content=noise(1))
            patient = pool.submit(served.client.post, "/v1/classify", content=noise(2))
            wait_for(lambda: served.engine.queue_length == 2)
            full = served.client.post("/v1/classify", content=noise(3))
            assert full.status_code == 503
            assert full.json()["detail"] == "the queue is full: 3 requests wait"
            assert full.headers["Retry-After"] == "1"
            time.sleep(0.05)  # the deadline passes
        assert hurried.result().status_code == 503
        assert "cannot be answered within 50 ms" in hurried.result().json()["detail"]
        check(first.result(), served, noise(0))
        check(patient.result(), served, noise(2))
        ends = served.client.get("/v1/status").json()["last_minute"]["ends"]
        assert ends == {"in_time": 2, "shed": 1, "refused": 1}


def test_a_server_that_stops_answers_what_it_accepted() -> None:
    with Served() as served, ThreadPoolExecutor(6) as pool:
        with served.busy_device():
            answers = [pool.submit(served.client.post, "/v1/classify", content=noise(i)) for i in range(5)]
            wait_for(lambda: served.engine._inside == 5)
            served.server.should_exit = True
            time.sleep(0.3)
        for number, answer in enumerate(answers):
            check(answer.result(), served, noise(number))
        served.thread.join(LONG)
        with pytest.raises(httpx.ConnectError):
            served.client.get("/healthz")


def test_a_target_that_no_stitch_can_hold_is_refused() -> None:
    model = measured_model()
    with pytest.raises(ValueError, match=r"no answer is possible within 0\.001 ms: the quickest"):
        Engine(model, image_processor(model.config), 1e-6)


def test_answers_leave_at_once(served) -> None:
    """Without TCP_NODELAY an answer of two packets waits 40 ms for the client's acknowledgement."""
    assert served.bound.proto == socket.IPPROTO_TCP
    seen = []
    original = server.ImpatientProtocol.connection_made

    def connection_made(self: server.ImpatientProtocol, transport: asyncio.Transport) -> None:
        seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        original(self, transport)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.ImpatientProtocol, "connection_made", connection_made)
        httpx.get(f"{served.url}/healthz", trust_env=False)
    assert seen
    assert all(seen)


def test_a_port_in_use_is_said() -> None:
    with server.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose"):
            server.bind("127.0.0.1", port)


def test_images_are_decoded_within_limits(tmp_path: Path) -> None:
    for path, shown in readable(tmp_path).values():
        assert decode(path.read_bytes()).tobytes() == shown.tobytes()


def test_the_last_minute_is_the_last_minute(monkeypatch) -> None:
    now = 1000.0
    monkeypatch.setattr(statistics.time, "monotonic", lambda: now)
    counts = Statistics()
    assert counts.last_minute()["attainment"] is None
    for end in ("in_time", "in_time", "late", "shed", "gone"):
        counts.ended(end, *(("stitch 1", 0.5) if end in ("in_time", "late") else ()))
    assert counts.last_minute()["attainment"] == 0.5
    assert counts.last_minute()["choices"] == {"stitch 1": 3}
    assert counts.last_minute()["accuracy"] == 0.5
    now = 1030.5
    counts.ended("in_time", "stitch 2", 1.0)
    assert counts.last_minute()["requests_per_second"] == [5, *[0] * 29, 1]
    assert counts.last_minute()["attainment"] == 0.6
    now = 1075.0
    assert counts.last_minute()["choices"] == {"stitch 2": 1}
    now = 9999.0
    assert counts.last_minute()["attainment"] is None
    assert len(counts.last_minute()["requests_per_second"]) == 60


def save(model, folder: Path) -> Path:
    save_repository(model, folder, image_processor(model.config, crop_pct=1.0), Card("tiny", "noise"))
    return folder


def test_the_command_says_what_is_wrong_before_it_serves(tmp_path) -> None:
    unmeasured = save(make("vit"), tmp_path / "unmeasured")
    with server.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in (
            ((str(unmeasured), "--port", "0"), "has a measured accuracy"),
            ((str(unmeasured), "--port", port), f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            ((str(unmeasured), "--slo-ms", "0"), "--slo-ms must be above 0"),
            ((str(unmeasured), "--slo-ms", "nan"), "--slo-ms must be above 0"),
            ((str(unmeasured), "--token", ""), "the token is empty"),
            ((str(unmeasured), "--ray", "--replicas", "0"), "--replicas must be a number from 1 on, or auto"),
            ((str(unmeasured), "--ray", "--replicas", "many"), "--replicas must be a number from 1 on, or auto"),
            (("no-such-folder", "--port", "0"), "find"),
            ((str(unmeasured), "--port", "0", "--device", "abacus"), "abacus"),
        ):
            result = CliRunner().invoke(app, ["serve", *arguments])
            assert result.exit_code == 1, arguments
            assert message in result.stderr
            assert "Traceback" not in result.output


@pytest.mark.slow
def test_the_command_serves_until_sigterm_and_answers_what_it_accepted(tmp_path) -> None:
    folder = save(measured_model(), tmp_path / "tiny")
    command = [sys.executable, "-W", "ignore", "-m", "stitchable_cli", "serve", str(folder), "--port", "0"]
    command += ["--slo-ms", "20000", "--threads", "1"]
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.fullmatch(r"tiny: 9 choices, target 20000 ms, http://127\.0\.0\.1:\d+\n", line), line
    url = line.split()[-1]
    statuses: Counter[str] = Counter()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=LONG, trust_env=False) as client:
            while True:
                try:
                    statuses[str(client.post("/v1/classify", content=noise(0)).status_code)] += 1
                except httpx.ConnectError:  # it has stopped to listen
                    return
                except httpx.RemoteProtocolError:  # it closed an idle connection on which a request was under way
                    statuses["closed"] += 1

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        wait_for(lambda: statuses["200"] > 100)
        process.send_signal(signal.SIGTERM)
        for each in asking:
            each.result()
    process.wait(LONG)
    process.stdout.close()
    assert statuses["closed"] <= 8
    assert set(statuses) <= {"200", "closed"}
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")
