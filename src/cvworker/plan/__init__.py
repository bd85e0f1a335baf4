"""How many of which machine a traffic needs, at what latency, for how much a month."""
