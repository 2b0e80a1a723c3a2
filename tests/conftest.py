"""Settings for every test: no Hub, one thread, one seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)  # the tests run in two processes, and the models are tiny
