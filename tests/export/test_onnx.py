import base64
import copy
import importlib
import json
import sys
import tempfile
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.exported import NETS, TwoTowers, quantized
from helpers.models import Classifier, data, new, train_loader, trainer, val_loader
from lightning_optim.checkpoint import plain_plan
from lightning_optim.export import export_onnx, integer
from lightning_optim.export.runtimes import RUNTIMES
from lightning_optim.export.verify import compare
from lightning_optim.quantization.calibrate import quantize_post_training
from lightning_optim.quantization.prepare import quantized_layers, set_phase

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def session(path):
    """The file in ONNX Runtime, right on this processor too."""
    return RUNTIMES["onnxruntime"](path)._session


def run(path, *tensors):
    """Outputs of the file in ONNX Runtime."""
    loaded = session(path)
    names = [put.name for put in loaded.get_inputs()]
    return [torch.as_tensor(y) for y in loaded.run(None, dict(zip(names, (x.numpy() for x in tensors), strict=True)))]


def reference(path, *tensors):
    """Outputs of the file by ONNX's own definition of its operators."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    feeds = dict(zip(evaluator.input_names, (x.numpy() for x in tensors), strict=True))
    return [torch.as_tensor(np.asarray(y)) for y in evaluator.run(None, feeds)]


def answer(module, *tensors):
    with torch.no_grad():
        return copy.deepcopy(module).eval()(*tensors)


def stored(path, kind):
    """Shapes of the file's weights of a type."""
    initializers = onnx.load(str(path)).graph.initializer
    return [tuple(weight.dims) for weight in initializers if weight.data_type == kind]


# What each net must reach: integer convolutions and matrix products of all, size, largest difference.
PROMISES = {
    "residual": ((6, 6, 1, 1), 0.65, 0.05),
    "branches": ((4, 4, 1, 1), None, 0.02),
    "recommender": ((0, 0, 4, 5), 0.30, 1e-3),  # the sum of a bag is a product with float weights
    "encoder": ((0, 0, 5, 13), 0.65, 0.02),  # attention's own 8 stay float
    "text convolution": ((2, 2, 1, 1), 0.45, 0.02),
    "tied": ((0, 0, 3, 3), 0.7, 0.02),  # stored twice: as a table and as a matrix
    "bert": ((0, 0, 8, 10), None, 0.02),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("bert", "branches", "tied", "encoder", "recommender") else n
        for n in PROMISES
    ],
)
def test_every_net_runs_with_integers_and_gives_its_answers(name, tmp_path):
    kernels, size, difference = PROMISES[name]
    module, inputs = quantized(name)
    report = export_onnx(module, tmp_path / "net.onnx", inputs, least_agreement=0.9)
    found = (report.integer_convolutions, report.convolutions, report.integer_matmuls, report.matmuls)
    assert found == kernels
    assert size is None or report.size_ratio < size
    assert report.max_difference < difference
    assert report.file_bytes == (tmp_path / "net.onnx").stat().st_size
    assert report.latency.low <= report.latency.ratio <= report.latency.high
    assert "Integer kernels: " in str(report)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


OPTIONS = {
    "8 bits": {},
    "4-bit weights": {"weight_bits": 4},
    "4-bit activations": {"activation_bits": 4},
    "one scale": {"weight_granularity": "per_tensor"},
    "groups": {"weight_granularity": "per_group:5"},
    "weights only": {"activation_bits": None},
    "dynamic": {"activation_ranges": "dynamic"},
}


DEFAULT = [("branches", "8 bits"), ("tied", "one scale")]
DEFAULT += [("mlp", option) for option in ("groups", "dynamic")]
EVERY = [(name, option) for name in ("mlp", "branches", "tied") for option in OPTIONS]


@pytest.mark.parametrize(
    ("name", "option"),
    [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in DEFAULT)],
)
def test_the_files_operators_compute_what_fake_quantization_computes(name, option, tmp_path):
    """By their definition, not by an engine's kernels: up to one step where a value lies between two integers."""
    module, inputs = quantized(name, **OPTIONS[option])
    inputs = inputs[:4]
    report = export_onnx(module, tmp_path / "net.onnx", inputs, verify=False)
    expected = answer(module, inputs)
    (got,) = reference(tmp_path / "net.onnx", inputs)
    coarse = 0.2 if option == "4-bit activations" else 0.02
    assert float((got - expected).abs().max()) <= coarse * float(expected.abs().max())
    assert float((got - expected).abs().mean()) <= 0.1 * coarse * float(expected.abs().max())
    assert report.runtime is None
    assert "Not verified." in str(report)


