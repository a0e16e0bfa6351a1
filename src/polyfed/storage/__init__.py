"""The run directory and the private states in it; a file is written whole or not at all."""
