"""Exports a Hugging Face model as a folder that ``from_pretrained`` reads, verified against the live model."""

import copy
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim import configs
from lightning_optim.checkpoint import load_from_checkpoint
from lightning_optim.checks import check_flags
from lightning_optim.export.gptq import GPTQ, gptq_config, head_of, packed_layers, unpacked_state
from lightning_optim.export.integer import rounds, rounds_output
from lightning_optim.export.pretrained_inputs import synthetic_inputs
from lightning_optim.export.pretrained_report import PretrainedReport
from lightning_optim.export.weights import deployed_copy, deployed_state
from lightning_optim.files import folder_written_aside
from lightning_optim.low_rank.layers import LowRank
from lightning_optim.outputs import output_tensors
from lightning_optim.progress import progress_bar
from lightning_optim.quantization.layers import QuantizedLayer
from lightning_optim.sharding import is_sharded, own_class
from lightning_optim.tables import by_reason
from lightning_optim.target import ForwardInputs, as_forward_calls, find_target

__all__ = ["export_pretrained"]

QUANTIZATIONS = (None, "gptq")

LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Difference of the answers, as a fraction of their range, that the order of sums may make; elsewhere 0.02."""

LARGEST_HALF_DIFFERENCE = 0.02

_TOKENIZERS = ("tokenizer", "processor", "image_processor", "feature_extractor")
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "chat_template*",
    "chat_templates/*",
    "*processor*config.json",
    "normalizer.json",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


def export_pretrained(
    module_or_checkpoint: nn.Module | str | Path,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    quantization: str | None = None,
    module: str | None = None,
    cls_or_module: Any = None,
    example_inputs: Any = None,
    progress: bool = True,
) -> PretrainedReport:
    """Write a Hugging Face folder whose configuration states the pruned shapes, for every tool that reads such folders.

    It holds ``model.safetensors`` (tied weights once), ``config.json`` with ``architectures``, the generation
    configuration and the tokenizer. The numbers of the configuration follow the shapes of the live model: they are
    found by building its class (:mod:`lightning_optim.configs`). The folder is written beside its place, read back with
    ``from_pretrained`` without network, compared with the module, and only then moved into place. Files of another kind
    in a folder that is there already (a README) stay.

    Masked weights are zeros in the file. What only trains (masks, ranges, a teacher, a distillation's projections) has
    no place in such a folder and is left out.

    Args:
        module_or_checkpoint: A model of ``transformers``, a LightningModule or other module around one (a
            DistillationModule: its student is exported), or a checkpoint file; it is not changed.
        folder: The folder to write. One that exists must be empty or hold a ``config.json``.
        tokenizer: A tokenizer or processor, or a folder with its files. By default an attribute ``tokenizer`` or
            ``processor`` of the module, else none.
        quantization: None: float, with the rounded values of quantized weights. ``"gptq"``: the Linear layers of all
            blocks, which are quantized with ``per_group:N`` and at most 4 bits, packed in the GPTQ layout with its
            ``quantization_config``, as vLLM, ONNX Runtime GenAI's builder and transformers (with gptqmodel) read it;
            the head too if it is quantized in the same form, and the other layers in float. Activations are not
            rounded in such folders.
        module: Dotted name of the model, where the module holds several.
        cls_or_module: With a checkpoint: the LightningModule class that wrote it, or an instance, as
            :func:`lightning_optim.load_from_checkpoint` takes it.
        example_inputs: Inputs of the model's forward to compare on, or a list of such: a tensor, a tuple, or a dict of
            keyword arguments. By default random tokens, pixels or features of the model's sizes.
        progress: Show a progress bar on rank zero where it takes longer than two seconds.

    Returns:
        What was written, how large it is and how far its answers are from the module's.

    Raises:
        FileExistsError: If the folder holds something else.
        ValueError: If the module holds no such model or several, no configuration can state a layer's shape, or a
            quantized layer has no place in the layout; the message names the layers. Also if inputs do not fit.
        RuntimeError: If what is read back gives other answers; nothing is written then.

    Examples:
        >>> from lightning_optim import prune_depth
        >>> prune_depth(model, {"input_ids": tokens}, pruning_ratio=0.25)  # doctest: +SKIP
        >>> print(export_pretrained(model, "small", tokenizer=tokenizer))  # doctest: +SKIP
        >>> small = AutoModelForCausalLM.from_pretrained("small")  # doctest: +SKIP
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"`quantization` must be None or 'gptq', got {quantization!r}.")
    check_flags(progress=progress)
    folder = Path(folder)
    _check_folder(folder)
    outer = _loaded(module_or_checkpoint, cls_or_module)
    name, model = _find_model(outer, module)
    tokenizer = _find_tokenizer(outer) if tokenizer is None else tokenizer
    _check_model(name, model)
    with (
        progress_bar("export_pretrained", 5, shown=progress) as advance,
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        _quiet(),
    ):
        solution = configs.solve(model)
        if solution.unstated:
            raise ValueError(_refusal(model, solution.unstated))
        advance()
        reference = deployed_copy(model)
        calls = _calls(reference, example_inputs)
        expected = [_answers(reference, call, "The model") for call in calls]
        packed = packed_layers(reference) if quantization == "gptq" else {}
        advance()
        with folder_written_aside(folder) as temporary:
            written = _write(model, reference, solution.values, packed, temporary)
            _write_tokenizer(tokenizer, temporary)
            advance()
            loaded = _read_back(model, temporary, packed)
            _check_kinds(model, loaded)
            advance()
            got = [_answers(loaded, call, "The folder's model") for call in calls]
            advance()
            difference = _compared(model, expected, got, rounded=bool(packed))
            report = replace(written, max_difference=difference, files=_files(temporary))
            _keep_others(folder, temporary, tokenizer is not None)
    return replace(report, path=folder, notes=_notes(model))


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / "config.json").is_file():
            raise FileExistsError(
                f"{str(folder)!r} holds files and no config.json: it is no Hugging Face folder, and its files would be "
                "mixed with one. Name a new or an empty folder."
            )
    elif folder.exists():
        raise FileExistsError(f"{str(folder)!r} is a file. Name the folder to write.")


