"""What a training will take, before it is started: parameters, passes, TFLOP, memory and hours.

    python tools/forecast.py yoso.py --model assets/mini-sd --rank 64
    python tools/forecast.py swiftbrush_v2.py --stage a --precision bf16 --gradient-checkpointing
    python tools/forecast.py --processes 4 diff_instruct_star.py --shard        each of 4 processes
    python tools/forecast.py yoso.py --help                                     the script's own flags

After the script come the flags of its training. Nothing is trained or written: the networks are loaded, and
the script's own step is done on torch's fake tensors, which know their shapes and devices and hold no
numbers. Memory is that of tensors; what the allocator and the kernels need comes on top. Hours are a lower
bound: the step's floating point operations at the rate of large matrix products on this device. What a script
does before its training, such as --adapt and the conversion of --prediction, is not in it.
"""

import argparse
import gc
import inspect
import sys
import tempfile
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
import diff_instruct_star
import swiftbrush_v2
import yoso
from common import Denoiser, UserError
from plumbing.cache import cache_conditions
from plumbing.cli import Parser, check_flags, parse_config, run_command
from plumbing.data import FreshData
from plumbing.run import Run
from plumbing.shard import part_here, shard
from plumbing.students import dense_copy, fold_lora

SCRIPTS = {f"{script.__name__}.py": script for script in (yoso, swiftbrush_v2, diff_instruct_star)}
ASKED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


# torch's own formulas lack the fused attention of CPUs.
@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def attention_flop(query, key, value, *args, out_shape=None, **kwargs):
    """Of the forward pass, by shapes."""
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def attention_backward_flop(grad, query, key, value, *args, out_shape=None, **kwargs):
    """Of the backward pass, by shapes."""
    return sdpa_backward_flop_count(grad, query, key, value)


class LiveBytes:
    """How many bytes the tensors that were counted and still live hold; peak is the most so far."""

    def __init__(self):
        self.live, self.peak, self.sizes = 0, 0, weakref.WeakKeyDictionary()

    def count(self, tensor):
        """Counts the tensor's storage, once, of a sharded tensor this process's part."""
        storage = part_here(tensor).untyped_storage()
        if storage not in self.sizes:
            size = self.sizes[storage] = [0]
            weakref.finalize(storage, lambda: self._add(-size[0]))
            self.resize(storage)

    def ignore(self, tensor):
        """The tensor's storage is never counted."""
        self.sizes.setdefault(tensor.untyped_storage())

    def resize(self, storage):
        """Notices the size that a counted storage has now."""
        if size := self.sizes.get(storage):
            before, size[0] = size[0], storage.nbytes()
            self._add(size[0] - before)

    def _add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)


