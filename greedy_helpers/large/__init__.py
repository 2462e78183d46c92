"""Models that are larger than the device, and runs that take longer than a machine stays up.

Blocks on the disk, committed blocks and smaller batches wrap the walk over a model's blocks from outside. Of several
processes the algorithm knows only that sums are over all of them.
"""
