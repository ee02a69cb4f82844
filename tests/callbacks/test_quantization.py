import copy
import logging
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.overrides import _len_torch_function_stack
from torch.utils.data import DataLoader, TensorDataset

from helpers.marks import cells
from helpers.models import (
    Classifier,
    ConvNet,
    Files,
    Quiet,
    SeededByStep,
    assert_same_state,
    fit,
    new,
    train_loader,
    trainer,
    val_loader,
)
from lightning_optim import (
    ChannelPruning,
    PerformanceScore,
    QuantizationAwareTraining,
    WeightPruning,
    conform,
    load_from_checkpoint,
    quantize_post_training,
)
from lightning_optim.checkpoint import EMPTY
from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.functional.observers import OBSERVERS
from lightning_optim.measure.size import SIZES
from lightning_optim.quantization.graph import GraphFacts
from lightning_optim.quantization.layers import QuantizedLayer, QuantizedLinear, float_kernels


def integers(**words):
    return QuantizationAwareTraining(**{"start": 8, "freeze": 20, "weight_bits": 4, **words})


class ResidualNet(Classifier):
    """Convolutions with BatchNorm around an addition."""

    def __init__(self):
        super().__init__()
        del self.net
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x.view(-1, 3, 2, 2))))
        y = F.relu(self.first_norm(self.first(x)))
        return self.head(F.relu(x + self.second_norm(self.second(y))).mean((2, 3)))


def phases(module):
    return {layer.quantization_phase for layer in module.modules() if isinstance(layer, QuantizedLayer)}


# Phases.


def test_phases_follow_the_window(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    seen = []

    class Notes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pl_module.net[0].quantization_phase)

        def on_validation_start(self, trainer, pl_module):
            batches.append(int(pl_module.net[0].input_batches))

        def on_validation_end(self, trainer, pl_module):
            batches.append(int(pl_module.net[0].input_batches))

    batches = []
    module = new()
    logger = CSVLogger(tmp_path)
    fit(tmp_path, module, integers(start=4, observe_steps=3, freeze=15), Notes(), logger=logger, log_every_n_steps=1)
    assert seen == ["off"] * 4 + ["observe"] * 3 + ["fake_quantize"] * 8 + ["frozen"] * 9
    assert batches == [4, 4, 11, 11, 11, 11]  # validation is never observed, and nothing after 15
    logger.finalize("")
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("quantization/phase")
    assert [row.split(",")[column] for row in rows[1:] if row.split(",")[column]] == ["1.0", "2.0", "3.0"]
    assert "step 7, rounding in 3 layers" in caplog.text


def test_the_rounded_model_is_what_validation_scores(tmp_path):
    module = new()
    run = fit(tmp_path, module, integers(weight_bits=2))
    rounded = run.validate(module, val_loader(), verbose=False)[0]["val_loss"]
    with float_kernels(module):
        plain = run.validate(module, val_loader(), verbose=False)[0]["val_loss"]
    assert abs(rounded - plain) > 0.01
    layer, x = module.net[0], torch.randn(5, 12)
    expected = F.linear(layer.quantized_input(x), fake_quantize_weight(layer.weight, 2), layer.quantized_bias())
    assert torch.equal(layer(x), expected)
    assert 0 < float((layer.quantized_bias() - layer.bias).detach().abs().max()) < 1e-3
    assert len(torch.unique(fake_quantize_weight(layer.weight, 2)[0])) <= 3


