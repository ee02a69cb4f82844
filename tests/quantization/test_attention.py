"""nn.MultiheadAttention: its projections are rounded, in training as in the file, and nothing else changes."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optim import export_onnx, quantize_post_training
from lightning_optim.checkpoint import conform, plain_plan
from lightning_optim.export.weights import deployed_copy, deployed_state
from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.measure import SIZES
from lightning_optim.quantization.attention import ProjectedAttention, projection_biases, projection_weights
from lightning_optim.quantization.layers import float_kernels
from lightning_optim.quantization.prepare import prepare, quantized_layers, select_layers, set_phase
from lightning_optim.quantization.scheme import QuantizationScheme


class Projected(ProjectedAttention):
    def projected(self, which, x):
        place = ("query", "key", "value").index(which)
        return F.linear(x, projection_weights(self)[place], projection_biases(self)[place])


BOTH = (False, True)
MASKS = (None, "bool", "float", "heads")


@pytest.mark.parametrize("add", [(False, False), (True, False), (False, True)], ids=["", "bias_kv", "zero_attn"])
@pytest.mark.parametrize("sizes", [pytest.param(None, marks=pytest.mark.slow), (6, 4)])
def test_the_projected_attention_gives_what_torch_does(add, sizes):
    cases = itertools.product(BOTH, BOTH, BOTH, MASKS, (None, "bool", "float"), BOTH, BOTH)
    for batch_first, need_weights, average, attn_mask, padding, batched, causal in cases:
        torch.manual_seed(0)
        kdim, vdim = sizes or (None, None)
        layer = nn.MultiheadAttention(
            8, 2, 0.3, True, *add, kdim=kdim, vdim=vdim, batch_first=batch_first
        )  # in training mode: dropout draws the same numbers
        length, keys, rows = 4, 4 if causal else 5, 3
        q, k, v = (
            torch.randn((rows, n, width) if batch_first and batched else (n, rows, width) if batched else (n, width))
            for n, width in ((length, 8), (keys, kdim or 8), (keys, vdim or 8))
        )
        heads = (rows if batched else 1) * 2
        mask = {
            None: None,
            "bool": torch.ones(length, keys).tril().logical_not(),
            "float": torch.randn(length, keys),
            "heads": torch.randn(heads, length, keys),
        }["bool" if causal else attn_mask]
        hidden = torch.arange(keys) == keys - 2
        hidden = hidden.expand(rows, -1) if batched else hidden
        hidden = {None: None, "bool": hidden, "float": torch.zeros(hidden.shape).masked_fill(hidden, -3.0)}[padding]
        if mask is not None and hidden is not None and mask.dtype != hidden.dtype:
            continue  # torch warns
        kwargs = {
            "key_padding_mask": hidden,
            "need_weights": need_weights,
            "attn_mask": mask,
            "average_attn_weights": average,
            "is_causal": causal,
        }
        torch.manual_seed(1)
        expected = layer(q, k, v, **kwargs)
        layer.__class__ = Projected
        torch.manual_seed(1)
        torch.testing.assert_close(layer(q, k, v, **kwargs), expected)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        layer(q, k, v, is_causal=True)


class Net(nn.Module):
    """An encoder layer, which has a fast path, and attention between two tensors of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=16, vdim=16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.encoder(x)
        return self.head(self.cross(x[:, :3, :8], x, x)[0].mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def inputs(seed: int = 1, rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 7, 16, generator=torch.Generator().manual_seed(seed))


def data(batches: int = 3) -> list[torch.Tensor]:
    return [inputs(seed) for seed in range(batches)]


def test_names_stay_and_every_projection_has_a_range():
    made = net()
    before = dict(made.state_dict())
    quantize_post_training(made, data(), progress_bar=False)
    state = made.state_dict()
    assert list(before) == [
        name for name in state if not name.endswith(("statistic", "batches", "scale", "zero_point"))
    ]
    layers = quantized_layers(made)
    assert {"encoder.layers.0.self_attn", "encoder.layers.0.self_attn.out_proj", "cross", "cross.out_proj"} <= set(
        layers
    )
    assert layers["cross"].watched == ("query", "key", "value")
    scales = [state[f"encoder.layers.1.self_attn.{which}_scale"] for which in ("query", "key", "value")]
    assert scales[0] == scales[1] == scales[2] > 0
    assert state["cross.query_scale"] != state["cross.key_scale"]
    rounded = made.cross.rounded_parameters()
    assert torch.equal(rounded["k_proj_weight"], fake_quantize_weight(made.cross.k_proj_weight.detach()))
    with float_kernels(made), torch.no_grad():
        torch.testing.assert_close(made(inputs()), net()(inputs()))


def test_the_fast_path_does_not_go_round_it():
    made = quantize_post_training(net(), data(), weight_bits=2, progress_bar=False)
    with torch.inference_mode():
        answers = made(inputs())
        assert (answers - net()(inputs())).abs().max() > 0.01
    made.train()
    for layer in made.modules():
        if isinstance(layer, nn.Dropout | nn.MultiheadAttention):
            layer.p = layer.dropout = 0.0
    torch.testing.assert_close(made(inputs()), answers)  # no fast path in training mode
    made(inputs()).sum().backward()
    assert made.encoder.layers[0].self_attn.in_proj_weight.grad.abs().sum() > 0


def test_weights_alone_are_those_of_a_float_net_with_rounded_weights():
    made, plain = net(), net()
    quantize_post_training(made, None, weight_bits=4, activation_bits=None, weight_granularity="per_tensor")
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.MultiheadAttention):
                for matrix in projection_weights(module):
                    matrix.copy_(fake_quantize_weight(matrix.clone(), 4, "per_tensor"))
            if isinstance(module, nn.Linear):
                module.weight.copy_(fake_quantize_weight(module.weight, 4, "per_tensor"))
        torch.testing.assert_close(made(inputs()), plain(inputs()))
    state = deployed_state(deployed_copy(made))
    assert state.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state[name], tensor)
    count = sum(p.numel() for name, p in made.named_parameters() if p.ndim == 2)
    assert SIZES["bits"](net()) - SIZES["bits"](made) == count * 28 / 32


