"""Layers that run late or never while ranges are observed, and the precision of files."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.models import Classifier, Files, assert_same_state, data, fit, new, train_loader, trainer, val_loader
from lightning_optim import QuantizationAwareTraining, load_from_checkpoint

WINDOW = {"start": 4, "observe_steps": 2, "freeze": 20, "weight_bits": 4}


class Tasks(Classifier):
    """A head of its own for each task; the second task begins in the second epoch of eight steps."""

    begins = 1

    def __init__(self):
        super().__init__()
        self.later = nn.Linear(3, 3)

    def forward(self, x):
        logits = self.net(x)
        return logits + self.later(logits) if self.current_epoch >= self.begins else logits


class Never(Tasks):
    begins = 99


class Notes(pl.Callback):
    """The phases of the late layer and of another one after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append((pl_module.later.quantization_phase, pl_module.net[0].quantization_phase))


@pytest.mark.parametrize("observer", ["moving_average", "histogram"])
def test_a_layer_that_runs_later_is_observed_until_it_does(tmp_path, observer):
    module = new(Tasks)
    notes = Notes()
    fit(tmp_path, module, QuantizationAwareTraining(observer=observer, **WINDOW), notes)
    assert [later for later, _ in notes.seen[3:8]] == ["observe"] * 5
    assert [others for _, others in notes.seen[5:19]] == ["fake_quantize"] * 14
    assert [later for later, _ in notes.seen[8:19]] == ["fake_quantize"] * 11  # its first batch gave a range
    assert notes.seen[-1] == ("frozen", "frozen")
    assert int(module.later.input_batches) == 12


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_with_a_late_layer_resumes_bit_for_bit(tmp_path, epoch):
    module = new(Tasks)
    fit(tmp_path, module, QuantizationAwareTraining(**WINDOW), Files(tmp_path / "files"))
    again = new(Tasks)
    fit(tmp_path, again, QuantizationAwareTraining(**WINDOW), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
    assert_same_state(module, again)
    assert again.later.quantization_phase == "frozen"


def test_a_layer_that_never_runs_stays_float_with_one_warning(tmp_path):
    module = new(Never)
    callback = QuantizationAwareTraining(**WINDOW)
    with pytest.warns(UserWarning, match=r"no input of later was seen .*`freeze` \(step 20\).* stays float") as warned:
        fit(tmp_path, module, callback, Files(tmp_path / "files"))
    assert len([w for w in warned if "stays float" in str(w.message)]) == 1
    assert (module.later.quantization_phase, callback.phase) == ("off", "frozen")
    assert "of which 1 never ran and stay float; they are frozen" in callback.last_line(module)
    x = torch.randn(4, 3)
    assert torch.equal(module.later(x), F.linear(x, module.later.weight, module.later.bias))
    again = load_from_checkpoint(new(Never), tmp_path / "files" / "2.ckpt")
    assert (again.later.quantization_phase, again.net[0].quantization_phase) == ("off", "frozen")


def test_a_layer_that_is_asked_for_and_never_runs_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"no input of later was seen .* Pass exclude=\['later'\]"):
        fit(tmp_path, new(Never), QuantizationAwareTraining(include=["net", "later"], **WINDOW))


class Normed(Classifier):
    """A convolution and its BatchNorm before an addition: both hold ranges."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.BatchNorm1d(8))
        self.net = nn.Linear(96, 3)

    def forward(self, x):
        return self.net(F.relu(self.body(x[:, None]) + x[:, None]).flatten(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).float(), batch[1])


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_of_half_precision_loads_into_a_model_of_any(tmp_path, precision):
    run = trainer(tmp_path, QuantizationAwareTraining(**WINDOW), precision="bf16-true")
    module = new(Normed)
    run.fit(module, train_loader(), val_loader())
    run.save_checkpoint(tmp_path / "net.ckpt")
    assert module.body[1].running_mean.dtype == torch.bfloat16
    loaded = load_from_checkpoint(new(Normed).to(precision), tmp_path / "net.ckpt").eval()
    assert loaded.body[1].running_mean.dtype == loaded.body[1].weight.dtype == precision
    assert loaded.body[1].output_scale.dtype == torch.float32
    x = data().tensors[0]
    with torch.no_grad():
        expected, found = module.eval()(x.bfloat16()).float(), loaded(x.to(precision)).float()
    assert float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())
