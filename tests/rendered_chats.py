"""The chat templates of the package once more, in Python, with the place of every content: an oracle."""

LLADA2_ROLES = {"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"}


def render(template, messages):
    """Return the text and, for each message, (start, end, skipped): bytes of the text and of its content."""
    parts, spans = [], []
    for number, message in enumerate(messages):
        before, shown, after = _pieces(template, message, number, len(messages))
        start = len("".join([*parts, before]).encode())
        skipped = len(message["content"].encode()) - len(shown.encode())
        spans.append((start, start + len(shown.encode()), skipped))
        parts += [before, shown, after]
    return "".join(parts), spans


def generation_prompt(template):
    """Return what opens a reply."""
    return {
        "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "chatml": "<|im_start|>assistant\n",
        "llada2": "<role>ASSISTANT</role>",
    }[template]


def _pieces(template, message, number, count):
    role, content = message["role"], message["content"]
    if template == "llada2":
        off = "detailed thinking off<|role_end|>"
        if role == "system" and number == 0:
            return "<role>SYSTEM</role>", content, f"\n{off}"
        front = f"<role>SYSTEM</role>{off}" if number == 0 else ""
        return f"{front}<role>{LLADA2_ROLES[role]}</role>", content, "<|role_end|>"
    front = f"<|im_start|>{role}\n"
    if template == "qwen3" and role == "assistant" and number == count - 1:
        return f"{front}<think>\n\n</think>\n\n", content.lstrip("\n"), "<|im_end|>\n"
    return front, content, "<|im_end|>\n"
