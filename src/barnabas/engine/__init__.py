"""The hot path: a source hands out deliveries, a handler turns each into a verdict, the source settles."""
