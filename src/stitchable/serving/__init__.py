"""A server that holds a latency target: cheaper stitches when requests pile up, the best one when it is quiet."""
