"""A new process takes over from the running one, and no session is cut: the two ends of that, and what they say."""
