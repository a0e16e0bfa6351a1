"""Drivers, which run the coroutines of a round. The sequential driver defines the correct result."""
