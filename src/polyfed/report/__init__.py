"""What a person sees of a run: units, progress, tables. Free of torch."""
