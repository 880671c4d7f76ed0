"""End-to-end tests: the real program, real sockets, loopback only."""
