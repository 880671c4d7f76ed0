"""What both ends of a tunnel share."""