class TensorCounter(TorchDispatchMode):
    """Inside the with block, counts the bytes of all tensors that are made, in memory, and the floating point
    operations of matrix products, convolutions and attention, in flop.

    fakes: a FakeTensorMode that is entered outside this mode. Then everything happens on its fake tensors: a
    real tensor that is met stays as it is, and has a fake in its place, which is not counted.
    """

    def __init__(self, fakes=None):
        super().__init__()
        self.memory, self.flop, self.fakes, self.kept = LiveBytes(), 0, fakes, {}

    def __enter__(self):
        # FSDP frees and restores gathered weights by resizing them, which is no operation.
        self.outside, self.resize_ = active_fake_mode(), torch.UntypedStorage.resize_

        def resize_(storage, size):
            self.resize_(storage, size)
            self.memory.resize(storage)
            return storage

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize_
        return super().__exit__(*error)

    def fake(self, tensor):
        """The fake tensor that stands for a real one."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self.kept:
            stand_in = self.fakes.from_tensor(tensor)
            self.memory.ignore(stand_in)
            self.kept[id(tensor)] = stand_in, tensor  # the tensor is kept, lest another get its id
        return self.kept[id(tensor)][0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until it has become operations on this process's part
        kwargs = kwargs or {}
        # Its device a fake tensor asks by an operation; a sharded one tries what shape its result will have.
        if function is torch.ops.prim.device.default or active_fake_mode() is not self.outside:
            return function(*args, **kwargs)
        if self.fakes:
            if function in ASKED:
                # The text encoders ask whether a whole mask is set, the pipelines whether a prompt was cut.
                return 1
            args, kwargs = tree_map_only(torch.Tensor, self.fake, (args, kwargs))
        out = function(*args, **kwargs)
        tree_map_only(torch.Tensor, self.memory.count, out)
        if function.overloadpacket in flop_registry:
            self.flop += flop_registry[function.overloadpacket](*args, **kwargs, out_val=out)
        return out


def tensors_on(device):
    """All tensors of this process on a device."""
    gc.collect()  # what lives in cycles alone is not held
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)
            and thing.device.type == device.type and device.index in (None, thing.device.index)]


def held_bytes(device):
    """The bytes of all tensors of this process on a device."""
    held = LiveBytes()
    for tensor in tensors_on(device):
        held.count(tensor)
    return held.live


def cost_of_step(run, networks, optimizers, step, iterations):
    """What step(iteration) will take, without doing it: a dict of parameters, trained, calls, units, TFLOP
    and memory_GB.

    networks: name -> module; optimizers: of all that is trained; iterations: typical ones and their shares of
    all, {iteration: share}. calls: name -> [calls, those of them that are followed by a backward pass];
    units: name -> the same in forward passes: a forward is 1, a backward to the input 1 more, to the weights
    2 more. These and TFLOP are means over the iterations, of this process's samples; memory is the most that
    tensors will hold, the present ones included, but not the kernels' own workspace. No weight changes; but
    sharded networks are of no use afterwards, for FSDP keeps fake tensors of its own.
    """
    fakes = active_fake_mode() or FakeTensorMode(allow_non_fake_inputs=True)
    counter = TensorCounter(fakes)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    before = [p.grad for p in trained], [dict(o.state) for o in optimizers]
    calls, units, share, hooks = {name: [0, 0] for name in networks}, dict.fromkeys(networks, 0), 0.0, []

    def counted(name):
        """A hook that counts the calls of a network."""
        def hook(module, args, kwargs):
            """Before a call."""
            trains = any(p.requires_grad for p in module.parameters())
            inputs = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
            backward = torch.is_grad_enabled() and (trains or any(x.requires_grad for x in inputs))
            calls[name][0] += share
            calls[name][1] += share * backward
            units[name] += share * (1 + backward * (1 + trains))
        return hook

    for tensor in tensors_on(run.device):
        counter.memory.count(tensor)
    flop = 0
    try:
        for name, network in networks.items():
            hooks.append(network.register_forward_pre_hook(counted(name), with_kwargs=True))
        with torch.compiler.set_stance("force_eager"), fakes, counter:
            for p in trained:
                p.grad = torch.zeros_like(p)
            for optimizer in optimizers:
                optimizer.step()  # its moments and the gradients are there from the second iteration on
            for iteration, share in iterations.items():
                earlier = counter.flop
                step(iteration)
                flop += share * (counter.flop - earlier)
    finally:
        for hook in hooks:
            hook.remove()
        for p, grad in zip(trained, before[0], strict=True):
            p.grad = grad
        for optimizer, state in zip(optimizers, before[1], strict=True):
            optimizer.state.clear()
            optimizer.state.update(state)
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return dict(parameters=sizes, trained=sum(p.numel() for p in trained), calls=calls, units=units,
                TFLOP=flop / 1e12, memory_GB=counter.memory.peak / 2**30)


def matmul_rate(device, precision):
    """TFLOP a second of square matrix products on this device in this precision, the best of five."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, seconds = torch.randn(size, size, device=device, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12


@contextmanager
def processes_that_share(number):
    """Inside the with block this is the first of so many processes; the others do not exist, as in torch's
    own tests.
    """
    if number > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        if number > 1:
            dist.destroy_process_group()


# What depends on the scripts

def networks_of(models):
    """name -> module of a cast's networks, LPIPS's VGG among them; one that plays two parts has two names."""
    parts = vars(models).items()
    networks = {name: part.net if isinstance(part, Denoiser) else part
                for name, part in parts if isinstance(part, Denoiser | torch.nn.Module)}
    if lpips := getattr(models, "distances", {}).get("lpips"):
        features = inspect.getclosurevars(lpips[0]).nonlocals["features"]
        networks["lpips"] = inspect.getclosurevars(features).nonlocals["network"].net
    return networks


def optimizers_of(models):
    """The optimisers of a cast."""
    return [part for part in vars(models).values() if isinstance(part, torch.optim.Optimizer)]


def trainings_of(script, config):
    """[(title, configuration)] of what a command line trains: of SwiftBrush v2 its stages, each with its own
    iterations.
    """
    script.check(config)
    if script is diff_instruct_star:
        config = script.resolve_start(config)
    if script is not swiftbrush_v2:
        return [(script.__name__, config)]
    if config.stage == "merge":
        raise UserError("--stage merge: trains nothing, so there is nothing to forecast; choose a, b or all")
    stages = dict(a=config.iterations, b=config.iterations_b)
    return [(f"{script.__name__}, stage {stage}", replace(config, stage=stage, iterations=iterations))
            for stage, iterations in stages.items() if config.stage in (stage, "all")]


