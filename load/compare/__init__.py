"""The comparison: this worker and others at the same work, in the same world, on the same machine, in turn.

``python -m load.compare`` runs it. The work is always the same: receive, download, decode at full size (or as small as
allowed), resize, crop, a model or none, callback, delete. What differs is the worker.
"""