def test_weights_only_are_exact_in_the_engine_too(tmp_path):
    module, inputs = quantized("tied", activation_bits=None)
    report = export_onnx(module, tmp_path / "net.onnx", inputs)
    assert report.max_difference < 1e-5
    assert report.size_ratio < 0.7


@pytest.mark.slow
def test_four_bit_activations_keep_integer_kernels(tmp_path):
    module, inputs = quantized("branches", activation_bits=4)
    report = export_onnx(module, tmp_path / "net.onnx", inputs, least_agreement=0.8)
    assert report.integer_convolutions == report.convolutions == 4
    assert any("fewer than 8 bits are stored as uint8" in note for note in report.notes)


def test_few_bits_are_said_to_be_stored_as_int8(tmp_path):
    module, inputs = quantized("mlp", weight_bits=4, bits={"2": 8})
    report = export_onnx(module, tmp_path / "net.onnx", inputs, verify=False)
    assert report.layers == {
        "0": "int4 in int8 container weight per channel, uint8 input",
        "2": "int8 weight per channel, uint8 input",
    }
    assert (12, 16) in stored(tmp_path / "net.onnx", onnx.TensorProto.INT8)
    assert any("no smaller" in note for note in report.notes)


class Bags(nn.Module):
    """Every mode, with and without padding and weights."""

    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(50, 6, mode=mode, padding_idx=padding)
            for mode in ("sum", "mean", "max")
            for padding in (None, 3)
        )

    def forward(self, ids):
        weighted = [bag(ids, per_sample_weights=ids.float()) for bag in self.bags[:2]]
        return torch.stack([bag(ids) for bag in self.bags] + weighted, 1)


@pytest.mark.parametrize(
    "granularity", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in (None, "per_group:4")), "per_channel"]
)
def test_bags_are_gathered_and_reduced(granularity, tmp_path):
    module = Bags()
    if granularity is not None:
        quantize_post_training(module, activation_bits=None, weight_granularity=granularity, progress_bar=False)
    ids = torch.randint(0, 50, (6, 4))
    ids[0] = 3
    ids[1, :2] = 3
    export_onnx(module, tmp_path / "bags.onnx", ids[:2], verify=False)
    torch.testing.assert_close(run(tmp_path / "bags.onnx", ids)[0], answer(module, ids))
    assert len(stored(tmp_path / "bags.onnx", onnx.TensorProto.INT8)) == (0 if granularity is None else 6)


def test_bags_with_offsets_are_refused(tmp_path):
    module = quantize_post_training(nn.EmbeddingBag(50, 6), activation_bits=None, progress_bar=False)
    with pytest.raises(ValueError, match="offsets"):
        export_onnx(module, tmp_path / "bags.onnx", (torch.arange(6), torch.tensor([0, 3])), dynamic_batch=False)
    assert not list(tmp_path.iterdir())


def test_max_norm_is_applied_once(tmp_path):
    module = nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Linear(8, 3))
    ids = torch.randint(0, 20, (6, 4))
    quantize_post_training(module, [ids], progress_bar=False)
    export_onnx(module, tmp_path / "net.onnx", ids, verify=False)
    torch.testing.assert_close(run(tmp_path / "net.onnx", ids)[0], answer(module, ids), atol=1e-2, rtol=0)


@pytest.mark.slow
def test_a_dead_channel_with_a_bias_does_not_overflow(tmp_path):
    module = NETS["mlp"][0]()
    with torch.no_grad():
        module[0].weight[0] = 0
        module[0].weight[1] *= 1e-12
        module[0].bias[:2] = torch.tensor([3.0, -5.0])
        module[2].bias += 100
    inputs = torch.randn(32, 12)
    quantize_post_training(module, [inputs], progress_bar=False)
    report = export_onnx(module, tmp_path / "net.onnx", inputs)
    assert report.max_difference < 0.02


