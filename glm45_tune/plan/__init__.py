"""Memory and time of a run before a card is touched. Pure arithmetic over config.json, a recipe and a card: no torch."""