@pytest.mark.parametrize(
    ("runtime", "more"),
    [
        ("onnxruntime", {"weight_bits": 7}),
        pytest.param("onnxruntime", {"weight_bits": 7, "activation_ranges": "dynamic"}, marks=pytest.mark.slow),
        pytest.param("onnxruntime", {"activation_bits": None}, marks=pytest.mark.slow),
        pytest.param("openvino", {"weight_bits": 7}, marks=pytest.mark.slow),
        pytest.param(
            "onnxruntime",
            {"weight_bits": 4, "activation_bits": None, "weight_granularity": "per_group:16"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_file_computes_the_projections_with_integers(tmp_path, runtime, more):
    pytest.importorskip(runtime)
    made = quantize_post_training(net(), data(), progress_bar=False, **more)
    report = export_onnx(
        made, tmp_path / "net.onnx", inputs(), inputs=inputs(9, 32), runtime=runtime, least_agreement=0.9
    )
    assert report.mean_difference < 5e-3
    assert report.layers["cross"].startswith(f"int{more.get('weight_bits', 8)}")
    # An encoder layer has four projections and two products of the feed-forward part.
    products = 2 * 6 + 4
    if more.get("activation_bits", 8) is not None:
        assert report.integer_matmuls - products in (0, 1)  # engines may compute the head in float: nothing rounds it
        assert report.layers["cross"].endswith(("uint8 query, key, value", "range of each call"))


def test_a_projection_goes_with_its_attention_and_each_can_be_left_out():
    made = net()
    chosen = select_layers(made, exclude=["cross.out_proj", "encoder.*"]).chosen
    assert list(chosen) == ["cross", "head"]
    selection = select_layers(made, exclude=[nn.MultiheadAttention])
    assert not any("attn" in name or "cross" in name for name in selection.chosen)
    assert selection.left_out["cross.out_proj"].startswith("the attention cross stays float")
    with pytest.raises(ValueError, match=r"out_proj .* cannot be quantized: the attention cross stays float"):
        select_layers(made, include=["cross.out_proj"])
    quantize_post_training(made, data(), exclude=["cross.out_proj", "encoder.*"], progress_bar=False)
    assert type(made.cross.out_proj) is type(net().cross.out_proj)
    assert made(inputs()).shape == (6, 5)


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_a_subclass_with_its_own_forward_stays_float():
    selection = select_layers(nn.ModuleDict({"attention": Own(8, 2)}))
    assert selection.chosen == {}
    assert "subclass of MultiheadAttention" in selection.left_out["attention"]


def test_files_and_copies_hold_the_same_attention():
    made = quantize_post_training(net(), data(), progress_bar=False)
    fresh = Net().eval()
    conform(fresh, plain_plan(made))
    fresh.load_state_dict(made.state_dict())
    expected = made(inputs())
    assert torch.equal(fresh(inputs()), expected)
    assert torch.equal(copy.deepcopy(made)(inputs()), expected)
    conform(fresh, {**plain_plan(made), "modules": {}, "entries": {}})
    assert type(fresh.cross) is nn.MultiheadAttention
    assert list(fresh.state_dict()) == list(net().state_dict())


def test_off_is_the_float_attention_bit_for_bit():
    made = net()
    prepare(made, select_layers(made).chosen, QuantizationScheme())
    assert torch.equal(made(inputs()), net()(inputs()))
    set_phase(made, quantized_layers(made), "observe")
    torch.testing.assert_close(made(inputs()), net()(inputs()))


@pytest.mark.parametrize("more", [{"method": "gptq", "weight_bits": 4}, {"smooth": True}, {"bits": "auto"}])
def test_other_ways_of_rounding_take_an_attention(more):
    if "bits" in more:
        more = {**more, "effective_bits": 5.0, "activation_bits": None}
    made = quantize_post_training(net(), data(), progress_bar=False, **more)
    assert (made(inputs()) - net()(inputs())).abs().mean() < 0.05
    assert made.cross.weight_bits in range(2, 9)
