"""nodepass: a TCP/UDP reverse tunnel.

This module imports nothing, so that it can be imported before gevent patches the standard library.
"""

__version__ = "0.1.0"
