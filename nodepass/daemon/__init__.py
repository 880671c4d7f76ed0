"""The process: its tunnels side by side, systemd, limits, the key file."""
