"""The server: listens for its client and for visitors."""
