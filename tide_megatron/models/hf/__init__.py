"""Hugging Face model folders on disk: config.json, safetensors files, the folder as a whole."""
