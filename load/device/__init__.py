"""The whole worker with a network on a device, beside the network alone and decoding alone on the same machine.

``python -m load.device`` runs it: from JPEG bytes over loopback HTTP to the callback, in the world of ``load.compare``.
"""
