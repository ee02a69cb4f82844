import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_worker import Block
from torch import Tensor, nn

from lightning_optim import DistillationModule
from lightning_optim.strategies.cost import OPTIMIZERS, PRECISIONS
from lightning_optim.strategies.presets import PRESETS
from lightning_optim.strategies.ranking import PLANS, VARIANTS
from lightning_optim.strategies.recommend import recommend, saved_bytes

WIDTH, DEPTH, VOCABULARY = 32, 4, 50
BLOCK = 4 * WIDTH * WIDTH + 2 * WIDTH * 64 + 64 + WIDTH + 2 * 2 * WIDTH  # projections, up and down, two norms


def block():
    return Block(WIDTH, 8, 64)


class GPT(pl.LightningModule):
    def __init__(self, optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.optimizer = optimizer

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


COUNT = DEPTH * BLOCK + 2 * VOCABULARY * WIDTH


def asked(subject=8 * 10**9, **changed):
    return recommend(subject, **{"devices": 8, "memory_gb": 80, "batch_size": 2, **changed})


def names(found):
    return [row.preset for row in found.rows]


# Ranking


def test_every_preset_has_a_plan_or_is_a_variant():
    assert set(PRESETS) <= PLANS.keys() | VARIANTS.keys()
    assert not PLANS.keys() & VARIANTS.keys()


def test_eight_billion_parameters_on_eight_devices():
    """128 GB of state do not fit one device of 80; over 8 devices they are 16, and sending hides."""
    found = asked(tokens_per_sample=8192)
    rows = {row.preset: row for row in found.rows}
    assert found.best.preset == "optim_fsdp"
    assert not rows["optim_ddp"].fits
    assert not rows["optim_single"].fits
    fsdp = rows["optim_fsdp"]
    assert (fsdp.held.weights, fsdp.held.gradients, fsdp.held.optimizer) == (4e9, 4e9, 8e9)
    assert fsdp.held.units == 2 * 1e9 + (2 + 4) * 0.5e9  # two units of 1/16 gathered, one's gradient twice
    assert fsdp.sent == pytest.approx(64e9 * 7 / 8)
    assert fsdp.compute == pytest.approx(6 * 8e9 * 16384 / (989e12 * 0.4))
    assert fsdp.hidden == pytest.approx(56 / 360, rel=0.02)
    assert fsdp.step_seconds == pytest.approx(1.988 + 0.2 * 0.156, rel=1e-3)
    assert 0.98 < fsdp.efficiency < 0.99


def test_what_does_not_fit_stands_at_the_end_the_nearest_first():
    found = asked(tokens_per_sample=8192, memory_gb=20)
    fits = [row.fits for row in found.rows]
    assert fits == sorted(fits, reverse=True)
    too_big = [row.held.total for row in found.rows if not row.fits]
    assert too_big == sorted(too_big)


def test_the_limit_is_085_of_the_memory():
    """1e9 parameters, SGD, 32-true on one device: 8 GB."""
    just = {"devices": 1, "precision": "32-true", "optimizer": "SGD"}
    assert asked(10**9, memory_gb=8 / 0.85 * 1.001, **just).best is not None
    assert asked(10**9, memory_gb=8 / 0.85 * 0.999, **just).best is None


def test_compression_wins_on_a_slow_link_and_the_simple_preset_on_a_fast_one():
    small = {"nodes": 2, "devices": 1, "step_seconds": 0.1}
    assert asked(25_000_000, bandwidth=400, **small).best.preset == "optim_ddp"
    slow = asked(25_000_000, bandwidth=1.25, **small)
    assert slow.best.preset == "optim_ddp_bf16"
    assert slow.row("optim_ddp_bf16").sent == 2 * 25e6 * 2 / 2


def test_one_device_needs_nothing_distributed():
    found = asked(10**6, devices=1)
    assert names(found) == ["optim_single"]
    assert "no distributed strategy" in str(found)


def test_one_device_alone_wins_over_a_link_that_is_too_slow():
    """400 MB of gradients over 0.01 GB/s take 40 s, the step 10 ms."""
    found = asked(10**8, devices=1, nodes=2, step_seconds=0.01, bandwidth=0.0125)
    assert found.best.preset == "optim_single"
    assert "One device alone is faster" in str(found)


def test_a_model_that_fits_one_device_is_said_to():
    found = asked(10**6, step_seconds=1.0)
    assert "fits one device" in str(found)
    assert "fits one device" not in str(asked(tokens_per_sample=8192))


@pytest.mark.parametrize(
    ("precision", "there", "absent"),
    [
        ("bf16-mixed", "optim_ddp_bf16", "optim_ddp_fp16"),
        ("32-true", "optim_ddp_bf16", "optim_ddp_fp16"),
        ("16-mixed", "optim_ddp_fp16", "optim_ddp_bf16"),
    ],
)
def test_compression_goes_with_the_precision(precision, there, absent):
    found = asked(precision=precision, step_seconds=1.0)
    assert there in names(found)
    assert absent in found.left_out


def test_what_is_sharded_has_no_loss_scale():
    found = asked(precision="16-mixed", tokens_per_sample=8)
    assert {"optim_fsdp", "optim_zero2", "optim_tp", "optim_2d"} <= found.left_out.keys()
    assert "trains in 32-true, bf16-mixed, bf16-true" in str(found)


def test_true_half_precision_has_nothing_to_compress_and_halves_the_state():
    found = asked(10**9, precision="bf16-true", step_seconds=1.0)
    assert not {"optim_ddp_bf16", "optim_ddp_fp16"} & set(names(found))
    assert found.row("optim_ddp").held.total == 8e9


def test_hybrid_sharding_is_for_several_nodes():
    assert "optim_hsdp" in asked().left_out
    assert asked(replicate=2).row("optim_hsdp").options == {"replicate": 2}
    assert asked(nodes=4).row("optim_hsdp").options == {"replicate": 4}
    assert "cannot form 3 groups" in asked(replicate=3).left_out["optim_hsdp"]
    assert "cannot form 2 groups" in asked(devices=1, nodes=2).left_out["optim_hsdp"]


def test_layers_are_split_within_a_node():
    assert asked(tokens_per_sample=8).row("optim_tp").options == {"tensor": 8}
    several = asked(nodes=2, tokens_per_sample=8)
    assert "optim_tp" in several.left_out
    assert several.row("optim_2d").layout.data * several.row("optim_2d").layout.tensor == 16


def test_without_a_time_only_communication_is_compared():
    found = asked()
    assert "communication alone" in str(found)
    row = found.row("optim_ddp")
    assert row.compute is None
    assert row.efficiency is None
    assert row.step_seconds == row.hidden
    assert {"optim_single", "optim_ddp_bf16", "optim_tp", "optim_2d"} <= found.left_out.keys()


positive = st.floats(0.1, 1000)


@given(
    count=st.integers(10**3, 10**12),
    devices=st.sampled_from([1, 2, 3, 4, 8]),
    nodes=st.sampled_from([1, 2, 3, 16]),
    memory=positive,
    bandwidth=positive,
    inside=positive,
    precision=st.sampled_from(sorted(PRECISIONS)),
    seconds=st.none() | st.floats(1e-3, 100),
)
def test_rows_of_any_question_hold_together(count, devices, nodes, memory, bandwidth, inside, precision, seconds):
    found = recommend(
        count,
        devices=devices,
        nodes=nodes,
        batch_size=1,
        memory_gb=memory,
        bandwidth=bandwidth,
        node_bandwidth=inside,
        precision=precision,
        step_seconds=seconds,
    )
    assert set(names(found)) | found.left_out.keys() == PLANS.keys()
    for row in found.rows:
        assert row.layout.devices in (1, devices * nodes)
        assert row.fits == (row.held.total <= 0.85 * memory * 1e9)
        assert row.efficiency is None or 0 < row.efficiency <= 1 + 1e-9
        assert row.reason
    fitting = [row.seconds_per_sample for row in found.rows if row.fits]
    for i, seconds_per_sample in enumerate(fitting):
        assert all(seconds_per_sample <= 1.02 * later * (1 + 1e-12) for later in fitting[i:])


# What is read from a module


def test_a_module_is_counted_by_hand():
    """The blocks are units; embedding and head count as units too where they are large enough."""
    found = asked(GPT(), devices=2, tokens_per_sample=8)
    model = found.question.model
    assert model.parameters == model.trainable == COUNT
    assert model.multiplied == COUNT - VOCABULARY * WIDTH
    assert model.largest_unit == BLOCK
    tensor = found.row("optim_tp").model
    split = DEPTH * (4 * WIDTH * WIDTH + 2 * WIDTH * 64 + 64)  # the bias of the second stays whole
    assert tensor.split == pytest.approx(split / COUNT)
    assert tensor.row_features == DEPTH * 2 * WIDTH  # outputs of o and the second
    assert tensor.column_features == DEPTH * 4 * WIDTH  # inputs of q, k, v and the first
    assert tensor.split_layers == DEPTH * 6


def test_frozen_parameters_and_shared_ones():
    net = GPT()
    net.head.weight = net.embedding.weight
    net.blocks[0].requires_grad_(False)
    model = asked(net).question.model
    assert model.parameters == COUNT - VOCABULARY * WIDTH
    assert model.trainable == model.parameters - BLOCK
    assert model.multiplied == model.parameters  # the head multiplies with what the embedding looks up


def test_a_teacher_is_counted_in_its_own_precision_where_it_is_divided_and_where_not():
    student, teacher = GPT(), GPT().bfloat16()
    held, gathered = 2 * COUNT, 2 * 2 * BLOCK  # two blocks at a time
    alone, taught = asked(student, nodes=2), asked(DistillationModule(student, teacher), nodes=2)
    for row in taught.rows:
        divides = row.preset in ("optim_fsdp", "optim_hsdp", "optim_2d")
        assert row.held.beside == (held / row.layout.shard + gathered if divides else held), row.preset
        assert row.held.total == pytest.approx(alone.row(row.preset).held.total + row.held.beside)
    assert {"optim_ddp", "optim_zero2", "optim_fsdp", "optim_hsdp"} <= set(names(taught))
    assert "teacher" in taught.table()
    assert "teacher" in taught.to_markdown()
    assert "divided where the units are freed after their use" in str(taught)
    assert "teacher: " in taught.explain("optim_fsdp")
    assert ", whole" in taught.explain("optim_ddp")
    assert "teacher" not in str(alone) + alone.explain()
    whole = asked(DistillationModule(student, [(teacher, 1.0), (teacher, 2.0)], divide_teacher=False))
    assert {row.held.beside for row in whole.rows} == {held}
    assert "whole on each device" in str(whole)


def test_a_net_without_pairs_is_not_split():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3))
    found = asked(net, tokens_per_sample=1)
    assert {"optim_tp", "optim_2d"} <= found.left_out.keys()
    assert "no pair" in str(found)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (None, 8),
        ("Adam", 8),
        ("adamw", 8),
        ("SGD", 0),
        ("SGD_momentum", 4),
        (torch.optim.SGD, 0),
        (torch.optim.Adagrad, 4),
        (6, 6),
        (2.5, 2.5),
        ("AdamW8bit", 2),
    ],
)
def test_bytes_of_optimizers(optimizer, expected):
    assert asked(optimizer=optimizer).question.optimizer == expected


