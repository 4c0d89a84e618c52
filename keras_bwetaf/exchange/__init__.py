"""A live model <-> a checkpoint of `converters`."""
