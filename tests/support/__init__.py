"""What the end-to-end tests are made of; imports nothing from the package under test."""
