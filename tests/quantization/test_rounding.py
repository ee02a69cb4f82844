"""GPTQ layer by layer: what is chosen is what computes, what is saved and what is exported."""

import copy
from collections import OrderedDict

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx.numpy_helper import to_array
from torch import nn
from torch.nn.functional import unfold

from helpers.mixtures import Conv1D, Experts, as_linear
from helpers.models import Classifier, assert_same_state, data, new, trainer, val_loader
from helpers.pretrained import MODELS
from lightning_optim import export_onnx, export_pretrained, layerwise, load_from_checkpoint, quantize_post_training
from lightning_optim.functional.fake_quantize import fake_quantize_weight, grouped, weight_scale
from lightning_optim.functional.gptq import unpack_gptq
from lightning_optim.functional.rounding import ROUNDINGS
from lightning_optim.functional.second_order import round_columns
from lightning_optim.quantization.prepare import quantized_layers


def correlated(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(rows, 3, generator=generator) @ torch.randn(3, features, generator=generator)
    return causes + 0.2 * torch.randn(rows, features, generator=generator)


def integers_of(layer) -> torch.Tensor:
    """Integers of a quantized layer, ``[out, groups, size]``."""
    weight = layer.quantized_weight().detach()
    return (
        grouped(weight, layer.weight_granularity) / weight_scale(weight, layer.weight_bits, layer.weight_granularity)
    ).round()


def weights_only(model, calls, **arguments):
    words = {"method": "gptq", "activation_bits": None, "weight_bits": 4, "progress_bar": False}
    return quantize_post_training(model, calls, **{**words, **arguments})


def batches(name: str, number: int = 3) -> list[dict[str, torch.Tensor]]:
    """Texts of five favourite words each, so that hidden states are correlated."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(number):
        favourites = torch.randint(3, 50, (4, 5), generator=generator)
        found.append(
            {
                key: torch.gather(favourites, 1, torch.randint(0, 5, (4, 12), generator=generator))
                if key.endswith("ids")
                else torch.randn(4, *value.shape[1:], generator=generator)
                for key, value in MODELS[name].inputs.items()
            }
        )
    return found


def test_each_layer_is_rounded_for_what_the_rounded_ones_before_it_give():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    by_hand, x = copy.deepcopy(net), [correlated(40, 12), correlated(30, 12, 1)]
    for place in (0, 2, 4):
        with torch.no_grad():
            inputs = torch.cat([by_hand[:place](batch) for batch in x])
            by_hand[place].weight.copy_(round_columns(by_hand[place].weight, inputs.T @ inputs, 4, "per_channel"))
    weights_only(net, x)
    for place in (0, 2, 4):
        torch.testing.assert_close(net[place]._parameters["weight"], by_hand[place].weight)
        assert torch.equal(net[place].quantized_weight(), fake_quantize_weight(net[place]._parameters["weight"], 4))


@pytest.mark.parametrize(
    "name", ["Llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("T5", "CLIP", "Swin"))]
)
def test_finished_blocks_return_what_they_would_compute(name, monkeypatch):
    """Skipping finished blocks is cheaper and changes nothing, with one stack or two."""
    found = {}
    for replayed in (True, False):
        if not replayed:
            monkeypatch.setattr(layerwise, "_replayable", lambda *arguments: [])
        model = MODELS[name].make()
        calls = []
        first = next(layer for layer in model.modules() if isinstance(layer, nn.Linear))
        first.register_forward_pre_hook(lambda *arguments, calls=calls: calls.append(1))
        weights_only(model, batches(name))
        found[replayed] = model, len(calls)
    assert found[True][1] < found[False][1]
    for (key, ours), theirs in zip(found[True][0].named_parameters(), found[False][0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)


def test_blocks_that_reach_further_than_their_neighbour_compute_again():
    class Reaches(nn.Module):
        """The head adds what all blocks gave."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            total = 0
            for block in self.blocks:
                x = block(x)
                total = total + x
            return self.head(total)

    torch.manual_seed(0)
    net, x = Reaches(), [correlated(40, 8)]
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    assert layerwise._replayable(net, layers, layerwise.ForwardInputs((x[0],))) == []
    weights_only(net, x, exclude=["head"])
    with torch.no_grad():
        inputs = net.blocks[0](x[0])
        inputs = inputs + net.blocks[1](inputs) + net.blocks[2](net.blocks[1](inputs))
    expected = round_columns(net.head.weight, inputs.T @ inputs, 4, "per_channel")
    torch.testing.assert_close(weights_only(net, x, include=["head"]).head._parameters["weight"], expected)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "per_group:8"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_less_is_lost_than_by_rounding_to_the_nearest(granularity, bits):
    x = correlated(200, 32)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))
    losses = {}
    for method in ROUNDINGS:
        rounded = weights_only(
            copy.deepcopy(net), x.split(50), method=method, weight_bits=bits, weight_granularity=granularity
        )
        with torch.no_grad():
            losses[method] = float(F.mse_loss(rounded(x), net(x)))
    assert losses["gptq"] < 0.6 * losses["round"]


