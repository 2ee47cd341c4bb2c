"""The evaluation of a finished run: its numbers (`metrics`, `classifier`) and their report (`reports`)."""
