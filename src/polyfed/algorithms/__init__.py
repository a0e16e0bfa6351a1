"""One readable file per algorithm. None imports another; `polyfed.algorithms.catalogue` lists them by name."""
