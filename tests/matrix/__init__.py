"""The tests on every Python that is installed, with the highest and the lowest versions of the dependencies."""
