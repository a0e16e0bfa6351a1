"""The client of a deployed run: its data, its networks, and its private state."""
