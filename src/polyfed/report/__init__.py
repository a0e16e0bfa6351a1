"""The output of a run for a reader: units, progress, tables. This package does not import torch."""
