"""What is wrong with a sandbox, and never with the program in it."""

from __future__ import annotations

from tide_megatron.base.errors import TideError


class SandboxError(TideError):
    """Programs cannot be run here as asked; says why, and what to do. No program is judged by it."""
