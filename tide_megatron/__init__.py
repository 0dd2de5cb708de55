"""TIDE on megatron-core: distil diffusion language models across architectures, layouts and tokenizers.

The package is a stack of layers; each imports only from the layers above it in this list
(`pyproject.toml` holds the contract, import-linter checks it):

    base, platform        errors, devices, logs; megatron-core on CPU
    parallel, text        layouts and process groups; tokens and templates
    diffusion             masking tokens: schedules, noise, contexts, views
    data                  columns on disk and the loader over them
    losses, models        formulas on rows; architectures on GPTModel
    head                  vocabulary heads joined with losses
    teachers, evaluate    answers for the student; held-out scores, samples
    train                 recipe, step, loop, checkpoints
    launch, commands      ranks; the `tide` command line
"""

__version__ = "0.1.0"
