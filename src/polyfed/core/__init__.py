"""The contract: what an algorithm is, what it asks for, what it sends, and who takes part."""
