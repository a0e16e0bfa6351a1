"""Which client holds which rows: kinds of partition, shares, pictures."""
