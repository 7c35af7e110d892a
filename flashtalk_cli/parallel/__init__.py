"""How one video is made by several processes; one process is the same code with everything the identity."""
