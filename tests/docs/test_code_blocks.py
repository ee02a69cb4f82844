"""Every code block of README and pages runs: Python as it stands, YAML by what reads it, commands by their words.

A page's Python blocks run one after the other in one namespace, which begins with what the pages call by name
(``model``, ``data``, ...): small nets and random rows. The Trainer is the real one, on one CPU device, for few epochs.
"""

import copy
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.utils.data import DataLoader

import lightning_optim
from helpers.models import CLASSES, FEATURES, Classifier, data
from lightning_optim import IndexedDataset, Recipe, WeightPruning
from lightning_optim.cli import main
from lightning_optim.cli.main import COMMANDS
from lightning_optim.export.runtimes import RUNTIMES
from lightning_optim.functional.blocks import BLOCK_CRITERIA
from lightning_optim.functional.channels import CHANNEL_CRITERIA
from lightning_optim.functional.criteria import CRITERIA, STATISTICS
from lightning_optim.functional.losses import FEATURE_LOSSES, LOSSES
from lightning_optim.functional.observers import OBSERVERS
from lightning_optim.functional.regularization import REGULARIZATIONS
from lightning_optim.functional.rounding import ROUNDINGS
from lightning_optim.functional.schedules import SCHEDULES
from lightning_optim.functional.sparsify import SPARSIFIERS
from lightning_optim.techniques import TECHNIQUES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
REGISTRIES = (
    BLOCK_CRITERIA,
    CHANNEL_CRITERIA,
    CRITERIA,
    FEATURE_LOSSES,
    LOSSES,
    OBSERVERS,
    REGULARIZATIONS,
    ROUNDINGS,
    RUNTIMES,
    SCHEDULES,
    SPARSIFIERS,
    STATISTICS,
)
MOST_EPOCHS = 4
LONG = ("extending.md", "index.md", "report.md", "start.md")
"""Pages whose blocks compare several models in several engines."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, in which language, what it says."""

    page: Path
    line: int
    language: str
    code: str


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        line = text[: match.start("code")].count("\n") + 1
        found.append(Block(page, line, match["language"], code))
    return [block for block in found if not languages or block.language in languages]


class Rows(pl.LightningDataModule):
    """Random rows with something to learn."""

    def train_dataloader(self):
        return DataLoader(data(), 8)

    def val_dataloader(self):
        return DataLoader(data(), 16)

    test_dataloader = val_dataloader


class Tables(nn.Module):
    """What needs a table: bags of words."""

    def __init__(self):
        super().__init__()
        self.words = nn.EmbeddingBag(20, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, words):
        return self.out(self.words(words))


