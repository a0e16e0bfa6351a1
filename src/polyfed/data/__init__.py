"""Data sets, what one client sees of them, and how rows are dealt to clients.

Importing this package loads neither torch nor numpy. Import names from its modules:

* ``catalogue``  names and one-line summaries of data sets and partitions, free of torch
* ``sources``    ``load_dataset(name)`` finds, downloads, reads and checks a data set
* ``dataset``    ``Dataset``: pixels or features, labels, official test rows, natural groups
* ``client``     ``FederatedData`` and ``ClientData``: batches of one client's rows
* ``images``     sizes and statistics of images
* ``readers``    one module per file format
* ``partition``  ``make.make_partition(...)``, ``partition.Partition`` (the rows of each client), ``plot.picture(...)``
"""
