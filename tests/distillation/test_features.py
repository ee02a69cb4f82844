"""Features: layers found or refused, widths matched, projectors learned, channels followed."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from helpers.distilled import HINT, IMAGES, ConvTeacher, Teacher, conv_distilled, distilled, teacher
from helpers.models import Classifier, ConvNet, Files, Quiet, assert_same_state, fit, new, train_loader
from lightning_optim import ChannelPruning
from lightning_optim.distillation import DistillationModule, Feature
from lightning_optim.distillation.features import propose_features
from lightning_optim.distillation.survivors import surviving_channels
from lightning_optim.structured.groups import Removal
from lightning_optim.target import ForwardInputs

EXAMPLE = torch.zeros(2, 12)


def test_the_loss_is_the_sum_of_its_parts():
    features = [*HINT, ("net.5", "body.5", "rkd", 2.0)]
    module = distilled(new(Quiet), features=features, alpha=0.25, example_inputs=EXAMPLE)
    module._matching.size_projectors()
    module.eval()
    batch = next(iter(train_loader()))
    total = module.training_step(batch, 0)
    x, y = batch
    net, body = module.student.net, module.teacher.networks[0].body
    task = F.cross_entropy(net(x), y)
    ours, theirs = module(x), module.teacher.networks[0](x)
    kd = 16 * F.kl_div((ours / 4).log_softmax(1), (theirs / 4).log_softmax(1), log_target=True, reduction="batchmean")
    hint = F.mse_loss(module.projectors["0"](net[:3](x)), body[:3](x))
    distances = [F.pdist(h) for h in (net[:6](x), body(x))]
    rkd = F.smooth_l1_loss(*(d / d.mean() for d in distances))
    expected = 0.75 * task + 0.25 * kd + 0.5 * hint + 2.0 * rkd
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["hint", "similarity_preserving", "rkd", lambda s, t: (s.mean() - t.mean()) ** 2])
def test_every_loss_of_vectors_trains(tmp_path, loss):
    module = distilled(features=[("net.2", "body.2", loss)])
    run = fit(tmp_path, module)
    assert "distillation/net.2" in run.callback_metrics
    assert len(module.projectors) == (loss == "hint")


def test_projectors_learn_in_the_first_group_and_draw_nothing(tmp_path):
    class Twice(Classifier):
        def configure_optimizers(self):
            groups = [{"params": self.net[:4].parameters()}, {"params": self.net[4:].parameters(), "lr": 1e-3}]
            optimizer = torch.optim.Adam(groups, 1e-2)
            return {
                "optimizer": optimizer,
                "lr_scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 1e-3], 40),
            }

    torch.manual_seed(5)
    module = DistillationModule(new(Twice), teacher(), features=HINT, example_inputs=EXAMPLE)
    state = torch.get_rng_state()
    module._matching.size_projectors()
    assert torch.equal(state, torch.get_rng_state())
    before = module.projectors["0"].weight.detach().clone()
    assert before.abs().max() <= 1 / math.sqrt(16)
    run = fit(tmp_path, module)
    assert not torch.equal(before, module.projectors["0"].weight)
    held = {id(p) for p in run.optimizers[0].param_groups[0]["params"]}
    assert {id(p) for p in module.projectors.parameters()} <= held
    assert len(run.optimizers[0].param_groups) == 2


def test_the_first_batch_sizes_projectors_and_the_run_goes_on_as_if_it_had_not(tmp_path):
    given, found = (distilled(features=HINT, **words) for words in ({"example_inputs": EXAMPLE}, {}))
    for module in (given, found):
        fit(tmp_path, module, max_epochs=2)
    assert_same_state(given, found)


def test_projectors_are_averaged_too(tmp_path):
    module = distilled(features=HINT)
    fit(tmp_path, module, WeightAveraging(), Files(tmp_path / "files"))
    for epoch in range(2):
        again = distilled(features=HINT)
        fit(tmp_path, again, WeightAveraging(), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert_same_state(module, again)
    file = torch.load(tmp_path / "files" / "2.ckpt", weights_only=True)
    assert "projectors.0.weight" in file["state_dict"]


def test_channels_leave_projector_optimizer_and_average(tmp_path):
    def callbacks():
        return [ChannelPruning(0.5, start=2, end=7, events=2, scope="layer"), WeightAveraging()]

    module = distilled(features=[*HINT, ("net.5", "body.5")])
    run = fit(tmp_path, module, *callbacks(), Files(tmp_path / "files"))
    assert module.projectors["0"].weight.shape == (24, 8)
    assert module.projectors["0"].in_features == 8
    for parameter in module.projectors.parameters():
        assert run.optimizers[0].state[parameter]["exp_avg"].shape == parameter.shape
    again = distilled(features=[*HINT, ("net.5", "body.5")])
    fit(tmp_path, again, *callbacks(), ckpt_path=tmp_path / "files" / "1.ckpt")
    assert_same_state(module, again)


def test_the_projector_keeps_the_columns_of_the_channels_that_stay():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 2))
    stay = torch.tensor([0, 2, 5])
    rows = torch.arange(18).view(6, 3)[stay].flatten()
    columns = torch.arange(24).view(4, 6)[:, stay].flatten()
    removal = Removal(
        {"0.weight": rows, "0.bias": stay, "1.weight": stay, "1.bias": stay, "3.weight": columns},
        {"0.weight": (3, 3), "0.bias": (3,), "1.weight": (3,), "1.bias": (3,), "3.weight": (4, 3)},
        {"0": {"out_features": 3}, "1": {"normalized_shape": (3,)}, "3": {"in_features": 3}},
    )
    inputs = ForwardInputs((torch.randn(5, 3),))
    found = surviving_channels(student, "", inputs, ["0", "1", "2", "3"], removal)
    assert {name: kept.tolist() for name, kept in found.items()} == {layer: [0, 2, 5] for layer in "012"}
    assert student[0].out_features == 6  # the student itself is as it was


class Concatenates(Classifier):
    """Two branches side by side: which channels of the whole leave cannot be told from one branch."""

    def __init__(self) -> None:
        super().__init__()

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.other = nn.Linear(12, 8), nn.Linear(12, 8)

            def forward(self, x):
                return torch.cat([self.one(x), self.other(x)], 1)

        self.net = nn.Sequential(Both(), nn.ReLU(), nn.Linear(16, 3))


def test_channels_that_cannot_be_followed_leave_the_model_as_it_was(tmp_path):
    module = DistillationModule(new(Concatenates), teacher(), features=[("net.1", "body.2")])
    with pytest.raises(ValueError, match="which ones are kept is unknown"):
        fit(tmp_path, module, ChannelPruning(0.5, start=2, end=7, events=2, scope="layer"))
    assert module.student.net[0].one.weight.shape == (8, 12)
    other = DistillationModule(new(Concatenates), teacher(), features=[("net.1", "body.2", "rkd")])
    fit(tmp_path, other, ChannelPruning(0.5, start=2, end=7, events=2, scope="layer"))
    assert other.student.net[0].one.weight.shape == (4, 12)


def test_names_that_do_not_exist_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"feature: Classifier has no layer 'nett.2'. Closest: net.2"):
        distilled(features=[("nett.2", "body.2")])
    with pytest.raises(ValueError, match=r"feature of the teacher: Teacher has no layer 'bdy.2'. Closest: body.2"):
        distilled(features=[("net.2", "bdy.2")])
    with pytest.raises(ValueError, match=r"logits_from: Classifier has no layer 'nett'. Closest: net"):
        distilled(logits_from="nett")


@pytest.mark.parametrize(
    ("feature", "error", "sentence"),
    [
        (("net.2", "body.2", "hnit"), ValueError, "unknown feature loss 'hnit'"),
        (("net.2", "body.2", "rkd", -1.0), ValueError, "must be a number >= 0"),
        ("net.2", TypeError, "a feature is"),
        (("net.2",), TypeError, "a feature is"),
        ((3, "body.2"), TypeError, "names a layer"),
    ],
)
def test_features_that_make_no_sense(feature, error, sentence):
    with pytest.raises(error, match=sentence):
        distilled(features=[feature])


def test_a_feature_may_be_a_mapping():
    given = {"student": "net.2", "teacher": "body.2", "loss": "rkd", "weight": 2.0}
    assert distilled(features=[given]).features == [Feature("net.2", "body.2", "rkd", 2.0)]


def test_layers_that_are_not_called_are_named(tmp_path):
    class Spare(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(12, 12)

    with pytest.raises(RuntimeError, match="never called its layer 'spare'"):
        fit(tmp_path, DistillationModule(new(Spare), teacher(), features=[("spare", "body.2", "rkd")]))
    with pytest.raises(ValueError, match="feature 'spare' of Spare is not called"):
        fit(tmp_path, DistillationModule(new(Spare), teacher(), features=[("spare", "body.2")]))
    spare = teacher()
    spare.spare = nn.Linear(12, 12)
    with pytest.raises(RuntimeError, match="teacher's layer 'spare' is never called"):
        fit(tmp_path, distilled(of=spare, features=[("net.2", "spare", "rkd")]))


def test_features_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a projector takes"):
        fit(tmp_path, DistillationModule(new(), teacher(ConvTeacher), features=[("net.2", "body.1")]))


def test_images_pair_by_resolution_and_are_printed(caplog):
    caplog.set_level(logging.INFO)
    module = conv_distilled(features=())
    pairs = module.match_features(EXAMPLE)
    assert pairs == [Feature("net.4", "body.1")]
    assert "Proposed features" in caplog.text
    assert "net.4" in caplog.text
    DistillationModule(new(ConvNet), teacher(ConvTeacher), features=pairs)


def test_vectors_pair_by_depth():
    pairs = distilled().match_features(EXAMPLE, loss="rkd")
    assert pairs == [Feature("net.0", "body.0", "rkd"), Feature("net.4", "body.4", "rkd")]


def test_sequences_pair_by_relative_depth():
    ours = {f"block.{i}": torch.zeros(2, 5, 8) for i in range(2)}
    theirs = {f"layer.{i}": torch.zeros(2, 5, 32) for i in range(6)}
    pairs = [(each.student, each.teacher) for each in propose_features(ours, theirs)]
    assert pairs == [("block.0", "layer.2"), ("block.1", "layer.5")]


def test_a_teacher_is_needed_to_propose():
    with pytest.raises(MisconfigurationException, match="needs a teacher"):
        DistillationModule(new()).match_features(EXAMPLE)


def test_hooks_are_there_only_during_a_step(tmp_path):
    class Looks(Teacher):
        pass

    module = conv_distilled(features=IMAGES)
    fit(tmp_path, module, max_epochs=1)
    for layer in [*module.modules(), *module.teacher.networks[0].modules()]:
        assert not layer._forward_hooks
