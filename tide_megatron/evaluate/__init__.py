"""Scores and samples: held-out likelihood at fixed noises, a block sampler, tables and plots."""
