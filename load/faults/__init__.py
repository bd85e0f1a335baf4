"""The fault harness: workers against an SQS, an image host and a callback receiver that fail by seed, and a judge.

``python -m load.faults --help`` says what it can do; ``docs`` of each scenario stand in :mod:`load.faults.plans`.
"""
