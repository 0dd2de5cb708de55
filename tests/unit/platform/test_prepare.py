"""Routers multiply by torch on every machine: where CUDA works, and where Transformer Engine is installed.

And a process starts without what only megatron-core's inference server needs.
"""

import subprocess
import sys


def test_the_name_is_settled_where_cuda_works_too():
    """Prepare a fresh process whose redirection to the CPU is told that there is a GPU."""
    code = (
        "import sys\n"
        "import torch\n"
        "answers, true_answer = iter([True]), torch.cuda.is_available\n"
        "torch.cuda.is_available = lambda: next(answers, None) or true_answer()\n"
        "import tide_megatron.platform as platform\n"
        "from megatron.core.transformer.moe import moe_utils\n"
        "print(platform.prepare_platform().redirected_to_cpu, moe_utils.te_general_gemm)\n"
        "print('wandb' in sys.modules)\n"
        "import wandb"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-2:] == ["False None", "False"], done.stderr
    assert done.returncode == 0, "who asks for wandb gets it"
