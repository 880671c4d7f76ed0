"""The client: connects to its server and dials the target."""
