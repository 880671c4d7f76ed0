"""How a client's connections leave this machine: from which address, and through which proxy."""
