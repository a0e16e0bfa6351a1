"""Data sets, what one client sees of them, and how rows are dealt to clients.

Importing this package loads nothing heavy; take names from its modules:

* ``catalogue``  names and one-line summaries of data sets and partitions, free of torch
* ``sources``    ``load_dataset(name)``: finds, downloads, reads and checks a data set
* ``dataset``    ``Dataset``: pixels or features, labels, official test rows, natural groups
* ``partition``  ``make_partition(...)`` and ``Partition``: which rows belong to which client
* ``client``     ``FederatedData`` and ``ClientData``: batches of one client's rows
* ``picture``    ``picture(...)``: the class counts of a partition as a PNG
"""
