"""The model lab: what a module's network can do on a machine, and what that costs."""