def test_an_instance_shows_its_options_and_parameters():
    net = nn.Linear(9, 1, bias=False)
    momentum = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    assert asked(net, optimizer=momentum).question.optimizer == 4
    net = nn.Sequential(nn.Linear(9, 1, bias=False), nn.Linear(1, 1, bias=False))
    part = torch.optim.Adam(net[0].parameters())  # 9 of 10 parameters, 8 bytes each
    assert asked(net, optimizer=part).question.optimizer == pytest.approx(7.2)


def halves(parameters):
    parameters = list(parameters)
    adam, sgd = torch.optim.Adam(parameters[:1]), torch.optim.SGD(parameters[1:], 0.1)
    return [adam, sgd], [torch.optim.lr_scheduler.ConstantLR(adam)]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda parameters: torch.optim.RMSprop(parameters), 4),
        (lambda parameters: {"optimizer": torch.optim.Adam(parameters), "lr_scheduler": None}, 8),
        (lambda parameters: [torch.optim.Adam(parameters)], 8),
        (halves, 8 * VOCABULARY * WIDTH / COUNT),
    ],
)
def test_configure_optimizers_is_asked(made, expected):
    assert asked(GPT(made)).question.optimizer == pytest.approx(expected)


class NeedsTrainer(GPT):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0 / self.trainer.max_epochs)


