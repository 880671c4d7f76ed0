"""Tests of nodepass: `unit` of its parts, `e2e` of the real program, `support` for both."""
