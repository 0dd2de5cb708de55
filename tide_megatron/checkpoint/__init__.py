"""Training checkpoints: copied in a moment, written in the background, whole or not there at all."""
