"""Tasks that a model is scored on: questions, and a judge of replies."""
