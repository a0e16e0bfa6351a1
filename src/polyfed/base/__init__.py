"""Basics that every other folder may use: errors, randomness, types, mappings of tensors, files, text."""
