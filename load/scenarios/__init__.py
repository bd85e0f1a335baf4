"""Load tests of whole workers: open-loop traffic, four scenarios, and tables that are made from the raw samples.

``python -m load.scenarios --help`` says what it can do; docs/load.md how to read it.
"""