def _loaded(given: Any, cls_or_module: Any) -> nn.Module:
    if isinstance(given, nn.Module):
        if cls_or_module is not None:
            raise TypeError("`cls_or_module` goes with a checkpoint; a module was given.")
        return given
    if not isinstance(given, (str, Path)):
        raise TypeError(f"expected a module or the path of a checkpoint, got {given!r}.")
    if cls_or_module is None:
        raise ValueError(
            f"a checkpoint does not hold its class. Pass it: export_pretrained({str(given)!r}, ..., "
            "cls_or_module=YourLightningModule), or load the file first with lightning_optim.load_from_checkpoint."
        )
    loaded: nn.Module = load_from_checkpoint(cls_or_module, given)
    return loaded


def _find_model(outer: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    """Return the model of a module, and its name in it."""
    prefix, target = find_target(outer, name)
    found = configs.config_models(target)
    if len(found) == 1:
        inner, model = next(iter(found.items()))
        return (prefix + inner).rstrip("."), model
    where = type(target).__name__
    if not found:
        raise ValueError(
            f"{where} holds no model of transformers: none of its modules has a `config` with `model_type` and "
            "`save_pretrained`. Other modules are exported with lightning_optim.export_onnx."
        )
    names = ", ".join(repr(prefix + inner) for inner in found)
    raise ValueError(
        f"{where} holds {len(found)} models: {names}. Name one of them: module={prefix + next(iter(found))!r}."
    )


def _find_tokenizer(outer: nn.Module) -> Any:
    candidates = (vars(outer).get(name) for name in _TOKENIZERS)
    return next((found for found in candidates if callable(getattr(found, "save_pretrained", None))), None)


def _check_model(name: str, model: nn.Module) -> None:
    if is_sharded(model):
        raise ValueError(
            f"{name or type(model).__name__} is divided among processes. Save a checkpoint and export that: "
            "export_pretrained('last.ckpt', folder, cls_or_module=...)."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{name or type(model).__name__} was loaded from a quantized folder, and its layers are not float. "
            "Build the class from its configuration and load the float weights into it."
        )
    factorized = {name: "" for name, layer in model.named_modules() if isinstance(layer, LowRank)}
    if factorized:
        ((names, _),) = by_reason(factorized)
        raise ValueError(
            f"{names}: each is two layers of low rank, and the configuration of {own_class(model).__name__} can only "
            "state whole ones. Export without low rank, or with lightning_optim.export_onnx, which writes the model as "
            "it is."
        )


def _refusal(model: nn.Module, unstated: Mapping[str, str]) -> str:
    cls = own_class(model).__name__
    if "" in unstated:
        return unstated[""]
    rows = [f"{names}: {reason}" for names, reason in by_reason(dict(unstated))]
    return (
        f"no configuration makes {cls} what it is. {'; '.join(rows)}. lightning_optim.export_onnx writes the model as "
        "it is."
    )


def _calls(reference: nn.Module, example_inputs: Any) -> list[ForwardInputs]:
    if example_inputs is None:
        return [synthetic_inputs(reference)]
    given = as_forward_calls(example_inputs)
    return [replace(given, further=()), *given.further]


def _answers(model: nn.Module, call: ForwardInputs, who: str) -> list[Tensor]:
    try:
        output = call.call(model)
    except configs.config_failures() as error:
        raise ValueError(
            f"{who} ({own_class(model).__name__}) cannot be called with the inputs to compare on ({error}). Pass "
            "`example_inputs`: what its forward receives, as a dict of keyword arguments."
        ) from error
    return [tensor.float() for tensor in output_tensors(output, objects=False) if tensor.is_floating_point()]


def _write(
    model: nn.Module, reference: nn.Module, values: Mapping[str, Any], packed: Mapping[str, GPTQ], folder: Path
) -> PretrainedReport:
    """Write weights and configurations through a fresh model of the class, which holds nothing of a technique."""
    head_is_packed = head_of(reference) in packed
    if head_is_packed and configs.value_at(model.config, "tie_word_embeddings"):
        values = {**values, "tie_word_embeddings": False}
    config = configs.config_with(model.config, values)
    twin: Any = configs.build(model, config)
    twin.load_state_dict(deployed_state(reference), strict=True, assign=True)
    twin.tie_weights()
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        twin.generation_config = copy.deepcopy(generation)
    twin.save_pretrained(folder, **({"state_dict": _packed_state(twin, packed)} if packed else {}))
    if packed:
        _add_to_config(folder, {"quantization_config": gptq_config(packed, head=head_is_packed)})
    before = {path: configs.value_at(model.config, path) for path in values}
    return PretrainedReport(
        path=folder,
        model=own_class(model).__name__,
        parameters=sum(parameter.numel() for parameter in twin.parameters()),
        config={path: (before[path], value) for path, value in values.items()},
        packed=len(packed),
    )


def _packed_state(twin: nn.Module, packed: Mapping[str, GPTQ]) -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in twin.state_dict().items() if name.removesuffix(".weight") not in packed}
    for name, layer in packed.items():
        state |= {f"{name}.{key}": tensor for key, tensor in layer.tensors.items()}
    return state


