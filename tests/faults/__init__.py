"""Tests in which something outside the program breaks."""
