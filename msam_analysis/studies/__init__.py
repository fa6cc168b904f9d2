"""Studies: the paper's figures and tables made again, from training to a verdict on each of its claims.

Data sets, networks and the workloads made of them, the training loop, what is recorded and measured, exhibits as data,
claims, and the words of the report live here. A study makes each run once, for all exhibits; whatever is finished is
kept. This room may import every other one but ``cli``.
"""