def _add_to_config(folder: Path, entries: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}, indent=2) + "\n")


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if not isinstance(tokenizer, (str, Path)):
        if not callable(getattr(tokenizer, "save_pretrained", None)):
            raise TypeError(
                f"`tokenizer` must be a tokenizer, a processor or a folder with its files, got {tokenizer!r}."
            )
        tokenizer.save_pretrained(folder)
        return
    source = Path(tokenizer)
    files = {path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}
    if not files:
        raise FileNotFoundError(f"{str(source)!r} is no folder with the files of a tokenizer.")
    for path in files:
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(path, target)


def _read_back(model: nn.Module, folder: Path, packed: Mapping[str, GPTQ]) -> nn.Module:
    """Return the model that is read from the folder; of packed layers what a reader of the layout computes."""
    cls: Any = own_class(model)
    options: dict[str, Any] = {"attn_implementation": getattr(model.config, "_attn_implementation", None)}
    if packed:
        config = configs.config_with(cls.config_class.from_pretrained(folder, local_files_only=True), {})
        del config.quantization_config
        options |= {"config": config, "state_dict": unpacked_state(folder)}
        location = None
    else:
        location = folder
    loaded, about = cls.from_pretrained(
        location, local_files_only=True, dtype="auto", output_loading_info=True, **options
    )
    problems = {kind: sorted(map(str, names)) for kind, names in about.items() if names}
    if problems:
        written = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}" for kind, names in problems.items())
        raise RuntimeError(
            f"from_pretrained does not read the folder as it was written ({written}). Nothing was written."
        )
    read: nn.Module = loaded.eval()
    return read


