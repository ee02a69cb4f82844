"""OptimFSDP2: fully sharded, hybrid, tensor-parallel and 2-D training of unmodified LightningModules."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_optim import _upstream
from lightning_optim.checks import check_choice, check_flags, listed
from lightning_optim.optimizers import check_current, following
from lightning_optim.sharding import is_sharded, reshard
from lightning_optim.strategies import gradients
from lightning_optim.strategies.batchnorm import OwnStatistics
from lightning_optim.strategies.before_sharding import announce_sharding, check_shardable
from lightning_optim.strategies.common import checked_timeout, end_children, end_group_at_exit, name_rank
from lightning_optim.strategies.divide import divide, recompute, register_steps, warn_of_short, without_reduction
from lightning_optim.strategies.reads import Reads, mixed_said_plainly
from lightning_optim.strategies.sharded_files import ShardedFiles, saves_shards
from lightning_optim.strategies.sizes import checked_size, data_mesh, resolve_sizes, said_sizes
from lightning_optim.strategies.tensor import checked_plan, split_pairs
from lightning_optim.strategies.units import find_units
from lightning_optim.strategies.whole import average_gradients, broadcast_from_first, parameters_left_whole

__all__ = ["OptimFSDP2"]

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
CLIPPING = {"clip_grad_by_norm": gradients.clip_by_norm, "clip_grad_by_value": gradients.clip_by_value}
"""Methods of the precision plugin that are replaced while the strategy is set up."""


class OptimFSDP2(ModelParallelStrategy):
    """Shard weights, gradients and optimizer states over the devices, without a ``configure_model``.

    PyTorch's FSDP2 (``fully_shard``): each parameter is a DTensor, sharded along its first dimension, and gathered
    together with its unit while the unit computes. Units are found automatically. A LightningModule that its own
    ``configure_model`` has sharded is left as it is.

    Args:
        units: ``"auto"`` (see :func:`~lightning_optim.strategies.units.find_units`), or class and module names.
        reshard: Free a unit after its forward pass and gather it again for the backward pass. ``False`` keeps it (ZeRO
            stage 2: less traffic; each device holds the whole model in the compute dtype).
        replicate: Hybrid sharding: number of copies of the model, each sharded over world / ``replicate`` devices.
            ``"nodes"``: one copy per node.
        tensor: Number of devices that share the layers' features (tensor parallelism), within a node. ``"node"``: all
            devices of a node.
        tensor_plan: ``"auto"`` (see :func:`~lightning_optim.strategies.tensor.find_pairs`), or glob patterns
            of layer names -> ``"col"`` or ``"row"``.
        shard: ``False`` with ``tensor`` > 1: tensor parallelism only.
        activation_checkpointing: Keep only the units' inputs and recompute the rest in the backward pass: about a third
            more computation.
        reduce_dtype: Dtype in which gradients are summed under ``precision="bf16-mixed"``.
        accumulate_unsharded: Reduce gradients once per accumulation instead of once per batch; until then each device
            holds them whole (4 bytes per parameter).
        checkpoint: ``"full"`` (one file, as other strategies write), ``"sharded"`` (a folder to which each process
            writes its shard; :func:`~lightning_optim.strategies.consolidate` merges it into one file) or ``"auto"``:
            sharded above a billion parameters. Both resume under any number of devices, a full file under any strategy.
        timeout_s: Seconds until a collective that a rank does not join raises on the others. Checkpoints, the
            preparation of data and the first compilation must fit into it.
        process_group_backend: ``"nccl"`` or ``"gloo"``; by default the device's.

    A unit's weight that is read outside of the unit's forward (an item table used for scoring) is gathered for that
    read. 0-dim parameters stay whole on every device; layers whose dtype differs from their unit's are units of their
    own.

    Precision: ``"bf16-mixed"`` gathers parameters in bfloat16 and sums gradients in float32; BatchNorm stays float32.
    BatchNorm statistics are averaged over the ranks after each training batch.

    Raises:
        ValueError: For invalid arguments.
        MisconfigurationException: In the Trainer's constructor, for sizes that do not divide the devices, or in a
            notebook; in ``setup``, for a precision, callback or flag that sharding does not support, or if ``tensor``
            finds no pair.

    Examples:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(devices=8, strategy="optim_fsdp", precision="bf16-mixed")  # by name  # doctest: +SKIP
        >>> trainer = pl.Trainer(devices=8, strategy=OptimFSDP2(checkpoint="sharded"))  # doctest: +SKIP
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
        self.replicate = checked_size("replicate", replicate, "nodes")
        self.tensor = checked_size("tensor", tensor, "node")
        self.tensor_plan = checked_plan(tensor_plan)
        self.shard = shard
        self.activation_checkpointing = activation_checkpointing
        self.reduce_dtype = reduce_dtype
        self.accumulate_unsharded = accumulate_unsharded
        self.checkpoint = checkpoint
        if not shard and (replicate != 1 or tensor == 1):
            raise ValueError("`shard=False` is tensor parallelism alone: it needs `tensor` > 1 and `replicate=1`.")
        if replicate != 1 and tensor != 1:
            raise ValueError("`replicate` and `tensor` cannot be combined; leave one at 1.")
        _upstream.check(self)
        self._files = ShardedFiles(self)
        self._statistics = OwnStatistics()
        self._reads = Reads()
        self._whole: list[nn.Parameter] = []

    # Sizes and processes.

    @override
    def _configure_launcher(self) -> None:
        if _upstream.is_interactive():
            raise MisconfigurationException(
                "sharded and tensor-parallel training need processes that keep their part of the model, and a notebook "
                "cannot start such processes. Run a script, or use Trainer(strategy='optim_ddp_notebook')."
            )
        self._resolve_sizes()
        super()._configure_launcher()

    def _resolve_sizes(self) -> None:
        sizes = resolve_sizes(
            tensor=self.tensor,
            replicate=self.replicate,
            shard=self.shard,
            devices=self.num_processes,
            nodes=self.num_nodes,
        )
        self._tensor_parallel_size, self._data_parallel_size, self._replicas = sizes.tensor, sizes.data, sizes.replicate

    @override
    def setup_environment(self) -> None:
        self._resolve_sizes()  # a launcher may have changed the number of processes since
        super().setup_environment()
        end_group_at_exit()
        self._data_mesh = data_mesh(self.device_mesh, self._replicas, self.world_size, self.root_device.type)

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
        """Before: callbacks and the plan are restored while the module is whole; the weights wait for their shards.

        ModelParallelStrategy returns True, so ``Trainer._run`` (Lightning 2.6) would restore a checkpoint after
        ``setup``, when the layers' classes and shapes that the plan asks for can no longer be given.
        """
        return False

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        # Instead of ModelParallelStrategy.setup (Lightning 2.6), which refuses a module without `configure_model` and
        # leaves its division to the user (https://github.com/Lightning-AI/pytorch-lightning/pull/19846). The order is
        # upstream's:
        # 1. The precision plugin and SyncBatchNorm replace tensors and layers, which sharded modules do not allow.
        # 2. `fully_shard` replaces each Parameter by a DTensor. Layers on the meta device are allocated afterwards, so
        #    that no device holds a whole one (https://github.com/pytorch/pytorch/issues/114299).
        # 3. A checkpoint's weights, which have waited, are loaded as shards.
        # 4. Optimizers come last: one built before would hold the Parameters that step 2 replaced, and its steps would
        #    change nothing. `following` gives the new ones to an optimizer that LightningCLI built early.
        if self.accelerator is None or self.lightning_module is None:
            raise RuntimeError("the Trainer sets accelerator and module before setup.")
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        module = self.lightning_module
        check_shardable(self, trainer)
        with following(module):
            reshard(
                module
            )  # an evaluation leaves the root gathered, and every unit that stays gathered after its forward
            is_whole = not is_sharded(module)
            if is_whole:
                announce_sharding(trainer, module)
                self.precision_plugin.convert_module(module)
                if fitting and self._layer_sync is not None:
                    self._layer_sync.apply(module)
                self._parallelize(module)
            _upstream.materialize_distributed_module(module, self.root_device)
            self.model_to_device()
        self._reads, self._whole = Reads.of(module), parameters_left_whole(module, self._data_mesh)
        if is_whole:
            broadcast_from_first(self._whole)
        self._files.load_pending()
        self._save_distributed_checkpoint = saves_shards(self.checkpoint, module)
        self.barrier()
        if fitting:
            self.setup_optimizers(trainer)
            check_current(type(self).__name__, module, self.optimizers)
        self.setup_precision_plugin()
        if fitting:
            _upstream.optimizers_to_device(self.optimizers, self.root_device)
            self._statistics = OwnStatistics(module)
        self.precision_plugin.__dict__.update(CLIPPING)

    def _parallelize(self, module: pl.LightningModule) -> None:
        """Divide the module: layers by features, then units by rows."""
        tensor = int(self._tensor_parallel_size)
        units = find_units(module, self.units)
        parts = [f"{type(self).__name__}: {said_sizes(self._replicas, tensor, self.world_size, shard=self.shard)}"]
        if tensor != 1:
            parts.append(split_pairs(module, self.device_mesh["tensor_parallel"], self.tensor_plan))
        if self.activation_checkpointing:
            recompute(units.named)
        if self.shard:
            parts.append(f"units {units}")
            warn_of_short(module, self._data_mesh.size(-1))
            half = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
            types = None if half is None else (half, getattr(torch, self.reduce_dtype))
            divided = divide(module, units.named, self._data_mesh, reshard=self.reshard, types=types)
            reads = Reads.of(module)
            for name, part in divided:
                reads.watch(name, part, half)
            register_steps(module, [step for step in STEPS if is_overridden(step, module)], reads.in_step)
        rank_zero_info("; ".join(parts) + ".")

    # The step.

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Leave the gradients of a batch that is not the last of its accumulation where they are."""
        module = self.lightning_module
        if module is None or not self.accumulate_unsharded:
            yield
            return
        with without_reduction(module):
            yield

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with mixed_said_plainly(self, "training_step"):
            return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with mixed_said_plainly(self, "validation_step"):
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with mixed_said_plainly(self, "test_step"):
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with mixed_said_plainly(self, "predict_step"):
            return super().predict_step(*args, **kwargs)

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
        self._statistics.average()

    def _finish_gradients(self) -> None:
        """Reduce the gradients that FSDP2 does not see: those of reads, and of parameters that are not sharded."""
        self._reads.finish_backward()
        average_gradients(self._whole, self._data_mesh)

    @override
    def teardown(self) -> None:
        for name in CLIPPING:
            self.precision_plugin.__dict__.pop(name, None)
        self._statistics, self._whole = OwnStatistics(), []
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