@pytest.mark.parametrize("bits", [3, 4])
def test_a_transformer_answers_nearer_to_its_float_self_on_texts_it_has_not_seen(bits):
    model = MODELS["Llama"].make()
    model.get_input_embeddings().weight.data.copy_(correlated(50, 32))  # words share few causes
    texts = batches("Llama", 24)
    losses = {}
    for method in ROUNDINGS:
        rounded = weights_only(
            copy.deepcopy(model), texts[:16], method=method, weight_bits=bits, exclude=[nn.Embedding]
        )
        with torch.no_grad():
            losses[method] = sum(
                float((rounded(**text).logits - model(**text).logits).square().mean()) for text in texts[16:]
            )
    assert losses["gptq"] < 0.7 * losses["round"]


def test_conv1d_is_the_linear_and_convolutions_are_what_they_unfold_to():
    torch.manual_seed(0)
    layer, x = Conv1D(6, 8), correlated(50, 8)
    nets = [nn.Sequential(layer), nn.Sequential(as_linear(layer))]
    for net in nets:
        weights_only(net, [x], weight_granularity="per_group:4")
    torch.testing.assert_close(nets[0][0]._parameters["weight"].t(), nets[1][0]._parameters["weight"])
    convolution = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    images = torch.randn(4, 3, 8, 8).cumsum(2)
    columns = unfold(images, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    expected = round_columns(convolution.weight, columns.T @ columns, 4, "per_channel")
    rounded = weights_only(nn.Sequential(convolution), [images])[0]
    torch.testing.assert_close(rounded._parameters["weight"], expected)


def test_static_ranges_are_taken_behind_the_rounded_weights():
    module = quantize_post_training(new(), val_loader(), weight_bits=3, method="gptq", progress_bar=False)
    plain = quantize_post_training(new(), val_loader(), weight_bits=3, progress_bar=False)
    assert int(module.net[4].input_batches) == 4
    assert torch.equal(module.net[0].input_statistic, plain.net[0].input_statistic)
    seen = copy.deepcopy(module).eval()
    for layer in quantized_layers(seen).values():
        layer.quantization_phase = layer.output_phase = "off"  # weights are their integers' values all the same
    with torch.no_grad():
        inputs = torch.stack([seen.net[:4](batch[0]).max() for batch in val_loader()])
    torch.testing.assert_close(module.net[4].input_statistic[1], inputs.mean())


def test_a_checkpoint_brings_the_integers_back(tmp_path):
    module = weights_only(new(), val_loader(), weight_bits=3)
    run = trainer(tmp_path)
    expected = run.validate(module, val_loader(), verbose=False)
    run.save_checkpoint(tmp_path / "file.ckpt")
    loaded = load_from_checkpoint(Classifier, tmp_path / "file.ckpt")
    assert_same_state(loaded, module)
    for ours, theirs in zip(quantized_layers(loaded).values(), quantized_layers(module).values(), strict=True):
        assert torch.equal(integers_of(ours), integers_of(theirs))
    assert trainer(tmp_path).validate(loaded, val_loader(), verbose=False) == expected


@pytest.mark.parametrize(
    ("granularity", "activation_bits"),
    [
        pytest.param("per_channel", 8, marks=pytest.mark.slow),
        ("per_group:32", None),
        pytest.param("per_channel", None, marks=pytest.mark.slow),
        pytest.param("per_tensor", 8, marks=pytest.mark.slow),
    ],
)
def test_the_exported_file_holds_the_integers_that_were_chosen(granularity, activation_bits, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 64)).eval()  # the exporter folds smaller ones
    x = correlated(200, 64)
    words = {"weight_granularity": granularity, "weight_bits": 8, "activation_bits": activation_bits}
    quantize_post_training(net, x.split(50), method="gptq", progress_bar=False, **words)
    export_onnx(net, tmp_path / "net.onnx", x[:4], inputs=[x], least_agreement=0.9)
    initializers = onnx.load(tmp_path / "net.onnx").graph.initializer
    stored = [to_array(each) for each in initializers if each.data_type == onnx.TensorProto.INT8]
    for place in (0, 2):
        chosen = integers_of(net[place]).flatten(1).numpy()
        forms = [form for held in stored for form in (held, held.T) if form.size == chosen.size]
        assert any((form.reshape(chosen.shape) == chosen).all() for form in forms), [each.shape for each in stored]


