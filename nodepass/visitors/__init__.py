"""Which visitors a server serves, and the record of their sessions."""
