"""Run a function as one rank, in this process: join the world, call, leave.

Every way of starting ends here: ranks that `launch/ranks.py` started, ranks of torchrun or srun, and the
single rank of a plain `tide train`. It also tells a rank's own failure from the echo of somebody else's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from tide_megatron.platform import prepare_platform
from tide_megatron.platform.distributed import TIMEOUT_SECONDS, start_distributed, stop_distributed

import torch.distributed as dist

from tide_megatron.base.device import Device, Ranks, Wanted, choose_device
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.stop import StopFlag
from tide_megatron.launch.gpus import agree_on_gpus

RankFunction = Callable[..., Any]
"""Called as `function(*args, device=Device, stop=StopFlag)` with the process world already joined."""

_LOST_PEER = re.compile(
    r"gloo/|NCCL|Connection (closed|reset) by peer|Connection refused|Broken pipe|recvValue failed"
    r"|^rank \d+ failed: "  # what `fail_together` tells the ranks without the bug
)


def run_here(
    function: RankFunction,
    args: tuple[Any, ...],
    *,
    wanted: Wanted,
    ranks: Ranks | None,
    stop: StopFlag,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Any:
    """Join the world, call the function, leave the world; return what the function returned.

    Args:
        function: see `RankFunction`.
        args: its positional arguments.
        wanted: device to choose.
        ranks: this process's place; None for a world of one.
        stop: handed to the function.
        timeout_seconds: how long a collective waits for a rank that never comes.

    Raises:
        ConfigError: before the function is called, for a device that cannot be had.

    All ranks call it together. After an error a world of several ranks is left as it is, for leaving it could
    wait for ranks that are stuck; the process ends soon.
    """
    device = choose_device(wanted)
    _refuse_seen_gpus(device)
    start_distributed(device, ranks, timeout_seconds=timeout_seconds)
    try:
        device = agree_on_gpus(device)
        value = function(*args, device=device, stop=stop)
    except BaseException:
        if ranks is None:
            stop_distributed()
        raise
    stop_distributed()
    return value


def _refuse_seen_gpus(device: Device) -> None:
    """Refuse a run on the CPU in a process where megatron-core would use the GPUs that it sees."""
    if device.type == "cpu" and not prepare_platform().redirected_to_cpu:
        raise ConfigError(
            "device: 'cpu' is asked of ranks that see GPUs, which megatron-core would use; hide them: put "
            "CUDA_VISIBLE_DEVICES= (empty) before the command that starts the ranks"
        )


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another rank went away.

    gloo, NCCL and the store have no common class for that, so messages are read; a wrong guess only changes
    which of two failures is reported first.
    """
    return any(
        isinstance(link, dist.DistError) or (isinstance(link, RuntimeError) and _LOST_PEER.search(str(link)))
        for link in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
