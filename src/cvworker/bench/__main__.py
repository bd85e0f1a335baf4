"""``python -m cvworker.bench RUNG``: the worker of one of the first four rungs, until it is ended."""

# A DataLoader process imports the module that was started, unless that is called __main__: then it stays small.
if __name__ == "__main__":
    from cvworker.bench.ladder import main

    main()
