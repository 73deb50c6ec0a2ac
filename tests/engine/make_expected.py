"""Writes expected_losses.json: the first ten losses of a seeded job with each optimiser on the tiny network.

    python tests/engine/make_expected.py

Run it only if the mathematics is meant to change, and give the reason in the commit message.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("proto", "server", ".")]

from gramophone.recipe import Optimiser
from gramophone_server.engine.engine import VggEngine
from gramophone_server.network.precision import MODES
from tests.conftest import make_job
from tests.support.networks import make_tiny_vgg

engine = VggEngine(make_tiny_vgg(), torch.device("cpu"), MODES["fp32"])
losses = {}
for optimiser in Optimiser:
    run = engine.run_batch([make_job.__wrapped__()(optimiser=optimiser)])
    losses[optimiser.value] = [round(run.advance()[0].losses.total, 6) for _ in range(10)]
(Path(__file__).parent / "expected_losses.json").write_text(json.dumps(losses, indent=1) + "\n")
