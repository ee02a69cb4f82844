import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers.models import Classifier, ConvNet, assert_same_state, data, fit, new, trainer, val_loader
from lightning_optim import load_from_checkpoint, quantize_post_training
from lightning_optim.functional.fake_quantize import fake_quantize_weight
from lightning_optim.functional.observers import OBSERVERS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    module = new()
    fit(tmp_path_factory.mktemp("trained"), module, max_epochs=6)
    return module


def answers(module):
    with torch.no_grad():
        return module.eval()(data().tensors[0])


@pytest.mark.parametrize("observer", sorted(name for name in OBSERVERS if not OBSERVERS[name].learns))
def test_eight_bits_answer_nearly_the_same(trained, observer):
    module = copy.deepcopy(trained)
    module.train()
    returned = quantize_post_training(module, val_loader(), observer=observer, progress_bar=False)
    assert returned is module
    assert module.training
    assert int(module.net[0].input_batches) == 4
    assert not torch.equal(answers(module), answers(trained))
    assert float((answers(module) - answers(trained)).abs().mean()) < 0.02 * float(answers(trained).abs().mean())


def test_what_a_batch_gives_to_forward(trained):
    rows = data().tensors[0]
    loaders = {
        "tuples": DataLoader(data(), 16),
        "tensors": DataLoader(rows, 16),
        "dicts": [{"x": rows[:16]}, {"x": rows[16:]}],
    }
    found = {}
    for name, loader in loaders.items():
        module = quantize_post_training(copy.deepcopy(trained), loader, observer="min_max", progress_bar=False)
        found[name] = module.net[0].input_statistic.tolist()
    assert found["tuples"] == found["tensors"] == found["dicts"]
    module = quantize_post_training(
        copy.deepcopy(trained),
        [{"rows": rows}],
        inputs=lambda batch: 2 * batch["rows"],
        observer="min_max",
        progress_bar=False,
    )
    assert module.net[0].input_statistic.tolist() == [2 * end for end in found["tuples"]]


def test_batches_bounds_how_much_is_taken(trained):
    module = quantize_post_training(copy.deepcopy(trained), val_loader(), batches=2, progress_bar=False)
    assert int(module.net[0].input_batches) == 2


def test_weights_only_needs_no_data():
    tower = nn.Sequential(nn.EmbeddingBag(50, 8), nn.Linear(8, 4))
    plain = copy.deepcopy(tower)
    quantize_post_training(tower, activation_bits=None, include=[nn.EmbeddingBag], weight_bits=4)
    assert type(tower[1]) is nn.Linear
    index = torch.randint(0, 50, (3, 6))
    plain[0].weight.data = fake_quantize_weight(plain[0].weight.data, 4)
    torch.testing.assert_close(tower(index), plain(index))


def test_a_plain_module_and_a_part_of_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    quantize_post_training(net, [torch.randn(5, 4)], module="2", bits={"2": 3}, progress_bar=False)
    assert type(net[0]) is nn.Linear
    assert net[2].weight_bits == 3
    assert net[2].quantization_phase == "frozen"


def test_convolutions_before_an_addition_get_a_range():
    class Adds(ConvNet):
        def forward(self, x):
            x = self.net[:4](x)
            return self.net[7:](self.net[6](x + self.net[4](x)))

    module = quantize_post_training(new(Adds), val_loader(), progress_bar=False)
    assert isinstance(module, Adds)
    assert module.functions == ("add_0",)
    assert module.watched == ("add_0_left", "add_0_right")
    assert module.output_phase == "frozen"
    assert not module.net[4].quantizes_output
    assert float(module.add_0_left_scale) == float(module.net[4].input_scale)  # the same tensor, the same range


def test_the_inference_path_of_an_encoder_is_observed():
    """In eval mode and without gradients PyTorch would not call the layers inside."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    quantize_post_training(encoder, [torch.randn(3, 5, 8)], progress_bar=False)
    assert int(encoder.layers[0].linear2.input_batches) == 1


def test_a_checkpoint_of_it_reloads(trained, tmp_path):
    module = quantize_post_training(copy.deepcopy(trained), val_loader(), progress_bar=False)
    run = trainer(tmp_path)
    expected = run.validate(module, val_loader(), verbose=False)
    run.save_checkpoint(tmp_path / "file.ckpt")
    loaded = load_from_checkpoint(Classifier, tmp_path / "file.ckpt")
    assert_same_state(loaded, module)
    assert trainer(tmp_path).validate(loaded, val_loader(), verbose=False) == expected


@pytest.mark.parametrize(
    ("loader", "words", "error"),
    [
        (None, {}, "ranges of activations need data: pass a dataloader"),
        ([], {}, "the dataloader has no batch"),
        ([torch.zeros(2, 12)], {"bits": {"head": 4}}, "bits: 'head' matches no layer"),
        ([torch.zeros(2, 12)], {"weight_bits": 1}, "from 2 to 8"),
        ([torch.full((2, 12), torch.inf)], {}, r"the input of net\.0 is not finite"),
        ([torch.zeros(2, 5)], {}, r"a batch of `dataloader` \(mat1 and mat2.*pass float32 \(2, 5\); pass inputs="),
        ([{"x": torch.zeros(2, 12), "y": torch.zeros(2)}], {}, "unexpected keyword argument 'y'.*pass inputs="),
        ([{"x": torch.zeros(2, 12)}], {"inputs": lambda batch: (batch["x"], 3)}, "`inputs` returns for a batch .*int;"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(loader, words, error):
    module = new()
    with pytest.raises((ValueError, RuntimeError), match=error):
        quantize_post_training(module, loader, progress_bar=False, **words)
    assert_same_state(module, new())
    assert type(module.net[0]) is nn.Linear
    assert "on_save_checkpoint" not in module.__dict__


def test_calibration_shows_a_bar_unless_told_not_to(trained, capsys):
    quantize_post_training(copy.deepcopy(trained), val_loader())
    assert "calibrating" in capsys.readouterr().out
    quantize_post_training(copy.deepcopy(trained), val_loader(), progress_bar=False)
    assert "calibrating" not in capsys.readouterr().out


def test_a_failed_second_calibration_leaves_the_quantized_model_as_it_was(trained):
    module = quantize_post_training(copy.deepcopy(trained), val_loader(), progress_bar=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = answers(module)
    with pytest.raises(RuntimeError, match="not finite"):
        quantize_post_training(module, [torch.full((2, 12), torch.inf)], progress_bar=False)
    assert_same_state(module, before)
    assert torch.equal(answers(module), expected)


def test_a_second_calibration_forgets_the_first(trained):
    module = copy.deepcopy(trained)
    for scale in (100.0, 1.0):
        quantize_post_training(module, [scale * data().tensors[0]], observer="min_max", progress_bar=False)
    assert float(module.net[0].input_statistic.max()) == float(data().tensors[0].abs().max())


def test_a_graph_that_cannot_be_read_is_a_warning():
    class Branches(ConvNet):
        def forward(self, x):
            return self.net(x) if float(x.sum()) > -1e9 else self.net(x) * 2

    with pytest.warns(UserWarning, match="no output of a convolution gets a range"):
        module = quantize_post_training(new(Branches), val_loader(), progress_bar=False)
    assert module.net[1].quantization_phase == "frozen"
