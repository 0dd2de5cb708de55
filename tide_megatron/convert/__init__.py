"""Between Hugging Face folders and Megatron's `torch_dist` checkpoints, on any number of ranks."""
