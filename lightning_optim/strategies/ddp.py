"""OptimDDP: Lightning's data-parallel strategy with gradient compression, on CPUs too."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed import GradBucket, group  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_optim import _upstream
from lightning_optim.checks import check_choice, check_flags
from lightning_optim.strategies.common import (
    check_batchnorm_sync,
    checked_timeout,
    end_children,
    end_group_at_exit,
    name_rank,
)

__all__ = ["OptimDDP"]

COMPRESSED: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Value of ``compress`` -> dtype in which gradients are sent."""


class OptimDDP(DDPStrategy):
    """Data-parallel training: every device holds the whole model; gradients are averaged while they are computed.

    Differences from Lightning's ``DDPStrategy``: gradients are views of the buckets, which saves one copy of them;
    they can be sent in half precision, on CPUs too (Lightning silently ignores communication hooks there); and all
    arguments have plain types, so YAML can set them.

    Args:
        compress: ``"none"``, ``"bf16"`` or ``"fp16"``: dtype in which gradients are sent and summed; a 16-bit dtype
            halves the traffic. ``"fp16"`` needs the loss scale of ``precision="16-mixed"``: without it, gradients
            below 6e-8 become zero and those above 65,504 infinite.
        static_graph: Whether every step uses the same parameters. DDP then overlaps more communication and supports
            reentrant checkpointing.
        find_unused_parameters: Allow parameters without a gradient in a step; each step then traverses the graph.
        broadcast_buffers: Copy the buffers of rank 0 (BatchNorm statistics) to all ranks before each forward pass.
        bucket_cap_mb: Size of a gradient bucket in MB; None for PyTorch's default of 25.
        gradient_as_bucket_view: Store gradients in the buckets, which saves one copy of them.
        start_method: How Lightning starts the processes. ``"popen"`` runs the script again; ``"fork"`` and
            ``"spawn"`` need no script (fork is faster and works in notebooks, as long as CUDA is not initialized).
        timeout_s: Seconds after which a collective raises if a rank has not joined it. Checkpointing, data
            preparation and the first compilation must finish within it.
        process_group_backend: ``"nccl"`` or ``"gloo"``; None for the default of the device.

    Raises:
        ValueError: If ``compress`` is unknown or ``timeout_s`` is not positive.
        MisconfigurationException: In ``setup``, for ``sync_batchnorm=True`` on a CPU.

    Examples:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(devices=2, strategy="optim_ddp")  # by name  # doctest: +SKIP
        >>> trainer = pl.Trainer(devices=2, strategy=OptimDDP())  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        compress: Literal["none", "bf16", "fp16"] = "none",
        static_graph: bool = False,
        find_unused_parameters: bool = False,
        broadcast_buffers: bool = True,
        bucket_cap_mb: float | None = None,
        gradient_as_bucket_view: bool = True,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        timeout_s: float = 600.0,
        process_group_backend: str | None = None,
    ) -> None:
        check_choice("compress", compress, ("none", *COMPRESSED))
        check_flags(static_graph=static_graph, find_unused_parameters=find_unused_parameters)
        check_flags(broadcast_buffers=broadcast_buffers, gradient_as_bucket_view=gradient_as_bucket_view)
        super().__init__(
            timeout=checked_timeout(timeout_s),
            start_method=start_method,
            process_group_backend=process_group_backend,
            static_graph=static_graph,
            find_unused_parameters=find_unused_parameters,
            forward_sync_buffers=broadcast_buffers,  # its new name in torch 2.13
            bucket_cap_mb=bucket_cap_mb,
            gradient_as_bucket_view=gradient_as_bucket_view,
        )
        self.compress = compress
        _upstream.check(self)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        end_group_at_exit()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            check_batchnorm_sync(self)
            if self.compress == "fp16" and self.precision_plugin.precision != "16-mixed":
                rank_zero_warn(
                    f"OptimDDP(compress='fp16') with precision={self.precision_plugin.precision!r} has no loss scale: "
                    "gradients below 6e-8 become zero and those above 65,504 infinite. Take 'optim_ddp_bf16'."
                )
        super().setup(trainer)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        name_rank(self, exception)
        end_children(self, exception)

    @override
    def _register_ddp_hooks(self) -> None:
        if self.compress != "none":
            if not isinstance(self.model, DistributedDataParallel):
                raise RuntimeError("expected a model wrapped in DistributedDataParallel.")
            self.model.register_comm_hook(COMPRESSED[self.compress], averaged_in)


def averaged_in(dtype: torch.dtype, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook that averages a bucket of gradients in another dtype.

    DDP rejects torch's own bf16 hook, by its name, wherever NCCL is missing (torch 2.13).
    """
    world: Any = group.WORLD
    future: torch.futures.Future[torch.Tensor] = _upstream.compress_hook(dtype, world, bucket)
    return future
