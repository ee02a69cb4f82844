"""Weights of 4 bits and fewer in the file: packed, multiplied as they are, and with the module's integers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.exported import TwoTowers, histories
from helpers.pretrained import IDS, MODELS
from lightning_optim import quantize_post_training
from lightning_optim.export import export_onnx
from lightning_optim.export.packed import StoredBlocks, StoredRows, _packed, _unpacked
from lightning_optim.export.runtimes import RUNTIMES
from lightning_optim.functional.fake_quantize import fake_quantize_weight

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FOUR = {"activation_bits": None, "weight_bits": 4, "weight_granularity": "per_group:32"}


class Heads(nn.Module):
    """A table whose rows are a head too, and two matrices with biases."""

    def __init__(self, width: int = 64, *, tied: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(300, width)
        self.inner = nn.Linear(width, 96)
        self.outer = nn.Linear(96, width)
        self.head = nn.Linear(width, 300, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.outer(F.relu(self.inner(self.words(ids)))))


def ids(rows: int = 6):
    return torch.randint(0, 300, (rows, 10), generator=torch.Generator().manual_seed(0))


def quantized(module: nn.Module, **options):
    return quantize_post_training(module, progress_bar=False, **{**FOUR, **options})


def exact(path, *tensors):
    """The file's answers where ONNX Runtime does not round inputs."""
    model = onnx.load(str(path))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]
    return torch.as_tensor(session.run(None, dict(zip(names, (x.numpy() for x in tensors), strict=True)))[0])


def answer(module, *tensors):
    with torch.no_grad():
        return module.eval()(*tensors)


def held(path, name):
    (found,) = [x for x in onnx.load(str(path)).graph.initializer if x.name.endswith(name)]
    return found


@pytest.mark.parametrize("size", [5, 16, 32])
def test_two_integers_in_a_byte(size):
    integers = torch.randint(-8, 8, (7, 3, size))
    assert _packed(integers).shape == (7, 3, (size + 1) // 2)
    assert torch.equal(_unpacked(_packed(integers))[..., :size], integers.float())
    assert int(_packed(torch.tensor([-7, 7]))) == 0xF1  # the first is the lower half


@pytest.mark.parametrize("stored", [StoredBlocks, StoredRows])
@pytest.mark.parametrize(("width", "size"), [(64, 32), (40, 16), (33, 32)])
def test_what_is_stored_is_the_rounded_weight(stored, width, size):
    weight = torch.randn(9, width)
    granularity = f"per_group:{size}"
    rounded = fake_quantize_weight(weight, 4, granularity)
    held = stored(weight, 4, granularity)
    assert torch.equal(held.matrix(), rounded)
    x = torch.randn(4, width)
    torch.testing.assert_close(held.product(x), x @ rounded.t())
    if stored is StoredRows:
        assert torch.equal(held.rows(torch.tensor([[3, 8]])), rounded[[3, 8]][None])


@pytest.mark.parametrize(
    ("bits", "width", "tied"),
    [
        (4, 64, True),
        pytest.param(3, 40, False, marks=pytest.mark.slow),  # 40 inputs are one group and a quarter
        pytest.param(2, 64, False, marks=pytest.mark.slow),
        pytest.param(4, 40, True, marks=pytest.mark.slow),
    ],
)
def test_the_file_holds_packed_integers_and_computes_the_module(tmp_path, bits, width, tied):
    torch.manual_seed(0)
    module = quantized(Heads(width, tied=tied), weight_bits=bits)
    path = tmp_path / "net.onnx"
    report = export_onnx(module, path, ids(), least_agreement=0.9)
    torch.testing.assert_close(exact(path, ids()), answer(module, ids()), rtol=1e-4, atol=1e-4)
    container = "" if bits == 4 else " in int4 container"
    assert set(report.layers.values()) == {f"int{bits}{container} weight per group:32, packed"}
    assert report.integer_matmuls == report.matmuls == 3
    weight = held(path, "inner.stored.integers")
    padded = -(-width // 32) * 32
    assert (weight.data_type, tuple(weight.dims)) == (onnx.TensorProto.INT4, (padded, 96))
    assert report.size_ratio < (0.26 if width == 64 else 0.35)  # 40 inputs are padded to 64
    types = [x.data_type for x in onnx.load(str(path)).graph.initializer if tuple(x.dims)[:1] == (300,)]
    assert types.count(onnx.TensorProto.UINT8) == 1  # the table, once if it is the head too
    assert any("com.microsoft" in note for note in report.notes) is tied
    assert any("accuracy_level=1" in note for note in report.notes)


def test_the_engine_rounds_inputs_only_a_little(tmp_path):
    torch.manual_seed(0)
    module = quantized(Heads())
    report = export_onnx(module, tmp_path / "net.onnx", ids(), least_agreement=0.9)
    span = float(answer(module, ids()).max() - answer(module, ids()).min())
    assert 0 < report.mean_difference < 0.01 * span


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, pytest.param(40, marks=pytest.mark.slow)])
def test_openvino_reads_the_same_file(tmp_path, width):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    module = quantized(Heads(width))
    report = export_onnx(module, tmp_path / "net.onnx", ids(), runtime="openvino")
    assert report.max_difference < 1e-4
    assert report.size_ratio < 0.3