def test_the_batch_is_free_or_fixed(tmp_path):
    module, inputs = quantized("branches")
    free = export_onnx(module, tmp_path / "free.onnx", inputs[:1], verify=False)
    assert free.inputs == {"x": ("batch", 3, 12, 12)}
    for rows in (1, 2, 5):
        got = run(tmp_path / "free.onnx", inputs[:rows])[0]
        torch.testing.assert_close(got, answer(module, inputs[:rows]), atol=0.05, rtol=0)
    fixed = export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "fixed.onnx", inputs[:1], dynamic_batch=False)
    assert fixed.inputs == {"input": (1, 3, 12, 12)}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(tmp_path / "fixed.onnx", inputs[:2])


class Answers(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, left, *, options=None, right=None, scale=1.0):
        y = self.inner(left + right["a"][0]) * scale
        return {"logits": y, "parts": (y + 1, y.argmax(-1)), "nothing": None}


def test_names_come_from_forward_and_from_what_it_returns(tmp_path):
    inputs = {"right": {"a": [torch.randn(4, 4)]}, "left": torch.randn(4, 4), "scale": 2.0}
    report = export_onnx(Answers(), tmp_path / "net.onnx", inputs)
    assert sorted(report.inputs) == ["left", "right_a_0"]
    assert report.outputs == ("logits", "parts_0", "parts_1")
    assert report.float_bytes is None
    assert report.latency is None
    assert any("Nothing in this file is quantized" in note for note in report.notes)
    report = export_onnx(
        NETS["mlp"][0](), tmp_path / "net.onnx", torch.randn(2, 12), input_names=["features"], output_names=["scores"]
    )
    assert (list(report.inputs), report.outputs) == (["features"], ("scores",))
    with pytest.raises(ValueError, match="must be 1 names, for input; got"):
        export_onnx(NETS["mlp"][0](), tmp_path / "net.onnx", torch.randn(2, 12), input_names=["a", "b"])


def test_the_file_says_what_it_holds(tmp_path):
    module, inputs = quantized("mlp")
    report = export_onnx(module, tmp_path / "net.onnx", inputs, metric={"val_acc": torch.tensor(0.5)}, verify=False)
    loaded = onnx.load(str(tmp_path / "net.onnx"))
    onnx.checker.check_model(loaded, full_check=True)
    metadata = {entry.key: entry.value for entry in loaded.metadata_props}
    assert json.loads(metadata["lightning_optim.metric"]) == {"val_acc": 0.5}
    plan = json.loads(zlib.decompress(base64.b64decode(metadata["lightning_optim.plan"])))
    assert plan["modules"].keys() == plain_plan(module)["modules"].keys()
    assert metadata["lightning_optim.version"]
    assert report.opset == 21
    assert [entry.version for entry in loaded.opset_import if entry.domain == ""] == [21]


