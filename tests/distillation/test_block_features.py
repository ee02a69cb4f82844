"""Features of blocks by their place in a stack: found, paired, masked, and following a removal."""

from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from helpers.models import Files, assert_same_state, trainer
from lightning_optim import DepthPruning
from lightning_optim.distillation import DistillationModule, Feature
from lightning_optim.distillation.features import pair_stacks
from lightning_optim.functional.losses import FEATURE_LOSSES

transformers = pytest.importorskip("transformers")

SHARED = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, **SHARED}


def llama(blocks: int, seed: int = 1, **sizes):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(num_hidden_layers=blocks, num_key_value_heads=1, use_cache=False, **SIZES | sizes)
    return transformers.LlamaForCausalLM(config)


def bert(blocks: int, seed: int = 1):
    torch.manual_seed(seed)
    config = transformers.BertConfig(num_hidden_layers=blocks, num_labels=3, **SIZES)
    return transformers.BertForSequenceClassification(config)


def t5(blocks: int, decoder: int, seed: int = 1):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=blocks, num_decoder_layers=decoder, dropout_rate=0.0,
        decoder_start_token_id=0, **SHARED,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit(blocks: int, seed: int = 1):
    torch.manual_seed(seed)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_hidden_layers=blocks, **SIZES)
    )


def texts(rows: int = 16, length: int = 6, **more):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 40, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": mask.long(), **{name: make(ids, mask) for name, make in more.items()}}


CAUSAL = texts(labels=lambda ids, mask: ids.masked_fill(~mask, -100))


class Student(pl.LightningModule):
    """A model of transformers on batches that are its arguments."""

    batches = CAUSAL

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)

    def train_dataloader(self):
        rows = [dict(zip(self.batches, row, strict=True)) for row in zip(*self.batches.values(), strict=True)]
        return torch.utils.data.DataLoader(rows, 4)


LAST = [("model.model.layers.-1", "model.layers.-1")]


def taught(student=None, of=None, **words) -> DistillationModule:
    words = {"features": [(*pair, "hint", 1.0, False) for pair in LAST], **words}
    return DistillationModule(Student(student or llama(4)), of or llama(6, 2), **words)


def feature_loss(module, batch) -> float:
    """What the module logs for its one feature in a step."""
    module._step._sums, module._step._rows = {}, 0
    module.training_step(batch, 0)
    name = next(name for name in module._step._sums if name not in ("task", "kd"))
    return float(module._step._sums[name] / module._step._rows)


def hidden(model, layer: str, batch) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model.eval()(**batch)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_last_block_is_compared_where_a_label_counts(alpha):
    module = taught(alpha=alpha).eval()
    ours = hidden(module.student.model, "model.layers.3", CAUSAL)
    theirs = hidden(module.teacher.networks[0], "model.layers.5", CAUSAL)
    keep = torch.cat([CAUSAL["labels"][:, 1:] != -100, torch.zeros(16, 1, dtype=torch.bool)], 1)
    assert 0 < keep.sum() < keep.numel() - 16
    expected = F.mse_loss(ours[keep], theirs[keep])
    assert feature_loss(module, CAUSAL) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [*sorted(FEATURE_LOSSES), lambda s, t: (s - t).square().sum()])
def test_what_is_read_at_padding_changes_no_loss(loss):
    """Blocks read neighbors through attention, so the noise is added to the features themselves."""

    class Noisy(nn.Module):
        def __init__(self, seed) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x, attention_mask, labels=None):
            for block in self.blocks:
                x = block(x)
            return x.sum(1)

    module = DistillationModule(
        Noisy(1),
        Noisy(2),
        features=[("blocks.-1", "blocks.-1", loss, 1.0, False)],
        alpha=0.5,
        optimizer=torch.optim.SGD,
    )
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    x = torch.randn(4, 4, 4)
    noise = torch.where(mask.bool().unsqueeze(-1), 0.0, torch.randn(4, 4, 4))
    y = torch.tensor([0, 1, 2, 3])
    batches = [{"x": x + noise * scale, "attention_mask": mask, "labels": y} for scale in (0.0, 9.0)]
    first, second = (feature_loss(module, batch) for batch in batches)
    assert first == pytest.approx(second, rel=1e-6)
    unmasked = {**batches[1], "attention_mask": torch.ones_like(mask)}
    assert feature_loss(module, unmasked) != pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))
