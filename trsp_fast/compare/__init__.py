"""Methods beside each other at equal tokens: what `trsp-fast compare` runs."""
