"""Tasks of lm-evaluation-harness in its own form, on local files: one generates, one has choices."""

import json
from pathlib import Path

GENERATE = """\
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "say {{{{word}}}}"
doc_to_target: "{{{{word}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
filter_list:
  - {{name: first, filter: [{{function: take_first}}]}}
  - {{name: letter, filter: [{{function: regex, regex_pattern: "([a-z])"}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """\
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "what is {{{{word}}}}?"
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_tasks(folder: Path, documents: int = 7) -> Path:
    """Write `local_words`, `local_choices` and their documents; all caches stay in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"word": f"word {'long ' * (n % 3)}{n}", "choices": [f"a{n}", "return left add", "x"], "label": n % 3}
        for n in range(documents)
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("words", GENERATE), ("choices", CHOOSE)):
        (folder / f"local_{name}.yaml").write_text(text.format(data=data, cache=folder / "cache"))
    return folder
