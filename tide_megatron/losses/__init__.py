"""Formulas on hidden rows. A new loss is one file and one line of `LOSSES`."""
