"""One module per format: from a file or an archive to arrays."""
