"""Keyed state that is committed together with the position it was read at."""
