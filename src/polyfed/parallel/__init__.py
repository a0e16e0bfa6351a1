"""Several processes: worker processes, what passes between them, and who is dealt to whom."""