def step_of(script, config):
    """One training as cost_of_step wants it: (run, networks, optimizers, step, iterations).

    The data are empty pictures and prompts. With
    --cache-latents it writes their conditions to config.out.
    """
    run = Run(config)
    every = 1  # iterations between those that do more
    if script is yoso:
        models = script.build(config, run)
        codecs = [models.codec, models.codec_d]
        every = config.r1_every if config.r1 else 1
    else:
        loaded = script.load_networks(config, run.device)
        start = loaded.start
        if (config.prediction or start.prediction_type) != start.prediction_type:
            net = dense_copy(start.net, fold_lora(start.net, None), run.device)
            loaded.start = Denoiser(net, start.schedule, config.prediction)
        codecs = [loaded.codec]
    prompt = f"a photo of a {codecs[0].classes[0]}" if codecs[0].classes else ""
    if script is swiftbrush_v2:
        if config.regularise:
            x0 = torch.zeros(2, *loaded.codec.shape)
            loaded.pairs, every = (x0, x0, [prompt] * 2), config.regularise_every
        shard(config, loaded.teacher.net, loaded.start.net)
        models = script.build(config, run, config.stage, loaded)
    elif script is diff_instruct_star:
        models = script.build(config, run, loaded)
    if config.cache_latents:
        for i, codec in enumerate(dict.fromkeys(codecs)):
            cache_conditions(codec, [prompt], f"{config.out}/conditions-{i}", {})
    n = run.rows.stop - run.rows.start
    batch = [[prompt] * n]
    if script is yoso:
        size = codecs[0].picture_size
        # Shapes are drawn anew each time, so that they are not cached.
        cached = config.model and config.cache_latents and config.dataset != "shapes"
        shape = codecs[0].shape if cached or config.draws_data else (3, size, size)
        batch = [torch.zeros(n, *shape, device=run.device), *batch]
    last = config.iterations - 1
    rare = last - last % every
    iterations = {rare: 1 / every, rare + 1: 1 - 1 / every} if every > 1 else {last: 1.0}
    step = train = lambda iteration: script.train_step(iteration, *batch, config, run, models)
    networks = networks_of(models)
    if script is yoso and config.draws_data:
        data = FreshData(replace(config, prompts="", dataset="shapes"), run, models.codec)
        networks["data_generator"] = data.generator.net
        step = lambda iteration: (data.__getitems__(range(n)), train(iteration))
    return run, networks, optimizers_of(models), step, iterations


# Main

def forecast(script, config, title):
    """Prints the forecast of one training."""
    run, networks, optimizers, step, iterations = step_of(script, config)
    names = {}
    for name, network in networks.items():
        names.setdefault(network, []).append(name)
    networks = {" and ".join(shared): network for network, shared in names.items()}
    cost = cost_of_step(run, networks, optimizers, step, iterations)
    rate = matmul_rate(run.device, config.precision)
    sizes = ", ".join(f"{name} {size / 1e6:.3g} M" for name, size in cost["parameters"].items())
    calls = ", ".join(f"{name} {n:.3g} ({backward:.3g})" for name, (n, backward) in cost["calls"].items())
    hours = config.iterations * cost["TFLOP"] / rate / 3600
    print(f"{title}\n"
          f"  parameters: {sizes}; trained: {cost['trained'] / 1e6:.3g} M\n"
          f"  a step calls (those with a backward pass): {calls}; "
          f"{cost['TFLOP']:.3g} TFLOP for {config.batch_size} samples\n"
          f"  memory: about {cost['memory_GB']:.3g} GB of tensors; {config.iterations} steps: "
          f"at least {hours:.2g} hours, at the {rate:.3g} TFLOP/s of matrix products here")


def main(argv):
    """The command line: this tool's own flag, the script, and the flags of its training."""
    parser = Parser(
        prog="forecast.py", usage="forecast.py [--processes N] SCRIPT [the script's flags]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="of which each takes its part of the batch "
                        "and, with --shard, of the states; the figures are of one")
    parser.add_argument("script", help=f"one of {', '.join(SCRIPTS)}")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the flags of its training")
    args = parser.parse_args(argv)
    script = SCRIPTS.get(Path(args.script).name)
    if not script:
        raise UserError(f"{args.script}: no such script; choose one of {', '.join(SCRIPTS)}")
    flags = args.flags[1:] if args.flags[:1] == ["train"] else args.flags
    description = script.__doc__.splitlines()[0]
    config = parse_config(script.Config, script.PRESETS, flags, description, script.preset_of)
    check_flags(args, processes=dict(least=1))
    if config.batch_size % args.processes:
        raise UserError(f"--processes {args.processes}: must divide --batch-size {config.batch_size}")
    for title, training in trainings_of(script, config):
        with tempfile.TemporaryDirectory() as folder, processes_that_share(args.processes):
            local = config.batch_size // args.processes
            forecast(script, replace(training, out=folder, resume="", batch_size=local), title)


if __name__ == "__main__":
    run_command(main)