class Images(nn.Module):
    """What takes images of 32 x 32 pixels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )

    def forward(self, images):
        return self.layers(images)


def accuracy(net):
    rows, labels = data()[:]
    with torch.no_grad():
        return (net.eval()(rows).argmax(1) == labels).float().mean().item()


def namespace(page: Path) -> dict:
    """What the pages speak of without defining it."""
    rows, labels = data()[:]
    names = {
        "pl": pl,
        "torch": torch,
        "nn": nn,
        "F": F,
        "copy": copy,
        "DataLoader": DataLoader,
        "IndexedDataset": IndexedDataset,
        "model": Classifier(16),
        "module": Classifier(16),
        "MyModule": Classifier,
        "student": Classifier(16),
        "teacher": Classifier(32),
        "dense": Classifier(16),
        "pruned": Classifier(8),
        "quantized": lightning_optim.quantize_post_training(
            Classifier(16), DataLoader(data(), 16), batches=2, progress_bar=False
        ),
        "small": Classifier(8),
        "data": Rows(),
        "train_set": data(),
        "train_loader": DataLoader(data(), 8, shuffle=True),
        "val_loader": DataLoader(data(), 16),
        "calibration_loader": DataLoader(data(), 16),
        "example_inputs": torch.zeros(2, FEATURES),
        "held_out": rows,
        "images": rows,
        "labels": labels,
        "classes": CLASSES,
        "evaluate": accuracy,
        "trainer": pl.Trainer(max_epochs=2),
    }
    if page.name == "channel_pruning.md":
        names |= {"model": Images(), "evaluate": lambda net: -net(torch.ones(1, 3, 32, 32)).abs().sum().item()}
    if page.name == "quantization.md":
        bags = torch.arange(160).view(40, 4) % 20
        names |= {"model": Tables(), "calibration_loader": DataLoader(bags, 8), "example_inputs": bags[:2]}
        names["held_out"] = bags
    return names


@pytest.fixture
def small_trainer(monkeypatch, tmp_path):
    """The real Trainer, cut down to this machine: one device, few epochs, nothing written but checkpoints."""
    real, folders = pl.Trainer, (tmp_path / str(number) for number in range(100))

    def small(**words):
        cut = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "logger": False, "enable_progress_bar": False}
        words["max_epochs"] = min(words.get("max_epochs") or MOST_EPOCHS, MOST_EPOCHS)
        return real(**{**words, **cut, "enable_model_summary": False, "default_root_dir": next(folders)})

    monkeypatch.setattr(pl, "Trainer", small)
    monkeypatch.chdir(tmp_path)
    techniques = set(TECHNIQUES)
    for registry in REGISTRIES:  # what a page registers is gone after it
        monkeypatch.setattr(registry, "_functions", dict(registry._functions))
    yield tmp_path
    for name in set(TECHNIQUES) - techniques:
        TECHNIQUES.unregister(name)
    if torch.distributed.is_initialized():  # by a page's preset
        torch.distributed.destroy_process_group()


def write_files(folder: Path) -> None:
    """Write the files that the pages load."""
    run = pl.Trainer(max_epochs=1, callbacks=[WeightPruning(0.5, start=1, end=4)])
    run.fit(Classifier(16), Rows())
    run.save_checkpoint(folder / "best.ckpt")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG else [], id=page.name)
        for page in PAGES
        if blocks(page, "python")
    ],
)
@pytest.mark.filterwarnings("ignore:.*prefers the epochs before:UserWarning")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_python_blocks_run(page, small_trainer):
    torch.manual_seed(0)
    write_files(small_trainer)
    names = namespace(page)
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        exec(code, names)


def test_each_extension_of_the_page_runs_in_its_own_block():
    """A function that is only defined may ask for what it does not get: a fit, an export or a quantization calls it."""
    registering = [b.code for b in blocks(ROOT / "docs" / "extending.md", "python") if ".register(" in b.code]
    assert len(registering) >= 6
    for code in registering:
        (name,) = re.findall(r'\.register\((?:Technique\()?"(\w+)"', code)
        assert f'="{name}"' in code or f"({name}=" in code, name
        assert any(call in code for call in (".fit(", "export_onnx(", "quantize_post_training(")), name


@pytest.mark.parametrize(
    "block", [b for page in PAGES for b in blocks(page, "yaml")], ids=lambda b: f"{b.page.name}:{b.line}"
)
def test_yaml_blocks_are_read(block):
    words = yaml.safe_load(block.code)
    assert isinstance(words, dict)
    if {"trainer", "model"} & words.keys():
        assert words.keys() <= {"seed_everything", "recipe", "teacher", "teacher_ckpt", "model", "data", "trainer"}
        Recipe.load(words.get("recipe", {}))
    else:
        Recipe.load(words)


def commands(block: Block) -> list[list[str]]:
    """Return the words of each command in a shell block; comments and continued lines are understood."""
    text = block.code.replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [part for words in lines for part in _split(words) if part]


def _split(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "|", ";"):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


SHELL = [(b, words) for page in PAGES for b in blocks(page, "sh") for words in commands(b)]


@pytest.mark.parametrize(
    ("block", "words"), SHELL, ids=lambda v: v.page.name if isinstance(v, Block) else " ".join(v[:3])
)
def test_commands_name_what_exists(block, words):
    if words[0] == "lightning-optim":
        assert words[1] in COMMANDS or words[1].startswith("-")
    for word in words:
        if re.fullmatch(r"(examples|benchmarks|tests)/[\w/]+\.(py|yaml)", word):
            assert (ROOT / word).is_file(), word
    if words[:4] == ["python", "-m", "pip", "install"]:
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            declared = (ROOT / "pyproject.toml").read_text()
            assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras.split(","))


MODELS = (
    "from helpers.models import Classifier\nclass Large(Classifier):\n    pass\nclass Small(Classifier):\n    pass\n"
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_the_commands_of_the_command_line_page_run(monkeypatch, tmp_path, capsys):
    """In a folder with ``my_models.py``, ``my_data.py`` and the page's YAML as ``small.yaml``."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    page = ROOT / "docs" / "cli.md"
    (tmp_path / "my_models.py").write_text(MODELS)
    (tmp_path / "my_data.py").write_text("from test_code_blocks import Rows\nclass Data(Rows):\n    pass\n")
    config = yaml.safe_load(blocks(page, "yaml")[0].code)
    config["trainer"] |= {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    large = Classifier(32)
    words = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    run = pl.Trainer(max_epochs=1, **words)
    run.fit(large, Rows())
    run.save_checkpoint(tmp_path / "large.ckpt")
    monkeypatch.setattr("sys.path", [str(Path(__file__).parent), *__import__("sys").path])
    for words in (part for block in blocks(page, "sh") for part in commands(block)):
        assert main(words[1:]) == 0, words
        if not (tmp_path / "small.ckpt").exists():  # of the page's first command
            (file,) = (tmp_path / "checkpoints").glob("*.ckpt")
            file.rename(tmp_path / "small.ckpt")
