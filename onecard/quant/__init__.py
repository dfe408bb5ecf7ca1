"""The maths in plain torch, written to be read: the specification that every kernel must match."""
