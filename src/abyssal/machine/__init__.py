"""This machine: what it is, and how fast it was measured to be."""
