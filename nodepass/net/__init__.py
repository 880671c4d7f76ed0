"""Sockets, listeners, streams and the relay between two of them; nothing here knows what a tunnel is."""
