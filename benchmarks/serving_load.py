"""What locust runs: requests at the times of a trace, each noted with its answer (see serving.py).

Each user takes the next arrival, waits for its time and sends the image; there are so many users that none is late.
"""

import json
import os
import time
from itertools import count
from pathlib import Path
from typing import Any

import gevent
from locust import FastHttpUser, constant, events, task

PLAN = json.loads(Path(os.environ["SERVING_PLAN"]).read_text(encoding="utf-8"))
IMAGES = [(Path(PLAN["images"]) / f"{number}.png").read_bytes() for number in range(PLAN["num_images"])]
ROWS: list[dict[str, Any]] = []
_numbers = count()
_start = 0.0


@events.test_start.add_listener
def _begin(**_: Any) -> None:
    global _start
    _start = time.perf_counter() + 3.0  # when all users are there


@events.quitting.add_listener
def _write(**_: Any) -> None:
    Path(PLAN["output"]).write_text(json.dumps(ROWS), encoding="utf-8")


class Visitor(FastHttpUser):
    """Sends what is due next."""

    wait_time = constant(0)
    connection_timeout = network_timeout = 30.0

    @task
    def send(self) -> None:
        number = next(_numbers)
        if number >= len(PLAN["arrivals"]):
            gevent.sleep(0.5)
            if not self.environment.runner.user_count or len(ROWS) >= len(PLAN["arrivals"]):
                self.environment.runner.quit()
            return
        due = _start + PLAN["arrivals"][number]
        gevent.sleep(max(0.0, due - time.perf_counter()))
        image = number % len(IMAGES)
        broken = PLAN["broken_every"] and number % PLAN["broken_every"] == 0
        content = IMAGES[image][:100] if broken else IMAGES[image]
        sent = time.perf_counter()
        with self.client.post(
            PLAN["path"], data=content, headers={"Content-Type": "image/png"}, catch_response=True
        ) as answer:
            row = {"image": image, "broken": bool(broken), "due": due - _start, "late_ms": 1e3 * (sent - due)}
            row |= {"ms": 1e3 * (time.perf_counter() - sent), "status": answer.status_code}
            if answer.status_code == 200:
                found = answer.json()
                row |= {name: found[name] for name in ("ran", "stitch_id", "run_ms", "queue_ms", "batch_size")}
                row["label"] = found["labels"][0]["label"]
            answer.success()  # the figures are taken from the rows
        ROWS.append(row)