@pytest.mark.parametrize("phase", ["fake_quantize", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_module_in_training_is_unchanged(phase, tmp_path):
    module = new(Classifier, dropout=0.3)
    quantize_post_training(module, val_loader(), progress_bar=False)
    set_phase(module, quantized_layers(module), phase)
    fitted = trainer(tmp_path, max_epochs=1)
    fitted.fit(module, train_loader(), val_loader())
    module.train()
    module.net[3].eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [layer.training for layer in module.modules()]
    attributes = [sorted(vars(layer)) for layer in module.modules()]
    parameters = list(module.parameters())
    random_state = torch.get_rng_state()
    report = export_onnx(module, tmp_path / "net.onnx", data().tensors[0][:5])
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
    assert [layer.training for layer in module.modules()] == modes
    assert [sorted(vars(layer)) for layer in module.modules()] == attributes
    assert all(left is right for left, right in zip(module.parameters(), parameters, strict=True))
    assert {layer.quantization_phase for layer in quantized_layers(module).values()} == {phase}
    assert module.trainer is fitted
    assert list(report.inputs) == ["x"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_any_precision_is_exported_as_float32(dtype, tmp_path):
    module, inputs = quantized("mlp")
    report = export_onnx(module.to(dtype), tmp_path / "net.onnx", inputs.to(dtype))
    assert report.max_difference < 1e-2
    assert session(tmp_path / "net.onnx").get_inputs()[0].type == "tensor(float)"
    assert next(module.parameters()).dtype == dtype


@pytest.mark.slow
def test_layers_that_have_not_begun_stay_float_beside_others(tmp_path):
    module, inputs = quantized("residual")
    layers = quantized_layers(module)
    set_phase(module, {"blocks.0.conv1": layers["blocks.0.conv1"]}, "observe")
    report = export_onnx(module, tmp_path / "net.onnx", inputs, verify=False)
    assert report.layers["blocks.0.conv1"] == "float"
    assert report.layers["blocks.0.norm1"] == "float"
    assert report.layers["stem.1"] == "folded into stem.0"
    assert report.layers["stem.0"] == "int8 weight per channel, uint8 input"


class Drifting(nn.Module):
    """Gives other answers at every call, which no file can."""

    def __init__(self, classes):
        super().__init__()
        self.inner = nn.Linear(12, classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        y = self.inner(x)
        return y if torch.compiler.is_compiling() else -y


@pytest.mark.parametrize(("classes", "words"), [(3, "the same class in .* of 65 rows"), (1, "of the output's range")])
def test_a_file_with_other_answers_is_not_written(classes, words, tmp_path):
    old = tmp_path / "net.onnx"
    old.write_bytes(b"old")
    with pytest.raises(RuntimeError, match=words):
        export_onnx(Drifting(classes), old, torch.randn(64, 12))
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_held_out_inputs_are_compared(tmp_path):
    module, inputs = NETS["mlp"][0](), torch.randn(2, 12)
    path = tmp_path / "net.onnx"
    report = export_onnx(module, path, inputs, inputs=[torch.randn(100, 12), torch.randn(50, 12)])
    assert report.rows == 151  # and one row by itself
    with pytest.raises(ValueError, match="form of `example_inputs`"):
        export_onnx(module, path, inputs, inputs={"input": torch.randn(100, 12)})
    with pytest.raises(ValueError, match="empty list"):
        export_onnx(module, path, inputs, inputs=[])


def test_what_cannot_be_exported_is_refused(tmp_path):
    path = tmp_path / "net.onnx"
    module, inputs = quantized("mlp")
    with pytest.raises(ValueError, match=r"fails with `example_inputs` .*They pass float32 \(2, 5\)"):
        export_onnx(module, path, torch.randn(2, 5))
    with pytest.raises(ValueError, match="runtime"):
        export_onnx(module, path, inputs, runtime="tensorrt")
    with pytest.raises(FileNotFoundError, match="Create it first"):
        export_onnx(module, tmp_path / "no" / "net.onnx", inputs)
    with pytest.raises(ValueError, match="dynamic_batch=False for fixed shapes"):
        export_onnx(TwoTowers(), path, (torch.ones(3, 4, dtype=torch.long), torch.ones(2, dtype=torch.long)))
    module[0].input_batches.zero_()
    with pytest.raises(ValueError, match="the input of 0 is quantized, and no batch was observed"):
        export_onnx(module, path, inputs)
    set_phase(module, quantized_layers(module), "observe")
    with pytest.raises(ValueError, match="quantization has not begun"):
        export_onnx(module, path, inputs)
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.sum() > 0 else x


class FixedBatch(nn.Module):
    def forward(self, x):
        return x + torch.arange(len(x))[:, None]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            Branching(),
            r"Branching cannot be exported by torch.export \(.*`return F.relu\(x\) if x.sum\(\) > 0 else x` in ",
        ),
        (FixedBatch(), r"FixedBatch fixes dimension 0 of 'x' \('batch'\) at 4.*`x.shape\[0\]` does not"),
    ],
)
def test_the_exporters_failure_is_one_sentence(module, words, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "details"))
    (tmp_path / "details").mkdir()
    with pytest.raises(ValueError, match=words) as raised:
        export_onnx(module, tmp_path / "net.onnx", torch.randn(4, 12))
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["details"]
    assert "".join(capfd.readouterr()) == ""
    for file in (tmp_path / "details").iterdir():
        assert str(file) in str(raised.value)
        assert "def forward" in file.read_text()  # the graph up to the failure


