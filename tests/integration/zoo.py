"""Every technique over many architectures: does it train, resume, reload and export?

``python tests/integration/zoo.py`` runs all of it and writes the table into docs/support.md; ``test_zoo.py`` compares.
A new architecture is a row of ``ARCHITECTURES``: how it is made, and what its forward receives.
"""

import copy
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.models import SeededByStep  # noqa: E402
from helpers.nets import Attention, Block, Net, Residual, flat  # noqa: E402
from lightning_optim import DistillationModule, Recipe, export_onnx, load_from_checkpoint  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
BUT = "yes, but "
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
ROWS, BATCH, CLASSES, EPOCHS = 8, 2, 3, 3
AGREEMENT = 7 / 8  # of random rows, whose classes are nearly tied

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A net, and what its forward receives (drawn by a seed)."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


# Inputs of ROWS rows.


def images(size: int = 32) -> Callable[[], Inputs]:
    return lambda: {"x": torch.randn(ROWS, 3, size, size)}


def pixels(size: int = 32) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(ROWS, 3, size, size)}


def sequences() -> Inputs:
    return {"x": torch.randn(ROWS, 6, 32)}


def signals() -> Inputs:
    return {"x": torch.randn(ROWS, 3, 24)}


def words(name: str = "x") -> Callable[[], Inputs]:
    return lambda: {name: torch.randint(2, 40, (ROWS, 6))}


def rows() -> Inputs:
    return {"x": torch.randn(ROWS, 16)}


# Nets of our own.


class UNet(nn.Module):
    """Down, up, and a connection around."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        return self.head(self.join(torch.cat([first, self.up(self.down2(first))], 1)).relu())


class Recurrent(nn.Module):
    """Words, a recurrent layer, a head."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.project = nn.Linear(16, 24)
        self.recurrent = kind(24, 16, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.project(self.table(x)).relu())[0][:, -1])