def test_frozen_norms_and_ranges_stay(tmp_path):
    states = {}

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = pl_module.state_dict()
            states[trainer.global_step] = {
                n: v.clone() for n, v in state.items() if n.endswith(("scale", "running_mean", "running_var"))
            }

    module = new()
    fit(tmp_path, module, Notes(), integers())
    assert_same_state(states[20], states[24])
    for name in states[20]:
        assert not torch.equal(states[19][name], states[20][name]), name
    assert all(layer.training for layer in module.modules())  # given back
    assert not any(layer.observing for layer in module.modules() if isinstance(layer, QuantizedLayer))


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_every_observer_trains_and_resumes(tmp_path, observer):
    module = new()
    fit(tmp_path, module, integers(observer=observer), Files(tmp_path / "files"))
    assert 0.005 < float(module.net[0].input_scale) < 0.05
    again = new()
    fit(tmp_path, again, integers(observer=observer), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)


def test_weights_only_needs_no_observing(tmp_path):
    module = new()
    fit(tmp_path, module, integers(activation_bits=None, freeze=12), max_epochs=2)
    assert module.state_dict().keys() == new().state_dict().keys()
    module = new()
    fit(tmp_path, module, integers(activation_bits=None))
    assert phases(module) == {"frozen"}
    x = torch.randn(4, 12)
    assert torch.equal(module.net[0](x), F.linear(x, fake_quantize_weight(module.net[0].weight, 4), module.net[0].bias))


def test_three_bits_learn_what_rounding_afterwards_loses(tmp_path):
    plain, aware = new(width=8), new(width=8)
    fit(tmp_path, plain, max_epochs=12)
    fit(tmp_path, aware, integers(weight_bits=2, start=0.2, freeze=0.9), max_epochs=12)
    fit(tmp_path, plain, integers(weight_bits=2, start=0, observe_steps=1, freeze=1), max_steps=1)
    run = trainer(tmp_path)
    losses = [run.validate(module, val_loader(), verbose=False)[0]["val_loss"] for module in (aware, plain)]
    assert losses[0] < losses[1] - 0.05


# Convolutions.


def test_operands_of_an_addition_get_a_range(tmp_path):
    module = new(ResidualNet)
    fit(tmp_path, module, integers(), Files(tmp_path / "files"), WeightAveraging())
    assert isinstance(module, ResidualNet)
    assert type(module).__name__ == "ResidualNet"
    assert module.functions == ("add_0", "mean_0")
    assert module.output_phase == "frozen"
    assert int(module.add_0_left_zero_point) == 0  # behind a ReLU
    assert float(module.add_0_left_scale) == float(module.first.input_scale)  # both read the same tensor
    assert type(module.second_norm) is nn.BatchNorm2d
    loaded = load_from_checkpoint(ResidualNet, tmp_path / "files" / "2.ckpt")
    assert_same_state(module, loaded)
    x = torch.randn(5, 12)
    answers = [each.eval()(x) for each in (module, loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module)))]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    with float_kernels(module):
        assert not torch.equal(module(x), answers[0])


