"""Fits with teachers that are divided among processes, and writes what each rank saw: ``OUT PRESET...``."""

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from helpers.models import Files, StepsTwo, trainer
from lightning_optim import DistillationModule
from lightning_optim.distillation import IndexedDataset
from lightning_optim.distillation.divided import divide_teacher, is_divided
from lightning_optim.distillation.teacher import Teacher
from lightning_optim.sharding import local, whole_state
from lightning_optim.strategies import OptimFSDP2, build
from lightning_optim.strategies.common import end_group_at_exit
from lightning_optim.target import ForwardInputs

EPOCHS, ROWS, LENGTH, WORDS = 2, 16, 6, 40
ENDS = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, **ENDS}
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
STRATEGIES = {"optim_hsdp": lambda: OptimFSDP2(replicate=2)}


def llama(blocks: int, seed: int, **sizes):
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(num_hidden_layers=blocks, num_key_value_heads=1, use_cache=False, **SIZES | sizes)
    return transformers.LlamaForCausalLM(config)


class Scores(nn.Module):
    """It reads a table's weights outside of the table's forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.table = nn.Embedding(WORDS, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)])
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.table(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.scale * x @ self.table.weight.t()


def outsiders() -> dict:
    """Models nobody here wrote, and what their forward receives."""
    import transformers

    ids = torch.randint(1, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(4)
    return {
        "llama": (llama(6, 2), {"input_ids": ids}),
        "llama, tied": (llama(3, 2, tie_word_embeddings=True), {"input_ids": ids}),
        "bert": (
            transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=4, **SIZES)),
            {"input_ids": ids},
        ),
        "t5": (
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=3, **ENDS)
            ),
            {"input_ids": ids, "decoder_input_ids": ids},
        ),
        "vit": (
            transformers.ViTForImageClassification(
                transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_hidden_layers=4, **SIZES)
            ),
            {"pixel_values": torch.ones(2, 1, 8, 8)},
        ),
        "albert": (
            transformers.AlbertForSequenceClassification(
                transformers.AlbertConfig(num_hidden_layers=3, embedding_size=8, **SIZES)
            ),
            {"input_ids": ids},
        ),
        "reads": (Scores(), {"input_ids": ids}),
        "torch": (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3, enable_nested_tensor=False
            ),
            {"src": torch.ones(2, 5, 16)},
        ),
        "half": (llama(3, 2).bfloat16(), {"input_ids": ids}),
    }


class Student(pl.LightningModule):
    """A smaller Llama, with its data."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama(4, 1)

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(**batch).loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)

    def _loader(self):
        ids = torch.randint(1, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
        kwargs = self.trainer.strategy.distributed_sampler_kwargs
        sampler = DistributedSampler(rows, shuffle=False, **kwargs)
        return DataLoader(rows, 8 // kwargs["num_replicas"], sampler=sampler)

    train_dataloader = val_dataloader = _loader


class Indexed(Student):
    """Its training set brings the samples' numbers, for a cache; the last batch of a rank is smaller."""

    def train_dataloader(self):
        rows = IndexedDataset(self._loader().dataset)
        return DataLoader(rows, 3, sampler=DistributedSampler(rows, **self.trainer.strategy.distributed_sampler_kwargs))


class ByHand(StepsTwo, Student):
    """It steps two optimizers itself."""

    def configure_optimizers(self):
        blocks = list(self.model.model.layers.parameters())
        others = [p for p in self.parameters() if not any(p is one for one in blocks)]
        return [torch.optim.AdamW(blocks, 1e-3), torch.optim.AdamW(others, 1e-2)]


METRICS = ("distillation/task", "distillation/kd", "distillation/model.model.layers.-1")
FEATURES = [("model.model.layers.-1", "model.layers.-1")]


def distilled(student: type = Student, teacher=None, **words) -> DistillationModule:
    return DistillationModule(student(), teacher or llama(6, 2, hidden_size=24), features=FEATURES, **words)


def run(folder: Path, preset: str, module, ckpt_path=None, *, files=False, epochs=EPOCHS) -> dict:
    torch.manual_seed(0)
    fitted = trainer(
        folder,
        *([Files(folder)] if files else []),
        strategy=STRATEGIES.get(preset, lambda: build(preset))(),
        devices=WORLD,
        max_epochs=epochs,
        use_distributed_sampler=False,
    )
    fitted.fit(module, ckpt_path=ckpt_path)
    network = module.teacher.networks[0]
    return {
        "state": {key: value.clone() for key, value in whole_state(module, keep=True).items()},
        "losses": [float(fitted.callback_metrics[name]) for name in METRICS if name in fitted.callback_metrics],
        "divided": is_divided(network),
        "held": sum(local(parameter).numel() for parameter in network.parameters()),
        "all": sum(parameter.numel() for parameter in network.parameters()),
        "checksum": module.teacher.checksum(),
        "validated": float(fitted.validate(module, verbose=False)[0]["val_loss"]),
    }


def said(call) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - what is raised is what is looked at
        return f"{type(error).__name__}: {error}"
    return "nothing"


def answers(folder: Path, preset: str) -> dict:
    """Whether divided models of others answer as whole ones, and how much of them a rank holds."""
    found = {}
    module = distilled()
    fitted = trainer(
        folder,
        strategy=STRATEGIES.get(preset, lambda: build(preset))(),
        devices=WORLD,
        max_epochs=1,
        limit_val_batches=0,
    )

    class Looks(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            for name, (network, inputs) in outsiders().items():
                handle = Teacher([network])
                handle.freeze()
                expected = handle(ForwardInputs((), inputs))[0]
                divide_teacher(trainer, [network], wanted=True)
                twice = [handle(ForwardInputs((), inputs))[0] for _ in range(2)]
                tensors = [getattr(answer, "logits", answer) for answer in (expected, *twice)]
                found[name] = {
                    "same": all(torch.equal(tensors[0], tensor) for tensor in tensors),
                    "share": sum(local(p).numel() for p in network.parameters())
                    / sum(p.numel() for p in network.parameters()),
                    "gathered": [
                        name
                        for name, p in network.named_parameters()
                        if p.ndim and not hasattr(p, "device_mesh")  # a unit that stayed gathered
                    ],
                }

    fitted.callbacks.append(Looks())
    fitted.fit(module)
    return found


def case(folder: Path, preset: str) -> dict:
    results = {"straight": run(folder, preset, distilled(), files=True)}
    results["whole"] = run(folder, preset, distilled(divide_teacher=False))
    results["resumed"] = run(folder, preset, distilled(), folder / "0.ckpt")
    results["by hand"] = run(folder, preset, distilled(ByHand), files=False)
    results["by hand, whole"] = run(folder, preset, distilled(ByHand, divide_teacher=False))
    teacher = llama(6, 2, hidden_size=24)
    first, second = distilled(teacher=teacher), distilled(teacher=teacher)
    results["first of two"] = run(folder, preset, first)
    results["second of two"] = run(folder, preset, second)
    results["second fit"] = run(folder, preset, first)
    for name, divided in (("cached", True), ("cached, whole", False)):
        words = {"cache": folder / name, "cache_top_k": 8, "divide_teacher": divided}
        module = DistillationModule(Indexed(), llama(6, 2, hidden_size=24), **words)
        results[name] = run(folder, preset, module)
    results["bytes"] = [(folder / name).read_bytes() for name in ("cached", "cached, whole")]
    results["answers"] = answers(folder, preset)
    lost = distilled()
    lost.set_teacher(None)
    fitted = trainer(folder, strategy=STRATEGIES.get(preset, lambda: build(preset))(), devices=WORLD)
    results["validated without"] = float(fitted.validate(lost, verbose=False)[0]["val_loss"])
    results["under ddp"] = said(lambda: run(folder, "optim_ddp", distilled(teacher=teacher)))

    from torch.distributed.fsdp import fully_shard

    theirs = llama(2, 2)
    fully_shard(theirs)
    results["divided by the user"] = said(lambda: distilled(teacher=theirs))
    one, other = llama(3, 2, hidden_size=24), llama(3, 3, hidden_size=24)
    other.model.embed_tokens = one.model.embed_tokens
    results["sharing"] = said(lambda: run(folder, preset, distilled(teacher=[one, other])))
    return results


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for preset in sys.argv[2:]:
        folder = out / preset
        results = case(folder, preset)
        torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    end_group_at_exit()
    main()
