"""What every operation stands on: the choice of a backend, dropout, dtypes, the extension."""
