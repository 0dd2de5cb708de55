"""Text from a model: block-wise denoising with a cache of prefixes."""
