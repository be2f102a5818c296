"""Settings that every test shares: no network, few threads, and nothing random that a test did not ask for."""

import os

# Before any import of torch or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same global seed, whatever ran before it."""
    torch.manual_seed(0)
