"""Flower carries the messages of a deployment. The only package that imports ``flwr``; names in docs/deploy/."""