def test_the_packed_folder_holds_the_integers_that_were_chosen(tmp_path):
    from safetensors.torch import load_file

    model = MODELS["Llama"].make()
    weights_only(model, batches("Llama"), weight_granularity="per_group:16", exclude=["*embed*", "lm_head"])
    export_pretrained(model, tmp_path / "folder", quantization="gptq")
    state = load_file(tmp_path / "folder" / "model.safetensors")
    layers = quantized_layers(model)
    assert len(layers) == 21
    for name, layer in layers.items():
        packed = {key: state[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
        ones = {**packed, "scales": torch.ones_like(packed["scales"])}
        assert torch.equal(unpack_gptq(ones), integers_of(layer).flatten(1))


def test_zeros_of_a_mask_stay():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), correlated(50, 16)
    with torch.no_grad():
        net[0].weight.view(16, 4, 4)[..., ::2] = 0.0
    weights_only(net, [x])
    assert (net[0]._parameters["weight"].view(16, 4, 4)[..., ::2] == 0).all()


def test_what_is_rounded_to_the_nearest_after_all_is_told(caplog):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer, self.unused = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.experts, self.head = Experts(), nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.experts(self.layer(self.table(ids))))

    torch.manual_seed(0)
    net = Net()
    before = copy.deepcopy(net)
    with caplog.at_level("INFO"):
        weights_only(net, [torch.randint(0, 20, (30,))])
    assert "1 layers" in caplog.text
    for reason in ("table: a table", "unused: no batch reaches it", "experts: experts", "head: other layers share"):
        assert reason in caplog.text
    assert not torch.equal(net.layer._parameters["weight"], before.layer.weight)
    for name in ("table", "unused", "head"):
        assert torch.equal(getattr(net, name)._parameters["weight"], getattr(before, name).weight)
        assert getattr(net, name).quantization_phase == "frozen"


def halves(weight, stats, bits, granularity):
    return weight / 2


def floors(weight, stats, bits, granularity):
    """Toward zero, but for the largest."""
    scale = weight_scale(weight, bits, granularity)
    return ((grouped(weight, granularity) / scale * (1 + 1e-6)).trunc() * scale).view_as(weight)


def test_a_rounding_of_ones_own():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 4)), [correlated(10, 8)]
    weight = net[0].weight.detach().clone()
    quantize_post_training(net, None, activation_bits=None, method=floors)
    assert torch.equal(integers_of(net[0])[:, 0], (weight / weight_scale(weight)[:, 0] * (1 + 1e-6)).trunc())
    with pytest.raises(ValueError, match="must return integers times scales"):
        weights_only(nn.Sequential(nn.Linear(8, 4)), x, method=halves)


@pytest.mark.parametrize(
    ("loader", "words", "message"),
    [
        (None, {}, "this `method` reads the inputs of the layers: pass a dataloader"),
        ([], {}, "the dataloader has no batch"),
        ([torch.zeros(3, 5)], {}, "forward of Sequential fails"),
        ([torch.full((3, 8), torch.nan)], {}, "0 cannot be rounded: the layer's inputs are not all finite"),
        ([torch.ones(3, 8)], {"method": "awq"}, "unknown rounding 'awq'; known: gptq, round"),
        ([torch.ones(3, 8)], {"method": {"gptq": {"damping": 0.0}}}, "linearly dependent and damping=0.0"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(loader, words, message):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).train()
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=message):
        weights_only(net, loader, **words)
    assert type(net[0]) is nn.Linear
    assert net.training
    assert_same_state(net, before)
    assert not net[0]._forward_pre_hooks


def test_a_failure_half_way_gives_the_weights_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    before, seen = copy.deepcopy(net), []

    def second_fails(weight, stats, bits, granularity):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return floors(weight, stats, bits, granularity)

    with pytest.raises(KeyboardInterrupt):
        quantize_post_training(net, None, activation_bits=None, method=second_fails)
    assert_same_state(net, before)
    assert type(net[0]) is nn.Linear


def test_a_compiled_model_is_refused():
    net = nn.Sequential(OrderedDict({"_orig_mod": nn.Linear(8, 8)}))  # the name that torch.compile gives
    with pytest.raises(ValueError, match="cannot be read in a compiled model"):
        weights_only(net, [torch.ones(3, 8)])


def test_data_is_a_lightning_loader_of_tuples_as_before():
    module = weights_only(new(), val_loader(), batches=2)
    rows = data().tensors[0]
    assert torch.isfinite(module(rows)).all()
