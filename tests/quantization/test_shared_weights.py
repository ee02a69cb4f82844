"""A weight that is read outside of its layer, or that several layers hold: rounded everywhere, stored once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.models import Classifier, fit, new
from lightning_optim import QuantizationAwareTraining
from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.quantization.calibrate import quantize_post_training
from lightning_optim.quantization.prepare import prepare, quantized_layers, select_layers, set_phase
from lightning_optim.quantization.scheme import QuantizationScheme


class NextItem(nn.Module):
    """A recommender whose table is its output matrix as well, by a product."""

    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(600, 32)

    def forward(self, history):
        return self.items(history).mean(1) @ self.items.weight.T


class Borrowed(nn.Module):
    """A Linear whose forward is never called: a function takes its weight."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 16)

    def forward(self, x):
        return F.linear(x, self.inner.weight, self.inner.bias)


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(600, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 600, bias=False)
        self.head.weight = self.items.weight

    def forward(self, history):
        return self.head(torch.relu(self.body(self.items(history).mean(1))))


class Aliased(nn.Module):
    """A module that registers the table's Parameter as its own."""

    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(600, 32)
        self.matrix = self.items.weight

    def forward(self, history):
        return self.items(history).mean(1) @ self.matrix.T


def histories():
    torch.manual_seed(0)
    return torch.randint(0, 600, (16, 5))


def weights_only(module, bits=8, **selection):
    torch.manual_seed(0)
    return quantize_post_training(
        module.eval(), activation_bits=None, weight_bits=bits, progress_bar=False, **selection
    )


@pytest.mark.parametrize("bits", [3, 8])
def test_a_product_with_a_table_uses_the_rounded_table(bits):
    module = NextItem()
    table = fake_quantize_weight(module.items.weight.detach(), bits, "per_channel")
    weights_only(module, bits)
    found = module(histories())
    torch.testing.assert_close(found, F.embedding(histories(), table).mean(1) @ table.T)
    found.sum().backward()
    assert bool(module.items.weight.grad.abs().sum(1).all())  # through the product every row is reached


def test_a_function_that_borrows_a_weight_uses_the_rounded_one():
    module, x = Borrowed(), torch.randn(4, 32)
    weight = fake_quantize_weight(module.inner.weight.detach(), 4, "per_channel")
    weights_only(module, 4)
    torch.testing.assert_close(module(x), F.linear(x, weight, module.inner.bias))


def test_outside_of_a_forward_the_weight_is_the_parameter():
    module = weights_only(NextItem(), 4)
    assert module.items.weight is dict(module.named_parameters())["items.weight"]
    torch.optim.SGD([{"params": [module.items.weight]}], lr=0.1)  # a leaf
    with torch.no_grad():
        module.items.weight[0].zero_()
    assert not module.items._parameters["weight"][0].any()


def test_before_rounding_a_product_is_the_float_one_bit_for_bit():
    module, x = NextItem(), histories()
    plain = module(x)
    weights_only(module)
    set_phase(module, quantized_layers(module), "off")
    assert torch.equal(module(x), plain)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch does it
def test_a_compiled_module_rounds_what_it_reads():
    module = weights_only(NextItem(), 4)
    x = histories()
    expected = module(x)
    compiled = torch.compile(copy.deepcopy(module), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_a_step_that_reads_a_weight_directly_rounds_it_too(tmp_path):
    read = []

    class Reads(Classifier):
        def training_step(self, batch, batch_idx):
            read.append(self.net[0].weight)
            return super().training_step(batch, batch_idx)

    fit(tmp_path, new(Reads), QuantizationAwareTraining(activation_bits=None, start=4, freeze=8), max_epochs=1)
    assert [isinstance(weight, nn.Parameter) for weight in read] == [True] * 4 + [False] * 4


# What layers share is quantized in all of them or in none.


def test_including_a_table_takes_the_head_that_shares_its_weight():
    selection = select_layers(TiedHead(), include=[nn.Embedding])
    assert list(selection.chosen) == ["items", "head"]
    assert selection.left_out == {"body": "not in include"}


def test_excluding_a_head_leaves_the_table_float_too():
    selection = select_layers(TiedHead(), exclude=["head"])
    assert list(selection.chosen) == ["body"]
    assert selection.left_out["items"] == "shares its weight with head, which stays float (excluded by 'head')"


def test_a_table_that_is_asked_for_and_is_held_as_a_float_parameter_raises():
    assert "shares its weight with Aliased, which stays float" in select_layers(Aliased()).left_out["items"]
    with pytest.raises(ValueError, match=r"items \(Embedding\) cannot be quantized: it shares its weight with Aliased"):
        select_layers(Aliased(), include=["items"])


def test_a_part_of_a_model_leaves_what_the_rest_shares():
    whole = nn.ModuleDict({"encoder": nn.Sequential(nn.Embedding(9, 4)), "head": nn.Linear(4, 9, bias=False)})
    whole["head"].weight = whole["encoder"][0].weight
    selection = select_layers(whole["encoder"], "encoder.", root=whole)
    assert not selection.chosen
    assert "outside the quantized module" in selection.left_out["encoder.0"]


# The file.


@pytest.mark.parametrize(
    "module", [pytest.param(NextItem(), marks=pytest.mark.slow), TiedHead()], ids=["product", "tied head"]
)
def test_a_table_that_is_the_output_matrix_is_stored_once(module, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from lightning_optim import export_onnx

    report = export_onnx(weights_only(module), tmp_path / "net.onnx", histories())
    graph = onnx.load(str(tmp_path / "net.onnx")).graph
    tables = [tuple(weight.dims) for weight in graph.initializer if 600 in weight.dims and len(weight.dims) == 2]
    assert sorted(tables) in ([(600, 1), (600, 32)], [(600, 32)])
    assert report.size_ratio < 0.4
    assert report.max_difference < 1e-4
    assert report.layers["items"] == "int8 weight per channel"


def test_integer_activations_and_a_tied_table_share_one_integer_table(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from lightning_optim import export_onnx

    torch.manual_seed(0)
    module = quantize_post_training(TiedHead().eval(), [histories()], progress_bar=False)
    report = export_onnx(module, tmp_path / "net.onnx", histories(), least_agreement=0.0, verify=False)
    graph = onnx.load(str(tmp_path / "net.onnx")).graph
    found = [tuple(w.dims) for w in graph.initializer if w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 2]
    assert sorted(found) == [(32, 32), (600, 32)]
    assert report.layers["head"] == "int8 weight per channel, uint8 input"


def test_the_report_says_what_forward_does_not_use(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from lightning_optim import export_onnx

    class Spare(Borrowed):
        def __init__(self):
            super().__init__()
            self.spare, self.old = nn.Linear(32, 16), nn.LayerNorm(4)

    report = export_onnx(weights_only(Spare()), tmp_path / "net.onnx", torch.randn(4, 32), verify=False)
    assert report.layers == {
        "inner": "int8 weight per channel",
        "spare": "not in the file: forward does not use it",
        "old": "not in the file: forward does not use it",
    }


def test_torch_that_shards_in_the_first_forward_gets_the_parameter_and_not_the_rounded_weight(tmp_path):
    """``fully_shard`` reads ``layer.weight`` there, and what it gets is trained: a resumed run begins rounded."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    model = NextItem()
    before = model.items.weight.detach().clone()
    prepare(model, ["items"], QuantizationScheme(weight_bits=2))
    set_phase(model, quantized_layers(model), "frozen")
    fully_shard(model)
    model(torch.randint(0, 600, (4, 5)))
    model.reshard()
    assert torch.equal(model.items._parameters["weight"].full_tensor(), before)
