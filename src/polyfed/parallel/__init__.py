"""Several processes: the worker processes, the transfer of values, and the units that each worker trains."""
