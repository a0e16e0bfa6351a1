"""The contract of an algorithm: its interface, its requests, its messages, and the clients that take part."""
