"""What only a GPU shows: the real loss scaler, masks on the device, and latency by synchronised wall time."""

import pytest
import torch
from lightning import pytorch as pl

from helpers.models import Classifier, Files, assert_same_state, new, train_loader, val_loader
from lightning_optim import (
    ChannelPruning,
    DistillationModule,
    PerformanceScore,
    QuantizationAwareTraining,
    WeightPruning,
    load_from_checkpoint,
    measure_latency,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def fit(tmp_path, module, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(0)
    run = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **options,
    )
    run.fit(module, train_loader(), val_loader(), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "wanda", "random", "lamp"])
def test_what_is_asked_is_reached_on_the_device(tmp_path, precision, criterion):
    class Cast(Classifier):
        def forward(self, x):
            return super().forward(x.to(self.net[0].weight.dtype))

    module = new(Cast)
    cut = WeightPruning(0.8, criterion=criterion, every_n_steps=4, start=2, end=1.0)
    run = fit(tmp_path, module, cut, precision=precision)
    assert cut.window.step == run.global_step == 24  # skipped by the scaler or not
    assert sum(int((module.net[i].weight == 0).sum()) for i in (0, 4)) == 358


def test_masks_do_not_depend_on_the_device(tmp_path):
    on_gpu, on_cpu = (WeightPruning(0.5, criterion="random", start=0, end=0) for _ in range(2))
    fit(tmp_path, new(), on_gpu)
    pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[on_cpu],
        default_root_dir=tmp_path,
    ).fit(new(), train_loader(), val_loader())
    assert_same_state({n: m.cpu() for n, m in on_gpu.masks.items()}, on_cpu.masks)


def test_resume_and_reload(tmp_path):
    module, again = new(), new()
    fit(tmp_path, module, WeightPruning(0.8, every_n_steps=4), Files(tmp_path / "files"))
    fit(tmp_path, again, WeightPruning(0.8, every_n_steps=4), ckpt_path=tmp_path / "files" / "1.ckpt")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value.cpu(), again.state_dict()[name].cpu(), rtol=1e-4, atol=1e-5)
    assert_same_state(module.cpu(), load_from_checkpoint(Classifier, tmp_path / "files" / "2.ckpt").cpu())


def test_the_score_and_the_latency(tmp_path):
    run = fit(tmp_path, new(), PerformanceScore())
    assert run.callback_metrics["P/inference_time"] == pytest.approx(1.0, abs=0.5)
    small, big = new().cuda(), new(width=4096).cuda()
    assert measure_latency(small, torch.randn(64, 12, device="cuda"), against=big, batch_size=4096).ratio < 0.9


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_channels_leave_on_the_device_in_multiples_of_eight(tmp_path, precision):
    class Cast(Classifier):
        def forward(self, x):
            return super().forward(x.to(self.net[0].weight.dtype))

    module = new(Cast, width=64)
    run = fit(tmp_path, module, ChannelPruning(0.4, scope="layer", start=2, end=0.8, events=3), precision=precision)
    assert module.net[0].out_features == module.net[4].out_features == 40  # 64 - 25 = 39, kept up to 40
    assert all(p.device.type == "cuda" for group in run.optimizers[0].param_groups for p in group["params"])


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("observer", ["moving_average", "histogram"])
def test_rounding_on_the_device_resumes_and_reloads(tmp_path, precision, observer):
    class Cast(Classifier):
        def forward(self, x):
            return super().forward(x.to(self.net[0].weight.dtype))

    def integers():
        return QuantizationAwareTraining(weight_bits=4, start=8, freeze=20, observer=observer)

    module, again = new(Cast), new(Cast)
    fit(tmp_path, module, integers(), Files(tmp_path / "files"), precision=precision)
    assert module.net[0].input_scale.dtype == torch.float32
    assert module.net[0].input_scale.device.type == "cuda"
    fit(tmp_path, again, integers(), ckpt_path=tmp_path / "files" / "1.ckpt", precision=precision)
    torch.testing.assert_close(module.net[4].input_scale, again.net[4].input_scale, rtol=1e-2, atol=0)
    assert_same_state(module.cpu(), load_from_checkpoint(Cast, tmp_path / "files" / "2.ckpt").to(module.dtype).cpu())


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_a_teacher_follows_the_student_to_the_device(tmp_path, precision):
    teacher = new(width=64)
    module = DistillationModule(new(), teacher, features=[("net.5", "net.5", "hint")])
    fit(tmp_path, module, Files(tmp_path / "files"), precision=precision)
    assert next(teacher.parameters()).device.type == "cuda"
    assert not any("teacher" in name for name in module.state_dict())
    again = DistillationModule(new(), new(width=64), features=[("net.5", "net.5", "hint")])
    fit(tmp_path, again, ckpt_path=tmp_path / "files" / "1.ckpt", precision=precision)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value.cpu(), again.state_dict()[name].cpu(), rtol=1e-2, atol=1e-3)