def _check_kinds(model: nn.Module, loaded: nn.Module) -> None:
    """Check that blocks of several kinds (sliding and full attention) are in their places; short inputs cannot tell."""
    others = dict(loaded.named_modules())
    for name, kind in configs.kinds_of_blocks(loaded).items():
        live = configs.kinds_of_blocks(model).get(name)
        if live != kind and name in others:
            raise RuntimeError(
                f"{name} is of another kind in the folder ({kind}) than in the model ({live}). Nothing was written. "
                "Let the configuration's lists, such as layer_types, state the blocks that are left."
            )


def _compared(model: nn.Module, expected: list[list[Tensor]], got: list[list[Tensor]], *, rounded: bool) -> float:
    """Return the largest difference of answers; ``rounded`` for scales that are float16 in the folder.

    Raises:
        RuntimeError: If it is too large.
    """
    largest = 0.0
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    limit = LARGEST_HALF_DIFFERENCE if rounded else LARGEST_DIFFERENCE.get(dtype, LARGEST_HALF_DIFFERENCE)
    for ours, theirs in zip(expected, got, strict=True):
        if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
            raise RuntimeError("the folder's model gives answers of other shapes. Nothing was written.")
        for left, right in zip(ours, theirs, strict=True):
            difference = float((left - right).abs().nan_to_num(posinf=0.0).max()) if left.numel() else 0.0
            scale = float(left.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if left.numel() else 1.0
            if difference > limit * max(scale, 1e-6) or not torch.equal(left.isfinite(), right.isfinite()):
                raise RuntimeError(
                    f"the folder's model gives other answers than the module: a difference of {difference:.3g} in "
                    f"outputs of up to {scale:.3g}. Nothing was written. Something of the module is neither in its "
                    "weights nor in its configuration."
                )
            largest = max(largest, difference)
    return largest


def _notes(model: nn.Module) -> list[str]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    active = [n for n, x in layers.items() if (rounds(x) and x.activation_bits is not None) or rounds_output(x)]
    if not active:
        return []
    return [
        f"Activations of {len(active)} layers are rounded in the module and not in the folder, which has no place for "
        "their ranges; the answers were compared without."
    ]


def _files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _keep_others(old: Path, new: Path, with_tokenizer: bool) -> None:
    """Copy what an export does not write from the old folder to the new one; other weights are not kept."""
    if not old.is_dir():
        return
    dropped = (*_WEIGHTS, "config.json", "generation_config.json", *(_TOKENIZER_FILES if with_tokenizer else ()))
    gone = {path for pattern in dropped for path in old.glob(pattern)}
    for path in old.iterdir():
        if path in gone or (new / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars that ``transformers`` shows for every model that it reads."""
    logging: Any = sys.modules.get("transformers.utils.logging")
    shown = logging is not None and logging.is_progress_bar_enabled()
    try:
        if shown:
            logging.disable_progress_bar()
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
