"""Presets on two and four gloo processes, against one process with the same global batch.

A launch per group runs its cases; a test each then reads what the ranks wrote.
"""

from pathlib import Path

import pytest
import torch
from presets_worker import EPOCHS, Conditional, Grouped, Made, Manual, Plain, ended, fit

from helpers.gpt import Language
from helpers.models import assert_same_state, data
from helpers.ranks import run_ranks
from lightning_optim import load_from_checkpoint

WORKER = Path(__file__).with_name("presets_worker.py")
FOUR = ("hsdp", "2d", "fsdp", "tp")
GROUPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "quick": (
        2,
        (
            *("plain/fsdp", "across/fsdp/ddp", "clip/fsdp/norm"),
            *("accumulate/fsdp/sharded", "module/fsdp/Tied"),
        ),
    ),
    "plain": (2, tuple(f"plain/{name}" for name in ("ddp", "ddp_static", "ddp_bf16", "ddp_fp16", "zero2", "tp"))),
    "files": (2, ("sharded/fsdp", "across/ddp/fsdp", "across/fsdp/tp", "across/tp/fsdp", "groups")),
    "steps": (
        2,
        (
            *("clip/fsdp/value", "clip/tp/norm", "clip/tp/value", "accumulate/fsdp/unsharded"),
            *("precision/fsdp/bf16-mixed", "precision/fsdp/bf16-true", "precision/ddp/bf16-mixed"),
            *("statistics/fsdp/32-true", "statistics/fsdp/bf16-mixed"),
        ),
    ),
    "modules": (
        2,
        (
            *(f"module/fsdp/{kind}" for kind in ("Conditional", "Grouped", "Manual", "Made", "ShardsItself")),
            *("module/tp/Tied", "meta", "recomputed/fsdp", "short"),
        ),
    ),
    "four": (
        4,
        (*(f"plain/{name}" for name in FOUR), "clip/2d/norm", "clip/2d/value", "clip/hsdp/norm", "sharded/2d"),
    ),
}
TOLERANCES = {"ddp_bf16": 4e-4, "ddp_fp16": 1e-4}
"""Largest difference of a loss from one process; sums in another order alone give 1e-6."""
EXACT = 2e-5

pytestmark = [pytest.mark.distributed]


def cases(start=""):
    """Return cases as test parameters; all but the quick are slow."""
    return [
        pytest.param(group, case, id=f"{case}/{processes}", marks=[] if group == "quick" else [pytest.mark.slow])
        for group, (processes, names) in GROUPS.items()
        for case in names
        if case.startswith(start)
    ]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Return the folder where the ranks of a group wrote."""
    done = {}

    def folder(group):
        if group not in done:
            world, names = GROUPS[group]
            out = tmp_path_factory.mktemp(group)
            run_ranks(WORKER, out, *names, processes=world)
            done[group] = out
        return done[group]

    return folder


@pytest.fixture
def results(launch):
    """Return the runs of a case, by rank."""

    def read(group, case):
        files = launch(group) / case.replace("/", "-")
        return [torch.load(files / f"rank{rank}.pt", weights_only=True) for rank in range(GROUPS[group][0])]

    return read


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return what one process ends with, trained alike."""
    done = {}

    def run(make, **options):
        key = (make, *options.items())
        if key not in done:
            torch.set_num_threads(1)
            done[key] = ended(*fit(tmp_path_factory.mktemp("one"), "auto", make, **options))
        return done[key]

    return run


def assert_close(run, expected, tolerance=EXACT):
    """Losses of every step, and what they led to."""
    assert run["step"] == expected["step"]
    assert len(run["losses"]) == len(expected["losses"])
    assert run["losses"] == pytest.approx(expected["losses"], abs=tolerance)


def assert_near(left, right, tolerance=1e-6):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize(("group", "case"), cases())
def test_ranks_agree(results, group, case):
    first, *others = results(group, case)
    for other in others:
        for name, run in first.items():
            if "weights" in run:
                assert_same_state(run["weights"], other[name]["weights"])
                assert run["losses"] == other[name]["losses"]


