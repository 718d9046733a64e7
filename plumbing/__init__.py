"""The machinery around the methods: nothing here is about a method, and a learner need not open it.

cli         flags from a dataclass, their ranges, errors in one line
run         Run: device, processes, batches, one update, log, stop
checkpoint  a run's state, saved and read back
data        folders of pictures, CIFAR-10, tar and parquet files, prompts; their order; grids of pictures
files       files written whole or not at all, with what shows that they are still what was written
shapes      the embedded dataset: pictures drawn by code
grids       pictures as files: grids with labels, folders of single pictures
cache       latents and text conditions, encoded once
students    a one-step student's start, its conversion, its exports for diffusers and kohya
shard       FSDP2: every process keeps its part of each weight

Modules here import common and one another, never a method's script.
"""

import sys

if sys.platform == "win32":
    sys.exit("Linux or macOS is needed, for locks of folders and the memory's measure; on Windows use WSL 2.")
