"""FSDP2: every process keeps its part of the weights."""


import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def shard(config, *networks):
    """With --shard and several processes, FSDP2: each keeps its part of every weight, gradient, moment and
    average of the networks.

    A block's weights are gathered when it runs and dropped again. Comes before a network's parameters are
    collected; LoRAs, which are added afterwards, stay whole on every process.
    """
    if not config.shard or not dist.is_initialized():
        return
    for network in networks:
        if isinstance(network, FSDPModule):
            continue
        mesh = init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
        inside = []
        for path, module in network.named_modules():
            name = path.split(".")[-1]
            if (
                name == "mid_block"
                or path.split(".")[-2:-1] in (["down_blocks"], ["up_blocks"], ["transformer_blocks"])
            ) and not any(path.startswith(f"{outer}.") for outer in inside):
                fully_shard(module, mesh=mesh)
                inside.append(path)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)  # torch keeps the outermost weights by default


def whole(tensor):
    """A sharded tensor's whole on every process, which all must call; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_here(tensor):
    """What this process holds of a sharded tensor; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # to_local() would be an operation, which a mode sees


def class_of(net):
    """The network's own class, which sharding hides behind one of its making."""
    return next(c for c in type(net).__mro__ if not issubclass(c, FSDPModule))
