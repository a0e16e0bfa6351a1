"""The run directory and the states in it, whole or absent."""
