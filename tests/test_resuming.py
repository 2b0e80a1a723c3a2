"""An evaluation that is killed, interrupted or of something else, and what is on disk of it."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from families import images, make
from stitchable import evaluate
from stitchable.training import resuming
from stitchable.training.resuming import evaluate_resumably
from test_evaluation import batches

TESTS = Path(__file__).parent


class _Stop(Exception):
    pass


def stopping(data: list, after: int):
    yield from data[:after]
    raise _Stop


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(resuming, "_SECONDS_BETWEEN_SAVES", 0)
    model, data, path = make("vit"), batches("vit", (3, 3, 3, 3)), tmp_path / "partial"
    expected = evaluate(model, data)
    with pytest.raises(_Stop):
        evaluate_resumably(model, stopping(data, 2), path)
    read = []
    resumed = evaluate_resumably(model, (read.append(1) or batch for batch in data), path)
    assert resumed == expected
    assert len(read) == 4  # an iterable has to be read, though not measured; a DataLoader skips
    assert not path.exists()

    samples = [{name: tensor[i] for name, tensor in batch.items()} for batch in data for i in range(3)]
    drawn = []

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, index: int) -> dict:
            drawn.append(index)
            if len(drawn) == 9 and not path.with_suffix(".second").exists():
                path.with_suffix(".second").touch()
                raise _Stop
            return samples[index]

    with pytest.raises(_Stop):
        evaluate_resumably(model, DataLoader(Samples(), 3), path)
    drawn.clear()
    assert evaluate_resumably(model, DataLoader(Samples(), 3), path) == expected
    assert drawn == list(range(6, 12))


def test_a_checkpoint_of_another_evaluation_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(resuming, "_SECONDS_BETWEEN_SAVES", 0)
    model, data, path = make("vit"), batches("vit", (3, 3, 3)), tmp_path / "partial"
    with pytest.raises(_Stop):
        evaluate_resumably(model, stopping(data, 1), path)
    with pytest.raises(ValueError, match="another evaluation, with other stitches"):
        evaluate_resumably(model, data, path, [0])
    with pytest.raises(ValueError, match="with other weights"):
        evaluate_resumably(make("vit", seed=3), data, path)
    with pytest.raises(ValueError, match="with other batch size"):
        evaluate_resumably(model, DataLoader([{"pixel_values": images("vit")[0], "labels": 1}], 1), path)
    with pytest.raises(ValueError, match="with other batch size: a batch has 2 samples, there it had 3"):
        evaluate_resumably(model, batches("vit", (2, 2, 2)), path)
    two = SimpleNamespace(num_processes=2, mixed_precision="bf16", is_main_process=True)
    with pytest.raises(ValueError, match="with other number of processes, precision;"):
        evaluate_resumably(model, data, path, accelerator=two)
    model.bfloat16()
    with pytest.raises(ValueError, match="with other weights"):
        evaluate_resumably(model, data, path)
    path.write_text("something else", encoding="utf-8")
    with pytest.raises(ValueError, match="partial is no checkpoint of an evaluation"):
        evaluate_resumably(model, data, path)
    assert path.read_text(encoding="utf-8") == "something else"


def test_a_killed_evaluation_leaves_what_it_measured(tmp_path) -> None:
    """A process killed by SIGKILL in the middle, its work taken up in this one."""
    code = f"""
import sys, time; sys.path.insert(0, {str(TESTS)!r})
import torch; torch.set_num_threads(1)
from stitchable.training import resuming
from stitchable.training.resuming import evaluate_resumably
from families import make
from test_evaluation import batches
resuming._SECONDS_BETWEEN_SAVES = 0
def slow():
    for number, batch in enumerate(batches("vit", (3,) * 6)):
        print(number, flush=True)
        time.sleep(0 if number < 3 else 100)
        yield batch
evaluate_resumably(make("vit"), slow(), {str(tmp_path / "partial")!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        while process.stdout.readline().strip() != "3":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "partial").exists()
    model, data = make("vit"), batches("vit", (3,) * 6)
    ran = []
    run_head = model.run_head
    model.run_head = lambda *arguments: ran.append(1) or run_head(*arguments)
    started = time.monotonic()
    resumed = evaluate_resumably(model, data, tmp_path / "partial")
    assert time.monotonic() - started < 60
    assert len(ran) == 3 * len(model.stitches)
    model.run_head = run_head
    for stitch_id, metrics in evaluate(model, data).items():
        assert resumed[stitch_id] == pytest.approx(metrics, rel=1e-5)
