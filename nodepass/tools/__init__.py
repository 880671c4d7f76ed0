"""Programs inside the command: `nodepass --check` and `nodepass top`."""
