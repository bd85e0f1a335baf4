"""``cvworker bench``: the same work by five designs, from one message at a time to this worker, on this machine."""
