"""`make soak`: real tunnels under mixed traffic while faults are injected at random, from a printed seed.

What must hold: every byte that arrived is the one that was sent; a stream that ended in good order is whole; while it
is quiet nothing is cut and no datagram is lost; memory does not grow; descriptors and greenlets return to their base
line; and the log warns of nothing but the faults.
"""
