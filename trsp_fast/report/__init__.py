"""How good and how fast the result is, and the page that says so."""
