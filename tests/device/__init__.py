"""A device that is not the CPU, on machines that have none: everything runs on it, and is told how often it waits."""
