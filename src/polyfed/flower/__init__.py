"""The transport by Flower, for deployments. Only this package imports ``flwr``; docs/deploy/ explains the names."""
