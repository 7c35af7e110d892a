"""The networks, single-device code with parallelism as one passed object, and their weights."""
