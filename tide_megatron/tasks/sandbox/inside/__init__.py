"""What runs on the far side: started as a program of its own, with the standard library alone."""
