"""``cvworker export`` and ``cvworker verify``: a network in another format, and whether it answers the same."""
