"""Where this package plugs into others. Nothing is imported until it is asked for."""