def test_an_optimizer_that_needs_a_trainer_must_be_named():
    with pytest.raises(ValueError, match=r"without a Trainer .* Pass `optimizer=`"):
        asked(NeedsTrainer())
    assert asked(NeedsTrainer(), optimizer="SGD").question.optimizer == 0
    with pytest.raises(ValueError, match="returns no optimizer"):
        asked(GPT(lambda parameters: None))


def test_nothing_of_the_module_changes():
    net = GPT()
    net.norm = nn.BatchNorm1d(4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    asked(net, example_inputs=torch.zeros(2, 8, dtype=torch.long))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())


# Activations


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("32-true", 4 * 10 * (8 + 16)),  # the input of the first layer, the output of the ReLU
        ("bf16-true", 2 * 10 * (8 + 16)),
        ("bf16-mixed", 2 * 10 * (8 + 16)),  # the copies of weights that autocast makes are not in it
    ],
)
def test_saved_bytes_by_hand(precision, expected):
    assert saved_bytes(mlp(), torch.zeros(3, 8), batch_size=10, precision=precision) == expected


def test_an_attention_block_by_hand():
    """Per token, in numbers of 4 bytes; each storage once."""
    rows, tokens = 2, 4
    parts = {
        "x, input of norm1": WIDTH,
        "output of norm1": WIDTH,
        "mean and deviation, twice": 4,
        "q, k, v": 3 * WIDTH,
        "output of the attention, which is the input of o_proj": WIDTH,
        "logsumexp of 4 heads": 4,
        "input of norm2": WIDTH,
        "output of norm2": WIDTH,
        "input and output of gelu": 2 * 64,
    }
    counted = saved_bytes(block(), torch.randn(1, tokens, WIDTH, requires_grad=True), batch_size=rows)
    assert counted == 4 * rows * tokens * sum(parts.values())


