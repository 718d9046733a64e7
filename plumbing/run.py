"""One training run: its device and processes, its batches, one update, its log, its stop."""

import dataclasses
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
from itertools import accumulate, groupby
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import EMA, Draws, UserError, Weights, part_of
from plumbing.checkpoint import checkpoint_note, latest_checkpoint, load_parts, write_checkpoint
from plumbing.cli import bound_flags
from plumbing.data import permutation, sample_order, to_floats
from plumbing.files import write_text

EXCHANGED_AT_ONCE = 2**26  # gradients in one exchange, roughly; 256 MB in float32


def choose_device(name):
    """"auto" (the accelerator if there is one), or a torch device name -> the device.

    Under torchrun, "cuda" is this process's own GPU. Raises UserError if the device cannot be used.
    """
    try:
        if name == "auto":
            name = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})")
    return device


def start_processes(device):
    """Starts torchrun's process group, once a program: gloo, and nccl between GPUs; run_command ends it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def ignore_signals(worker):
    """Lets a process that reads pictures outlive a signal to the whole group, until the run has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Run:
    """One training run: its device, its random numbers and batches, its updates, its folder config.out.

    config: a plumbing.cli.RunFlags with iterations and batch_size (global). bound: the flags that a
    continuation must repeat; by default all but cli.FREE. A micro-batch must be a multiple of micro_multiple.
    Raises UserError, with nothing written, if the config cannot work here.
    """

    def __init__(self, config, bound=None, micro_multiple=1):
        self.bound = bound_flags(type(config)) if bound is None else bound
        self.config, self.out = config, Path(config.out)
        self.checkpoints = self.out / "checkpoint"
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if config.batch_size % self.world:
            raise UserError(f"--batch-size {config.batch_size}: the global batch is not divisible by "
                            f"{self.world} processes")
        local = config.batch_size // self.world
        micro = config.micro_batch or local
        if local % micro:
            raise UserError(f"--micro-batch {micro}: does not divide the {local} samples of each process")
        if micro % micro_multiple:
            raise UserError(f"--batch-size {config.batch_size}: gives {micro} samples at once, "
                            f"which must be a multiple of {micro_multiple}")
        # Whether this process draws samples: the first does; with a sharded network all must, for its blocks
        # are gathered from all.
        self.shows = self.rank == 0 or config.shard
        self.rows = slice(self.rank * local, (self.rank + 1) * local)
        self.micro_batches = [slice(i, i + micro) for i in range(0, local, micro)]  # of this rank's rows
        self.device = choose_device(config.device)
        self.source = self._find_checkpoint()
        self.start = int(self.source.name) if self.source else 0
        self.signal = 0
        start_processes(self.device)
        if self.world > 1:
            starts = [None] * self.world
            dist.all_gather_object(starts, self.start)
            if len(set(starts)) > 1:
                raise UserError(f"--out {config.out}: the processes find different checkpoints; "
                                "use a disk that all share")
        torch.manual_seed(config.seed)  # the same weights on every rank

    def _find_checkpoint(self):
        # The run's own checkpoint comes first: the same command, with or without --resume, continues the run.
        source = latest_checkpoint(self.checkpoints)
        if not source and self.config.resume:
            source = latest_checkpoint(Path(self.config.resume) / "checkpoint")
            if not source:
                raise UserError(f"--resume {self.config.resume}: there is no checkpoint in it")
        if not source:
            return None
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        saved, ours = defaults | checkpoint_note(source)["config"], dataclasses.asdict(self.config)
        differing = [f"--{name.replace('_', '-')} was {saved[name]}, is {ours[name]}"
                     for name in ours if name in self.bound and saved[name] != ours[name]]
        if differing:
            raise UserError(f"{source}: belongs to another configuration ({'; '.join(differing)}); "
                            "repeat that run's flags, or choose another --out")
        return source

    def make_folder(self):
        """Makes the run's folder. Raises UserError if it cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints):
                pass
        except OSError as error:
            raise UserError(f"--out {self.config.out}: cannot write there ({error.strerror}); "
                            "choose another folder")

    def begin(self, parts):
        """Called once everything is built: makes the folder, loads the checkpoint, catches the signals.

        parts: name -> module, optimiser or EMA: the contents of a checkpoint. Log lines after the checkpoint
        are dropped.
        """
        self.make_folder()
        if self.source:
            load_parts(self.source, parts)
        elif self.world > 1:
            for part in parts.values():
                if isinstance(part, (torch.nn.Module, Weights, EMA)):
                    for tensor in part.state_dict().values():
                        if not isinstance(tensor, DTensor):
                            dist.broadcast(tensor, 0)
        self.parts = parts
        if self.source and self.source.parent != self.checkpoints:
            self.save(self.start)  # from another run: this one can now be continued on its own
        if self.rank == 0:
            write_text(self.out / "config.json", json.dumps(dataclasses.asdict(self.config), indent=1))
            log = self.out / "metrics.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            # A line that was cut short by a kill has no closing brace.
            kept = [line for line in lines
                    if line.endswith("}") and json.loads(line)["iteration"] <= self.start]
            if kept != lines:
                write_text(log, "\n".join(kept))
        remember = lambda number, frame: setattr(self, "signal", number)
        self.old_handlers = {number: signal.signal(number, remember)
                             for number in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.config.iterations, initial=self.start, disable=self.rank > 0,
                        smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 30)
        self.window, self.skipped = [], set()
        self.window_start, self.window_iteration = time.perf_counter(), self.start

    def draws(self, iteration):
        """The random numbers of an iteration, for this rank's rows of the batch."""
        return Draws(self.config.seed, iteration, self.config.batch_size, self.rows, self.device)

    def batches(self, dataset):
        """This rank's (x0 in [-1, 1] on the device, captions) of every iteration still to come."""
        size, rows = self.config.batch_size, self.rows
        order = (sample_order(dataset, self.config.seed, range(i * size + rows.start, i * size + rows.stop))
                 for i in range(self.start, self.config.iterations))
        # With a generator of its own the loader leaves the global one alone.
        loader = DataLoader(dataset, batch_sampler=order, num_workers=self.config.workers, collate_fn=list,
                            generator=torch.Generator(), worker_init_fn=ignore_signals)
        for samples in loader:
            for path in sorted({p for s in samples for p in s["skipped"]} - self.skipped):
                self.skipped.add(path)
                tqdm.write(f"skipped, cannot be read as a picture: {path} ({len(self.skipped)} so far)",
                           file=sys.stderr)
            x0 = torch.stack([s["image"] for s in samples]).to(self.device)
            yield to_floats(x0), [s["caption"] for s in samples]

    def prompts(self, prompts):
        """This rank's list of prompts for every iteration still to come, shuffled anew in each pass."""
        size, rows, n = self.config.batch_size, self.rows, len(prompts)
        for i in range(self.start, self.config.iterations):
            counters = range(i * size + rows.start, i * size + rows.stop)
            yield [prompts[permutation(self.config.seed, c // n, n)[c % n]] for c in counters]

    def split(self, **batch):
        """This rank's batch as a list of micro-batches: namespaces with their rows of every value.

        A value is a tensor, a list or a condition; a number, or None, is the same in all micro-batches.
        """
        return [SimpleNamespace(**{name: part_of(value, rows) for name, value in batch.items()})
                for rows in self.micro_batches]

    def autocast(self):
        """bf16 for the networks under --precision bf16; weights and losses stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def descend(self, optimizer, batches, loss_of, clip_norm=math.inf):
        """One step of the optimiser down the mean loss over all micro-batches, `batches`, of all ranks.

        loss_of(batch) -> (loss, {name: scalar}), both means over the micro-batch's samples, called under
        autocast. The gradient of all the optimiser's parameters together is clipped to the norm clip_norm.
        Returns the scalars' means over this rank's micro-batches.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        scalars = []
        for batch in batches:
            with self.autocast():
                loss, values = loss_of(batch)
            (loss / len(batches)).backward()
            scalars.append(values)
        self.average_gradients(parameters)
        if clip_norm < math.inf:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        return {name: torch.stack([s[name].detach() for s in scalars]).mean() for name in scalars[0]}

    def average_gradients(self, parameters):
        """Replaces the parameters' gradients by their means over the ranks.

        Those of a sharded network are left alone: its backward pass has taken the means.
        """
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        if self.world == 1:
            return
        # In few exchanges, for in each the ranks wait for each other; but not in one, which would need a copy
        # of all gradients.
        ends = accumulate(g.numel() for g in gradients)
        for _, bucket in groupby(zip(ends, gradients), lambda pair: pair[0] // EXCHANGED_AT_ONCE):
            bucket = [g for _, g in bucket]
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            means = flat.div_(self.world).split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [m.view_as(g) for m, g in zip(means, bucket)])
            del flat, means  # before the next bucket is copied

    def finish_iteration(self, iteration, losses):
        """Logs, saves when due, and returns True if the run must stop now (Ctrl-C or SIGTERM on any rank).

        losses: name -> scalar tensor. Raises UserError with the iteration and the loss's name if a loss was
        not finite.
        """
        done, config = iteration + 1, self.config
        # The vote is taken on the host: it does not wait for the device.
        vote = torch.tensor(int(self.signal))
        if self.world > 1:
            dist.all_reduce(vote, dist.ReduceOp.MAX)
        self.signal = int(vote)
        saves = done % config.save_every == 0 or done == config.iterations or self.signal > 0
        self._log(done, losses, flush=saves or done % config.log_every == 0)
        if saves:
            self.save(done)
        return self.signal > 0

    def _log(self, done, losses, flush):
        # Between log lines nothing is read from the device. A loss is averaged over the iterations with it.
        self.window.append((done, {name: value.detach() for name, value in losses.items()}))
        self.bar.update()
        if not flush:
            return
        names = list(dict.fromkeys(name for _, values in self.window for name in values))
        means, first_bad = [], []
        for name in names:
            found = [(n, values[name]) for n, values in self.window if name in values]
            iterations = torch.tensor([n for n, _ in found], device=self.device)
            values = torch.stack([v for _, v in found]).float()
            means.append(values.mean())
            first_bad.append(torch.where(values.isfinite(), torch.inf, iterations.float()).min())
        means, first_bad = torch.stack(means), torch.stack(first_bad)
        if self.world > 1:
            dist.all_reduce(means)
            dist.all_reduce(first_bad, dist.ReduceOp.MIN)
        first_bad = first_bad.tolist()
        if min(first_bad) < torch.inf:
            self.bar.close()
            name = names[first_bad.index(min(first_bad))]
            last = latest_checkpoint(self.checkpoints)
            kept = "no checkpoint had been written yet"
            if last:
                kept = f"the checkpoint of iteration {int(last.name)} is kept"
            raise UserError(f"iteration {int(min(first_bad))}: {name} is not finite, stopped; {kept}; "
                            "lower --lr, or use --precision fp32")
        now, count = time.perf_counter(), done - self.window_iteration
        row = {k: v / self.world for k, v in zip(names, means.tolist())}
        self.bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in row.items()), refresh=False)
        row |= dict(images_per_second=count * self.config.batch_size / (now - self.window_start),
                    peak_memory_gb=self._peak_memory_gb())
        row = dict(iteration=done, **{k: float(f"{v:.6g}") for k, v in row.items()},
                   skipped_pictures=len(self.skipped))
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        self.window, self.window_start, self.window_iteration = [], now, done

    def _peak_memory_gb(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def save(self, done):
        """Writes the checkpoint after `done` iterations, in place of the one before."""
        write_checkpoint(self.checkpoints, done, self.parts, self.config)

    def end(self):
        """Closes the run; after a signal, says how to go on and exits with 128 + the signal's number."""
        self.bar.close()
        self.parts = None  # an adaptation's optimiser must not live on through the training
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if self.signal:
            if self.rank == 0:
                print(f"stopped, saved to {self.checkpoints}; the same command continues", file=sys.stderr)
            sys.exit(128 + self.signal)
