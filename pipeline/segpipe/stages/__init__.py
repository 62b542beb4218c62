"""The four stages; the only code that sees I/O and mathematics together."""
