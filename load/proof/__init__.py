"""The planner's proof: what ``cvworker plan`` predicts for 1, 2 and 4 workers, beside real runs of the same traffic.

``python -m load.proof --help`` says what it can do.
"""