def test_matrices_before_a_bias_of_two_dimensions_stay_packed(tmp_path):
    net = quantized(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)))
    report = export_onnx(net, tmp_path / "net.onnx", torch.randn(8, 64), least_agreement=0.7)
    assert report.integer_matmuls == report.matmuls == 2


@pytest.mark.slow
@pytest.mark.parametrize("granularity", [pytest.param("per_channel", marks=pytest.mark.slow), "per_group:8"])
def test_tables_are_packed_with_any_scales(tmp_path, granularity):
    module = TwoTowers()
    quantized(module, weight_granularity=granularity, include=[nn.Embedding, nn.EmbeddingBag])
    inputs = histories()
    report = export_onnx(module, tmp_path / "net.onnx", inputs)
    assert report.max_difference < 1e-5
    text = f"int4 weight {granularity.replace('_', ' ')}, packed"
    assert report.layers["histories"] == report.layers["items"] == text
    assert held(tmp_path / "net.onnx", "items.stored.integers").data_type == onnx.TensorProto.UINT8
    assert report.size_ratio < 0.22


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weight_granularity": "per_group:24"}, "int4 in int8 container weight per group:24"),
        pytest.param(
            {"weight_granularity": "per_channel"}, "int4 in int8 container weight per channel", marks=pytest.mark.slow
        ),
        pytest.param({"weight_bits": 8}, "int8 weight per group:32", marks=pytest.mark.slow),
    ],
)
def test_what_engines_do_not_multiply_packed_is_said(tmp_path, options, text):
    net = quantized(nn.Sequential(nn.Linear(48, 16)), **options)
    report = export_onnx(net, tmp_path / "net.onnx", torch.randn(8, 48), least_agreement=0.7)
    assert report.layers == {"0": text}
    assert any("not packed" in note for note in report.notes) is (options.get("weight_bits") != 8)
    torch.testing.assert_close(
        exact(tmp_path / "net.onnx", torch.ones(3, 48)), answer(net, torch.ones(3, 48)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", pytest.param("GPT-2", marks=pytest.mark.slow)])
def test_language_models_of_transformers(tmp_path, name):
    pytest.importorskip("transformers")
    model = MODELS[name].make()
    model.config.use_cache = False
    quantized(model, weight_granularity="per_group:16")
    report = export_onnx(model, tmp_path / "net.onnx", {"input_ids": IDS}, least_agreement=0.8)
    packed = [layer for layer, text in report.layers.items() if text.endswith("packed")]
    assert len(packed) == sum(1 for x in model.modules() if getattr(x, "weight_bits", None) == 4)
    got = exact(tmp_path / "net.onnx", IDS)
    torch.testing.assert_close(got, answer(model, IDS).logits, rtol=1e-3, atol=1e-3)
    assert report.integer_matmuls > 0


@pytest.mark.slow
def test_a_loaded_file_answers_as_it_was_verified(tmp_path):
    torch.manual_seed(0)
    module = quantized(Heads())
    report = export_onnx(module, tmp_path / "net.onnx", ids(), least_agreement=0.9)
    (got,) = RUNTIMES["onnxruntime"](tmp_path / "net.onnx").run([ids()])
    assert float((got - answer(module, ids())).abs().max()) == pytest.approx(report.max_difference, rel=0.3)


def test_wide_groups_keep_their_form_on_every_processor(tmp_path):
    """Rewritten as uint8, where a processor needs that elsewhere, blocks would lose the scales they are read with."""
    torch.manual_seed(0)
    net = quantized(nn.Sequential(nn.Linear(256, 256)), weight_bits=8)  # the scales are too many to be folded
    x = torch.randn(8, 256)
    report = export_onnx(net, tmp_path / "net.onnx", x, least_agreement=0.7)
    assert report.integer_matmuls == 1
    torch.testing.assert_close(exact(tmp_path / "net.onnx", x), answer(net, x), rtol=1e-4, atol=1e-4)
