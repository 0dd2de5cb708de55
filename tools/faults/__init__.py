"""Faults on purpose: planted ones and small mutations, to show that the tests would see real ones."""
