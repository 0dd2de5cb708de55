"""A trained student out of the house: in the form that each of its readers loads, checked by loading it."""
