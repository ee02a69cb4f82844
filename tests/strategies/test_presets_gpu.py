"""Presets on CUDA devices: one says that they construct and step, two that they agree."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPUS = torch.cuda.device_count()
WORKER = Path(__file__).with_name("gpu_worker.py")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="needs a CUDA device"),
]


def losses(tmp_path, strategy, devices=1, precision="32-true", compiled="eager"):
    """Train in processes of their own: no group is left here."""
    out = tmp_path / f"{strategy}-{devices}-{precision}-{compiled}.pt"
    words = [strategy, str(devices), precision, compiled, str(out)]
    done = subprocess.run([sys.executable, "-W", "ignore", WORKER, *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("strategy", ["optim_ddp", "optim_zero2", "optim_fsdp"])
def test_one_gpu_trains_as_a_single_device(tmp_path, strategy):
    assert losses(tmp_path, strategy) == pytest.approx(losses(tmp_path, "optim_single"), abs=1e-4)


def test_half_precision_on_one_gpu(tmp_path):
    expected = losses(tmp_path, "optim_single")
    assert losses(tmp_path, "optim_fsdp", precision="bf16-mixed") == pytest.approx(expected, abs=5e-2)
    assert losses(tmp_path, "optim_ddp_fp16", precision="16-mixed") == pytest.approx(expected, abs=5e-2)


def test_compiled_blocks_on_one_gpu(tmp_path):
    assert losses(tmp_path, "optim_fsdp", compiled="compiled") == pytest.approx(
        losses(tmp_path, "optim_fsdp"), abs=1e-3
    )


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", ["optim_ddp", "optim_ddp_bf16", "optim_zero2", "optim_fsdp", "optim_tp"])
def test_two_gpus_train_as_one(tmp_path, strategy):
    tolerance = 2e-2 if strategy.endswith("bf16") else 1e-3
    assert losses(tmp_path, strategy, devices=2) == pytest.approx(losses(tmp_path, "optim_single"), abs=tolerance)
