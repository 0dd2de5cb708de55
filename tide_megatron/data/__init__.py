"""Training data: chats in JSONL files, prepared once into columns on disk, read back as batches."""
