"""Scripted peers of wire v2, for either end, that share no code with the program."""
