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
from datetime import timedelta
from functools import cache
from itertools import accumulate, groupby
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import EMA, Draws, UserError, Weights, part_of
from plumbing.checkpoint import (
    checkpoints,
    flat_state,
    latest_checkpoint,
    load_parts,
    sound_checkpoint,
    sweep,
    write_checkpoint,
)
from plumbing.cli import bound_flags, samples_at_once
from plumbing.data import permutation, sample_order, to_floats
from plumbing.files import (
    agreed,
    append_line,
    digest,
    gathered,
    lock,
    origin_of,
    silent_ranks,
    wait_for_first,
    want_of_a_process,
    write_text,
    writing,
)
from plumbing.grids import save_grid
from plumbing.shard import part_here, whole

EXCHANGED_AT_ONCE = 2**26  # gradients in one exchange, roughly; 256 MB in float32


def choose_device(name, precision="fp32"):
    """"auto" (the accelerator if there is one), or a torch device name -> the device.

    Under torchrun, "cuda" is this process's own GPU. Factors of float32 products are rounded to TF32, by
    convolutions and by all others, if the precision is "tf32"; torch's defaults do so in convolutions alone.
    Raises UserError if the device cannot be used.
    """
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = precision == "tf32"
    try:
        if name == "auto":
            name = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})")
    return device


def start_processes(device):
    """Starts torchrun's process group, once a program: gloo, and nccl between GPUs; run_command ends it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


@cache
def group_of_steps(seconds):
    """The process group of what is exchanged in a step on the host, which gives up after so many seconds."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))


