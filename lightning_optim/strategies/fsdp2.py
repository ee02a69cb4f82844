"""OptimFSDP2: fully sharded, hybrid, tensor parallel and 2-D training of unmodified LightningModules."""

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_optim import _upstream
from lightning_optim.checks import check_choice, check_flags, listed
from lightning_optim.optimizers import check_current, following
from lightning_optim.sharding import is_dtensor, is_sharded, local, reshard
from lightning_optim.strategies import gradients
from lightning_optim.strategies.common import (
    check_batchnorm_sync,
    checked_timeout,
    end_children,
    end_group_at_exit,
    name_rank,
)
from lightning_optim.strategies.cost import SHARDED_PRECISIONS
from lightning_optim.strategies.divide import Recomputed, divide, has_own_statistics, register_steps
from lightning_optim.strategies.reads import Reads, mixed_said_plainly
from lightning_optim.strategies.sharded_files import ShardedFiles
from lightning_optim.strategies.tensor import find_pairs, given_pairs
from lightning_optim.strategies.units import NamedModules, find_units
from lightning_optim.strategies.whole import average_gradients, broadcast_from_first
from lightning_optim.target import averaged_copies

__all__ = ["OptimFSDP2"]

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
CLIPPING = {"clip_grad_by_norm": gradients.clip_by_norm, "clip_grad_by_value": gradients.clip_by_value}
"""Methods of the precision plugin that are replaced while the strategy is set up."""
FULL_UNTIL = 1_000_000_000
"""Models of more parameters than this are saved as a folder of shards by default."""


