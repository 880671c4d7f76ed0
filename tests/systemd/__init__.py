"""Tests of what systemd and the program say to each other: systemd played by the test, and a real one."""
