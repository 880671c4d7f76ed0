"""TLS: the only importers of OpenSSL and cryptography, imported only where TLS is on."""
