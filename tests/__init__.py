"""A package, so that these tests are found before a `tests` that some other distribution has installed."""
