"""The figures of the documentation come out of here."""