def ignore_signals(worker):
    """Lets a process that reads pictures outlive a signal to the whole group, until the run has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def tracker(name, folder, start):
    """The writer of `--track`, None without one; what it wrote after iteration `start` is dropped.

    Raises UserError if its package is missing.
    """
    if not name:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--track tensorboard: pip install tensorboard")
    return SummaryWriter(folder, purge_step=start + 1)


class Run:
    """One training run: its device, its random numbers and batches, its updates, its folder config.out.

    config: a plumbing.cli.RunFlags with iterations and batch_size (global). bound: the flags that a
    continuation must repeat; by default all but cli.FREE. Raises UserError, with nothing written, if the
    config cannot work here.
    """

    def __init__(self, config, bound=None):
        self.bound = bound_flags(type(config)) if bound is None else bound
        self.config, self.out = config, Path(config.out)
        self.checkpoints = self.out / "checkpoint"
        # Of files that belong to this run, and to another that has the same flags.
        flags = dataclasses.asdict(config).items()
        self.origin = origin_of({name: value for name, value in flags if name in self.bound})
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if config.batch_size % self.world:
            raise UserError(f"--batch-size {config.batch_size}: the global batch is not divisible by "
                            f"{self.world} processes")
        local = config.batch_size // self.world
        if local % config.micro_multiple:
            raise UserError(f"--batch-size {config.batch_size}: gives each process {local} samples, which "
                            f"must be a multiple of {config.micro_multiple}")
        micro = samples_at_once(config, local, config.micro_batch or local)
        if not micro:
            raise UserError(f"--micro-batch {config.micro_batch}: must be at least {config.micro_multiple}")
        # Whether this process draws samples: the first does; with a sharded network all must, for its blocks
        # are gathered from all.
        self.shows = self.rank == 0 or config.shard
        self.rows = slice(self.rank * local, (self.rank + 1) * local)
        self.micro_batches = [slice(i, i + micro) for i in range(0, local, micro)]  # of this rank's rows
        self.device = choose_device(config.device, config.precision)
        start_processes(self.device)
        self.source, self.data_before = self._find_checkpoint()
        self.start = int(self.source.name) if self.source else 0
        self.signal, self.lock, self.tracker, self.data = 0, None, None, ""
        self.steps = group_of_steps(config.timeout) if self.world > 1 else None
        torch.manual_seed(config.seed)  # the same weights on every rank

    def _find_checkpoint(self):
        # The run's own checkpoint comes first: the same command, with or without --resume, continues the run.
        folders = [self.checkpoints]
        if self.config.resume:
            folders.append(Path(self.config.resume) / "checkpoint")
        found = gathered([path.name for folder in folders for path in checkpoints(folder)])
        if any(names != found[0] for names in found):
            raise UserError(f"--out {self.config.out}: the processes find different checkpoints; "
                            "use a disk that all share")
        sound = sound_checkpoint(self.checkpoints)
        if not sound and self.config.resume:
            sound = sound_checkpoint(folders[1])
            if not sound:
                raise UserError(f"--resume {self.config.resume}: there is no checkpoint in it")
        if not sound:
            return None, ""
        source, note = sound
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        saved, ours = defaults | note["config"], dataclasses.asdict(self.config)
        differing = [f"--{name.replace('_', '-')} was {saved[name]}, is {ours[name]}"
                     for name in ours if name in self.bound and saved[name] != ours[name]]
        if differing:
            raise UserError(f"{source}: belongs to another configuration ({'; '.join(differing)}); "
                            "repeat that run's flags, or choose another --out")
        return source, note["data"]

    def make_folder(self):
        """Makes the run's folder, which no other run may be writing to.

        Every process must call this. Raises UserError if the folder cannot be had.
        """
        def problem():
            try:
                self._claim_folder()
            except UserError as error:
                return str(error)

        if found := agreed(problem):
            raise UserError(found)

    def _claim_folder(self):
        if self.lock:
            return
        with writing(f"--out {self.config.out}", "choose another folder"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints):
                pass
        for name in ("samples", "pipeline"):
            if (self.out / name).is_file():
                raise UserError(f"--out {self.config.out}: the file {name} is in the way of a folder; "
                                "move it, or choose another --out")
        self.lock = lock(self.out / "lock")
        self.tracker = tracker(self.config.track, self.out, self.start)

    def begin(self, parts):
        """Called once everything is built: makes the folder, loads the checkpoint, catches the signals.

        parts: name -> module, optimiser or EMA: the contents of a checkpoint. Log lines after the checkpoint
        are dropped. Comes back when all processes are ready.
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
            self._cut_log()
            sweep(self.checkpoints, self.start)
        remember = lambda number, frame: setattr(self, "signal", number)
        self.old_handlers = {number: signal.signal(number, remember)
                             for number in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.config.iterations, initial=self.start, disable=self.rank > 0,
                        smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 30)
        self.window, self.skipped = [], set()
        self.window_start, self.window_iteration = time.perf_counter(), self.start
        if self.world > 1:
            # All have loaded, each in its time: torch's half an hour. On the host: between GPUs a barrier
            # would give up after a third of that.
            self._exchange(lambda: dist.all_reduce(torch.zeros(1)))

    def _cut_log(self):
        log = self.out / "metrics.jsonl"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        kept = []
        for line in lines:
            try:
                if json.loads(line)["iteration"] <= self.start:
                    kept.append(line)
            except (ValueError, TypeError, KeyError, RecursionError):
                if line is not lines[-1]:  # a kill cuts the last one short
                    tqdm.write(f"{log}: a damaged line is dropped", file=sys.stderr)
        if kept != lines:
            write_text(log, "\n".join(kept))

    def wait(self):
        """Waits until all processes are here, after work that the first has longer with than the others.

        For the first, torch's half an hour; then for all as in a step. Raises UserError if a process has
        ended or does not answer.
        """
        if self.world > 1:
            self._exchange(wait_for_first)
            self._reduce(torch.zeros(1))

    def _reduce(self, tensor, operation=dist.ReduceOp.SUM):
        group = self.steps if tensor.device.type == "cpu" else None
        self._exchange(lambda: dist.all_reduce(tensor, operation, group=group))

    def _exchange(self, exchange):
        try:
            exchange()
        except RuntimeError as error:
            if not want_of_a_process(error):
                raise
            self.bar.close()
            lost = silent_ranks(self.config.timeout)
            raise UserError(f"rank {lost}: has ended, or did not answer for --timeout {self.config.timeout} "
                            f"seconds, stopped; {self._kept()}; the same command continues")

    def _kept(self):
        last = latest_checkpoint(self.checkpoints)
        return f"the checkpoint of iteration {int(last.name)} is kept" if last else "no checkpoint yet"

    def draws(self, iteration):
        """The random numbers of an iteration, for this rank's rows of the batch."""
        return Draws(self.config.seed, iteration, self.config.batch_size, self.rows, self.device)

    def batches(self, dataset):
        """This rank's (x0 in [-1, 1] on the device, captions) of every iteration still to come."""
        self._compare_data(f"--dataset {getattr(dataset, 'root', '')}", dataset.state)
        size, rows = self.config.batch_size, self.rows
        order = (sample_order(dataset, self.config.seed, range(i * size + rows.start, i * size + rows.stop))
                 for i in range(self.start, self.config.iterations))
        # With a generator of its own the loader leaves the global one alone.
        loader = DataLoader(dataset, batch_sampler=order, num_workers=self.config.workers, collate_fn=list,
                            generator=torch.Generator(), worker_init_fn=ignore_signals)
        for samples in loader:
            for path in sorted({p for s in samples for p in s["skipped"]} - self.skipped):
                self.skipped.add(path)
                tqdm.write(f"skipped: {path} ({len(self.skipped)} so far)",
                           file=sys.stderr)
            x0 = torch.stack([s["image"] for s in samples]).to(self.device)
            yield to_floats(x0), [s["caption"] for s in samples]

    def prompts(self, prompts):
        """This rank's list of prompts for every iteration still to come, shuffled anew in each pass."""
        self._compare_data("--prompts", lambda: prompts)
        size, rows, n = self.config.batch_size, self.rows, len(prompts)
        for i in range(self.start, self.config.iterations):
            counters = range(i * size + rows.start, i * size + rows.stop)
            yield [prompts[permutation(self.config.seed, c // n, n)[c % n]] for c in counters]

    def _compare_data(self, name, state):
        """Says so if the data have changed since the checkpoint. state() -> texts that change with them."""
        if self.rank == 0:
            self.data = digest(state())
            if self.data_before not in ("", self.data):
                tqdm.write(f"{name}: changed since iteration {self.start}; "
                           "the run goes on with what is there now", file=sys.stderr)

    def split(self, **batch):
        """This rank's batch as a list of micro-batches: namespaces with their rows of every value.

        A value is a tensor, a list or a condition; a number, or None, is the same in all micro-batches.
        """
        return [SimpleNamespace(**{name: part_of(value, rows) for name, value in batch.items()})
                for rows in self.micro_batches]

    def autocast(self):
        """bf16 for the networks under --precision bf16, the VAE and the text encoders too.

        float32 stay: trained weights, gradients, moments and averages; the conversion of a prediction, for
        sigma_T / alpha_T magnifies its rounding in x0; losses; and the adaptation's teacher.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def descend(self, optimizer, batches, loss_of, clip_norm=math.inf):
        """One step of the optimiser down the mean loss over all micro-batches, `batches`, of all ranks.

        loss_of(batch) -> (loss, {name: scalar}), both means over the micro-batch's samples, called under
        autocast. The gradient of all the optimiser's parameters together is clipped to the norm clip_norm.
        Returns the scalars' means over this rank's micro-batches, and the gradient's norm before clipping by
        the name of the loss: grad_G of loss_G.
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
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        optimizer.step()
        means = {name: torch.stack([s[name].detach() for s in scalars]).mean() for name in scalars[0]}
        return means | {loss_of.__name__.replace("loss", "grad"): whole(norm)}

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
            self._reduce(flat)
            means = flat.div_(self.world).split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [m.view_as(g) for m, g in zip(means, bucket)])
            del flat, means  # before the next bucket is copied

    def finish_iteration(self, iteration, losses, draw=None):
        """Logs, saves and shows when due; True if the run must stop now (Ctrl-C or SIGTERM on any rank).

        losses: name -> scalar tensor, losses and norms of gradients. draw() -> pictures [N, 3, H, W] in
        [-1, 1] for samples/, on the ranks where the run shows them. Raises UserError, with nothing written,
        if a scalar, or a number that is to be saved, is not finite.
        """
        done, config = iteration + 1, self.config
        # The vote is taken on the host: it does not wait for the device.
        vote = torch.tensor(int(self.signal))
        if self.world > 1:
            self._reduce(vote, dist.ReduceOp.MAX)
        self.signal = int(vote)
        shows = draw is not None and done % config.sample_every == 0
        saves = done % config.save_every == 0 or done == config.iterations or self.signal > 0
        # Between log lines nothing is read from the device. A loss is averaged over the iterations with it.
        self.window.append((done, {name: value.detach() for name, value in losses.items()}))
        self.bar.update()
        try:
            if shows or saves or done % config.log_every == 0:
                self._log(done, self.check_finite(done, shows or saves))
            if saves:
                self.save(done)
            if shows and self.shows:  # last, for it may need memory that is not there
                save_grid(draw(), self.out / "samples" / f"{done:07d}.png")
        except UserError:
            self.bar.close()  # its line would hold the message too
            raise
        if shows or saves:
            self.wait()
        return self.signal > 0

    def check_finite(self, done, parts=True):
        """The means of the scalars since the last log line, by name; called before anything is written.

        Raises UserError with the first iteration and the name of the scalar, or of the number in the run's
        parts, that was not finite. Every process must call this.
        """
        means = self._check_losses()
        if parts:
            self._check_parts(done)
        return means

    def _check_losses(self):
        names = list(dict.fromkeys(name for _, values in self.window for name in values))
        means, first_bad = [], []
        for name in names:
            found = [(n, values[name]) for n, values in self.window if name in values]
            iterations = torch.tensor([n for n, _ in found], device=self.device)
            values = torch.stack([v for _, v in found]).float()
            means.append(values.mean())
            first_bad.append(torch.where(values.isfinite(), torch.inf, iterations.float()).min())
        if not names:
            return {}
        means, first_bad = torch.stack(means), torch.stack(first_bad)
        if self.world > 1:
            self._reduce(means)
            self._reduce(first_bad, dist.ReduceOp.MIN)
        first_bad = first_bad.tolist()
        if min(first_bad) < torch.inf:
            name = names[first_bad.index(min(first_bad))]
            self._stop(f"iteration {int(min(first_bad))}: {name} is not finite")
        return {name: value / self.world for name, value in zip(names, means.tolist())}

    def _check_parts(self, done):
        state = {key: part_here(value) for key, value in flat_state(self.parts).items()}
        finite = torch.stack([value.isfinite().all().int().to(self.device) for value in state.values()])
        if self.world > 1:
            self._reduce(finite, dist.ReduceOp.MIN)
        if not finite.all():
            self._stop(f"iteration {done}: {list(state)[finite.tolist().index(0)]} is not finite")

    def _stop(self, reason):
        raise UserError(f"{reason}, stopped; {self._kept()}; lower --lr, or use --precision fp32")

    def _log(self, done, means):
        now, count = time.perf_counter(), done - self.window_iteration
        self.bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in means.items()), refresh=False)
        row = means | dict(images_per_second=count * self.config.batch_size / (now - self.window_start),
                           peak_memory_gb=self._peak_memory_gb())
        row = dict(iteration=done, **{k: float(f"{v:.6g}") for k, v in row.items()},
                   skipped_pictures=len(self.skipped))
        if self.rank == 0:
            append_line(self.out / "metrics.jsonl", json.dumps(row))
            if self.tracker:
                with writing(self.out):
                    for key in row.keys() - {"iteration"}:
                        self.tracker.add_scalar(key, row[key], done)
        self.window, self.window_start, self.window_iteration = [], now, done

    def _peak_memory_gb(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def save(self, done):
        """Writes the checkpoint after `done` iterations; the one before it stays."""
        write_checkpoint(self.checkpoints, done, self.parts, self.config, self.data)

    def end(self):
        """Closes the run; after a signal, says how to go on and exits with 128 + the signal's number."""
        self.bar.close()
        if self.lock:
            self.lock.close()
        if self.tracker:
            self.tracker.close()
        self.parts = None  # an adaptation's optimiser must not live on through the training
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if self.signal:
            if self.rank == 0:
                print(f"stopped, saved to {self.checkpoints}; the same command continues", file=sys.stderr)
            sys.exit(128 + self.signal)
