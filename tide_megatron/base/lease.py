"""A lease on a folder: one process at a time trains in it, fills it or replaces it, on any host that sees it.

The lease is a small file that names host, pid and job, and that its holder touches every ten seconds. No file
locks are needed, which shared file systems lack or emulate. What is relied on: of several `link` calls to one
name exactly one succeeds (also O_EXCL, where there are no links), `rename` replaces in one piece, and opening
a file tells its present times (NFS: close-to-open).

Whether a holder lives is seen, not computed from clocks, which differ between hosts: a lease that is touched
while we watch is living, however old it looks. How old it looks, by the file server's clock on both sides,
only shortens the watch. On the holder's own host its process is looked at, so nobody waits for the dead. A
SLURM job that was restarted takes its own lease over at once; two steps of one job do not.

A stale lease is taken over by who first makes the file that is called after its token, looks again, and then
renames a lease of its own over it. A token is never used twice, so of any number of starts one gets it, and
one that was delayed in between finds another token and begins again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tide_megatron.base.device import read_job
from tide_megatron.base.errors import CheckpointError, TideError
from tide_megatron.base.owner import Holder
from tide_megatron.base.stop import StopFlag

RENEW_SECONDS, STALE_SECONDS = 10.0, 60.0
"""How often a holder touches its lease, and how long one that nobody touches is honoured."""
LEASE = ".lease"
"""The file's name in a folder that is worked in."""
_NO_LINKS = {
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EACCES,
    errno.EINVAL,
    errno.EXDEV,
}
_TRIES = 100

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sight:
    """A lease as it was at one moment."""

    holder: Holder
    touched: float
    """When it was last touched, by the file server's clock in seconds."""


