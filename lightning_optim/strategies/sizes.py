"""Numbers of devices that share layers, hold shards, and hold copies."""

from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["Sizes", "checked_size", "data_mesh", "resolve_sizes", "said_sizes"]


class Sizes(NamedTuple):
    """Numbers of devices.

    Attributes:
        tensor: Devices that share the features of a layer.
        data: Groups of such devices, each with its own batches.
        replicate: Copies of the model among the groups.
    """

    tensor: int
    data: int
    replicate: int


def resolve_sizes(*, tensor: int | str, replicate: int | str, shard: bool, devices: int, nodes: int) -> Sizes:
    """Turn "node" and "nodes" into numbers, and check that they divide the devices.

    Args:
        tensor: A number, or "node": all devices of a node.
        replicate: A number, or "nodes": one copy per node.
        shard: Whether the model is divided beyond tensor parallelism.
        devices: Devices of a node.
        nodes: Number of nodes.

    Raises:
        MisconfigurationException: If they do not.
    """
    world = devices * nodes
    sharing = devices if tensor == "node" else int(tensor)
    copies = nodes if replicate == "nodes" else int(replicate)
    if replicate == "nodes" and nodes == 1:
        raise MisconfigurationException(
            "hybrid sharding keeps one copy of the model per node, and the Trainer has one node. Use 'optim_fsdp', or "
            "OptimFSDP2(replicate=2) for two copies within the node."
        )
    if tensor != 1 and sharing < 2:
        raise MisconfigurationException(
            "tensor parallelism splits layers over devices, and the Trainer has one device."
        )
    for name, size, whole, of in (
        ("tensor", sharing, devices, "of a node"),
        ("replicate", copies, world, "in all"),
    ):
        if whole % size:
            raise MisconfigurationException(
                f"`{name}`={size} does not divide the {whole} devices {of}. Use a divisor of {whole}."
            )
    if not shard and world != sharing:
        raise MisconfigurationException(
            f"tensor parallelism alone uses exactly `tensor` devices: {sharing} of {world}. Use 'optim_2d', which also "
            "shards over the others."
        )
    return Sizes(sharing, world // sharing, copies)


def data_mesh(mesh: Any, copies: int, world_size: int, device_type: str) -> Any:
    """Return the mesh that parameters are divided over: one dimension, or (copies, shards)."""
    if copies == 1:
        return mesh["data_parallel"]
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (copies, world_size // copies), mesh_dim_names=("replicate", "shard"))


def said_sizes(copies: int, tensor: int, world_size: int, *, shard: bool) -> str:
    """Describe the division, for the log."""
    shards = world_size // copies // tensor if shard else 1
    sizes = {"copies": copies, "shards": shards, "tensor": tensor}
    return " x ".join(f"{size} {name}" for name, size in sizes.items() if size != 1) or "1 shard"


def checked_size(name: str, value: Any, word: str) -> Any:
    """Return a number of devices, or the word that stands for one.

    Raises:
        ValueError: If it is neither.
    """
    if value != word and (type(value) is not int or value < 1):
        raise ValueError(f"`{name}` must be a whole number >= 1 or {word!r}, got {value!r}.")
    return value
