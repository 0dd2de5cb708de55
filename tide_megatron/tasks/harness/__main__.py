"""`python -m tide_megatron.tasks.harness --model tide ...`: the harness's own command, with our model class.

lm-evaluation-harness 0.4.13 finds models in a table of its own source only; neither an entry point nor
`--include_path` (which is for tasks) can add one. So its command is started from here, behind the import that
registers ours.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import tide_megatron.tasks.harness.language_model  # noqa: F401 - it registers `tide`

if __name__ == "__main__":
    cli_evaluate()