@runtime_checkable
class BeforeSharding(Protocol):
    """A callback that acts right before the module is divided, after its plan was restored."""

    def before_sharding(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change or copy the module while it is whole."""


class OptimFSDP2(ModelParallelStrategy):
    """Divide weights, gradients and optimizer states among the devices, without a ``configure_model``.

    PyTorch's FSDP2 (``fully_shard``): each parameter is a DTensor, divided along its first dimension, and gathered
    with its unit for the moment of its use. Units are found automatically. A LightningModule whose own
    ``configure_model`` has sharded it already is left as it is.

    Args:
        units: ``"auto"`` (see :func:`~lightning_optim.strategies.units.find_units`), or class and module names.
        reshard: Free a unit after its forward pass and gather it again for the backward pass. ``False`` keeps it (ZeRO
            stage 2: less traffic, the whole model in the compute type is held).
        replicate: Hybrid sharding: this many copies of the model, each divided among world / ``replicate`` devices.
            ``"nodes"``: one copy per node.
        tensor: Devices that share the layers' features (tensor parallelism); neighbours, so within a node.
            ``"node"``: all devices of a node.
        tensor_plan: ``"auto"`` (see :func:`~lightning_optim.strategies.tensor.find_pairs`), or glob patterns
            of layer names -> ``"col"`` or ``"row"``.
        shard: ``False`` with ``tensor`` > 1: nothing but tensor parallelism.
        activation_checkpointing: Keep only the units' inputs and compute the rest again in the backward pass:
            about a third more computation.
        reduce_dtype: Type in which gradients are added up under ``precision="bf16-mixed"``.
        accumulate_unsharded: Reduce gradients once per accumulation instead of once per batch; holds them whole
            meanwhile (4 bytes per parameter).
        checkpoint: ``"full"`` (one file, like any other strategy's), ``"sharded"`` (a folder, each process writes its
            part; :func:`~lightning_optim.strategies.consolidate` makes one file of it) or ``"auto"``: sharded
            above a billion parameters. Either resumes under any number of devices; a full file under any strategy.
        timeout_s: Seconds until a collective that a rank does not join raises on the others. Checkpoints, the
            preparation of data and the first compilation must fit in it.
        process_group_backend: ``"nccl"`` or ``"gloo"``; by default what the device takes.

    A weight of a unit that is read outside of its forward (an item table that scores) is gathered for that read. 0-dim
    parameters stay whole on every device; layers of another dtype than their unit are units of their own.

    Precision: ``"bf16-mixed"`` gathers parameters in bfloat16 and adds gradients up in float32;
    BatchNorm stays float32. BatchNorm statistics are averaged over the ranks after each training batch.

    Raises:
        ValueError: For arguments that are none.
        MisconfigurationException: In the Trainer's constructor, for sizes that do not divide the devices, or in a
            notebook; in ``setup``, for a precision, a callback or a flag that sharding does not carry, or where
            ``tensor`` finds no pair.
    """

    def __init__(
        self,
        *,
        units: Literal["auto"] | list[str] = "auto",
        reshard: bool = True,
        replicate: int | Literal["nodes"] = 1,
        tensor: int | Literal["node"] = 1,
        tensor_plan: Literal["auto"] | dict[str, str] = "auto",
        shard: bool = True,
        activation_checkpointing: bool = False,
        reduce_dtype: Literal["float32", "bfloat16"] = "float32",
        accumulate_unsharded: bool = False,
        checkpoint: Literal["auto", "full", "sharded"] = "auto",
        timeout_s: float = 600.0,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=checkpoint == "sharded",
            timeout=checked_timeout(timeout_s),
            process_group_backend=process_group_backend,
        )
        check_choice("reduce_dtype", reduce_dtype, ("float32", "bfloat16"))
        check_choice("checkpoint", checkpoint, ("auto", "full", "sharded"))
        check_flags(reshard=reshard, shard=shard, accumulate_unsharded=accumulate_unsharded)
        check_flags(activation_checkpointing=activation_checkpointing)
        self.units = units if isinstance(units, str) else listed("units", units, "names of layer classes")
        self.reshard = reshard
        self.replicate = _checked_size("replicate", replicate, "nodes")
        self.tensor = _checked_size("tensor", tensor, "node")
        self.tensor_plan = _checked_plan(tensor_plan)
        self.shard = shard
        self.activation_checkpointing = activation_checkpointing
        self.reduce_dtype = reduce_dtype
        self.accumulate_unsharded = accumulate_unsharded
        self.checkpoint = checkpoint
        if not shard and (replicate != 1 or tensor == 1):
            raise ValueError("`shard=False` is tensor parallelism alone: it needs `tensor` > 1 and `replicate=1`.")
        if replicate != 1 and tensor != 1:
            raise ValueError("`replicate` and `tensor` are not offered together; leave one at 1.")
        _upstream.check(self)
        self._files = ShardedFiles(self)
        self._averaged_norms: list[nn.Module] = []
        self._reads = Reads()
        self._whole: list[nn.Parameter] = []

    # Sizes and processes.

    @override
    def _configure_launcher(self) -> None:
        if _upstream.is_interactive():
            raise MisconfigurationException(
                "sharded and tensor parallel training need processes that keep their part of the model, which a "
                "notebook cannot start. Run a script, or take Trainer(strategy='optim_ddp_notebook')."
            )
        self._resolve_sizes()
        super()._configure_launcher()

    def _resolve_sizes(self) -> None:
        """Turn the words into numbers, and check that they divide the devices."""
        devices, nodes = self.num_processes, self.num_nodes
        world = devices * nodes
        tensor = devices if self.tensor == "node" else self.tensor
        replicate = nodes if self.replicate == "nodes" else self.replicate
        if self.replicate == "nodes" and nodes == 1:
            raise MisconfigurationException(
                "hybrid sharding keeps one copy of the model per node, and the Trainer has one node. Take "
                "'optim_fsdp', or OptimFSDP2(replicate=2) for two copies within the node."
            )
        if self.tensor != 1 and tensor < 2:
            raise MisconfigurationException("tensor parallelism divides layers among devices, and the Trainer has one.")
        for name, size, whole, of in (
            ("tensor", tensor, devices, "of a node"),
            ("replicate", replicate, world, "in all"),
        ):
            if whole % size:
                raise MisconfigurationException(
                    f"`{name}`={size} does not divide the {whole} devices {of}. Take a divisor of {whole}."
                )
        if not self.shard and world != tensor:
            raise MisconfigurationException(
                f"tensor parallelism alone takes exactly `tensor` devices: {tensor} of {world}. Take 'optim_2d', which "
                "shards over the others."
            )
        self._tensor_parallel_size, self._data_parallel_size = tensor, world // tensor
        self._replicas = replicate

    @override
    def setup_environment(self) -> None:
        self._resolve_sizes()  # a launcher may have changed the number of processes since
        super().setup_environment()
        end_group_at_exit()
        self._data_mesh = self._make_data_mesh()

    def _make_data_mesh(self) -> Any:
        if self._replicas == 1:
            return self.device_mesh["data_parallel"]
        from torch.distributed.device_mesh import init_device_mesh

        sizes = (self._replicas, self.world_size // self._replicas)
        return init_device_mesh(self.root_device.type, sizes, mesh_dim_names=("replicate", "shard"))

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that share layers get the same batches."""
        tensor = self.world_size // int(self._data_parallel_size)
        return {"num_replicas": self._data_parallel_size, "rank": self.global_rank // tensor}

    # Setup.

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Before: callbacks and the plan are restored while the module is whole; the weights wait for their shards."""
        return False

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if self.accelerator is None or self.lightning_module is None:
            raise RuntimeError("the Trainer sets accelerator and module before setup.")
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        module = self.lightning_module
        self._check(trainer, module)
        with following(module):
            is_whole = not is_sharded(module)
            if is_whole:
                self._announce(trainer, module)
                self.precision_plugin.convert_module(module)
                if fitting and self._layer_sync is not None:
                    self._layer_sync.apply(module)
                self._parallelize(module)
            reshard(module)  # a root stays gathered after an evaluation
            _upstream.materialize_distributed_module(module, self.root_device)
            self.model_to_device()
        self._reads, self._whole = Reads.of(module), self._parameters_left_whole(module)
        if is_whole:
            broadcast_from_first(self._whole)
        self._files.load_pending()
        self._save_distributed_checkpoint = self._saves_shards(module)
        self.barrier()
        if fitting:
            self.setup_optimizers(trainer)
            check_current(type(self).__name__, module, self.optimizers)
        self.setup_precision_plugin()
        if fitting:
            _upstream.optimizers_to_device(self.optimizers, self.root_device)
            self._averaged_norms = [m for m in module.modules() if has_own_statistics(m)]
        self.precision_plugin.__dict__.update(CLIPPING)

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        precision = self.precision_plugin.precision
        if precision not in SHARDED_PRECISIONS:
            raise MisconfigurationException(
                f"{type(self).__name__} trains in {', '.join(SHARDED_PRECISIONS)}, got precision={precision!r}."
            )
        if trainer.state.fn == TrainerFn.FITTING:
            check_batchnorm_sync(self)
        if averaged_copies(trainer):
            raise MisconfigurationException(
                "weight averaging callbacks keep a whole copy of the model, which cannot follow one that is divided "
                f"among devices. Leave them out under {type(self).__name__}, or take 'optim_ddp'."
            )

    def _announce(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Tell callbacks that the module is about to be divided: the last moment to change or copy it."""
        announced = getattr(module, "before_sharding", None)  # a DistillationModule's
        if announced is not None:
            announced(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BeforeSharding):
                callback.before_sharding(trainer, module)

    def _saves_shards(self, module: nn.Module) -> bool:
        if self.checkpoint != "auto":
            return self.checkpoint == "sharded"
        return sum(parameter.numel() for parameter in module.parameters()) > FULL_UNTIL

    # The division of the module.

    def _parallelize(self, module: pl.LightningModule) -> None:
        units = find_units(module, self.units)
        words = [f"{type(self).__name__}: {self._size_words()}"]
        if self._tensor_parallel_size != 1:
            words.append(self._split_pairs(module))
        if self.activation_checkpointing:
            for _, unit in units.named:
                if any(True for _ in unit.children()):
                    unit.__dict__["forward"] = Recomputed(unit)
        if self.shard:
            words.append(f"units {units}")
            self._warn_of_short(module)
            self._shard(module, units.named)
        rank_zero_info("; ".join(words) + ".")

    def _size_words(self) -> str:
        shards = self.world_size // self._replicas // int(self._tensor_parallel_size)
        sizes = {"copies": self._replicas, "shards": shards if self.shard else 1, "tensor": self._tensor_parallel_size}
        return " x ".join(f"{size} {name}" for name, size in sizes.items() if size != 1) or "1 shard"

    def _split_pairs(self, module: nn.Module) -> str:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        size = int(self._tensor_parallel_size)
        given = self.tensor_plan
        plan = find_pairs(module, size) if isinstance(given, str) else given_pairs(module, given, size)
        if not plan:
            raise MisconfigurationException(
                f"tensor parallelism over {size} devices found no pair of Linear layers in {type(module).__name__} to "
                "divide: names such as q_proj, k_proj, v_proj with o_proj, fc1 with fc2, or Linear, activation, Linear "
                "in a Sequential. Name them with OptimFSDP2(tensor_plan={'*.in': 'col', '*.out': 'row'}), or take "
                "'optim_fsdp'."
            )
        styles = {"col": ColwiseParallel, "row": RowwiseParallel}
        for name, style in plan.items():
            layer = module.get_submodule(name)
            parallelize_module(layer, self.device_mesh["tensor_parallel"], styles[style]())
            for buffer_name, buffer in layer.named_buffers(recurse=False):  # ranges, the same on each rank
                layer._buffers[buffer_name] = local(buffer)
        split = sum(module.get_parameter(f"{name}.weight").numel() for name in plan)
        share = split / sum(parameter.numel() for parameter in module.parameters())
        return f"{len(plan)} layers with {share:.0%} of the parameters divided by features"

    def _shard(self, module: pl.LightningModule, units: NamedModules) -> None:
        reduce_dtype = getattr(torch, self.reduce_dtype)
        compute_dtype = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        types = None if compute_dtype is None else (compute_dtype, reduce_dtype)
        divided = divide(module, units, self._data_mesh, reshard=self.reshard, types=types)
        reads = Reads.of(module)
        for name, part in divided:
            reads.watch(name, part, compute_dtype)
        register_steps(module, [step for step in STEPS if is_overridden(step, module)], reads.in_step)

    def _warn_of_short(self, module: nn.Module) -> None:
        """Say which layers have fewer rows than there are shards: some devices hold nothing of them."""
        shards = self._data_mesh.size(-1)
        short = [name for name, p in module.named_parameters() if p.ndim and p.shape[0] < shards and p.numel() > shards]
        if short:
            rank_zero_warn(
                f"{short[0]} has {module.get_parameter(short[0]).shape[0]} rows for {shards} shards"
                f"{f', and {len(short) - 1} more such' if len(short) > 1 else ''}: some devices hold nothing of it."
            )

    # The step.

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Leave the gradients of a batch that is not the last of its accumulation where they are."""
        from torch.distributed.fsdp import FSDPModule

        module = self.lightning_module
        parts = [] if module is None else [part for part in module.modules() if isinstance(part, FSDPModule)]
        parts = parts if self.accumulate_unsharded else []
        for part in parts:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_gradient_sync(True, recurse=False)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._mixed_said_plainly("`training_step`"):
            return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._mixed_said_plainly("`validation_step`"):
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._mixed_said_plainly("`test_step`"):
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._mixed_said_plainly("`predict_step`"):
            return super().predict_step(*args, **kwargs)

    def _mixed_said_plainly(self, where: str) -> AbstractContextManager[None]:
        module = self.lightning_module
        return mixed_said_plainly(type(self).__name__, module, where)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._reads.running():  # what is computed again reads again
            return super().backward(*args, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        if module is not None and not module.automatic_optimization:  # `loss.backward()` comes by no `post_backward`
            self._finish_gradients()
        return super().optimizer_step(*args, **kwargs)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        self._finish_gradients()
        self._average_statistics()

    def _finish_gradients(self) -> None:
        """Give the processes the same gradients of what FSDP2 does not see: reads, and what is whole everywhere."""
        self._reads.finish_backward()
        average_gradients(self._whole, self._data_mesh)

    def _parameters_left_whole(self, module: nn.Module) -> list[nn.Parameter]:
        """Return those that every process holds whole and trains by its own batches, where the rest is divided."""
        if self._data_mesh.size() == 1 or not is_sharded(module) or self._divides_itself(module):
            return []
        return [parameter for parameter in module.parameters() if not is_dtensor(parameter)]

    def _divides_itself(self, module: nn.Module) -> bool:
        from torch.distributed.fsdp import FSDPModule

        return not isinstance(module, FSDPModule)

    def _average_statistics(self) -> None:
        """Average BatchNorm's running statistics: unlike DDP, nothing else keeps them equal on all ranks.

        Not before the backward pass, which wants them as the forward pass left them.
        """
        buffers = [b for norm in self._averaged_norms if norm.training for b in norm.buffers() if b.is_floating_point()]
        if not buffers or self.world_size == 1:
            return
        together = torch.cat([local(buffer).flatten() for buffer in buffers])
        torch.distributed.all_reduce(together)
        together /= self.world_size
        parts = torch.split(together, [buffer.numel() for buffer in buffers])
        torch._foreach_copy_([local(buffer).view(-1) for buffer in buffers], list(parts))

    @override
    def teardown(self) -> None:
        for name in CLIPPING:
            self.precision_plugin.__dict__.pop(name, None)
        self._averaged_norms, self._whole = [], []
        super().teardown()

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._files.forget()
        name_rank(self, exception)
        end_children(self, exception)

    # Files.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._files.model_state()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._files.optimizer_state(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        self._files.save(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self._files.read(checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._files.load_model(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self._files.load_optimizers(checkpoint)


def _checked_size(name: str, value: Any, word: str) -> Any:
    if value != word and (type(value) is not int or value < 1):
        raise ValueError(f"`{name}` must be a whole number >= 1 or {word!r}, got {value!r}.")
    return value


def _checked_plan(plan: Any) -> Any:
    if plan == "auto":
        return plan
    if not isinstance(plan, Mapping) or not plan or set(plan.values()) - {"col", "row"}:
        raise ValueError(f"`tensor_plan` must be 'auto' or map layer name patterns to 'col' or 'row', got {plan!r}.")
    return dict(plan)
