"""Whole steps at the paper's sizes on one GPU against the reference's way, by part, and the goals.

    python tools/bench/gpu_step.py --json              (make gpu-bench: at most 5 minutes on an H100 or H200)
    python tools/bench/gpu_step.py --only "linears, head"
    python tools/bench/gpu_step.py --rehearse          (the same program in small, on a CPU)

WeDLM-8B whole in bf16, LLaDA2-mini whole in FP8, a Qwen3-0.6B student with AdamW, 8 samples of 512 tokens,
random weights; `bench.gpu_goals` lists what is measured. The reference's way is `bench.plain_step`, frozen:
whole logits of both models, two teacher passes, everything in bf16, experts one after the other.

It is the part `bench` of `gpu_check`, whose options it takes: each check is a process of its own with a time
limit of its own, `results.jsonl` and `table.md` go into `--out`. A missed goal is no failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs as a command

from gpu_check.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["--part", "bench"]
    sys.exit(main())
