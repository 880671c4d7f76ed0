"""The wire as data: bytes to values and back, no I/O."""