def test_saved_bytes_leave_statistics_and_the_generator_alone():
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    inputs = torch.randn(4, 8)
    before, random = net[1].running_mean.clone(), torch.get_rng_state()
    saved_bytes(net, inputs, batch_size=4)
    assert torch.equal(net[1].running_mean, before)
    assert net[1].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), random)


@given(st.integers(1, 40))
def test_saved_bytes_grow_with_the_batch(rows):
    assert saved_bytes(mlp(), torch.zeros(1, 8), batch_size=rows) == rows * 96


def test_activations_are_in_the_total_or_said_to_be_missing():
    net, inputs = GPT(), torch.zeros(1, 8, dtype=torch.long)
    counted = asked(net, example_inputs=inputs).row("optim_ddp").held
    assert counted.activations == saved_bytes(net, inputs, batch_size=2, precision="bf16-mixed")
    assert counted.total == sum(
        (counted.weights, counted.gradients, counted.optimizer, counted.units, counted.activations)
    )
    assert asked(net, activation_bytes=5e9).row("optim_ddp").held.activations == 5e9
    assert "NOT counted" in str(asked(net))


# What is handed back


def test_the_strategy_of_the_best_row_and_of_a_named_one(monkeypatch):
    built = []
    for preset in PRESETS.values():
        monkeypatch.setattr(type(preset), "build", lambda self, **options: built.append((self.name, options)))
    found = asked(nodes=2, tokens_per_sample=8192)
    for name in (None, "optim_hsdp", "optim_2d", "optim_ddp_static", "optim_ddp"):
        found.strategy(name)
    best, *rest = built
    assert best == (found.best.preset, dict(found.best.options))
    assert rest == [
        ("optim_hsdp", {"replicate": 2}),
        ("optim_2d", {"tensor": found.row("optim_2d").layout.tensor}),
        ("optim_ddp_static", {}),
        ("optim_ddp", {}),
    ]


def test_a_trainer_takes_each():
    found = asked(GPT(), devices=4, replicate=2, tokens_per_sample=8)
    assert len(found.rows) == 8
    for row in found.rows:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=row.layout.devices,
            strategy=found.strategy(row.preset),
            logger=False,
            enable_checkpointing=False,
        )
        assert trainer.world_size == row.layout.devices


def test_nothing_fits():
    found = asked(memory_gb=1)
    assert found.best is None
    assert "Nothing fits" in str(found)
    with pytest.raises(ValueError, match=r"no preset fits; the closest, .*, does not fit"):
        found.strategy()


def test_a_row_that_is_not_there_says_why():
    found = asked()
    with pytest.raises(ValueError, match="there is one node"):
        found.row("optim_hsdp")
    with pytest.raises(ValueError, match="no such preset"):
        found.strategy("ddp")