@pytest.mark.parametrize("start", [0, 5])
def test_a_residual_net_resumes(tmp_path, start):
    module = new(ResidualNet)
    fit(tmp_path, module, integers(start=start), SeededByStep(), Files(tmp_path / "files"))
    for epoch in range(2):
        again = new(ResidualNet)
        fit(tmp_path, again, integers(start=start), SeededByStep(), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert_same_state(module, again)


def test_fast_dev_run_of_a_residual_net(tmp_path):
    module = new(ResidualNet)
    fit(tmp_path, module, QuantizationAwareTraining(), fast_dev_run=1)
    assert phases(module) == {"frozen"}


@pytest.mark.filterwarnings("ignore:.*no output of a convolution gets a range.*:UserWarning")
def test_a_graph_that_cannot_be_read_is_said(tmp_path):
    class Branches(ConvNet):
        def forward(self, x):
            return self.net(x) if float(x.sum()) > -1e9 else self.net(x) * 2

    module = new(Branches)
    with pytest.warns(UserWarning, match="cannot be exported by torch.export"):
        fit(tmp_path, module, integers())
    assert phases(module) == {"frozen"}
    assert _len_torch_function_stack() == 0  # neither our mode nor that of torch.export is left


class LeavesForward(pl.Callback):
    """Leaves the bound forward on the instance in each step, as Lightning's redirection does under DDP."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.forward = pl_module.forward


def test_ranges_of_the_module_itself_are_observed_under_ddp_too(tmp_path):
    class Adds(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.first(x)
            return self.head((nn.functional.silu(self.second(x)) + x).mean((2, 3)))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    rows = TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 4)
    module, callback = Adds(), QuantizationAwareTraining(start=2, observe_steps=3, freeze=0.8)
    trainer(tmp_path, LeavesForward(), callback, max_epochs=3).fit(module, DataLoader(rows, 8))
    assert module.output_phase == "frozen"
    assert module.functions == ("silu_0", "add_0", "mean_0")
    assert all(float(module.get_buffer(f"{which}_scale")) > 1e-6 for which in module.watched)


# Selection and bits.


def test_every_layer_is_in_the_table(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    class Mixed(Classifier):
        def __init__(self):
            super().__init__()
            self.net.insert(0, nn.LayerNorm(12))
            self.rnn = nn.RNN(3, 4)
            self.bilinear = nn.Bilinear(4, 2, 2)

    fit(tmp_path, new(Mixed), integers())
    for text in ("net.1", "LayerNorm stays float", "a recurrent layer", "a bilinear layer"):
        assert text in caplog.text


def test_bits_by_pattern_and_size(tmp_path):
    module = new()
    fit(tmp_path, module, integers(bits={"net.0": 2, "net.6": 8}))
    assert [module.net[i].weight_bits for i in (0, 4, 6)] == [2, 4, 8]
    rest = sum(p.numel() for p in module.parameters()) - (192 + 256 + 48)
    assert SIZES["bits"](module) == pytest.approx(rest + (192 * 2 + 256 * 4 + 48 * 8) / 32)
    assert SIZES["parameters"](module) == sum(p.numel() for p in module.parameters())


def test_include_and_exclude(tmp_path):
    module = new()
    fit(tmp_path, module, integers(include=["net.0", "net.4"], exclude=["net.4"]))
    assert [type(module.net[i]) for i in (0, 4, 6)] == [QuantizedLinear, nn.Linear, nn.Linear]
    module = new(ConvNet)
    fit(tmp_path, module, integers(include=[nn.Linear]))
    assert type(module.net[1]) is nn.Conv2d
    assert type(module.net[8]) is QuantizedLinear


def test_groups(tmp_path):
    module = new()
    fit(tmp_path, module, integers(weight_granularity="per_group:8"))
    assert len(torch.unique(fake_quantize_weight(module.net[4].weight, 4, "per_group:8")[0, :8])) <= 15
    assert module.net[4].weight_granularity == "per_group:8"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"weight_bits": 0}, "whole number of bits from 2 to 8, got 0"),
        ({"weight_bits": 1}, "from 2 to 8, got 1"),
        ({"activation_bits": 9}, "`activation_bits` must be .* got 9"),
        ({"weight_bits": 8.5}, r"got 8\.5"),
        ({"bits": {"net.0": 16}}, r"bits\['net.0'\]"),
        ({"start": 0.9, "freeze": 0.5}, "`start` must not be after `freeze`"),
        (
            {"observer": "minmax"},
            "unknown observer 'minmax'; known: histogram, learned, min_max, moving_average, percentile",
        ),
        ({"weight_granularity": "per_row"}, "weight granularity must be"),
        ({"observe_steps": 0}, "`observe_steps` must be a whole number >= 1"),
    ],
)
def test_bad_arguments(words, error):
    with pytest.raises(ValueError, match=error):
        integers(**words)


def test_bad_arguments_of_the_wrong_type():
    with pytest.raises(TypeError, match="`bits` takes names, glob patterns"):
        integers(bits={3: 4})
    with pytest.raises(TypeError, match="Register your own"):
        integers(observer=OBSERVERS["min_max"])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"bits": {"encoder.*": 4}}, r"bits: 'encoder\.\*' matches no layer that is quantized"),
        ({"include": ["head"]}, "include: 'head' matches no layer"),
        ({"exclude": [nn.Conv2d]}, "exclude: Conv2d matches no layer"),
        ({"exclude": ["net", "rnn"]}, "no layer is selected"),
        ({"include": ["cell"]}, "cell .GRUCell. cannot be quantized: "),
        ({"include": ["scaled"]}, "a subclass of Linear, whose own forward is unknown"),
    ],
)
def test_bad_selections_raise_before_the_first_step(tmp_path, words, error):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class More(Classifier):
        def __init__(self):
            super().__init__()
            self.rnn, self.cell, self.scaled = nn.GRU(3, 4), nn.GRUCell(3, 4), Scaled(3, 3)

        def training_step(self, batch, batch_idx):
            raise AssertionError

    with pytest.raises(ValueError, match=error):
        fit(tmp_path, new(More), integers(**words))


def test_an_infinite_activation_is_named(tmp_path):
    class Overflows(Classifier):
        def forward(self, x):
            h = self.net[:4](x)
            return self.net[4:](torch.where(h > 100, h, h)) if self.trainer.global_step != 9 else self.net[4:](h / 0)

    with pytest.raises(RuntimeError, match=r"the input of net\.4 is not finite"):
        fit(tmp_path, new(Overflows), integers(observe_steps=4))


def test_no_room_to_observe(tmp_path):
    with pytest.raises(MisconfigurationException, match="observed for 9 steps from `start`"):
        fit(tmp_path, new(), integers(observe_steps=9, start=15, freeze=20))


def test_two_callbacks_on_one_layer_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="selected by two QuantizationAwareTraining"):
        fit(tmp_path, new(), integers(), integers(include=[nn.Linear]))
    module = new()
    fit(tmp_path, module, integers(include=["net.0"], weight_bits=8), integers(exclude=["net.0"]))
    assert [module.net[i].weight_bits for i in (0, 4, 6)] == [8, 4, 4]
    assert phases(module) == {"frozen"}


# Together with others.


@pytest.mark.parametrize(
    ("kind", "first"),
    cells(
        ["ema", "swa", "average", "average without buffers"],
        [True, False],
        quick=[("ema", True), ("swa", False), ("average", True), ("average without buffers", False)],
    ),
)
def test_averaged_models_are_quantized_too(tmp_path, kind, first):
    averaging = {
        "ema": lambda: EMAWeightAveraging(decay=0.9),
        "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
        "average": lambda: WeightAveraging(),
        "average without buffers": lambda: WeightAveraging(use_buffers=False),
    }[kind]()
    module, ours = new(ResidualNet), integers(start=10, freeze=30)
    fit(tmp_path, module, *([averaging, ours] if first else [ours, averaging]), Files(tmp_path / "f"), max_epochs=5)
    assert phases(module) == {"frozen"}
    loaded = load_from_checkpoint(ResidualNet, tmp_path / "f" / "4.ckpt")
    assert phases(loaded) == {"frozen"}
    assert float(loaded.head.input_scale) == pytest.approx(float(module.head.input_scale))
    assert float(module.stem_norm.running_var.min()) > 0.01


def test_resumed_with_an_average_equals_uninterrupted(tmp_path):
    def callbacks():
        return [EMAWeightAveraging(decay=0.9), integers()]

    module = new(ResidualNet)
    fit(tmp_path, module, *callbacks(), Files(tmp_path / "files"))
    for epoch in range(2):
        again = new(ResidualNet)
        fit(tmp_path, again, *callbacks(), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert_same_state(module, again)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_ranges_stay_float32(tmp_path, precision):
    module = new(ResidualNet)
    files = Files(tmp_path / "files")
    fit(tmp_path, module, integers(), files, precision=precision)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert module.head.weight.dtype == dtype
    assert module.head.input_scale.dtype == module.add_0_left_statistic.dtype == torch.float32
    if precision != "64-true":  # Lightning loads such a file into float32 before it converts the module
        again = new(ResidualNet)
        fit(tmp_path, again, integers(), ckpt_path=tmp_path / "files" / "1.ckpt", precision=precision)
        assert_same_state(module, again)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch 2.13's own tracing does it
@pytest.mark.parametrize("when", ["whole", "part"])
def test_torch_compile(tmp_path, when):
    eager, module = new(Quiet), new(Quiet)
    fit(tmp_path, eager, integers())
    if when == "part":
        module.net = torch.compile(module.net, backend="aot_eager")
        fit(tmp_path, module, integers())
        layers = module.net._orig_mod
    else:
        fit(tmp_path, torch.compile(module, backend="aot_eager"), integers())
        layers = module.net
    assert phases(module) == {"frozen"}
    assert int(layers[0].input_batches) == 12
    torch.testing.assert_close(layers[4].input_scale, eager.net[4].input_scale, rtol=0.05, atol=0)


def test_a_compiled_convolutional_net_asks_for_example_inputs(tmp_path):
    module = new(ConvNet)
    with pytest.raises(MisconfigurationException, match="Pass `example_inputs`"):
        fit(tmp_path, torch.compile(module, backend="eager"), integers())


def test_zeros_of_masks_stay_zero(tmp_path):
    module = new()
    pruning = WeightPruning(0.8, start=2, end=10, every_n_steps=4)
    fit(tmp_path, module, integers(), pruning)
    for name, mask in pruning.masks.items():
        weight = module.get_parameter(name)
        assert not (weight * ~mask).any()
        assert not (module.get_submodule(name.removesuffix(".weight")).quantized_weight() * ~mask).any()


@pytest.mark.parametrize("ends", [6, 14], ids=["before rounding", "while rounding"])
def test_channels_leave_a_quantized_net(tmp_path, ends):
    def callbacks():
        return [integers(), ChannelPruning(0.5, start=2, end=ends, events=2, scope="layer")]

    module = new(ResidualNet)
    fit(tmp_path, module, *callbacks(), Files(tmp_path / "files"))
    assert module.first.weight.shape == (4, 4, 3, 3)
    assert phases(module) == {"frozen"}
    again = new(ResidualNet)
    fit(tmp_path, again, *callbacks(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)


def test_channels_leave_a_file_that_was_quantized(tmp_path):
    fit(tmp_path, new(ResidualNet), integers(), Files(tmp_path / "files"))
    module = load_from_checkpoint(ResidualNet, tmp_path / "files" / "2.ckpt")
    fit(tmp_path, module, ChannelPruning(0.5, start=2, end=6, scope="layer"), integers(start=0, freeze=0.9))
    assert module.first.weight.shape == (4, 4, 3, 3)
    assert phases(module) == {"frozen"}


def test_manual_optimization_and_several_optimizers(tmp_path):
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                loss = F.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[:4].parameters(), 0.1), torch.optim.SGD(self.net[4:].parameters(), 0.1)]

    module = new(Manual)
    callback = integers()
    fit(tmp_path, module, callback)
    assert callback.window.step == 24
    assert phases(module) == {"frozen"}


def test_a_new_fit_keeps_a_quantized_model_quantized(tmp_path):
    module = new()
    fit(tmp_path, module, integers())
    scale = float(module.net[0].input_scale)
    seen = []

    class Notes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pl_module.net[0].quantization_phase)

    fit(tmp_path, module, Notes(), integers())
    assert seen == ["fake_quantize"] * 20 + ["frozen"] * 4
    assert float(module.net[0].input_scale) != scale
    conform(module, EMPTY)
    assert type(module.net[0]) is nn.Linear
    assert module.state_dict().keys() == new().state_dict().keys()
    assert not hasattr(module.net[0], "weight_bits")


def test_a_new_fit_with_other_arguments_starts_with_new_ranges(tmp_path):
    seen = []

    class Notes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((pl_module.net[0].quantization_phase, float(pl_module.net[0].input_scale)))

    module = new()
    fit(tmp_path, module, integers())
    scale = float(module.net[0].input_scale)
    fit(tmp_path, module, Notes(), integers(activation_bits=4))
    assert seen[0] == ("fake_quantize", pytest.approx(17 * scale, rel=1e-4))
    seen.clear()
    fit(tmp_path, module, Notes(), integers(observer="histogram"))  # its ranges are not known yet
    assert [phase for phase, _ in seen] == ["off"] * 8 + ["observe"] + ["fake_quantize"] * 11 + ["frozen"] * 4


def test_a_file_without_quantization_continues_with_it(tmp_path):
    fit(tmp_path, new(), Files(tmp_path / "files"))
    module = new()
    fit(tmp_path, module, integers(start=10, freeze=30), ckpt_path=tmp_path / "files" / "1.ckpt", max_epochs=6)
    assert phases(module) == {"frozen"}


def test_lightnings_own_loader_names_the_unexpected_keys(tmp_path):
    fit(tmp_path, new(), integers(), Files(tmp_path / "files"))
    with pytest.raises(RuntimeError, match="input_scale"):
        Classifier.load_from_checkpoint(tmp_path / "files" / "2.ckpt")


def test_the_score_sees_bits_and_measures_float_kernels(tmp_path):
    phases_seen = []

    class Notes(Classifier):
        def forward(self, x):
            if not self.training and (self._trainer is None or not self._trainer.evaluating):
                phases_seen.append(self.net[0].quantization_phase)
            return super().forward(x)

    score = PerformanceScore(size="bits", weights={"size": 1.0, "inference_time": 1.0})
    run = fit(tmp_path, new(Notes), integers(weight_bits=2), score, max_epochs=4)
    assert float(run.callback_metrics["P/size"]) < 0.4
    assert set(phases_seen[-50:]) == {"off"}


def test_transformer_encoder_answers_the_same_with_and_without_gradients(tmp_path):
    class Text(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(self.net(x.view(-1, 6, 2))).mean(1))

    module = new(Text)
    fit(tmp_path, module, integers(weight_bits=3), Files(tmp_path / "files"))
    x = torch.randn(4, 12)
    module.eval()
    with torch.no_grad():
        inferred = module(x)
    torch.testing.assert_close(inferred, module(x).detach())
    with float_kernels(module):
        assert not torch.allclose(module(x), inferred, atol=1e-3)
    loaded = load_from_checkpoint(Text, tmp_path / "files" / "2.ckpt").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), inferred)


def test_pickled_and_copied(tmp_path):
    module = new()
    fit(tmp_path, module, integers())
    twin = copy.deepcopy(module)
    assert_same_state(module, twin)
    x = torch.randn(3, 12)
    assert torch.equal(module.eval()(x), twin.eval()(x))


def test_command_line_arguments(tmp_path):
    """Every argument is of a plain type: a second run reads them from the first one's plan."""
    module = new()
    fit(tmp_path, module, integers(bits={"net.0": 8}), Files(tmp_path / "files"))
    plan = torch.load(tmp_path / "files" / "2.ckpt", weights_only=True)["lightning_optim"]
    (entry,) = plan["entries"].values()
    assert entry["bits"] == {"net.0": 8}
    assert entry["phase"] == "frozen"
    assert plan["modules"]["net.0"]["attributes"]["weight_bits"] == 8


def test_train_loader_is_what_is_observed(tmp_path):
    module = new()
    fit(tmp_path, module, integers(observer="min_max", start=0, freeze=8), max_epochs=1)
    rows = torch.cat([batch[0] for batch in train_loader()])
    assert float(-module.net[0].input_statistic[0]) == float(rows.min())
    assert float(module.net[0].input_statistic[1]) == float(rows.max())


# What others do in a batch.


class Peeks(pl.Callback):
    """Calls the model on other data at the end of a training batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module(100 * batch[0])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("first", [True, False])
def test_what_another_callback_computes_is_not_observed(tmp_path, first, accumulate):
    plain, module = new(), new()
    words = {"start": 1, "freeze": 6, "observe_steps": 2}
    fit(tmp_path, plain, integers(**words), accumulate_grad_batches=accumulate)
    callbacks = [Peeks(), integers(**words)] if first else [integers(**words), Peeks()]
    fit(tmp_path, module, *callbacks, accumulate_grad_batches=accumulate)
    assert torch.equal(module.net[0].input_scale, plain.net[0].input_scale)


def test_a_forward_after_the_last_step_does_not_break_resuming(tmp_path):
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self(3 * batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = new(Manual)
    fit(tmp_path, module, integers(), Files(tmp_path / "files"))
    again = new(Manual)
    fit(tmp_path, again, integers(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)


def test_two_callbacks_share_a_residual_net_and_resume(tmp_path):
    def callbacks():
        return [integers(include=["stem", "head"], weight_bits=8), integers(include=["first", "second"])]

    module = new(ResidualNet)
    fit(tmp_path, module, *callbacks(), Files(tmp_path / "files"))
    assert phases(module) == {"frozen"}
    again = new(ResidualNet)
    fit(tmp_path, again, *callbacks(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)
    fit(tmp_path, again, *callbacks())  # and once more, as a new run
    assert phases(again) == {"frozen"}


def test_a_model_of_integer_weights_observes_before_it_rounds_inputs(tmp_path):
    module = new()
    quantize_post_training(module, activation_bits=None)
    seen = []

    class Notes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pl_module.net[0].quantization_phase)

    fit(tmp_path, module, Notes(), integers())
    assert seen[:10] == ["off"] * 8 + ["observe", "fake_quantize"]


def test_a_wider_selection_keeps_rounded_what_was(tmp_path):
    module = new()
    fit(tmp_path, module, integers(include=["net.0"]))
    seen = []

    class Notes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(tuple(pl_module.net[i].quantization_phase for i in (0, 4)))

    fit(tmp_path, module, Notes(), integers())
    assert seen[0] == ("fake_quantize", "off")
    assert seen[8] == ("fake_quantize", "observe")
    assert seen[-1] == ("frozen", "frozen")


def test_other_observers_and_weights_only_on_a_residual_net(tmp_path):
    module = new(ResidualNet)
    fit(tmp_path, module, integers())
    fit(tmp_path, module, integers(activation_bits=None))
    assert not any(layer.watched for layer in module.modules() if isinstance(layer, QuantizedLayer))
    assert module.functions == ()
    fit(tmp_path, module, integers(observer="histogram"))
    assert phases(module) == {"frozen"}
    assert module.functions == ("add_0", "mean_0")
    assert module.output_phase == "frozen"


def test_the_mode_that_the_user_sets_last_stays(tmp_path):
    class Ends(Classifier):
        def on_fit_end(self):
            self.eval()

    module = new(Ends)
    fit(tmp_path, module, integers())
    assert not any(layer.training for layer in module.modules())


def test_no_graph_is_read_before_the_window_opens(tmp_path, monkeypatch):
    def read(*args, **kwargs):
        steps.append(run_step[0])
        return GraphFacts()

    steps, run_step = [], [0]

    class Counts(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            run_step[0] = trainer.global_step

    monkeypatch.setattr("lightning_optim.callbacks.output_ranges.find_ranges", read)
    module = new(ResidualNet)
    module.example_input_array = torch.zeros(2, 12)
    fit(tmp_path, module, Counts(), integers())
    assert steps == [7]  # in the batch that leads to step 8
