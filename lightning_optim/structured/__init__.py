"""Channels that leave: coupled groups through torch-pruning, and their removal with everything that hangs on them."""
