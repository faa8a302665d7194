"""The engines' containers, one module for each engine."""
