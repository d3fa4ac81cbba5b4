"""What the processes of one run, started by `accelerate launch` or `torchrun`, must agree on.

Tuning shares each batch; everything else every process does by itself, on the same data, and the first one's results
are taken over by the others: on unlike processors sums differ in their last bits, and a mask must not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from losa_export.errors import ConfigError

Value = TypeVar("Value")


class Processes:
    """The processes of a run, seen from one of them. With a single one every method hands back what it is given.

    All processes must call the same methods in the same order.

    Args:
        accelerator: accelerate's Accelerator.
    Raises: ConfigError where the launcher meant several processes and started one, or shards parameters.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.count = int(accelerator.num_processes)
        self._check()

    def _check(self) -> None:
        # accelerate starts several processes on CPUs through MPI alone; without it, it starts one and says nothing.
        if self.count == 1 and "MASTER_PORT" in os.environ and os.environ.get("ACCELERATE_USE_CPU") == "True":
            raise ConfigError(
                "'accelerate launch --cpu' was asked for several processes but starts one; use 'torchrun "
                "--nproc-per-node N --no-python losa train … --device cpu', or give --mpirun_hostfile",
                processes=self.count,
            )
        kind = str(getattr(self._accelerator, "distributed_type", "NO")).rpartition(".")[2]
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise ConfigError(
                f"the launcher asks for {kind}, which would take the adapters apart; launch plain data parallelism, "
                "for example 'accelerate launch --multi_gpu', and give --shard-weights to share out frozen weights",
                kind=kind,
            )

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, element by element."""
        if self.count == 1:
            return values
        averaged: Tensor = self._accelerator.reduce(values, reduction="mean")
        return averaged

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of them."""
        if self.count == 1:
            return flag
        raised = torch.tensor(float(flag), device=self._accelerator.device)
        return bool(self._accelerator.reduce(raised, reduction="sum") > 0)

    def first(self, value: Value) -> Value:
        """What the first process holds."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        held: list[Value] = broadcast_object_list([value])
        return held[0]

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors, of the same shapes everywhere, with the first process's."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            tensor.copy_(broadcast(tensor.to(self._accelerator.device, copy=True).contiguous()))


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes. True where nothing has been launched."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def end_launched(code: int) -> None:
    """End this process with an exit code if it is one of several; come back if nothing has been launched.

    It spares Python's own ending, which aborts some runs that had finished: a thread of Gloo that drops the last tensor
    it sent asks for the interpreter, which is just going away, and DistributedDataParallel keeps these threads alive
    even where the process group is destroyed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
