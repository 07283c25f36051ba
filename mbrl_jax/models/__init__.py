"""Learned models of the world, usable on plain arrays without any agent or environment."""
