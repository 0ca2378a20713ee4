"""Jobs: what is known about them apart from where they are stored."""