class Tower(nn.Module):
    """A bag of items, an MLP, and a score for each item of a catalogue."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 16, mode="mean")
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.norm = nn.LayerNorm(16)
        self.items = nn.Linear(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        bag = self.bag(x)
        return self.items(self.norm(self.mlp(bag) + bag))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 3),
    )


def separable() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        return [depthwise, nn.BatchNorm2d(inputs), nn.ReLU6(), nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs)]

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU6(), *block(8, 16), *block(16, 16), nn.AdaptiveAvgPool2d(1), *flat(16)
    )


def dense_connections() -> nn.Module:
    return Net(
        lambda s, x: s.head(s.join(torch.cat([s.stem(x), s.grow(s.norm(s.stem(x)).relu())], 1)).relu().mean((2, 3))),
        stem=nn.Conv2d(3, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        grow=nn.Conv2d(8, 6, 3, padding=1),
        join=nn.Conv2d(14, 8, 1),
        head=nn.Linear(8, CLASSES),
    )


def signal_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.PReLU(8), nn.Conv1d(8, 8, 3), nn.AdaptiveMaxPool1d(1), *flat(8)
    )


def text_net() -> nn.Module:
    return Net(
        lambda s, x: s.head(s.conv(s.table(x).transpose(1, 2)).relu().amax(2)),
        table=nn.Embedding(40, 16),
        conv=nn.Conv1d(16, 12, 3),
        head=nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, CLASSES)),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return Net(
        lambda s, x: s.head(s.encoder(x).mean(1)),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        head=nn.Linear(32, CLASSES),
    )


def hugging_face(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    """Return what makes a small model from a configuration; nothing is downloaded."""

    def make() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(num_labels=CLASSES, **options))

    return make


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 40, "max_position_embeddings": 16, **SMALL}


def mixtral() -> nn.Module:
    """Return a mixture of experts, which ONNX has operators for."""
    words = {"pad_token_id": 0, "num_local_experts": 4, "num_key_value_heads": 2, **TEXT}
    net = hugging_face("MixtralConfig", "MixtralForSequenceClassification", **words)()
    net.set_experts_implementation("batched_mm")
    return net


ARCHITECTURES: dict[str, Architecture] = {
    "MLP": Architecture(mlp, rows),
    "residual conv net": Architecture(Residual, images(8)),
    "separable conv net": Architecture(separable, images(16)),
    "dense connections": Architecture(dense_connections, images(8)),
    "U-Net": Architecture(UNet, images(8)),
    "1-D conv net": Architecture(signal_net, signals),
    "text conv net": Architecture(text_net, words()),
    "GRU": Architecture(lambda: Recurrent(nn.GRU), words()),
    "LSTM": Architecture(lambda: Recurrent(nn.LSTM), words()),
    "two-tower recommender": Architecture(Tower, words()),
    "nn.TransformerEncoder": Architecture(encoder, sequences),
    "hand-written attention": Architecture(lambda: Block(Attention("head_dim")), sequences),
    "ResNet (transformers)": Architecture(
        hugging_face(
            "ResNetConfig",
            "ResNetForImageClassification",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
        ),
        pixels(),
    ),
    "MobileNetV2 (transformers)": Architecture(
        hugging_face("MobileNetV2Config", "MobileNetV2ForImageClassification", depth_multiplier=0.25), pixels()
    ),
    "ConvNeXt (transformers)": Architecture(
        hugging_face(
            "ConvNextConfig", "ConvNextForImageClassification", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2
        ),
        pixels(),
    ),
    "ViT (transformers)": Architecture(
        hugging_face("ViTConfig", "ViTForImageClassification", image_size=16, patch_size=8, **SMALL), pixels(16)
    ),
    "Swin (transformers)": Architecture(
        hugging_face(
            "SwinConfig",
            "SwinForImageClassification",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
        ),
        pixels(16),
    ),
    "BERT (transformers)": Architecture(
        hugging_face("BertConfig", "BertForSequenceClassification", **TEXT), words("input_ids")
    ),
    "DistilBERT (transformers)": Architecture(
        hugging_face(
            "DistilBertConfig",
            "DistilBertForSequenceClassification",
            vocab_size=40,
            max_position_embeddings=16,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
        ),
        words("input_ids"),
    ),
    "ALBERT (transformers)": Architecture(
        hugging_face("AlbertConfig", "AlbertForSequenceClassification", embedding_size=16, **TEXT), words("input_ids")
    ),
    "ELECTRA (transformers)": Architecture(
        hugging_face("ElectraConfig", "ElectraForSequenceClassification", embedding_size=16, **TEXT), words("input_ids")
    ),
    "GPT-2 (transformers)": Architecture(
        hugging_face(
            "GPT2Config",
            "GPT2ForSequenceClassification",
            vocab_size=40,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=4,
            pad_token_id=0,
        ),
        words("input_ids"),
    ),
    "Llama (transformers)": Architecture(
        hugging_face("LlamaConfig", "LlamaForSequenceClassification", pad_token_id=0, **TEXT), words("input_ids")
    ),
    "Mixtral (transformers)": Architecture(mixtral, words("input_ids")),
    "T5 encoder (transformers)": Architecture(
        hugging_face(
            "T5Config", "T5EncoderModel", vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        ),
        words("input_ids"),
    ),
}

WINDOWS = {"start": 2, "end": 6}
CHANNELS = {"pruning_ratio": 0.25, "events": 2, "scope": "layer", **WINDOWS}
WEIGHTS = {"sparsity": 0.5, "every_n_steps": 2, **WINDOWS}
ROUNDING = {"start": 3, "freeze": 8, "observe_steps": 2}
TECHNIQUES: dict[str, Recipe] = {
    "zeros": Recipe(weight_pruning=WEIGHTS),
    "channels": Recipe(channel_pruning=CHANNELS),
    "8 bits": Recipe(quantization=ROUNDING),
    "a teacher": Recipe(distillation={"alpha": 0.5}),
    "all of it": Recipe(
        channel_pruning={**CHANNELS, "end": 4},
        weight_pruning={**WEIGHTS, "start": 4},
        quantization={"start": 6, "freeze": 10, "observe_steps": 2},
        distillation={"alpha": 0.5},
    ),
}


class Learner(pl.LightningModule):
    """An ordinary LightningModule around a net."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Tensor) -> Tensor:
        found = self.net(*inputs.values()) if list(inputs) == ["x"] else self.net(**inputs)
        logits = getattr(found, "logits", getattr(found, "last_hidden_state", found))
        return logits.flatten(1)

    def training_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(**inputs)[:, :CLASSES], labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Samples(Dataset):
    """Random inputs and labels, the same for a seed."""

    def __init__(self, inputs: Callable[[], Inputs]) -> None:
        torch.manual_seed(5)
        self.inputs = inputs()
        self.labels = torch.arange(ROWS) % CLASSES

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Inputs, Tensor]:
        return {name: value[index] for name, value in self.inputs.items()}, self.labels[index]


