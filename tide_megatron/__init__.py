"""TIDE on megatron-core: distil diffusion language models across architectures, layouts and tokenizers.

The package is a stack of layers; each imports only from the layers above it in this list
(`pyproject.toml` holds the contract, import-linter checks it):

    base, platform                  errors, devices, files, logs; megatron-core on CPU
    parallel, text                  layouts, process groups, vocabulary group; tokens and templates
    diffusion                       masking tokens: schedules, noise, contexts, views
    data                            columns on disk and the loader over them
    losses, models                  formulas on rows; architectures on GPTModel
    head                            vocabulary heads joined with losses
    checkpoint                      training checkpoints
    teachers, evaluate, convert     teachers' hidden states; held-out scores, samples; Megatron checkpoints
    train, export                   recipe, step, loop; a student for its readers
    launch, api, commands           ranks; the public functions; the `tide` command line

`from tide_megatron import api` is the way in from Python.
"""

__version__ = "0.1.0"
