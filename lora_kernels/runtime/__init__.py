"""What every operation stands on: plans, the choice of a backend, dropout, dtypes, extensions."""
