"""What algorithms are built of: means, losses, masks, matrices of low rank, rows by class."""