class Lease:
    """A lease that this process holds, and a thread that renews it."""

    def __init__(self, path: Path, holder: Holder, kind: type[TideError], renew_seconds: float) -> None:
        """Hold what was taken; `take` does that."""
        self.path = path
        self._holder, self._kind = holder, kind
        self._file = os.open(path, os.O_RDONLY)  # touched by its number, it can be nobody else's
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, args=(renew_seconds,), name="lease", daemon=True)
        self.on_loss: Callable[[str], None] = lambda reason: None
        """Called once, by the thread, when the lease is somebody else's."""

    def check(self) -> None:
        """Make sure, before something is given its name, that the lease is still ours.

        Raises:
            TideError: (of the wanted kind) another process has taken it, or somebody removed it.
        """
        now = _sight(self.path)
        if now is None or now.holder.token != self._holder.token:
            taken = f"was taken over by {now.holder.described()}" if now else "was removed"
            raise self._kind(
                f"{self.path}: this process's lease {taken}, so nothing more is written here; let only one "
                "of the two go on"
            )
        with contextlib.suppress(OSError):
            os.utime(self._file)

    def release(self) -> None:
        """Give the lease up, so that the next start need not wait."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._renewal.is_alive():
            self._renewal.join()
        os.close(self._file)
        with contextlib.suppress(OSError), _claim(self.path, self._holder.token) as is_ours:
            now = _sight(self.path)
            if is_ours and now is not None and now.holder.token == self._holder.token:
                self.path.unlink()

    def start(self) -> None:
        """Renew it from now on."""
        self._renewal.start()

    def _renew(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            try:
                os.utime(self._file)
                now = _sight(self.path)
            except OSError as fault:  # a server that is away may come back; `check` says whether it is lost
                log.warning("%s: cannot be renewed (%s)", self.path, fault)
                continue
            if now is None or now.holder.token != self._holder.token:
                who = f"taken over by {now.holder.described()}" if now else "removed"
                log.error("%s: the lease was %s; this process ends", self.path, who)
                self.on_loss(f"the loss of {self.path}")
                return


def holder_of(path: Path) -> Holder | None:
    """Return who holds a lease, as far as one look tells: this machine's dead and what is stale hold nothing.

    Raises:
        OSError: it cannot be read.
    """
    seen = _sight(path)
    if seen is None or seen.holder.is_gone(Holder.here(read_job())):
        return None
    return seen.holder if time.time() - seen.touched < STALE_SECONDS else None


def lease_beside(target: Path) -> Path:
    """Return where the lease on a place is that is replaced as a whole."""
    return target.with_name(f".{target.name}{LEASE}")


@contextlib.contextmanager
def leased(
    path: Path,
    what: str,
    kind: type[TideError] = CheckpointError,
    *,
    stop: StopFlag | None = None,
    renew_seconds: float = RENEW_SECONDS,
    stale_seconds: float = STALE_SECONDS,
) -> Iterator[Lease]:
    """Hold a lease while the block runs (one process of a run; the others learn of a refusal from it).

    Folders that are missing on the way to it are made, and removed again where nothing else came into them.

    Args:
        path: of the lease file.
        what: is leased, for messages.
        kind: of the error.
        stop: ends the watch over a lease that may be stale; a process that ends without unwinding gives the
            lease up.
        renew_seconds: how often it is touched.
        stale_seconds: how long another one is honoured that nobody touches.

    Raises:
        TideError: (of that kind) another process holds it; host and pid are named.
        OSError: the disk refuses.
    """
    made: set[Path] = set()
    try:
        holder = Holder.here(read_job())
        _Taking(path, what, kind, holder, stop, renew_seconds, stale_seconds, made).take()
        _tidy(path, stale_seconds)
        lease = Lease(path, holder, kind, renew_seconds)
        lease.start()

        def farewell() -> None:
            lease.release()
            _remove_empty(made)

        farewells = [] if stop is None else stop.farewells
        farewells.append(farewell)
        try:
            yield lease
        finally:
            farewells.remove(farewell)
            lease.release()
    finally:
        _remove_empty(made)


def _remove_empty(made: set[Path]) -> None:
    """Remove the folders that were made for a lease, where nothing came into them, the innermost first."""
    for folder in sorted(made, reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()


@dataclasses.dataclass(frozen=True)
class _Taking:
    """One try to get a lease."""

    path: Path
    what: str
    kind: type[TideError]
    holder: Holder
    stop: StopFlag | None
    renew_seconds: float
    stale_seconds: float
    made: set[Path]
    """Folders that were missing and that we made."""

    def take(self) -> None:
        """Write our lease where there is none, or over one that is stale."""
        own = _beside(self.path, self.holder.token)
        gone = None
        try:
            for attempt in range(_TRIES):
                time.sleep(bool(attempt) * (0.01 + 0.0004 * secrets.randbelow(100)))
                try:
                    if self._is_taken(own):
                        break
                except FileNotFoundError as fault:  # another start removed the folder it had made
                    gone = fault
            else:
                raise self.kind(
                    f"{self.path}: cannot be had, others take it all the time; try again"
                ) from gone
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)

    def _is_taken(self, own: Path) -> bool:
        """Try once, with a file of our own beside the lease; say whether the lease is ours."""
        self._make_parents()
        own.write_text(json.dumps(dataclasses.asdict(self.holder)) + "\n", encoding="utf-8")
        seen = _sight(self.path)
        if seen is None:
            return _created(own, self.path)
        if seen.holder.token == self.holder.token:  # made, and the server's answer was lost
            return True
        self._refuse_living(seen, own)
        with _claim(self.path, seen.holder.token) as is_ours:
            if is_ours and _sight(self.path) == seen:
                own.replace(self.path)
                log.info("%s: took over the lease of %s", self.what, seen.holder.described())
                return True
        if not is_ours:
            self._remove_old_claim(_beside(self.path, f"{seen.holder.token}.claim"), own)
        return False

    def _make_parents(self) -> None:
        """Make the folder and those above it, and note which were missing.

        Raises:
            FileNotFoundError: one was removed by another start while we looked.
        """
        folder = self.path.parent
        self.made.update(one for one in (folder, *folder.parents) if not one.exists())
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as fault:
            if os.path.lexists(fault.filename):  # a file is where a folder should be
                raise
            raise FileNotFoundError(*fault.args, fault.filename) from fault

    def _remove_old_claim(self, claim: Path, own: Path) -> None:
        """Remove what one left that died in the moment between two calls of a takeover."""
        with contextlib.suppress(FileNotFoundError):
            if _touched_now(own) - claim.stat().st_mtime > self.stale_seconds:
                claim.unlink()

    def _refuse_living(self, seen: _Sight, own: Path) -> None:
        """Return when a lease is stale.

        Raises:
            TideError: its holder lives.
        """
        if seen.holder.is_gone(self.holder) or seen.holder.is_succeeded_by(self.holder):
            return
        age = _touched_now(own) - seen.touched
        if seen.holder.is_here(self.holder) and age < self.stale_seconds:
            self._refuse(seen)
        # A clock that was set back makes no lease last for ever, one that was set ahead ends none unseen.
        watched = min(max(self.stale_seconds - age, 1.5 * self.renew_seconds), self.stale_seconds)
        log.info(
            "%s: held by %s; watching for up to %.0f s whether it lives",
            self.what,
            seen.holder.described(),
            watched,
        )
        end = time.monotonic() + watched
        while time.monotonic() < end:
            if self.stop is not None and self.stop.requested:
                raise TideError(
                    f"stopped by {self.stop.reason} while waiting for {self.what}; nothing was changed"
                )
            time.sleep(min(0.5, watched / 20))
            now = _sight(self.path)
            if now is None or now.holder.token != seen.holder.token:
                return  # the claim finds out whose it is now
            if now.touched != seen.touched:
                self._refuse(now)

    def _refuse(self, seen: _Sight) -> None:
        raise self.kind(
            f"{self.what}: in use by {seen.holder.described()}; wait for it or end it, or choose another "
            f"folder (a process that died frees it within {self.stale_seconds:.0f} s)"
        )


def _beside(path: Path, token: str) -> Path:
    """Return the name of a file that belongs to a lease."""
    return path.with_name(f"{path.name}-{token}")


def _sight(path: Path) -> _Sight | None:
    """Return a lease as it is now; None where there is none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:  # opening makes NFS ask the server
            touched, content = os.fstat(stream.fileno()).st_mtime, stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as fault:
        if fault.errno == errno.ESTALE:  # replaced by another host between two calls
            return _sight(path)
        raise
    try:
        holder = Holder(**json.loads(content))
        if not all(
            isinstance(value, type(getattr(Holder(token=""), key))) for key, value in vars(holder).items()
        ):
            raise TypeError("fields of other types")
    except (ValueError, TypeError):  # half written, or of another release: honoured until it is stale
        holder = Holder(token="unreadable")
    return _Sight(holder=holder, touched=touched)


