"""Studies: an item of a paper, such as a table or a figure, as cells that polyfed runs, tabulates and draws.

    from polyfed.experiments.catalogue import find
    from polyfed.experiments.reproduce import reproduce

    table, page = reproduce(find("fedmrl/table1"), "smoke")

Modules: ``catalogue`` (names of the studies), ``study`` (the file format), ``tuning`` (hyper-parameters chosen on
validation rows), ``plan`` (the time that is left), ``views``, ``sizes``, ``submodels`` and ``figures`` (tables and
pictures), ``known`` (the paper's results), ``reproduce`` (runs a study and writes its page). The studies of a paper are
in a folder of its name, with ``known.toml``. docs/experiments.md describes the format.
"""
