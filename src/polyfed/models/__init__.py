"""Models: any network, run on weights that live outside it and cut where an algorithm needs it.

``catalogue`` is free of torch, so that a configuration can be checked quickly; ``zoo`` builds;
``split`` runs.
"""
