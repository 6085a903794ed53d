"""How a run survives: what it says while it goes, and how its results appear whole or not at all."""