def _created(own: Path, path: Path) -> bool:
    """Give our file the lease's name if nothing has it; say whether it is ours."""
    try:
        os.link(own, path)
    except FileExistsError:
        return own.stat().st_nlink > 1  # made, and the server's answer was lost
    except FileNotFoundError:
        return False  # the folder, or our file, was removed by another start that failed
    except OSError as fault:
        if fault.errno not in _NO_LINKS:
            raise
        return _created_without_links(own, path)
    return True


def _created_without_links(own: Path, path: Path) -> bool:
    """Do the same on a file system that knows no links."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as stream:
        stream.write(own.read_bytes())
        stream.flush()
        os.fsync(stream.fileno())
    return True


def _touched_now(own: Path) -> float:
    """Return the file server's time."""
    os.utime(own)
    with own.open("rb") as stream:
        return os.fstat(stream.fileno()).st_mtime


def _tidy(path: Path, stale_seconds: float) -> None:
    """Remove what starts left beside a lease that were killed on the way to it."""
    with contextlib.suppress(OSError):
        now = path.stat().st_mtime
        for left in path.parent.iterdir():
            if left.name.startswith(f"{path.name}-") and now - left.stat().st_mtime > stale_seconds:
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def _claim(path: Path, token: str) -> Iterator[bool]:
    """Be the only one that replaces or removes the lease of a token; say whether we are."""
    claim = _beside(path, f"{token}.claim")
    try:
        os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            claim.unlink()
