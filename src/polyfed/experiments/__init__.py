"""Studies: an item of a paper, such as a table or a figure, as cells that are run, tabulated and drawn.

    from polyfed.experiments.catalogue import find
    from polyfed.experiments.reproduce import reproduce

    table, page = reproduce(find("fedmrl/table1"), "smoke")

Modules: ``catalogue`` (what there is), ``study`` (the file format), ``tuning`` (hyper-parameters chosen on validation
rows), ``plan`` (how long it takes), ``views`` and ``figures`` (what is shown), ``known`` (what the paper says),
``reproduce``. The studies of a paper lie in a folder of its name, with ``known.toml``. docs/experiments.md describes
the format.
"""
