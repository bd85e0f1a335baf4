"""A module over a manifest of stored images, on Ray Data: ``cvworker bulk``."""
