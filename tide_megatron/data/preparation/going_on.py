"""A folder of columns in one or several starts: goes on with what is certain, or begins anew and says why."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tide_megatron.base.disk import disk_words
from tide_megatron.base.errors import DataError
from tide_megatron.base.lease import Lease
from tide_megatron.base.stop import is_stop
from tide_megatron.base.unfinished import DamagedWork, Unfinished, unfinished_folder
from tide_megatron.data.preparation.filling import Filling, RecordsChanged
from tide_megatron.data.preparation.identity import Plan, differences
from tide_megatron.data.preparation.parallel_encoder import EncoderKilled, ParallelEncoder

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def filled_folder(out: Path, plan: Plan, workers: int, lease: Lease) -> Iterator[tuple[Unfinished, Filling]]:
    """Give the folder in which all records of a plan are encoded; it takes its name at the end of the block.

    Args:
        out: where it shall stand (`place_of`).
        plan: what is to be done.
        workers: processes that encode.
        lease: on the place.

    Raises:
        DataError: bad records or sources, which leave nothing; a disk or processes that failed.
        OSError: the disk refuses the name.
    """
    with (
        unfinished_folder(out) as work,
        _told(work, lease, out),
        ParallelEncoder(plan.encoder, number=workers) as processes,
        _filled(work, plan, processes, lease, out) as filling,
    ):
        yield work, filling
        lease.check()


@contextlib.contextmanager
def _filled(
    work: Unfinished, plan: Plan, processes: ParallelEncoder, lease: Lease, out: Path
) -> Iterator[Filling]:
    """Give a filling that has read all records, going on with an earlier start's work if that is of use."""
    with contextlib.ExitStack() as stack:
        try:
            state = _certain(work, plan)
            if state is not None:
                work.go_on(state)
                filling = stack.enter_context(Filling(work, plan, processes, lease, state))
                logger.info("%s: goes on behind record %d of an earlier start", out, state["records"])
                filling.read(out.name)
        except (DamagedWork, RecordsChanged) as why:
            logger.warning("%s: an earlier start's work is of no use, begins anew: %s", out, why)
            stack.close()
            state = None
        if state is None:
            work.begin()
            filling = stack.enter_context(Filling(work, plan, processes, lease))
            filling.read(out.name)
        yield filling


def _certain(work: Unfinished, plan: Plan) -> dict[str, Any] | None:
    """Return what an earlier start has done; None: nothing.

    Raises:
        DamagedWork: something, but it is of no use here; the message says why.
    """
    state = work.committed()
    if state is None:
        return None
    if others := differences(state.get("identity") or {}, plan.identity()):
        raise DamagedWork(f"it was made with another {', another '.join(others)}")
    if not all(source.can_be_read_again for source in plan.sources()):
        raise DamagedWork("a pipe cannot be read again")
    return state


@contextlib.contextmanager
def _told(work: Unfinished, lease: Lease, out: Path) -> Iterator[None]:
    """Decide what becomes of the work when the block ends early, and say so.

    Raises:
        DataError: of the block; or the disk refused.
    """
    try:
        yield
    except EncoderKilled as fault:
        raise DataError(f"{fault}{_promise(work)}") from None
    except DataError:
        work.is_kept = not _is_held(lease)  # what another process has taken over is left to it
        raise
    except OSError as fault:
        raise DataError(disk_words(fault, out, _promise(work))) from fault
    except BaseException as end:
        if is_stop(end) or isinstance(end, KeyboardInterrupt):
            logger.warning("%s: stopped%s", out, _promise(work) or "; nothing was written")
        raise


def _promise(work: Unfinished) -> str:
    """Say what the next start will do with the work."""
    return f"; the same command goes on behind record {work.state['records']}" if work.is_kept else ""


def _is_held(lease: Lease) -> bool:
    try:
        lease.check()
    except DataError:
        return False
    return True
