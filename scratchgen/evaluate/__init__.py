"""How good is it? A finished run loaded again (`load`), measured (`metrics`, `classifier`), reported (`reports`)."""
