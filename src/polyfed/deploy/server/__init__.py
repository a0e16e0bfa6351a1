"""The server of a deployed run: its rounds, its clients, and what it accepts from them."""
