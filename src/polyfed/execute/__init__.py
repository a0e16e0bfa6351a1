"""Drivers: who runs the coroutines of a round, where and how. The sequential driver is the definition of correct."""