def test_texts_show_the_numbers():
    found = asked(tokens_per_sample=8192, nodes=2, bandwidth=50)
    text, markdown, explained = str(found), found.to_markdown(), found.explain("optim_fsdp")
    for name in names(found):
        assert name in text
        assert name in markdown
    assert "H100 assumed" in text
    assert "weights: 4 B * 8,000,000,000 / 16 = 2 GB" in explained
    assert "32 GB * 15/16 = 30 GB at 40 GB/s" in explained
    assert "log2 16" in explained
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    for row in found.rows:
        assert found.explain(row.preset)


# Bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bandwidth": 0}, "`bandwidth` must be a number above 0, got 0"),
        ({"bandwidth": -1.0}, "`bandwidth`"),
        ({"node_bandwidth": 0}, "`node_bandwidth`"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "`batch_size`"),
        ({"devices": 0}, "`devices`"),
        ({"devices": True}, "`devices`"),
        ({"nodes": 0}, "`nodes`"),
        ({"memory_gb": float("nan")}, "`memory_gb`"),
        ({"step_seconds": 0.0}, "`step_seconds`"),
        ({"tokens_per_sample": 0}, "`tokens_per_sample`"),
        ({"activation_bytes": -1}, "`activation_bytes`"),
        ({"reached": 1.5}, "is a fraction"),
        ({"split_share": 1.5}, "is a fraction"),
        ({"optimizer": "Adma"}, "'Adma' is unknown. Known: SGD, .*bytes of state per parameter"),
        ({"optimizer": -1}, "at least 0"),
        ({"optimizer": torch.optim.LBFGS}, "the state of the optimizer 'LBFGS' is unknown"),
        ({"precision": "16"}, "`precision` must be one of 32-true, bf16-mixed, 16-mixed, bf16-true, got '16'"),
        ({"device": "GTX"}, "`device` must be one of .*H100"),
        ({"example_inputs": 1}, "needs the module"),
    ],
)
def test_bad_arguments_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        asked(**changed)


@pytest.mark.parametrize(
    ("subject", "changed", "message"),
    [
        (nn.ReLU(), {}, "ReLU has no parameters"),
        (nn.Linear(2, 2).requires_grad_(False), {}, "only frozen parameters"),
        (nn.LazyLinear(2), {}, "weight has no shape yet"),
        (0, {}, "expected a module, or a number of parameters"),
        (8e9, {}, "expected a module"),
        (nn.Linear(2, 2), {"split_share": 0.5}, "read from its layers"),
        (nn.Linear(2, 2), {"activation_bytes": 1, "example_inputs": torch.zeros(1, 2)}, "not both"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_bad_subjects_are_refused(subject, changed, message):
    with pytest.raises(ValueError, match=message):
        asked(subject, **changed)


def test_memory_must_be_given_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="pass `memory_gb`"):
        recommend(10**6, devices=2, batch_size=1)


def test_a_gpu_that_is_not_in_the_table(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    with pytest.raises(ValueError, match="pass `node_bandwidth`"):
        asked()
    found = asked(node_bandwidth=64, tokens_per_sample=8)
    assert "`step_seconds`" in str(found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert asked().question.cluster.node_bandwidth == pytest.approx(240)


def test_every_known_optimizer_is_taken_by_name():
    for name in OPTIMIZERS:
        assert asked(optimizer=name.lower()).question.optimizer >= 0


def test_a_measured_noise_scale_says_the_global_batch_and_what_more_devices_gain():
    words = {"devices": 8, "memory_gb": 80, "batch_size": 2, "tokens_per_sample": 8192}
    plain = recommend(8_000_000_000, **words)
    small, fair, large = (recommend(8_000_000_000, noise_scale=scale, **words) for scale in (256, 16, 4))
    assert small.rows == plain.rows
    assert small.notes[:-2] == plain.notes
    assert "16 samples a step (8 x 2)" in small.notes[-2]
    assert "use 94% of the samples well; at 256 (8 x 32)" in small.notes[-2]
    assert "scale the learning rate" in small.notes[-2]
    assert "a fair trade" in fair.notes[-2]
    assert "wastes samples" in large.notes[-2]
    assert "2x devices: 1.89x fewer steps for 1.06x the samples" in small.notes[-1]
    with pytest.raises(ValueError, match="`noise_scale` must be a number above 0, got 0"):
        recommend(8_000_000_000, noise_scale=0, **words)
