"""How the embedded models are made from nothing."""
