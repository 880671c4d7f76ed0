"""What users write: addresses, settings, URLs and files, and their values."""