class FilePerEpoch(pl.Callback):
    """Writes the first epoch's file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def learner(architecture: Architecture) -> Learner:
    torch.manual_seed(3)
    return Learner(architecture.make())


def fit(architecture: Architecture, recipe: Recipe, *callbacks: pl.Callback, resume: Path | None = None) -> Any:
    module = learner(architecture)
    wrapped = recipe.wrap(module, learner(architecture) if recipe.distillation is not None else None)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SeededByStep(), *recipe.callbacks(), *callbacks],
    )
    trainer.fit(wrapped, DataLoader(Samples(architecture.inputs), BATCH), ckpt_path=resume)
    return wrapped, module, trainer


def try_out(name: str, technique: str, folder: Path) -> str:
    """Train, resume, reload and export; return "yes", or where it ends and why."""
    architecture, recipe = ARCHITECTURES[name], TECHNIQUES[technique]
    step = "train"
    try:
        wrapped, module, trainer = fit(architecture, recipe, FilePerEpoch(folder / "first.ckpt"))
        trainer.save_checkpoint(folder / "last.ckpt")
        step = "resume"
        resumed, *_ = fit(architecture, recipe, resume=folder / "first.ckpt")
        assert same(resumed, wrapped), "the resumed run is another"
        step = "reload"
        fresh = learner(architecture)
        into = DistillationModule(fresh) if recipe.distillation is not None else fresh
        assert same(load_from_checkpoint(into, folder / "last.ckpt"), wrapped), "the file is another"
        step = "export"
        inputs = Samples(architecture.inputs).inputs
        export_onnx(module, folder / "net.onnx", inputs, inputs=inputs, least_agreement=AGREEMENT)
    except Exception as error:  # noqa: BLE001 - the table says what happens, whatever it is
        return f"{step}: {first_sentence(error)}"
    return "yes"


def same(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[.:]) ", text)[0].rstrip(".:")[:160]


def table(
    found: Mapping[tuple[str, str], str],
    names: Iterable[str] = tuple(ARCHITECTURES),
    techniques: Iterable[str] = tuple(TECHNIQUES),
) -> str:
    """Return the table: a mark where all steps work, else (or with it: "yes, but ...") a number of a reason below."""
    reasons: list[str] = []
    techniques = tuple(techniques)
    lines = [f"| | {' | '.join(techniques)} |", f"| --- |{' --- |' * len(techniques)}"]
    for name in names:
        cells = []
        for technique in techniques:
            reason = found[name, technique].removeprefix(BUT)
            mark = "yes " if reason != found[name, technique] else ""
            if reason != "yes" and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason == "yes" else f"{mark}({reasons.index(reason) + 1})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason.replace('|', '/')}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *notes]).rstrip()


def put_on_page(text: str, begin: str = BEGIN, end: str = END, page: Path = PAGE) -> None:
    """Write between two marks of a page."""
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def main() -> None:
    quiet()
    found = {}
    for name in ARCHITECTURES:
        for technique in TECHNIQUES:
            with tempfile.TemporaryDirectory() as folder:
                found[name, technique] = try_out(copy.copy(name), technique, Path(folder))
            sys.stdout.write(f"{name} | {technique}: {found[name, technique]}\n")
            sys.stdout.flush()
    put_on_page(table(found))


if __name__ == "__main__":
    main()
