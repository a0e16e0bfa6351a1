"""Models: any network, run on weights that are stored outside it, and cut where an algorithm needs it.

``catalogue`` does not import torch, so that a configuration is checked quickly; ``zoo`` builds networks;
``split`` runs them.
"""