def test_registering_the_operators_again_is_harmless(tmp_path):
    module, inputs = quantized("mlp")
    importlib.reload(integer)
    export_onnx(module, tmp_path / "net.onnx", inputs, verify=False)
    torch.testing.assert_close(run(tmp_path / "net.onnx", inputs)[0], answer(module, inputs), atol=0.02, rtol=0)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"lightning-optim\[onnx\]"):
        export_onnx(NETS["mlp"][0](), tmp_path / "net.onnx", torch.randn(2, 12))
    assert not list(tmp_path.iterdir())


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv, self.head = nn.Embedding(40, 16), nn.Conv1d(16, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, pieces):
        return self.head(self.conv(self.table(pieces).transpose(1, 2)).relu().amax(2))


def test_other_dimensions_can_be_free(tmp_path):
    torch.manual_seed(0)
    lengths = [torch.randint(0, 40, (4, length)) for length in (5, 9, 2)]
    model = quantize_post_training(Text(), lengths, progress_bar=False)
    words = {"dynamic_dims": {"pieces": {1: "length"}}, "inputs": lengths, "least_agreement": 0.9}
    report = export_onnx(model, tmp_path / "text.onnx", lengths[0], **words)
    assert report.inputs == {"pieces": ("batch", "length")}
    assert report.rows == 4 * 3 + 1
    with pytest.raises(ValueError, match="there is no input 'text'; the inputs are pieces"):
        export_onnx(model, tmp_path / "a.onnx", lengths[0], dynamic_dims={"text": {1: "length"}})
    with pytest.raises(ValueError, match=r"dimension 1 of 'pieces' cannot be free with an example of shape \(4, 1\)"):
        export_onnx(model, tmp_path / "a.onnx", lengths[0][:, :1], dynamic_dims={"pieces": {1: "length"}})


class Shared(nn.Module):
    """One convolution under two names, with a BatchNorm of its own for each call."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.na, self.nb = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        with torch.no_grad():
            for norm, factor in ((self.na, 0.5), (self.nb, 2.0)):
                norm.weight.fill_(factor)
                norm.running_mean.fill_(factor / 10)

    def forward(self, x):
        return self.nb(self.b(self.na(self.a(x)).relu())).relu()


@pytest.mark.slow
def test_a_layer_under_two_names_is_not_folded_into_one_of_its_norms(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6)
    model = quantize_post_training(Shared().eval(), [x], observer="min_max", progress_bar=False)
    report = export_onnx(model, tmp_path / "shared.onnx", x, least_agreement=0.9)
    assert report.mean_difference < 2e-3
    again = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    again.append(again[0]).append(again[1])
    quantize_post_training(again.eval(), [x], progress_bar=False)
    assert export_onnx(again, tmp_path / "again.onnx", x, least_agreement=0.9).mean_difference < 2e-3


def compared(expected, got):
    return compare([[torch.as_tensor(expected)]], [[torch.as_tensor(got)]]).complaint(0.99)


def test_values_count_beside_classes():
    torch.manual_seed(0)
    x = torch.randn(50, 8)
    assert compared(x, x) is None
    assert compared(x, x + 1e-3 * torch.randn(50, 8)) is None
    assert "mean difference" in compared(x, 10 * x)
    assert compared(torch.full((2, 3), torch.nan), torch.full((2, 3), torch.nan)) is not None
    masked = torch.tensor([[1.0, -torch.inf, 0.0]])
    assert compared(masked, masked) is None
    second = [[x, x]], [[x, 3 * x]]
    assert "mean difference" in compare(*second).complaint(0.99)
    images = torch.randn(4, 3, 5, 5)
    assert compare([[images]], [[images]]).rows == 4 * 25


def test_names_that_meet_raise(tmp_path):
    class Returns(nn.Module):
        def forward(self, x):
            return {"x": x + 1}

    with pytest.raises(ValueError, match="'x' would name two of the file's inputs and outputs"):
        export_onnx(Returns(), tmp_path / "a.onnx", torch.zeros(2, 3))
    export_onnx(Returns(), tmp_path / "a.onnx", torch.zeros(2, 3), output_names=["y"])
    with pytest.raises(ValueError, match=r"a fraction in \[0, 1\], got 99"):
        export_onnx(Returns(), tmp_path / "a.onnx", torch.zeros(2, 3), least_agreement=99)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_few_bits_keep_their_biases(tmp_path, bits):
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    quantize_post_training(net, [x], weight_bits=bits, activation_bits=bits, observer="min_max", progress_bar=False)
    report = export_onnx(net, tmp_path / "few.onnx", x, least_agreement=0.95)
    assert report.mean_difference < 0.01
