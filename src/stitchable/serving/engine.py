"""The loop of the server: requests in, batches by the policy, answers out; one thread per device runs the model."""

import asyncio
import io
import sys
import time
from bisect import insort
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from transformers import BaseImageProcessor
from transformers.utils import logging

from stitchable.model.modeling_stitchable import StitchableForImageClassification
from stitchable.serving.choices import choices_of, front_of
from stitchable.serving.images import reader
from stitchable.serving.policy import Choice, Plan, Policy, Request
from stitchable.serving.statistics import Statistics

logger = logging.get_logger(__name__)

_FAILED = "this server has failed and must be started again"
_DECODERS = 2  # threads
_WARM_UP = 10.0  # seconds, of which a large model on a CPU could spend minutes
_WAY = 0.002  # seconds that a request and its answer spend in HTTP at the least, which are the deadline's too
_SWITCH = 0.0005  # seconds after which a thread gives way to another: with Python's 5 ms, HTTP waits for the model
_now = time.perf_counter  # a loop's own time may be of whole milliseconds (uvloop)


class Unavailable(Exception):
    """A request that this server cannot answer now, and why: shed, or met a full queue, or a server that stops."""


class Answer(NamedTuple):
    """Of one image.

    Attributes:
        scores: of every class, summing to 1.
        choice: the stitch or cascade that ran.
        stitch_id: the stitch whose answer this is: of a cascade the last stage that the image reached.
        flops: spent on this image.
        size: images of the batch.
        queue_seconds: from `arrived` until the batch began.
        run_seconds: of the batch.
        in_time: whether it was there by its deadline.
    """

    scores: list[float]
    choice: Choice
    stitch_id: int
    flops: float
    size: int
    queue_seconds: float
    run_seconds: float
    in_time: bool


@dataclass(eq=False)
class _Waiting:
    request: Request
    arrived: float
    deadline: float
    pixel_values: torch.Tensor
    answer: "asyncio.Future[Answer]"


