"""Scale that moves from activations into weights: the answers stay, what is wrong is refused, outliers cost less."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optim import quantize_post_training
from lightning_optim.functional.smoothing import smoothing_scales
from lightning_optim.modules import LINEARS
from lightning_optim.quantization.smoothing import smooth_inputs
from lightning_optim.target import as_forward_calls

WIDTH = 16


class Block(nn.Module):
    """A norm that two layers read, a product, and another norm whose output is added too."""

    def __init__(self, activation, *, residual_of_norm=False):
        super().__init__()
        self.norm, self.gate, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 24),
            nn.Linear(WIDTH, 24, bias=False),
            nn.Linear(24, WIDTH),
        )
        self.activation, self.residual_of_norm = activation, residual_of_norm

    def forward(self, x):
        y = self.norm(x)
        z = self.down(self.activation(self.gate(y)) * self.up(y))
        return (y if self.residual_of_norm else x) + z


def with_outliers(model, by=100.0):
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[3] *= by
            if isinstance(module, Block):
                for reader in (module.gate, module.up):
                    reader.weight[:, 3] /= by
    return model.eval()


def stack(activation=F.silu, **options):
    torch.manual_seed(0)
    return with_outliers(nn.Sequential(*(Block(activation, **options) for _ in range(3)), nn.Linear(WIDTH, 4)))


def smoothed(model, batches):
    calls = [as_forward_calls(batch) for batch in batches]
    readers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LINEARS)}
    return smooth_inputs(model, calls, readers)


def test_scales_leave_both_sides_equally_large():
    x, w = torch.tensor([64.0, 1.0, 0.0, 4.0]), torch.tensor([1.0, 4.0, 1.0, 0.0])
    scales = smoothing_scales(x, w)
    assert scales.tolist() == [8.0, 0.5, 1.0, 1.0]
    assert torch.equal((x / scales)[:2], (w * scales)[:2])
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        smoothing_scales(x, w, 1.0)


def test_the_answers_stay_to_the_last_bit_and_every_block_is_smoothed():
    model, batches = stack(), list(torch.randn(3, 5, WIDTH))
    before = copy.deepcopy(model)
    done = smoothed(model, batches)
    assert {(one.maker, one.readers) for one in done} == {
        move
        for block in range(3)
        for move in (
            (f"{block}.norm", (f"{block}.gate", f"{block}.up")),
            (f"{block}.up", (f"{block}.down",)),
        )
    }
    assert all(torch.equal(model(batch), before(batch)) for batch in batches)
    largest = model[0].norm(batches[0]).abs().amax(0)
    dense = before[0].norm(batches[0]).abs().amax(0)
    assert largest.max() / largest.median() < 0.2 * dense.max() / dense.median()


def test_what_something_else_reads_stays():
    model, batches = stack(residual_of_norm=True), list(torch.randn(2, 5, WIDTH))
    state = copy.deepcopy(model.state_dict())
    done = smoothed(model, batches)
    assert {one.maker for one in done} == {"0.up", "1.up", "2.up"}
    for name, value in model.state_dict().items():
        assert ("up" in name or "down" in name) or torch.equal(value, state[name]), name


@pytest.mark.parametrize(("activation", "moves"), [(F.relu, True), (F.gelu, False), (torch.sigmoid, False)])
def test_an_activation_lets_scale_through_only_if_it_is_homogeneous(activation, moves):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
            with torch.no_grad():
                self.first.weight[2] *= 50

        def forward(self, x):
            return self.second(activation(self.first(x)))

    model, batch = Two(), torch.randn(6, 8)
    expected = model(batch)
    done = smoothed(model, [batch])
    assert ("first" in {one.maker for one in done}) is moves
    assert torch.equal(model(batch), expected)


def test_shared_weights_and_layers_that_are_called_twice_stay():
    model = stack()
    model[1].gate.weight = model[0].gate.weight
    twice = nn.Sequential(model[2], model[2], nn.Linear(WIDTH, 2))
    for net in (model, twice):
        expected = net(torch.ones(2, WIDTH))
        done = smoothed(net, [torch.ones(2, WIDTH) * torch.arange(1.0, WIDTH + 1)])
        assert torch.equal(net(torch.ones(2, WIDTH)), expected)
        readers = {name for one in done for name in one.readers}
        assert readers.isdisjoint({"0.gate", "1.gate"} if net is model else {"0.gate", "0.up", "0.down"})


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "OPT"])
def test_models_of_others(name):
    transformers = pytest.importorskip("transformers", reason="transformers: pip install 'transformers==5.24.*'")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {
        "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=24, **sizes)),
        "GPT-2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)
        ),
        "BERT": lambda: transformers.BertForMaskedLM(transformers.BertConfig(intermediate_size=24, **sizes)),
        "OPT": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(ffn_dim=24, word_embed_proj_dim=16, **sizes)),
    }[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[1] += 20 * (parameter.mean() + 0.1)
    ids = torch.randint(2, 40, (2, 6))
    expected = model(input_ids=ids).logits
    done = smoothed(model, [{"input_ids": ids}])
    assert torch.equal(model(input_ids=ids).logits, expected)
    makers = " ".join(one.maker for one in done)
    wanted = {
        "Llama": ("input_layernorm", "post_attention_layernorm", "up_proj", "v_proj"),
        "GPT-2": ("ln_1", "ln_2"),
        "BERT": ("value",),
        "OPT": ("self_attn_layer_norm", "final_layer_norm", "v_proj", "fc1"),
    }[name]
    assert all(part in makers for part in wanted), makers


def error(model, dense, batches):
    with torch.no_grad():
        return float(sum((model(batch) - dense(batch)).square().mean() for batch in batches))


def test_outliers_cost_less_where_their_scale_moved():
    """The same quantization with and without; weights alone lose least, since no activation is rounded."""
    batches, errors = list(torch.randn(8, 32, WIDTH)), {}
    for name, options in {"static": {}, "smooth": {"smooth": True}, "weights": {"activation_bits": None}}.items():
        model = stack()
        quantize_post_training(model, batches, progress_bar=False, **options)
        errors[name] = error(model, stack(), batches)
    assert errors["smooth"] < 0.1 * errors["static"]
    assert errors["smooth"] < 20 * errors["weights"]


def test_a_run_that_fails_leaves_the_weights_as_they_were():
    model, batches = stack(), [torch.randn(4, WIDTH), torch.full((4, WIDTH), torch.nan)]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="finite"):
        quantize_post_training(model, batches, smooth=True, progress_bar=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"smooth": 1}, "`smooth` must be False, True or a number between 0 and 1, got 1"),
        ({"smooth": 1.0}, "`smooth` must be False, True or a number between 0 and 1, got 1.0"),
        ({"smooth": 0.0}, "`smooth` must be False, True or a number between 0 and 1, got 0.0"),
        ({"smooth": "yes"}, "`smooth` must be False, True or a number between 0 and 1, got 'yes'"),
        ({"smooth": True, "activation_bits": None}, "with activation_bits=None they stay float"),
    ],
)
def test_what_cannot_be_smoothed_says_so(words, message):
    with pytest.raises(ValueError, match=message):
        quantize_post_training(stack(), [torch.ones(2, WIDTH)], **words)


def test_smooth_needs_data_and_says_if_nothing_moved():
    with pytest.raises(ValueError, match="`smooth` reads the inputs of the layers: pass a dataloader, or leave it out"):
        quantize_post_training(stack(), smooth=True)
    with pytest.warns(UserWarning, match="smooth: nothing was moved"):
        quantize_post_training(nn.Sequential(nn.Linear(4, 4)), [torch.ones(2, 4)], smooth=True, progress_bar=False)


def test_it_goes_with_rounding_that_makes_up_and_with_chosen_bits(tmp_path):
    """Weights move, then get bits, then integers: each step reads what the one before it made."""
    batches = list(torch.randn(4, 32, WIDTH))
    plain, all_of_it = stack(), stack()
    quantize_post_training(plain, batches, weight_bits=4, progress_bar=False)
    quantize_post_training(
        all_of_it,
        batches,
        smooth=True,
        method="gptq",
        bits="auto",
        effective_bits=4.0,
        activation_ranges="dynamic",
        progress_bar=False,
    )
    assert error(all_of_it, stack(), batches) < 0.1 * error(plain, stack(), batches)
    assert all(layer.activation_ranges == "dynamic" for layer in all_of_it.modules() if isinstance(layer, LINEARS))
