"""What `make dist` releases, used as on a machine that has nothing of this project."""
