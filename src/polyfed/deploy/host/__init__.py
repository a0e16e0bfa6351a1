"""The processes of a deployment on this machine: commands, keys, and a federation of local processes."""
