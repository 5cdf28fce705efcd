"""Files, hub names and loggers: what the core reads and writes through."""
