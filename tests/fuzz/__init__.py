"""What parses a peer's bytes, and what users type, against any bytes at all.

Each `check_*` function takes bytes, drives one parser or state machine with them, and raises AssertionError where a
property does not hold, or whatever else escapes. `targets` has the table of them. Hypothesis calls them in `make test`,
atheris in `make fuzz`, both from the seeds kept in `seeds/`.
"""
