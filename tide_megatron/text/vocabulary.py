"""Do two tokenizers mean the same by an id? Losses that compare distributions by id stand on the answer."""

from __future__ import annotations

from tide_megatron.base.errors import ConfigError
from tide_megatron.text.tokenizer import Tokenizer


def differing_ids(left: Tokenizer, right: Tokenizer, limit: int) -> list[int]:
    """List the ids below `limit` that are not the same bytes in both vocabularies; mask tokens are exempt.

    An id that one side does not have differs. Each model is shown its own mask token, and neither is ever a
    target, so their spelling does not matter.
    """
    exempt = {left.mask_id, right.mask_id}
    return [
        token for token in range(limit) if token not in exempt and _bytes(left, token) != _bytes(right, token)
    ]


def require_shared(student: Tokenizer, teacher: Tokenizer, limit: int, key: str) -> None:
    """Refuse to compare distributions whose first `limit` ids are not the same bytes.

    Args:
        student: the student's tokenizer, whose ids the data holds.
        teacher: the teacher's.
        limit: how many first ids are compared.
        key: recipe key for the message.

    Raises:
        ConfigError: names the first differing id with both spellings, and how far the vocabularies agree.
    """
    different = differing_ids(student, teacher, limit)
    if different:
        first = different[0]
        raise ConfigError(
            f"{key}: {len(different)} of the first {limit} ids are different bytes in {student.name} and "
            f"{teacher.name} (id {first}: {_bytes(student, first)!r} against {_bytes(teacher, first)!r}); "
            f"set shared_vocab_size to {first} or less, or choose a teacher with the student's tokenizer"
        )


def _bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    return tokenizer.token_bytes(token) if tokenizer.has(token) else None
