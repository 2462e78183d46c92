"""Models that are larger than the device, and runs that are longer than the patience of a machine.

What stands here wraps the walk over a model's blocks from outside; the algorithm does not know of it.
"""
