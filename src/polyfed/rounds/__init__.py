"""One round, shared by simulation and deployment: the cohort, the exchange, the evaluation, and the costs."""
