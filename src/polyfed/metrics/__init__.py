"""Metrics: values that add over batches and clients, and what is computed from their sums."""
