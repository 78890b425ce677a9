"""What all tests share: one thread, and small traces made once."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: tests run side by side, and waiting threads must not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from specmoe.sources.synthetic import synthetic_trace
from specmoe.topology import Topology

torch.set_num_threads(1)

SYNTHETIC = Topology(model_id="synthetic", layers=4, experts=8, top_k=2, hidden_size=16)


@pytest.fixture(scope="session")
def synthetic_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of Markov routing whose best recall is known: 24 documents of 48 tokens, determinism 0.8."""
    path = tmp_path_factory.mktemp("synthetic") / "trace"
    synthetic_trace(path, topology=SYNTHETIC, documents=30, tokens=48, determinism=0.8, seed=3)
    return path
