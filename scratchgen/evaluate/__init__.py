"""How good is it? A finished run measured (`metrics`, `classifier`) and reported (`reports`)."""
