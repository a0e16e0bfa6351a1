"""From a configuration to a finished run on one machine."""
