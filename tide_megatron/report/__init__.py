"""A run, or several, on one page: what was learnt, from whom, how fast, and how sure a difference is."""
