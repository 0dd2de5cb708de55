"""What is done with whole prepared data sets: merged, split, looked at."""