class Engine:
    """Answers images with one model on one device.

    A loop on the event loop's thread asks the policy whenever the device is free; it waits for nothing but requests, so
    batches are as large as the load makes them. Images are decoded in threads of their own. Weights are never moved:
    which stitch runs is an argument of the model's call.

    Args:
        model: on its device; it is put into evaluation mode.
        processor: its image processor.
        target: seconds within which a request is to be answered unless it says otherwise.
        max_queue: requests that wait at a time; more are refused.

    Raises:
        ValueError: no stitch of the model has a measured accuracy, or none is quick enough for the target.
    """

    def __init__(
        self,
        model: StitchableForImageClassification,
        processor: BaseImageProcessor,
        target: float,
        max_queue: int = 256,
    ) -> None:
        self.model = model.eval()
        self.read = reader(processor)
        self.policy = Policy(choices_of(model), target, max_queue=max_queue)
        self.statistics = Statistics()
        self._device = ThreadPoolExecutor(1, "device")
        self._decoders = ThreadPoolExecutor(_DECODERS, "decoder")
        self._warm_up()
        self.check_target(target)
        self._queue: list[_Waiting] = []
        self._running: list[_Waiting] = []
        self._inside = 0  # requests that are decoded, wait or run
        self._wake = asyncio.Event()
        self._stopping = False
        self._loop: asyncio.Task[None] | None = None

    @property
    def queue_length(self) -> int:
        """Requests that wait for a batch."""
        return len(self._queue)

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._loop is not None and not self._loop.done() and not self._stopping

    @property
    def has_failed(self) -> bool:
        """Whether the loop has ended by a fault of ours."""
        return self._loop is not None and self._loop.done() and not self._stopping

    def quickest(self, permits: Callable[[Choice], bool] | None = None) -> tuple[Choice, float]:
        """Of the permitted choices the quickest for one image, and its seconds as they are of late, with HTTP."""
        permitted = [choice for choice in self.policy.choices if permits is None or permits(choice)]
        choice = min(permitted, key=lambda choice: choice.bound(1))
        return choice, choice.bound(1) * self.policy.scale + _WAY

    def check_target(self, seconds: float, permits: Callable[[Choice], bool] | None = None) -> None:
        """Refuse a target that even the quickest of the permitted choices misses on an idle device.

        Raises:
            ValueError: names the quickest.
        """
        quickest, least = self.quickest(permits)
        if not seconds > least:
            raise ValueError(
                f"no answer is possible within {1e3 * seconds:g} ms: the quickest that may give it, "
                f"{name_of(quickest)}, takes {1e3 * least:.3g} ms on this device"
            )

    def start(self) -> None:
        """Begin to answer, on the running event loop."""
        sys.setswitchinterval(_SWITCH)
        self._loop = asyncio.get_running_loop().create_task(self._run())
        self._loop.add_done_callback(self._fail)

    def _fail(self, loop: "asyncio.Task[None]") -> None:
        """Leave nobody waiting for a loop that has ended by a fault of ours."""
        if loop.cancelled() or loop.exception() is None:
            return
        logger.error(f"the loop of the server has ended: {loop.exception()!r}")
        for waiting in (*self._queue, *self._running):
            if not waiting.answer.done():
                waiting.answer.set_exception(Unavailable(_FAILED))

    async def drain(self) -> None:
        """Take no more requests, answer all that were taken, and stop."""
        self._stopping = True
        self._wake.set()
        if self._loop is not None:
            await asyncio.wait([self._loop])
        self._decoders.shutdown()
        self._device.shutdown()

    async def classify(
        self, content: bytes, seconds: float | None = None, permits: Callable[[Choice], bool] | None = None
    ) -> Answer:
        """Answer one image.

        Args:
            content: of an image file.
            seconds: from now to the deadline; the server's target if None.
            permits: says which choices may answer; all if None. It must permit one.

        Raises:
            ValueError: what `decode` refuses.
            Unavailable: it cannot be answered in time, or too many wait already.
        """
        loop = asyncio.get_running_loop()
        arrived = _now()
        if self._stopping or self.has_failed:
            raise Unavailable(_FAILED if self.has_failed else "this server is stopping")
        if self._inside >= self.policy.max_queue:
            self.statistics.ended("refused")
            raise Unavailable(f"the queue is full: {self._inside} requests wait")
        self.policy.arrived(arrived)
        deadline = arrived + (self.policy.target if seconds is None else seconds)
        request = self.policy.request(deadline - _WAY, permits)
        self._inside += 1
        try:
            pixel_values = await loop.run_in_executor(self._decoders, self.read, content)
            if self.has_failed:
                raise Unavailable(_FAILED)
            waiting = _Waiting(request, arrived, deadline, pixel_values, loop.create_future())
            insort(self._queue, waiting, key=lambda other: other.request.deadline)
            self._wake.set()
            answer = await waiting.answer
            self.policy.answered(_now() <= request.deadline)  # now, when the loop has come to it
            return answer
        except asyncio.CancelledError:
            self.statistics.ended("gone")
            raise
        finally:
            self._inside -= 1
            self._wake.set()  # whoever drains waits for the last one

    async def _run(self) -> None:
        while self._inside or not self._stopping:
            self._queue = [waiting for waiting in self._queue if not waiting.answer.done()]  # some clients hung up
            plan = self.policy.decide([waiting.request for waiting in self._queue], _now())
            for place in reversed(plan.shed):
                self._shed(self._queue.pop(place))
            if plan.choice is None:
                self._wake.clear()
                if self._inside or not self._stopping:
                    await self._wake.wait()
                continue
            self._running, self._queue = self._queue[: plan.size], self._queue[plan.size :]
            await self._answer(self._running, plan, plan.choice)

    async def _answer(self, batch: Sequence[_Waiting], plan: Plan, choice: Choice) -> None:
        loop = asyncio.get_running_loop()
        began = _now()
        images = [waiting.pixel_values for waiting in batch]
        try:
            rows = await loop.run_in_executor(self._device, self._forward, images, choice)
        except Exception as error:  # of the device: these requests fail, the server goes on
            for waiting in batch:
                self.statistics.ended("failed")
                if not waiting.answer.done():
                    waiting.answer.set_exception(RuntimeError(f"{name_of(choice)} failed: {error}"))
            return
        now = _now()
        self.policy.observe(plan, now - began)
        self.statistics.batches.labels(name_of(choice)).inc()
        self.statistics.ran.observe(now - began)
        self.statistics.slowdown.set(self.policy.scale)
        for waiting, (scores, stitch_id, flops) in zip(batch, rows, strict=True):
            if waiting.answer.done():
                continue
            in_time = now <= waiting.deadline
            self.statistics.ended("in_time" if in_time else "late", name_of(choice), choice.accuracy)
            self.statistics.latency.observe(now - waiting.arrived)
            self.statistics.waited.observe(began - waiting.arrived)
            waiting.answer.set_result(
                Answer(scores, choice, stitch_id, flops, len(batch), began - waiting.arrived, now - began, in_time)
            )

    def _shed(self, waiting: _Waiting) -> None:
        self.statistics.ended("shed")
        target = 1e3 * (waiting.deadline - waiting.arrived)
        waiting.answer.set_exception(
            Unavailable(f"too many requests: this one cannot be answered within {target:g} ms")
        )

    @torch.inference_mode()
    def _forward(self, images: Sequence[torch.Tensor], choice: Choice) -> list[tuple[list[float], int, float]]:
        """Scores, stitch and FLOPs of each image."""
        x_NCHW = torch.stack(list(images)).to(self.model.device, self.model.dtype)
        if choice.kind == "stitch":
            logits = self.model(x_NCHW, stitch_id=choice.id).logits
            stitch_ids, flops = [choice.id] * len(images), [choice.flops] * len(images)
        else:
            output = self.model(x_NCHW, cascade=choice.id)
            logits, stitch_ids, flops = output.logits, output.stitch_ids.tolist(), output.flops.tolist()
        return list(zip(logits.float().softmax(-1).tolist(), stitch_ids, flops, strict=True))

    def _warm_up(self) -> None:
        """Run what is likely to run, small batches first, for some seconds at most.

        Each twice: the first call makes kernels and buffers, the second one is observed.
        """
        height, width = self.model.config.image_size
        sample = io.BytesIO()
        Image.new("RGB", (2 * width, 2 * height)).save(sample, "JPEG")
        pixel_values, *_ = self._decoders.map(self.read, [sample.getvalue()] * 2 * _DECODERS)
        end = _now() + _WARM_UP
        for size in self.policy.batch_sizes:
            for choice in front_of(self.policy.choices, size):
                if choice.seconds(size) > self.policy.target or _now() + 2 * choice.seconds(size) > end:
                    continue
                for _ in range(2):
                    began = _now()
                    self._device.submit(self._forward, [pixel_values] * size, choice).result()
                    taken = _now() - began
                self.policy.observe(Plan([], choice, size, choice.seconds(size)), taken)


def name_of(choice: Choice) -> str:
    """Such as "stitch 24"."""
    return f"{choice.kind} {choice.id}"
