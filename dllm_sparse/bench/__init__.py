"""How fast it is, and how fast it could be: timing, floors, and measured runs of the public path."""
