"""Every algorithm of the catalogue obeys every law; one that is added there is covered here."""

from polyfed.algorithms.catalogue import ALGORITHMS as CATALOGUE
from polyfed.testing.laws import *  # noqa: F403

ALGORITHMS = list(CATALOGUE)