@pytest.mark.parametrize(("group", "case"), cases("plain"))
def test_every_step_equals_one_process(results, one_process, group, case):
    tolerance = TOLERANCES.get(case.partition("/")[2], EXACT)
    runs = results(group, case)[0]
    expected = one_process(Language)
    assert_close(runs["straight"], expected, tolerance)
    assert runs["straight"]["losses"][-1] < runs["straight"]["losses"][0] - 1
    for metric in ("val_loss", "val_acc", "train_loss"):
        bound = 10 * tolerance if metric == "val_loss" else 5e-3
        assert runs["straight"]["metrics"][metric] == pytest.approx(expected["metrics"][metric], abs=bound)
    assert runs["straight"]["divided"] is ("ddp" not in case)


@pytest.mark.parametrize(
    ("group", "case"),
    [
        *cases("plain"),
        *cases("sharded"),
        *cases("precision"),
        *cases("module"),
        *cases("meta"),
        *cases("recomputed"),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(results, group, case):
    for runs in results(group, case):
        assert_same_state(runs["straight"]["weights"], runs["resumed"]["weights"])
        steps = len(runs["straight"]["losses"]) // EPOCHS
        assert runs["straight"]["losses"][steps:] == runs["resumed"]["losses"]


@pytest.mark.parametrize(("group", "case"), cases("plain"))
def test_evaluation_by_the_same_trainer(results, group, case):
    """After fit, the trainer scores what the last validation scored; and a file's model as it was then."""
    runs = results(group, case)[0]
    evaluated, last = runs["evaluated"], runs["straight"]["metrics"]
    assert evaluated["validated"] == pytest.approx({name: last[name] for name in ("val_loss", "val_acc")}, abs=1e-6)
    assert evaluated["tested"] == evaluated["validated"]
    assert evaluated["of the first file"]["val_loss"] > evaluated["tested"]["val_loss"] + 0.1


@pytest.mark.parametrize(("group", "case"), cases("plain"))
def test_a_second_fit_by_the_same_trainer(results, launch, one_process, tmp_path, group, case):
    """New optimizers, the same module: as in one process."""
    expected = one_process(Language)
    trainer, module = fit(tmp_path, "auto", Language)
    trainer.fit_loop.max_epochs = EPOCHS + 1
    trainer.fit(module)
    tolerance = 10 * TOLERANCES.get(case.partition("/")[2], EXACT)
    run = results(group, case)[0]["fitted again"]
    assert run["losses"] == pytest.approx(module.losses, abs=tolerance)
    assert len(run["losses"]) == len(expected["losses"]) * (EPOCHS + 1) // EPOCHS


@pytest.mark.parametrize(("group", "case"), [*cases("across"), *cases("groups")])
def test_resumed_under_another_preset(results, group, case):
    runs = results(group, case)[0]
    assert_near(runs["straight"]["weights"], runs["resumed"]["weights"])


@pytest.mark.parametrize(("group", "case"), cases("sharded"))
def test_a_folder_and_one_file_of_it_resume(results, one_process, group, case):
    runs = results(group, case)[0]
    assert_close(runs["straight"], one_process(Language))
    assert_same_state(runs["straight"]["weights"], runs["one file"]["weights"])
    assert_near(runs["straight"]["weights"], runs["one file under ddp"]["weights"])
    assert_near(runs["straight"]["weights"], runs["under tp"]["weights"])


@pytest.mark.parametrize(("group", "case"), cases("sharded"))
def test_one_file_resumes_in_one_process(results, launch, tmp_path, group, case):
    file = launch(group) / case.replace("/", "-") / "one.ckpt"
    run = ended(*fit(tmp_path, "auto", Language, ckpt_path=file))
    assert_near(run["weights"], results(group, case)[0]["straight"]["weights"])


@pytest.mark.parametrize(("group", "case"), cases("plain"))
def test_files_load_into_the_bare_class(results, launch, group, case):
    file = launch(group) / case.replace("/", "-") / f"{EPOCHS - 1}.ckpt"
    expected = results(group, case)[0]["straight"]["weights"]
    assert_same_state(Language.load_from_checkpoint(file, weights_only=True), expected)
    assert_same_state(load_from_checkpoint(Language, file), expected)


@pytest.mark.slow
def test_a_folder_instead_of_a_file_is_rejected(launch):
    with pytest.raises(ValueError, match=r"Make one file of it with lightning_optim\.strategies\.consolidate"):
        load_from_checkpoint(Language, launch("files") / "sharded-fsdp" / "0.ckpt")


@pytest.mark.parametrize(("group", "case"), cases("clip"))
def test_clipping_equals_one_process(results, one_process, group, case):
    _, _, how = case.split("/")
    words = {"gradient_clip_val": {"norm": 0.3, "value": 0.005}[how], "gradient_clip_algorithm": how}
    expected = one_process(Plain, **words)
    unclipped = one_process(Plain)
    assert abs(expected["losses"][-1] - unclipped["losses"][-1]) > 0.01  # it bites
    run = results(group, case)[0]["straight"]
    assert_close(run, expected)
    assert_near(run["weights"], expected["weights"], 1e-5)


@pytest.mark.parametrize(("group", "case"), cases("accumulate"))
def test_accumulation_equals_one_process(results, one_process, group, case):
    expected = one_process(Plain, accumulate_grad_batches=2)
    run = results(group, case)[0]["straight"]
    assert_close(run, expected)
    assert_near(run["weights"], expected["weights"], 1e-5)


@pytest.mark.parametrize(("group", "case"), cases("precision"))
def test_half_precision_stays_close(results, one_process, group, case):
    run = results(group, case)[0]["straight"]
    assert_close(run, one_process(Language), 0.1 if case.endswith("true") else 1e-2)
    expected = torch.bfloat16 if case.endswith("true") else torch.float32
    assert {weight.dtype for weight in run["weights"].values()} == {expected}


@pytest.mark.parametrize(("group", "case"), [*cases("module"), *cases("meta"), *cases("recomputed")])
def test_modules_that_need_care_equal_one_process(results, one_process, group, case):
    kind = case.rpartition("/")[2]
    make = {each.__name__: each for each in (Conditional, Grouped, Manual, Made)}
    make |= {"Tied": TIED, "ShardsItself": Made, "meta": Made}
    run = results(group, case)[0]["straight"]
    assert_close(run, one_process(make.get(kind, Language)), 1e-4)
    assert run["divided"]


def TIED():  # one function, so that one process trains it once
    return Language(tied=True)


@pytest.mark.parametrize(("group", "case"), [*cases("module/fsdp/Tied"), *cases("module/tp/Tied")])
def test_tied_weights_stay_tied(results, group, case):
    weights = results(group, case)[0]["straight"]["weights"]
    assert torch.equal(weights["net.embedding.weight"], weights["net.head.weight"])


@pytest.mark.slow
def test_layers_without_memory_get_values(results):
    run = results("modules", "meta")[0]["fresh"]
    assert run["losses"][0] == pytest.approx(3.5, abs=0.6)  # ln 32
    assert run["losses"][-1] < run["losses"][0] - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "tolerance"), [("statistics/fsdp/32-true", 1e-6), ("statistics/fsdp/bf16-mixed", 2e-2)]
)
def test_batchnorm_trains_as_under_ddp(results, case, tolerance):
    """Each rank normalises by its own batch in both, so losses are those of DDP and not those of one process."""
    runs = results("steps", case)[0]
    assert runs["straight"]["losses"] == pytest.approx(runs["ddp"]["losses"], abs=tolerance)


@pytest.mark.slow
def test_batchnorm_statistics_are_the_mean_over_ranks(results):
    """By hand: of each rank's eight rows, then the running average with PyTorch's momentum of 0.1."""
    rows = data().tensors[0]
    mean, variance = torch.zeros(12), torch.ones(12)
    for _ in range(EPOCHS):
        for first in range(0, 64, 16):
            ranks = [rows[first + rank : first + 16 : 2] for rank in range(2)]
            mean = 0.9 * mean + 0.1 * torch.stack([part.mean(0) for part in ranks]).mean(0)
            variance = 0.9 * variance + 0.1 * torch.stack([part.var(0) for part in ranks]).mean(0)
    for run in results("steps", "statistics/fsdp/32-true"):
        torch.testing.assert_close(run["still"]["weights"]["net.0.running_mean"], mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(run["still"]["weights"]["net.0.running_var"], variance, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_layer_with_fewer_rows_than_shards_is_named(results):
    """A device without a part of it trains all the same."""
    runs = results("modules", "short")[0]
    assert any("head.weight has 1 rows for 2 shards" in message for message in runs["warnings"])
    assert runs["straight"]["losses"] == pytest.approx(runs["ddp"]["losses"], abs=1e-6)
