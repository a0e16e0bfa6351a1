"""One round, shared by simulation and deployment: the cohort, the exchange, evaluation, and what it cost."""
