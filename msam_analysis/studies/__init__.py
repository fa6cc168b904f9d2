"""Studies: workloads, a training loop, the paper's exhibits and a verdict on each of its claims."""
