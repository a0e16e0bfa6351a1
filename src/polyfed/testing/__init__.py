"""The laws that every algorithm obeys, shipped as a pytest plugin.

    pytest --algorithm my_pkg.my_file:MyMethod                          the laws, for one algorithm of your own
    pytest --algorithm fedavg --algorithm fiarse                        for two of the catalogue
    pytest --algorithm my_pkg.my_file:MyMethod --law-config laws.toml   with settings of yours (networks, keys)
    pytest --algorithm my_pkg.my_file:MyMethod tests                    and your own tests

Modules: ``laws`` (the laws; each says what fault it catches), ``subject`` (a small federation for an algorithm, and
runs of it), ``settings`` (networks and keys), ``compare`` (records leaf by leaf), ``clients`` (clients that are
watched, or met through bytes), ``process`` (clients in another process), ``plugin`` (what pytest loads; free of torch).

A law that does not hold for a method by its nature is named by the method itself, with the reason:

    class MyMethod(Algorithm):
        exempt: ClassVar[Mapping[str, str]] = {"idle_rounds_change_nothing": "prototypes depend on the data alone"}

and a field of a private state that also travels is named there: ``class Private(State): public = ("student",)``.
"""
