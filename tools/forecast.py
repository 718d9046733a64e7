"""What a training step will take, without doing it: memory, passes and floating point operations."""

import gc
import time
import traceback
import weakref
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from plumbing.shard import part_here


class LiveBytes:
    """How many bytes the tensors that were counted and still live hold; peak is the most so far."""

    def __init__(self):
        self.live, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def count(self, tensor):
        """Counts the tensor's storage, once, of a sharded tensor this process's part; returns the tensor."""
        storage = part_here(tensor).untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            weakref.finalize(storage, self._free, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return tensor

    def _free(self, size):
        self.live -= size


class Ghosts(TorchDispatchMode):
    """Inside the with block every operation runs on meta tensors, by shapes alone: nothing real is computed or changed.

    A real tensor that is met gets a ghost, which is not counted: it exists already; so does a sharded one, and its ghost is whole.
    memory counts all others; flop the floating point operations of matrix products, convolutions and attention.
    """

    def __init__(self):
        super().__init__()
        self.memory, self.flop, self.ghosts = LiveBytes(), 0, {}

    def ghost(self, tensor):
        """The meta tensor that stands for a real or a sharded one."""
        if tensor.device.type == "meta" and not isinstance(tensor, DTensor):
            return tensor
        if id(tensor) not in self.ghosts:
            stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self.memory.seen.add(stand_in.untyped_storage())
            self.ghosts[id(tensor)] = stand_in, tensor  # the tensor is kept, lest another get its id
        return self.ghosts[id(tensor)][0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            return 1  # the text encoders ask whether a whole mask is set, the pipelines whether a prompt was cut
        args, kwargs = tree_map_only(torch.Tensor, self.ghost, (args, dict(kwargs or {})))
        kwargs |= {name: value for name, value in dict(device=torch.device("meta"), generator=None).items() if name in kwargs}
        out = tree_map_only(torch.Tensor, self.memory.count, function(*args, **kwargs))
        if function.overloadpacket in flop_registry:
            self.flop += flop_registry[function.overloadpacket](*args, **kwargs, out_val=out)
        return out


LOWERED = ((F, "linear"), (F, "conv2d"), (F, "scaled_dot_product_attention"), (torch, "bmm"), (torch, "baddbmm"), (torch, "matmul"),
           (torch.Tensor, "matmul"))
RAISED, RAISED_ON = ((F, "layer_norm"), (F, "group_norm"), (F, "softmax")), {"cuda"}


@contextmanager
def device_rules(device):
    """Inside the with block torch's functions do what ghosts do not know of the device: fused attention, and autocast to bf16.

    Nothing is exchanged between processes.
    """
    kept = {(owner, name): getattr(owner, name) for owner, name in LOWERED + RAISED}

    def ruled(place, function):
        """The function with its arguments in autocast's dtype."""
        dtype = torch.bfloat16 if place in LOWERED else torch.float32 if device.type in RAISED_ON else None

        def call(*args, **kwargs):
            if dtype and torch.is_autocast_enabled(device.type):
                args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))
            return function(*args, **kwargs)
        return call

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """What never holds the matrix of all pairs."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask)[0]

    try:
        for place, function in kept.items():
            setattr(*place, ruled(place, attention if place[1] == "scaled_dot_product_attention" else function))
        # Checkpointing restores the autocast of its inputs' device, and ghosts are on none.
        infer, torch.utils.checkpoint._infer_device_type = torch.utils.checkpoint._infer_device_type, lambda *_: device.type
        exchange, dist.all_reduce = dist.all_reduce, lambda *_, **__: None
        yield
    finally:
        for place, function in kept.items():
            setattr(*place, function)
        torch.utils.checkpoint._infer_device_type, dist.all_reduce = infer, exchange


@contextmanager
def sharding_rules(networks, memory):
    """Inside the with block sharded networks, whose weights' ghosts are whole, exchange nothing but hold what FSDP would.

    A block's weights lie there twice when they arrive, once while it is called. In the backward pass its gradients are whole, beside the
    weights, until the last one is there; then a copy is sent, which stays until the next block's, and a part of each gradient. Yields
    what takes a trained weight, its gradient whole.
    """
    kept, hooks, held, blocks = [], [], {}, {}
    some = lambda size: torch.empty(size, dtype=torch.uint8, device="meta")

    def gather(module, size):
        """Weights arrive, and are copied to where they are used."""
        arriving = some(2 * size)
        del arriving
        held[module], held["sent"] = [some(size)], None

    def arrive(p):
        """A gradient is whole; with the last one of its block each becomes a part."""
        module, trained, size = blocks[p]
        if module not in held:
            held[module] = [some(size)]
        held[module].append(p.grad)
        with _disable_current_modes():
            p.grad = memory.count(torch.empty_like(p))
        if len(held[module]) > trained:
            held[module][0] = held["sent"] = None
            held["sent"] = some(size)
            del held[module]

    try:
        for module in {m for network in networks for m in network.modules() if isinstance(m, FSDPModule)}:
            state = fully_shard.state(module)
            for all_hooks, handle in ((module._forward_pre_hooks, state._pre_forward_hook_handle),
                                      (module._forward_hooks, state._post_forward_hook_handle)):
                kept.append((all_hooks, dict(all_hooks)))
                all_hooks.pop(handle.id, None)
            inside = {p for m in module.modules() if m is not module and isinstance(m, FSDPModule) for p in m.parameters()}
            own = [p for p in module.parameters() if isinstance(p, DTensor) and p not in inside]
            size, trained = sum(p.nbytes for p in own), sum(p.requires_grad for p in own)
            blocks |= {p: (module, trained, size) for p in own}
            hooks.append(module.register_forward_pre_hook(lambda module, _, size=size: gather(module, size)))
            hooks.append(module.register_forward_hook(lambda module, *_: held.pop(module, None) and None))
        yield arrive
    finally:
        for hook in hooks:
            hook.remove()
        for all_hooks, before in kept:
            all_hooks.clear()
            all_hooks.update(before)


def held_bytes(device):
    """The bytes of all tensors of this process on a device."""
    gc.collect()  # what lives in cycles alone is not held
    held = LiveBytes()
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == device.type and device.index in (None, thing.device.index):
            held.count(thing)
    return held.live


def cost_of_step(run, networks, optimizers, step, iterations, device=None):
    """What step(iteration) will take, without doing it: dict(parameters, trained, calls, units, TFLOP, memory_GB).

    networks: name -> module; optimizers: of all that is trained; iterations: typical ones and their shares of all, {iteration: share}.
    calls: name -> [calls, those of them that are followed by a backward pass]; units: name -> the same in forward passes: a forward is
    1, a backward to the input 1 more, to the weights 2 more. These and TFLOP are means over the iterations; memory is the most that
    tensors will hold, the present ones included, but not the kernels' own workspace. All of this process's samples. device: where
    everything lies, if not on run.device.
    """
    held, memory = held_bytes(device or run.device), (ghosts := Ghosts()).memory
    trained = list({id(p): p for o in optimizers for group in o.param_groups for p in group["params"]}.values())
    moments = sum(2 * part_here(p).nbytes for o in optimizers for group in o.param_groups for p in group["params"] if p not in o.state)
    calls, units, hooks, share, arrive = {name: [0, 0] for name in networks}, dict.fromkeys(networks, 0), [], [0.0], [None]

    def counted(name):
        """A hook that counts the calls of a network."""
        def hook(module, args, kwargs):
            """Before a call."""
            trains = any(p.requires_grad for p in module.parameters())
            backward = torch.is_grad_enabled() and (trains or any(x.requires_grad for x in (*args, *kwargs.values()) if torch.is_tensor(x)))
            calls[name][0] += share[0]
            calls[name][1] += share[0] * backward
            units[name] += share[0] * (1 + backward * (1 + trains))
        return hook

    twins = [torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in trained]
    for twin in twins:
        memory.seen.add(part_here(twin).untyped_storage())
        twin.grad = memory.count(torch.empty_like(twin))  # the gradients that the step before has left
        if isinstance(twin, DTensor):
            hooks.append(twin.register_post_accumulate_grad_hook(lambda p: arrive[0](p)))
    swap = lambda: [torch.utils.swap_tensors(p, twin) for p, twin in zip(trained, twins)]
    flop = 0
    swap()
    try:
        for optimizer in optimizers:
            optimizer.step = lambda: None
        hooks += [network.register_forward_pre_hook(counted(name), with_kwargs=True) for name, network in networks.items()]
        with torch.compiler.set_stance("force_eager"), sharding_rules(networks.values(), memory) as arrive[0], ghosts, device_rules(run.device):
            for iteration, share[0] in iterations.items():
                before = ghosts.flop
                step(iteration)
                flop += share[0] * (ghosts.flop - before)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the graph that they hold would keep the parameters from coming back
        gc.collect()
        raise
    finally:
        for optimizer in optimizers:
            del optimizer.step
        for hook in hooks:
            hook.remove()
        swap()
    return dict(parameters={name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
                trained=sum(p.numel() for p in trained), calls=calls, units=units, TFLOP=flop / 1e12,
                memory_GB=(held + moments + memory.peak) / 2**30)


def matmul_rate(device, precision):
    """TFLOP a second of square matrix products on this device in this precision, the best of five."""
    size = 1024 if device.type == "cpu" else 8192
    a, seconds = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32), []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12
