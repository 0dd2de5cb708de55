"""The place of a data folder: what may be put there, and what is said of what was."""

from __future__ import annotations

import logging
from pathlib import Path

from tide_megatron.base.errors import DataError
from tide_megatron.data.manifest import MANIFEST_FILE, Manifest
from tide_megatron.data.preparation.completion import listed
from tide_megatron.data.preparation.rejects import REJECTS_FILE

logger = logging.getLogger(__name__)


def report(out: Path, manifest: Manifest) -> None:
    """Log what was written and what was left out."""
    for name, side in manifest.sides.items():
        logger.info(
            "%s: side %s: %d chunks (%d of one token on both sides) over %d tokens, %d cut, %d without any",
            *(out, name, side.chunks, side.pairs, side.tokens, side.cut, side.without_chunks),
        )
    if manifest.unprompted:
        logger.info(
            "%s: %d earlier replies are learnt without their generation prompt, which the template does not "
            "write in earlier turns",
            *(out, manifest.unprompted),
        )
    if manifest.rejected:
        logger.warning(
            "%s: %d bad records were left out (%s); %s has their lines",
            *(out, sum(manifest.rejected.values()), listed(manifest.rejected), out / REJECTS_FILE),
        )
    kept = manifest.statistics
    logger.info(
        "%s: %d samples, %d tokens (%d to learn, %d bytes), %d cut, %d left out",
        *(out, manifest.samples, kept.tokens, kept.reply_tokens, kept.reply_bytes),
        *(kept.truncated, sum(kept.skipped.values()) + sum(manifest.rejected.values())),
    )


def check_target(out: Path, *, replace: bool) -> None:
    """Refuse a target that exists, unless it is prepared data and may be replaced.

    Raises:
        DataError: says so.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST_FILE).is_file():
        raise DataError(
            f"{out}: exists and is no prepared data, so it is never replaced: choose another folder"
        )
    if not replace:
        raise DataError(f"{out}: exists: choose another folder, or ask for it to be replaced (--replace)")