def test_a_mask_of_everything_is_no_mask_and_one_of_nothing_is_zero(name):
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(4, 5, 6, generator=generator).requires_grad_() for _ in range(2))
    mask = torch.ones(4, 5, dtype=torch.bool)
    loss = FEATURE_LOSSES[name]
    assert loss(one, other, mask=mask).item() == pytest.approx(loss(one, other).item(), rel=1e-6)
    none = loss(one, other, mask=~mask)
    none.backward()
    assert none.item() == 0.0
    assert not one.grad.any()
    mask[1] = False
    rows = [0, 2, 3]
    assert loss(one, other, mask=mask).item() == pytest.approx(loss(one[rows], other[rows]).item(), rel=1e-6)


def test_padding_of_a_classifier_is_left_out_and_an_encoder_keeps_its_own():
    batch = texts()
    last = [("model.bert.encoder.layer.-1", "bert.encoder.layer.-1", "hint", 1.0, False)]
    module = DistillationModule(Student(bert(2)), bert(4, 2), features=last).eval()
    ours = hidden(module.student.model, "bert.encoder.layer.1", batch)
    theirs = hidden(module.teacher.networks[0], "bert.encoder.layer.3", batch)
    keep = batch["attention_mask"].bool()
    labeled = {**batch, "labels": torch.arange(16) % 3}
    assert feature_loss(module, labeled) == pytest.approx(F.mse_loss(ours[keep], theirs[keep]).item(), rel=1e-5)

    # As many positions in the decoder as in the encoder: shapes do not tell which is which.
    batch = texts(labels=lambda ids, mask: ids.flip(0).masked_fill(~mask.flip(1), -100))
    for layer, keep in (
        ("encoder.block", batch["attention_mask"].bool()),
        ("decoder.block", batch["labels"] != -100),
    ):
        module = DistillationModule(
            Student(t5(2, 3)), t5(3, 4, 2), features=[(f"model.{layer}.-1", f"{layer}.-1", "hint", 1.0, False)]
        ).eval()
        ours = hidden(module.student.model, f"{layer}.{1 if 'enc' in layer else 2}", batch)
        theirs = hidden(module.teacher.networks[0], f"{layer}.{2 if 'enc' in layer else 3}", batch)
        assert feature_loss(module, batch) == pytest.approx(F.mse_loss(ours[keep], theirs[keep]).item(), rel=1e-5)


def test_blocks_that_return_tuples_give_their_hidden_state():
    class Tuples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(x), x.sum()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Tuples() for _ in range(3)])

        def forward(self, x):
            for block in self.blocks:
                x, _ = block(x)
            return x

    torch.manual_seed(0)
    net, other = Net(), Net()
    module = DistillationModule(
        net, other, features=[("blocks.-2", "blocks.-1", "hint", 1.0, False)], optimizer=torch.optim.SGD
    )
    x = torch.randn(3, 4)
    a, b = net.blocks[1](net.blocks[0](x)[0])[0], other(x)
    assert feature_loss(module, (x, torch.tensor([0, 1, 2]))) == pytest.approx(F.mse_loss(a, b).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        (
            ("model.model.layers.-5", "model.layers.-1"),
            r"model.model.layers holds 4 layers, places 0 to 3, or -1 to -4",
        ),
        (("model.model.layers.4", "model.layers.-1"), r"model.model.layers holds 4 layers"),
        (("model.model.layers.-1", "model.layers.-7"), r"feature of the teacher: .* model.layers holds 6 layers"),
        (
            ("model.model.norm.-1", "model.layers.-1"),
            r"model.model.norm, which is no ModuleList or Sequential but Llama",
        ),
    ],
)
def test_places_out_of_range_are_refused_at_once(pair, sentence):
    with pytest.raises(ValueError, match=sentence):
        taught(features=[pair])


# Pairs.


