"""Which visitors a server serves."""
