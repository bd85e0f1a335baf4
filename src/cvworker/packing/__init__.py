"""``cvworker pack``: a checkpoint as people have it → a weights file that describes itself."""
