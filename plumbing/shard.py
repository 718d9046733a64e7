"""FSDP2: every process keeps its part of each weight."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(config, *networks):
    """Shards the networks with FSDP2, if --shard is on and there are several processes.

    Each process then keeps its part of every weight, gradient, moment and average; a block's weights are
    gathered when the block runs, and dropped afterwards. Under --precision bf16 they are gathered in bf16,
    and the networks run under autocast wherever they are called. Must be called before a network's parameters
    are collected; LoRAs, which are added later, stay whole on every process.
    """
    if not config.shard or not dist.is_initialized():
        return
    settings = dict(reshard_after_forward=True)  # torch keeps the weights outside the blocks by default
    if config.precision == "bf16":
        settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for network in networks:
        if isinstance(network, FSDPModule):
            continue
        device_type = next(network.parameters()).device.type
        settings["mesh"] = init_device_mesh(device_type, (dist.get_world_size(),))
        if config.precision == "bf16":
            network.forward = torch.autocast(device_type, torch.bfloat16)(network.forward)
        inside = []
        for path, module in network.named_modules():
            *_, parent, name = "", *path.split(".")
            block = name == "mid_block" or parent in ("down_blocks", "up_blocks", "transformer_blocks")
            if block and not any(path.startswith(f"{outer}.") for outer in inside):
                fully_shard(module, **settings)
                inside.append(path)
        fully_shard(network, **settings)


def whole(tensor):
    """A sharded tensor, gathered on every process, all of which must call this; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_here(tensor):
    """This process's part of a sharded tensor; any other tensor as it is."""
    # to_local() would be an operation of its own for a TorchDispatchMode.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def class_of(net):
    """The network's class, without the subclass that FSDP2 has put in its place."""
    return next(c for c in type(net).__mro__ if not issubclass(c, FSDPModule))
