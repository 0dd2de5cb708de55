"""What a run will hold and send on each rank, counted by our own step before the run exists."""
