"""Programs that a model wrote, run where they harm nothing."""