@pytest.mark.parametrize(("ours", "theirs", "last"), [(20, 30, [2, 5, 8, 29]), (3, 3, [2]), (30, 20, [19])])
def test_stacks_pair_evenly_and_the_last_with_the_last(ours, theirs, last):
    student = {"layers": {f"layers.{i}": torch.zeros(2, 5, 8) for i in range(ours)}}
    teacher = {"h": {f"h.{i}": torch.zeros(2, 5, 32) for i in range(theirs)}}
    pairs = pair_stacks(student, teacher)
    assert len(pairs) == min(ours, theirs)
    assert pairs[-1] == Feature(f"layers.{ours - 1}", f"h.{theirs - 1}")
    places = [int(pair.teacher[2:]) for pair in pairs]
    steps = {b - a for a, b in pairwise(places)}
    assert max(steps) - min(steps) <= 1
    assert places[0] <= theirs // min(ours, theirs)
    assert [pair.teacher for pair in pair_stacks(student, teacher, pairs=1)] == [f"h.{theirs - 1}"]


def test_proposals_for_transformers():
    pairs = [(pair.student, pair.teacher, pair.projector) for pair in taught(features=()).match_features(CAUSAL)]
    assert pairs == [(f"model.model.layers.{i}", f"model.layers.{j}", False) for i, j in enumerate((0, 2, 3, 5))]
    module = DistillationModule(Student(t5(2, 3)), t5(4, 6, 2))
    pairs = [(pair.student, pair.teacher) for pair in module.match_features(CAUSAL, pairs=2)]
    assert pairs == [
        ("model.encoder.block.0", "encoder.block.1"),
        ("model.encoder.block.1", "encoder.block.3"),
        ("model.decoder.block.0", "decoder.block.2"),
        ("model.decoder.block.2", "decoder.block.5"),
    ]
    module = DistillationModule(Student(vit(2)), vit(6, 2))
    pairs = module.match_features({"pixel_values": torch.zeros(2, 1, 8, 8)}, loss="rkd")
    assert [(pair.student.rpartition(".")[2], pair.teacher.rpartition(".")[2]) for pair in pairs] == [
        ("0", "2"),
        ("1", "5"),
    ]
    wider = taught(of=llama(6, 2, hidden_size=24), features=()).match_features(CAUSAL, pairs=1)
    assert wider == [Feature("model.model.layers.3", "model.layers.5")]  # it needs a projector
    with pytest.raises((TypeError, ValueError), match="pairs"):
        taught(features=()).match_features(CAUSAL, pairs=0)


# In a run.


def fit(tmp_path, module, *callbacks, ckpt_path=None):
    torch.manual_seed(0)
    run = trainer(tmp_path, *callbacks)
    run.fit(module, module.student.train_dataloader(), ckpt_path=ckpt_path)
    return run


def depth():
    return DepthPruning(2, criterion="influence", start=2, end=5)


def test_a_place_from_the_end_is_the_last_block_after_blocks_left_too(tmp_path):
    module = taught(llama(6))
    run = fit(tmp_path, module, depth(), Files(tmp_path / "files"))
    assert len(module.student.model.model.layers) == 4
    assert module.features[0].student == "model.model.layers.-1"
    assert "distillation/model.model.layers.-1" in run.callback_metrics
    last = module.student.model.model.layers[3]
    seen = []
    last.register_forward_hook(lambda *_: seen.append(1))
    feature_loss(module, CAUSAL)
    assert seen == [1]
    for epoch in (0, 1):
        again = taught(llama(6))
        fit(tmp_path, again, depth(), ckpt_path=tmp_path / "files" / f"{epoch}.ckpt")
        assert_same_state(module, again)


def test_a_place_that_will_not_be_there_is_refused_before_the_run(tmp_path):
    module = taught(llama(6), features=[("model.model.layers.-5", "model.layers.-1", "rkd")])
    with pytest.raises(MisconfigurationException, match=r"the block at -5 of student.model.model.layers, of which 4"):
        fit(tmp_path, module, depth())
    module = taught(llama(6), features=[("model.model.layers.4", "model.layers.-1", "rkd")])
    with pytest.raises(MisconfigurationException, match=r"such as student.model.model.layers.-1, is whichever"):
        fit(tmp_path, module, depth())
